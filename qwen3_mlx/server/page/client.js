// Client of the server, in OpenAI's protocol.

const KEY = "qwen3-key";

/** An error response of the server. */
export class ServerError extends Error {}

async function call(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  if (response.status === 401) {
    if (sessionStorage.getItem(KEY) !== key) return call(path, options); // given meanwhile
    const given = window.prompt("This server wants an API key:");
    if (given) {
      sessionStorage.setItem(KEY, given);
      return call(path, options);
    }
  }
  const body = await response.json().catch(() => null);
  throw new ServerError(body?.error?.message ?? `the server answers with ${response.status}`);
}

/** Return the served models. */
export async function models() {
  return (await (await call("/v1/models")).json()).data;
}

/**
 * Request a reply: calls `progress(done, total)` with tokens during prefill, and `chunk(object)` for
 * each chunk of the stream.
 */
export async function complete(request, { signal, progress, chunk }) {
  const body = { ...request, stream: true, stream_options: { include_usage: true } };
  const response = await call("/v1/chat/completions", {
    method: "POST",
    body: JSON.stringify(body),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ServerError("the connection ended before the reply did");
    const lines = (text + value).split("\n");
    text = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      const read = /^: keepalive (\d+)\/(\d+)$/.exec(line);
      if (read) progress(Number(read[1]), Number(read[2]));
      if (!line.startsWith("data: ")) continue;
      const data = JSON.parse(line.slice(6));
      if (data.error) throw new ServerError(data.error.message);
      chunk(data);
    }
  }
}

/** Return the reply to a request, as text. */
export async function ask(request) {
  const response = await call("/v1/chat/completions", { method: "POST", body: JSON.stringify(request) });
  return (await response.json()).choices[0].message.content;
}

/** Return the tools that the server was started with. */
export async function servedTools() {
  return (await (await call("/v1/mcp/tools")).json()).data;
}

/** Call a tool with arguments in JSON, as they were written, and return its result. */
export async function callTool(name, written, signal) {
  const body = `{"name": ${JSON.stringify(name)}, "arguments": ${written}}`;
  return (await (await call("/v1/mcp/call", { method: "POST", body, signal })).json()).content;
}

function inputOf(written) {
  try {
    return Object(JSON.parse(written));
  } catch {
    return {};
  }
}

/** Return a message in Anthropic's form, which counts tokens. */
function counted({ role, content, tool_calls: calls = [], tool_call_id: id }) {
  if (role === "tool") return { role: "user", content: [{ type: "tool_result", tool_use_id: id, content }] };
  const used = calls.map(({ id, function: { name, arguments: written } }) => ({ type: "tool_use", id, name, input: inputOf(written) }));
  const text = content ? [{ type: "text", text: content }] : [];
  return { role, content: used.length ? [...text, ...used] : content };
}

/** Return the number of tokens of some messages and tools for a model. */
export async function count(model, messages, tools, signal) {
  const system = messages[0]?.role === "system" ? messages[0].content : undefined;
  const body = { model, system, messages: messages.filter(({ role }) => role !== "system").map(counted) };
  body.tools = tools.map((tool) => tool.function ?? tool).map(({ parameters, ...tool }) => ({ ...tool, input_schema: parameters ?? {} }));
  const response = await call("/v1/messages/count_tokens", { method: "POST", body: JSON.stringify(body), signal });
  return (await response.json()).input_tokens;
}
