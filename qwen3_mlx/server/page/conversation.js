// A conversation is a tree of messages: an edit or another try is a sibling of the message that it
// replaces, and nothing is lost. `leaf` is the last message of the path that is shown. Each message
// is written by one tab only, so the changes of several tabs add up.

const FORMAT = "qwen3-mlx conversation"; // which `qwen3 chat` and the library write and read, too

export const newId = () => Array.from(crypto.getRandomValues(new Uint32Array(3)), (word) => word.toString(36)).join("");

/** Create an empty conversation. */
export function begin(settings) {
  return { id: newId(), name: "", updated: Date.now(), settings, nodes: {}, leaf: null };
}

/** Create a message that follows `parent`. */
export function message(parent, role, content, more = {}) {
  return { id: newId(), parent, made: Date.now(), role, content, ...more };
}

/** Add a message, and show the path to it. */
export function add(conversation, node) {
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  conversation.updated = Date.now();
  if (!conversation.name && node.role === "user") conversation.name = firstWords(node);
}

function firstWords({ content, files }) {
  return (content || files?.[0]?.name || "").slice(0, 200).replace(/\s+/g, " ").trim().slice(0, 60).trim();
}

/** Return the messages from the first one to `id`. */
export function path({ nodes, leaf }, id = leaf) {
  const made = [];
  for (let node = nodes[id]; node; node = nodes[node.parent]) made.unshift(node);
  return made;
}

/** Return the message and those that may stand in its place, in the order in which they were made. */
export function siblings({ nodes }, node) {
  return Object.values(nodes).filter((one) => one.parent === node.parent).sort(byAge);
}

const byAge = (one, other) => one.made - other.made || (one.id < other.id ? -1 : 1);

/** Return the id of the latest message below a message, or its own. */
export function latestBelow({ nodes }, id) {
  const all = Object.values(nodes).sort(byAge);
  for (let next = id; next; next = all.findLast((one) => one.parent === id)?.id) id = next;
  return id;
}

/** Return a message without the fields that only this page uses; files are a part of the text. */
function plain({ role, content, reasoning_content, tool_calls, tool_call_id, files = [] }) {
  const parts = [...files.map(({ name, text }) => `${name}:\n${fenced(text)}`), ...(content || !files.length ? [content] : [])];
  return { role, content: parts.join("\n\n"), reasoning_content, tool_calls, tool_call_id };
}

function fenced(text) {
  const longest = Math.max(2, ...(text.match(/`{3,}/g) ?? []).map((run) => run.length));
  const fence = "`".repeat(longest + 1);
  return `${fence}\n${text}${text.endsWith("\n") ? "" : "\n"}${fence}`;
}

/** Return the results that follow a reply with calls, in the order in which they came. */
export function resultsOf({ nodes }, reply) {
  const all = Object.values(nodes).filter(({ role }) => role === "tool").sort(byAge);
  const made = [];
  const next = (id) => all.findLast(({ parent }) => parent === id);
  for (let node = next(reply.id); node; node = next(node.id)) made.push(node);
  return made;
}

/** Return messages with the results of calls in the order of the calls: the model reads no ids. */
function inOrder(messages) {
  const made = [];
  for (const one of messages) {
    let at = made.length;
    if (one.role === "tool") {
      const calls = made.findLast(({ tool_calls: calls }) => calls)?.tool_calls ?? [];
      const place = ({ tool_call_id: id }) => calls.findIndex((call) => call.id === id);
      while (made[at - 1]?.role === "tool" && place(made[at - 1]) > place(one)) at -= 1;
    }
    made.splice(at, 0, one);
  }
  return made;
}

/** Return the messages for the server, up to the message `id`. */
export function prompt(conversation, id) {
  const messages = inOrder(path(conversation, id).map(plain));
  const system = conversation.settings.system ?? "";
  return system.trim() ? [{ role: "system", content: system }, ...messages] : messages;
}

/** Return a conversation for a file; `messages` are what the other programs read. */
export function exported(conversation) {
  const { name, settings, nodes, leaf } = conversation;
  return { format: FORMAT, version: 1, messages: prompt(conversation, leaf), page: { name, settings, nodes, leaf } };
}

/** Return the conversations of a file's text. Throws an error if it has none. */
export function imported(text) {
  const content = JSON.parse(text);
  const list = Array.isArray(content) ? content : [content];
  return list.map((one) => {
    if (one?.format !== FORMAT || one.version !== 1) throw new Error(`it is not a ${FORMAT} of version 1`);
    return one.page ? restored(one.page) : ofMessages(one.messages);
  });
}

function restored({ name, settings, nodes, leaf }) {
  const made = { ...begin({}), name: String(name), settings: strings(settings), leaf };
  for (const [id, node] of Object.entries(nodes)) {
    made.nodes[id] = { ...checked(settled(node)), id, parent: node.parent ?? null, made: Number(node.made) };
  }
  if ((leaf && !made.nodes[leaf]) || Object.values(made.nodes).some((node) => !isRooted(made, node))) throw new Error("its messages are incomplete");
  return made;
}

/** Return whether the messages before a message lead to a first one. */
function isRooted({ nodes }, node) {
  const seen = new Set();
  while (node?.parent && !seen.has(node.id)) {
    seen.add(node.id);
    node = nodes[node.parent];
  }
  return Boolean(node) && !node.parent;
}

function strings(settings) {
  return Object.fromEntries(Object.entries(settings ?? {}).map(([key, value]) => [key, String(value)]));
}

/** Return a conversation of a list of messages. */
export function ofMessages(messages, name = "", id = newId()) {
  const made = { ...begin({}), id, name };
  for (const one of messages.map((each) => checked(settled(each)))) {
    const { role, content, ...more } = one;
    if (role === "system") made.settings.system = content;
    else if (content || more.reasoning_content || more.tool_calls || role !== "assistant") add(made, message(made.leaf, role, content, more));
  }
  return made;
}

/** Return a message of a file as this page stores it. Throws an error if it has something else. */
function checked({ content, reasoning_content: thought, tool_calls: calls, files, ...node }) {
  if (!["system", "user", "assistant", "tool"].includes(node.role)) throw new Error("a message has no role");
  const made = { ...node, content: textOf(content) };
  if (thought) made.reasoning_content = textOf(thought);
  if (calls?.length) made.tool_calls = listOf(calls).map(callOf);
  if (files?.length) made.files = listOf(files).map(({ name, text }) => ({ name: textOf(name), text: textOf(text) }));
  return made;
}

function textOf(value) {
  if (typeof (value ?? "") !== "string") throw new Error("a message has something that is no text");
  return value ?? "";
}

function listOf(value) {
  if (!Array.isArray(value)) throw new Error("a message has something that is no list");
  return value;
}

function callOf({ id, function: { name, arguments: given = {} } = {} }) {
  const written = typeof given === "string" ? given : JSON.stringify(given);
  if (!name) throw new Error("a tool call has no name");
  return { id: textOf(id) || newId(), type: "function", function: { name: textOf(name), arguments: written } };
}

/** Return a message that no tab is writing. */
function settled({ live, state, ...node } = {}) {
  return live || state ? { ...node, state: "partial" } : node;
}

/** Return whether a conversation contains some words. */
export function contains({ name, nodes }, words) {
  const wanted = words.toLowerCase();
  return [name, ...Object.values(nodes).map(({ content }) => content)].some((text) => text.toLowerCase().includes(wanted));
}
