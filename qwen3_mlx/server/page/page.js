// The page: a conversation, the list of conversations, and the settings.

import { ServerError, complete, model } from "/page/client.js";
import { copyButton, element, markdown } from "/page/markdown.js";
import { download, load, plain, save, setting } from "/page/store.js";

const EXAMPLES = ["What is 123 + 456?", "Reverse the list: 4 8 1", "Count from 3 to 9"];
const THEMES = { "": "◐", light: "☀", dark: "☾" };
const CLOSED_BY = { budget: "its budget", end: "an early end", loop: "the loop guard", request: "request" };
const FIELDS = ["system", "mode", "budget", "temperature", "max-tokens", "tools"];
const NEAR = 80; // pixels from the end within which new text scrolls the view

const $ = (id) => document.getElementById(id);

const conversations = load();
let current = conversations[0] ?? begin();
let served = null;
let running = null; // {controller, message, view} during a reply
let warned = false;

// --- conversations ---------------------------------------------------------------------------

function begin() {
  return { id: crypto.randomUUID?.() ?? String(Math.random()), name: "", messages: [] };
}

function keep() {
  if (!conversations.includes(current) && current.messages.length) conversations.unshift(current);
  if (!current.name) current.name = firstWords(current);
  if (!save(conversations) && !warned) {
    warned = true;
    complain("This browser does not keep the conversations: its storage is full or switched off.");
  }
  showList();
}

function firstWords(conversation) {
  const words = conversation.messages.find((message) => message.role === "user")?.content ?? "";
  return words.replace(/\s+/g, " ").slice(0, 60);
}

function open(conversation) {
  stop();
  current = conversation;
  complain("");
  closeDrawer();
  showList();
  showMessages();
  $("prompt").focus();
}

function showList() {
  $("conversations").replaceChildren(...conversations.map(entry));
}

function entry(conversation) {
  const name = element("button", { className: "name", textContent: conversation.name || "…", title: conversation.name, "data-testid": "conversation" });
  name.addEventListener("click", () => open(conversation));
  const rename = element("button", { className: "more", textContent: "✎", title: "Rename", "aria-label": `Rename ${conversation.name}` });
  rename.addEventListener("click", () => {
    const given = window.prompt("Name of the conversation:", conversation.name);
    if (given?.trim()) conversation.name = given.trim();
    keep();
  });
  const remove = element("button", { className: "more", textContent: "✕", title: "Delete", "aria-label": `Delete ${conversation.name}` });
  remove.addEventListener("click", () => {
    if (!window.confirm(`Delete “${conversation.name}”?`)) return;
    conversations.splice(conversations.indexOf(conversation), 1);
    save(conversations);
    if (conversation === current) open(conversations[0] ?? begin());
    else showList();
  });
  const made = element("li", {}, name, rename, remove);
  if (conversation === current) {
    made.className = "current";
    name.setAttribute("aria-current", "true");
  }
  return made;
}

// --- messages --------------------------------------------------------------------------------

function showMessages() {
  const views = current.messages.map((message, index) => {
    if (message.role === "user") return userView(message, index);
    return message.role === "assistant" ? new ReplyView(message).node : null;
  });
  $("messages").replaceChildren(...(current.messages.length ? views.filter(Boolean) : [emptyView()]));
  toBottom();
}

function emptyView() {
  const examples = EXAMPLES.map((words) => {
    const button = element("button", { type: "button", textContent: words });
    button.addEventListener("click", () => say(words));
    return button;
  });
  return element(
    "div",
    { className: "empty" },
    element("h1", { textContent: served?.id ?? "Qwen3" }),
    element("p", { textContent: "It runs on this machine; nothing that is said here leaves it." }),
    element("div", { className: "examples" }, ...examples),
  );
}

function userView(message, index) {
  const words = element("div", { className: "words", textContent: message.content });
  const edit = element("button", { type: "button", textContent: "Edit", "data-testid": "edit" });
  const actions = element("div", { className: "actions" }, edit);
  const made = element("div", { className: "message user", "data-testid": "message-user" }, words, actions);
  edit.addEventListener("click", () => {
    const field = element("textarea", { value: message.content, "aria-label": "Your message" });
    const send = element("button", { type: "button", textContent: "Send" });
    const leave = element("button", { type: "button", textContent: "Leave it" });
    const done = () => {
      if (!field.value.trim()) return;
      stop();
      current.messages.splice(index);
      say(field.value);
    };
    send.addEventListener("click", done);
    leave.addEventListener("click", () => made.replaceWith(userView(message, index)));
    field.addEventListener("keydown", (event) => onEnter(event, done));
    made.replaceChildren(field, element("div", { className: "actions" }, send, leave));
    field.focus();
  });
  return made;
}

/** Shows a reply, during the stream and after it. */
class ReplyView {
  constructor(message) {
    this.message = message;
    this.summary = element("summary");
    this.thought = element("div", { className: "thought" });
    this.thinking = element("details", { className: "thinking", "data-testid": "thinking" }, this.summary, this.thought);
    this.answer = element("div", { className: "answer", "data-testid": "answer" });
    this.calls = element("div");
    this.actions = element("div", { className: "actions" });
    this.node = element("div", { className: "message", "data-testid": "message-assistant" }, this.thinking, this.answer, this.calls, this.actions);
    this.shown = {};
    this.show();
  }

  /** Update the parts that have changed. */
  show() {
    const { reasoning_content: thought = "", content, thoughtFor, live } = this.message;
    this.thinking.hidden = !thought;
    if (this.thinking.open || !live) this.set("thought", thought, (text) => (this.thought.textContent = text));
    const tokens = this.message.thoughtTokens ? ` · ${this.message.thoughtTokens} tokens` : "";
    const seconds = ((thoughtFor ?? 0) / 1000).toFixed(live && !content ? 0 : 1);
    this.summary.textContent = live && !content ? `Thinking… ${seconds} s` : `Thought for ${seconds} s${tokens}`;
    this.set("content", content, (text) => this.answer.replaceChildren(...markdown(text)));
    if (!live) this.finish();
  }

  set(name, value, write) {
    if (this.shown[name] === value) return;
    this.shown[name] = value;
    write(value);
  }

  finish() {
    this.calls.replaceChildren(...(this.message.tool_calls ?? []).map(callView));
    const retry = element("button", { type: "button", textContent: "Retry", "data-testid": "retry" });
    retry.addEventListener("click", () => {
      stop();
      current.messages.splice(current.messages.indexOf(this.message));
      showMessages();
      reply();
    });
    const copy = copyButton(() => this.message.content, { "data-testid": "copy" });
    const stats = element("span", { textContent: this.message.stats ?? "", "data-testid": "stats" });
    this.actions.replaceChildren(copy, retry, stats);
  }
}

function callView(call) {
  const made = element(
    "div",
    { className: "call", "data-testid": "tool-call" },
    element("strong", { textContent: call.function.name }),
    element("pre", { textContent: pretty(call.function.arguments) }),
  );
  const answer = current.messages.find((message) => message.tool_call_id === call.id);
  if (answer) {
    made.append(element("pre", { textContent: `→ ${answer.content}` }));
    return made;
  }
  const result = element("input", { placeholder: "What the tool gives", "aria-label": `Result of ${call.function.name}`, "data-testid": "tool-result" });
  const form = element("form", {}, result, element("button", { textContent: "Give", "data-testid": "tool-send" }));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    current.messages.push({ role: "tool", tool_call_id: call.id, content: result.value });
    form.replaceWith(element("pre", { textContent: `→ ${result.value}` }));
    keep();
    const asked = current.messages.findLast((message) => message.tool_calls)?.tool_calls ?? [];
    if (asked.every((one) => current.messages.some((message) => message.tool_call_id === one.id))) reply();
  });
  made.append(form);
  return made;
}

function pretty(text) {
  const value = parsed(text);
  return value ? JSON.stringify(value, null, 2) : text;
}

/** Return the value of JSON text, or undefined if the text is cut off. */
function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

// --- requests --------------------------------------------------------------------------------

function say(words) {
  if (running || !words.trim()) return;
  current.messages.push({ role: "user", content: words });
  showMessages();
  reply();
}

async function reply() {
  let request;
  try {
    request = asked();
  } catch (error) {
    return complain(error.message);
  }
  complain("");
  const message = { role: "assistant", content: "", live: true };
  current.messages.push(message);
  const turn = { controller: new AbortController(), message, view: new ReplyView(message), conversation: current, started: performance.now() };
  running = turn;
  $("messages").append(turn.view.node);
  setBusy(true);
  keep();
  const timer = setInterval(() => draw(turn), 250); // updates the seconds of thinking between chunks
  try {
    await complete(request, { signal: turn.controller.signal, progress: showProgress, chunk: (chunk) => take(turn, chunk) });
    message.stats = statsOf(turn);
  } catch (error) {
    if (error.name === "AbortError") message.stats = "stopped";
    else complain(error instanceof ServerError ? error.message : `The server cannot be reached: ${error.message}`);
  } finally {
    clearInterval(timer);
    end(turn);
  }
}

/** Return the request, or throw an error that names the invalid setting. */
function asked() {
  const messages = plain(current);
  if ($("system").value.trim()) messages.unshift({ role: "system", content: $("system").value });
  const request = { model: served?.id, messages };
  if ($("mode").value) request.enable_thinking = $("mode").value === "on";
  if ($("mode").value !== "off") request.thinking_budget = number("budget");
  request.temperature = number("temperature");
  request.max_tokens = number("max-tokens");
  if ($("tools").value.trim()) request.tools = tools();
  return request;
}

function number(id) {
  const field = $(id);
  if (!field.checkValidity()) throw new Error(`${field.labels[0].firstChild.textContent.trim()}: ${field.validationMessage}`);
  return field.value === "" ? undefined : Number(field.value);
}

function tools() {
  let made;
  try {
    made = JSON.parse($("tools").value);
  } catch (error) {
    throw new Error(`The tools are not JSON: ${error.message}`);
  }
  if (!Array.isArray(made)) throw new Error("The tools must be a list: [{…}]");
  return made;
}

function take(turn, { choices, usage, timings }) {
  const message = turn.message;
  if (usage) Object.assign(turn, { usage, timings });
  for (const { delta, finish_reason: reason, finish_details: details } of choices) {
    if (delta.reasoning_content) {
      turn.thinkingSince ??= performance.now();
      message.reasoning_content = (message.reasoning_content ?? "") + delta.reasoning_content;
    }
    if (delta.content) message.content += delta.content;
    for (const part of delta.tool_calls ?? []) addCall(message, part);
    if (reason) Object.assign(turn, { reason, details });
    if ((delta.content || delta.tool_calls || reason) && turn.thinkingSince) turn.thoughtUntil ??= performance.now();
  }
  $("progress").hidden = true;
  turn.frame ??= requestAnimationFrame(() => draw(turn));
}

function addCall(message, { index, id, function: part }) {
  message.tool_calls ??= [];
  const call = (message.tool_calls[index] ??= { id, type: "function", function: { name: "", arguments: "" } });
  call.function.name += part.name ?? "";
  call.function.arguments += part.arguments ?? "";
}

function draw(turn) {
  turn.frame = undefined;
  const follow = atBottom();
  if (turn.thinkingSince) turn.message.thoughtFor = (turn.thoughtUntil ?? performance.now()) - turn.thinkingSince;
  turn.view.show();
  if (follow) toBottom();
}

/** Convert tool calls that were cut off to text: they cannot be run. */
function settleCalls(message) {
  message.tool_calls = message.tool_calls?.filter(({ function: { name, arguments: written } }) => {
    if (parsed(written)) return true;
    message.content += `${name}(${written}`;
    return false;
  });
  if (!message.tool_calls?.length) delete message.tool_calls;
}

function end(turn) {
  const message = turn.message;
  delete message.live;
  settleCalls(message);
  cancelAnimationFrame(turn.frame);
  if (turn.usage) message.thoughtTokens = turn.usage.completion_tokens_details.reasoning_tokens;
  if (running === turn) {
    running = null;
    setBusy(false);
  }
  if (!message.content && !message.reasoning_content && !message.tool_calls) {
    turn.conversation.messages.splice(turn.conversation.messages.indexOf(message), 1);
    turn.view.node.remove();
  } else {
    draw(turn);
  }
  keep();
  $("state").textContent = message.stats ? `The reply is complete: ${message.stats}` : "The reply has ended.";
}

function statsOf({ usage, timings, reason, details = {} }) {
  if (!usage) return "";
  const cached = usage.prompt_tokens_details.cached_tokens;
  const parts = [
    `${usage.prompt_tokens} tokens in${cached ? ` (${cached} known)` : ""}`,
    `${usage.completion_tokens} out`,
    `${timings.predicted_per_second.toFixed(1)} tokens/s`,
  ];
  if (details.forward_passes) parts.push(`${details.forward_passes} passes`);
  if (reason === "length") parts.push("cut off at the token limit");
  if (details.thinking_closed_by) parts.push(`thinking closed by ${CLOSED_BY[details.thinking_closed_by]}`);
  if (details.ended_by) parts.push("ended by the loop guard");
  if (details.warning) parts.push(details.warning);
  return parts.join(" · ");
}

function stop() {
  running?.controller.abort();
}

// --- the rest of the page --------------------------------------------------------------------

function complain(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

function showProgress(done, total) {
  $("progress").hidden = done >= total;
  $("progress").firstElementChild.style.width = `${(100 * done) / Math.max(total, 1)}%`;
  $("progress").setAttribute("aria-valuenow", String(Math.round((100 * done) / Math.max(total, 1))));
}

function setBusy(busy) {
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("progress").hidden = true;
  if (busy) $("state").textContent = "The reply is coming.";
}

function atBottom() {
  const { scrollTop, scrollHeight, clientHeight } = $("messages");
  return scrollHeight - scrollTop - clientHeight < NEAR;
}

function toBottom() {
  $("messages").scrollTop = $("messages").scrollHeight;
}

function onEnter(event, act) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  act();
}

function send() {
  const field = $("prompt");
  if (running || !field.value.trim()) return;
  const words = field.value;
  field.value = "";
  grow(field);
  say(words);
}

function grow(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

function toggleSettings() {
  $("settings").hidden = !$("settings").hidden;
  $("open-settings").setAttribute("aria-expanded", String(!$("settings").hidden));
}

function closeDrawer() {
  $("drawer").classList.remove("open");
  $("menu").setAttribute("aria-expanded", "false");
}

function setTheme(name) {
  if (name) document.documentElement.dataset.theme = name;
  else delete document.documentElement.dataset.theme;
  $("theme").textContent = THEMES[name];
  $("theme").title = `Colours: ${name || "as the system has them"}`;
  setting("theme", name);
}

function nextTheme() {
  const names = Object.keys(THEMES);
  setTheme(names[(names.indexOf(document.documentElement.dataset.theme ?? "") + 1) % names.length]);
}

function wire() {
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("prompt").addEventListener("keydown", (event) => onEnter(event, send));
  $("prompt").addEventListener("input", () => grow($("prompt")));
  $("settings").addEventListener("submit", (event) => event.preventDefault());
  $("stop").addEventListener("click", stop);
  $("new").addEventListener("click", () => open(begin()));
  $("export").addEventListener("click", () => download(current));
  $("theme").addEventListener("click", nextTheme);
  $("open-settings").addEventListener("click", toggleSettings);
  $("menu").addEventListener("click", () => {
    const shown = $("drawer").classList.toggle("open");
    $("menu").setAttribute("aria-expanded", String(shown));
  });
  $("messages").addEventListener("click", closeDrawer);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      stop();
      closeDrawer();
    } else if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      open(begin());
    }
  });
  for (const id of FIELDS) {
    $(id).value = setting(id);
    $(id).addEventListener("change", () => setting(id, $(id).value));
  }
}

async function start() {
  wire();
  setTheme(setting("theme") in THEMES ? setting("theme") : "");
  open(current);
  try {
    served = await model();
  } catch (error) {
    return complain(`The server cannot be reached: ${error.message}`);
  }
  $("model").textContent = served.id;
  document.title = served.id;
  if (served.thinking !== "hybrid") {
    $("mode").disabled = true;
    $("mode").value = "";
    $("budget").disabled = served.thinking === "never";
  }
  if (!current.messages.length) showMessages();
}

start();
