// Tools of MCP servers: the page offers them to the model, and asks before each call.

import { callTool, servedTools } from "/page/client.js";
import { path } from "/page/conversation.js";
import { button, element } from "/page/dom.js";
import { parsed } from "/page/turn.js";

const MAX_STEPS = 25; // replies to one message that call tools without a question
const HIDDEN = /[^\P{C}\n]|[\p{Zl}\p{Zp}]/gu; // what could hide or reorder a part of the arguments

const served = new Map(); // {type, server, function} by name
const always = new Set(); // names of tools that need no question, until the page is loaded again
const running = new Map(); // AbortControllers, by the ids of the calls

/** Read the tools from the server; return what they are called, by server. */
export async function loadTools() {
  const names = new Map();
  for (const tool of await servedTools()) {
    served.set(tool.function.name, tool);
    names.set(tool.server, [...(names.get(tool.server) ?? []), tool.function.name]);
  }
  return names;
}

/** Return the tools for a request, without those that are called like one of its own. */
export function offered(own) {
  const taken = new Set(own.map((tool) => (tool.function ?? tool).name));
  return [...served.values()].filter((tool) => !taken.has(tool.function.name)).map(({ type, function: described }) => ({ type, function: described }));
}

/** Return how a call is made: "running", "served", or "by hand". */
export function stateOf({ id, function: { name } }) {
  return running.has(id) ? "running" : served.has(name) ? "served" : "by hand";
}

/** Allow all calls of a tool. */
export const allow = (name) => always.add(name);

/** Return the calls of a reply that may be made without a question. */
export function allowedCalls(conversation, reply) {
  const shown = path(conversation, reply.id);
  const asked = shown.slice(shown.findLastIndex(({ role }) => role === "user")).filter(({ tool_calls: calls }) => calls);
  if (asked.length > MAX_STEPS) return [];
  return reply.tool_calls.filter((call) => stateOf(call) === "served" && always.has(call.function.name));
}

/** Make a call and return its result. Throws an AbortError if it is stopped. */
export async function make({ id, function: { name, arguments: written } }) {
  const controller = new AbortController();
  running.set(id, controller);
  try {
    return await callTool(name, parsed(written), controller.signal);
  } finally {
    running.delete(id);
  }
}

/** Show a call with its result, or with what can be done; `actions` are undefined if nothing can. */
export function callView(call, answer, actions) {
  const { name, arguments: written } = call.function;
  const server = served.get(name)?.server;
  const made = element(
    "div",
    { className: "call", "data-testid": "tool-call" },
    element("strong", { textContent: server ? `${server}: ${name}` : name }),
    element("pre", { textContent: printable(pretty(written)) }),
  );
  if (answer) made.append(element("pre", { className: "result", textContent: `→ ${answer.content}` }));
  else if (actions) made.append(CHOICES[stateOf(call)](call, actions));
  return made;
}

const CHOICES = {
  running: ({ id }) => element("div", { className: "row small" }, "It is called…", button("Stop", () => running.get(id)?.abort(), { "data-testid": "tool-stop" })),
  served: (call, actions) =>
    element(
      "div",
      { className: "row" },
      button("Allow once", () => actions.call(call), { "data-testid": "tool-once" }),
      button("Always allow", () => actions.callAlways(call), { "data-testid": "tool-always", title: `Call ${call.function.name} without asking until the page is loaded again` }),
      button("Decline", () => actions.give(call, "Error: the user declined this call"), { "data-testid": "tool-decline" }),
    ),
  "by hand": (call, actions) => {
    const result = element("input", { placeholder: "What the tool gives", "aria-label": `Result of ${call.function.name}`, "data-testid": "tool-result" });
    const form = element("form", { className: "row" }, result, element("button", { textContent: "Give", "data-testid": "tool-send" }));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      actions.give(call, result.value);
    });
    return form;
  },
};

function pretty(text) {
  const value = parsed(text);
  return value ? JSON.stringify(value, null, 2) : text;
}

const printable = (text) => text.replace(HIDDEN, (found) => [...Array(found.length).keys()].map((at) => `\\u${found.charCodeAt(at).toString(16).padStart(4, "0")}`).join(""));
