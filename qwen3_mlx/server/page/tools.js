// Tools of MCP servers: the page offers them to the model, and asks before each call.

import { callTool, servedTools } from "/page/client.js";
import { newId, path } from "/page/conversation.js";
import { button, element } from "/page/dom.js";
import { announce, conversations, isAnnounced } from "/page/store.js";
import { parsed } from "/page/turn.js";

const MAX_STEPS = 25; // replies to one message that call tools without a question
const MAX_CALLS = 3; // at once: a browser has six connections to a server, which other requests need
const ANNOUNCE_EVERY = 2000; // milliseconds
// What could hide or reorder a part of the arguments: it is shown as JSON's escapes.
const HIDDEN = /[^\P{C}\n]|(?! )\p{Z}|\p{Default_Ignorable_Code_Point}|\u2800/gu;
const NUMBER = /"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*/g; // in JSON, beside strings
const MARK = newId();

const served = new Map(); // {type, server, function} by name
const always = new Set(); // names of tools that need no question, until the page is loaded again
const running = new Map(); // AbortControllers, by the ids of the calls
const waiting = []; // calls that begin when others have ended

/** Read the tools from the server; return what they are called, by server. */
export async function loadTools() {
  const names = new Map();
  for (const tool of await servedTools()) {
    served.set(tool.function.name, tool);
    names.set(tool.server, [...(names.get(tool.server) ?? []), tool.function.name]);
  }
  return names;
}

/** Return the tools for a request with some settings. Throws an error if its own are not right. */
export function toolsOf(settings) {
  const own = ownTools(settings.tools);
  if (settings["served-tools"] === "off") return own;
  const taken = new Set(own.map(nameOf));
  const others = [...served.values()].filter((tool) => !taken.has(nameOf(tool)));
  return [...own, ...others.map(({ type, function: described }) => ({ type, function: described }))];
}

const nameOf = (tool) => (tool?.function ?? tool)?.name;

function ownTools(text) {
  let own;
  try {
    own = JSON.parse(text?.trim() || "[]");
  } catch (error) {
    throw new Error(`The tools are not JSON: ${error.message}`);
  }
  if (!Array.isArray(own)) throw new Error("The tools must be a list: [{…}]");
  if (!own.every(nameOf)) throw new Error("Each of the tools needs a name.");
  return own;
}

/** Return how a call is made: "running", "elsewhere" (by another tab), "served" or "by hand". */
export function stateOf({ id, function: { name } }, settings) {
  if (running.has(id)) return "running";
  if (isAnnounced(id)) return "elsewhere";
  return isServed(name, settings) ? "served" : "by hand";
}

function isServed(name, settings) {
  if (!served.has(name) || settings["served-tools"] === "off") return false;
  try {
    return !ownTools(settings.tools).some((tool) => nameOf(tool) === name);
  } catch {
    return true; // the request had other tools than what stands there now
  }
}

const callsIn = ({ nodes }) => Object.values(nodes).flatMap(({ tool_calls: calls = [] }) => calls);

/** Return whether a call of a conversation is being made. */
export function isCalling(conversation) {
  const answered = new Set(Object.values(conversation.nodes).map((one) => one.tool_call_id));
  return callsIn(conversation).some(({ id }) => running.has(id) || (isAnnounced(id) && !answered.has(id)));
}

/** Stop the calls of a conversation. */
export function stopCalls(conversation) {
  for (const { id } of callsIn(conversation)) running.get(id)?.abort();
}

/** Allow all calls of a tool. */
export const allow = (name) => always.add(name);

/** Return the calls of a reply that may be made without a question. */
export function allowedCalls({ settings }, reply) {
  return reply.tool_calls.filter((call) => stateOf(call, settings) === "served" && always.has(call.function.name));
}

/** Return whether so many replies have called tools that each further call is asked for. */
export function isLimited(conversation, reply) {
  const shown = path(conversation, reply.id);
  const asked = shown.slice(shown.findLastIndex(({ role }) => role === "user")).filter(({ tool_calls: calls }) => calls);
  return asked.length > MAX_STEPS;
}

/** Make a call of a conversation and return its result. Throws an AbortError if it is stopped. */
export async function make(conversation, { id, function: { name, arguments: written } }) {
  const given = parsed(written);
  if (typeof given !== "object" || !given || Array.isArray(given)) return "Error: the arguments must be an object";
  const controller = new AbortController();
  running.set(id, controller);
  const beat = () => (conversations.has(conversation) ? announce(conversation, { id }) : controller.abort());
  const heart = setInterval(beat, ANNOUNCE_EVERY);
  beat();
  try {
    if (running.size - waiting.length > MAX_CALLS) await turn(controller.signal);
    try {
      return await callTool(name, written, controller.signal);
    } finally {
      waiting.shift()?.();
    }
  } finally {
    clearInterval(heart);
    running.delete(id);
  }
}

/** Wait for another call to end. Throws an AbortError if the signal comes first. */
function turn(signal) {
  return new Promise((resolve, reject) => {
    waiting.push(resolve);
    signal.addEventListener("abort", () => {
      const place = waiting.indexOf(resolve);
      if (place >= 0) waiting.splice(place, 1);
      reject(signal.reason);
    });
  });
}

/** Show a call with its result, or with what can be done; `actions` are undefined if nothing can. */
export function callView(call, answer, settings, actions) {
  const { name, arguments: written } = call.function;
  const state = stateOf(call, settings);
  const server = state !== "by hand" && served.get(name)?.server;
  const made = element(
    "div",
    { className: "call", "data-testid": "tool-call" },
    element("strong", { textContent: printable(server ? `${server}: ${name}` : name) }),
    element("pre", { textContent: printable(pretty(written)) }),
  );
  if (answer) made.append(element("pre", { className: "result", textContent: `→ ${answer.content}` }));
  else if (state === "running") made.append(CHOICES.running(call));
  else if (actions) made.append(CHOICES[state](call, actions));
  return made;
}

const CHOICES = {
  running: ({ id }) => element("div", { className: "row small" }, "It is called…", button("Stop", () => running.get(id)?.abort(), { "data-testid": "tool-stop" })),
  elsewhere: () => element("div", { className: "small", textContent: "Another tab calls it." }),
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

/** Return JSON with its lines indented, and its numbers as they were written. */
function pretty(text) {
  const marked = text.replace(NUMBER, (found) => (found[0] === '"' ? found : `"${MARK}${found}"`));
  const value = parsed(marked);
  return value === undefined ? text : JSON.stringify(value, null, 2).replaceAll(new RegExp(`"${MARK}([^"]*)"`, "g"), "$1");
}

const printable = (text) => text.replace(HIDDEN, (found) => [...Array(found.length).keys()].map((at) => `\\u${found.charCodeAt(at).toString(16).padStart(4, "0")}`).join(""));
