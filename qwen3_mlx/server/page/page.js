// The page: the list of conversations, the one that is shown, and its settings.

import { attached, isReading, onAttach, takeFiles, wireFiles } from "/page/attach.js";
import { ask, count, models } from "/page/client.js";
import { begin, contains, exported, imported, latestBelow, message, path, prompt, resultsOf } from "/page/conversation.js";
import { $, button, complain, element, onEnter } from "/page/dom.js";
import { conversations, download, isLiveElsewhere, open as openStore, remove, setting, typing, update } from "/page/store.js";
import { allow, allowedCalls, isCalling, isLimited, loadTools, make, stateOf, stopCalls, toolsOf } from "/page/tools.js";
import { Turn, leaveAll, store, turnOf } from "/page/turn.js";
import { ReplyView, UserView, reconcile } from "/page/view.js";

// What a toy of a few hundred tokens of vocabulary can do, and what other models can.
const TOY_EXAMPLES = ["What is 123 + 456?", "Reverse the list: 4 8 1", "Count: apple pear plum"];
const EXAMPLES = ["Explain how a bicycle stays upright", "Write a Python function that finds duplicate files", "Compare green and black tea in a table"];
const TOY_VOCABULARY = 10_000;
// What is served instead of a chat, by the kind of the model.
const NO_CHAT = {
  embedding: "This is an embedding model: it computes vectors of texts (POST /v1/embeddings) and does not chat.",
  reranker: "This is a reranker: it scores documents for a query (POST /v1/rerank) and does not chat.",
};
const THEMES = { "": "◐", light: "☀", dark: "☾" };
const FIELDS = ["system", "mode", "budget", "temperature", "top-p", "max-tokens", "tools", "served-tools"];
const NEAR = 80; // pixels from the end within which new text scrolls the view
const MEASURED = 10_000; // characters of a message that is typed; more of them fill the field
const COUNT_AFTER = 300; // milliseconds without a key
const TITLE = "Write a title for this conversation, of at most six words. Answer with the title alone.";

let draft = null; // a conversation that has no message yet, and is not stored
let shown = null; // id of the conversation that is shown
let served = null;
let unkept = ""; // why the browser does not keep the conversations
let frame = 0;
let isListed = false; // whether the list shows the conversations as they are
const views = new Map(); // of the messages that are shown, by their ids
const entries = new Map(); // of the list, by the ids of the conversations
const troubles = new Map(); // errors, by the ids of the conversations

const current = () => conversations.get(shown) ?? (draft?.id === shown ? draft : undefined);

// --- conversations ---------------------------------------------------------------------------

function blank() {
  draft = begin(Object.fromEntries(FIELDS.map((name) => [name, setting(name)])));
  return draft.id;
}

function open(id) {
  shown = id;
  isListed = false;
  views.clear();
  $("messages").replaceChildren();
  closeDrawer();
  show();
  toBottom();
  $("prompt").focus();
  recount();
}

/** Show what has changed, with the next frame. */
function changed() {
  isListed = false;
  grown();
}

/** Show what has come of a reply, with the next frame: the list stays as it is. */
function grown() {
  frame ||= requestAnimationFrame(show);
}

function show() {
  cancelAnimationFrame(frame);
  frame = 0;
  if (!current()) shown = newest()[0]?.id ?? blank(); // it was deleted
  const follow = atBottom();
  if (!isListed) showList();
  showMessages();
  showState();
  if (follow) toBottom();
}

const newest = () => [...conversations.values()].sort((one, other) => other.updated - one.updated);

function showList() {
  isListed = true;
  const words = $("search").value.trim();
  const found = newest().filter((one) => !words || contains(one, words));
  reconcile($("conversations"), found.map(entry));
  $("nothing-found").hidden = !words || found.length > 0;
}

function entry({ id, name }) {
  if (!entries.has(id)) entries.set(id, newEntry(id));
  const made = entries.get(id);
  const [opens, renames, removes] = made.children;
  Object.assign(opens, { textContent: name || "…", title: name });
  renames.ariaLabel = `Rename ${name}`;
  removes.ariaLabel = `Delete ${name}`;
  made.className = id === shown ? "current" : "";
  if (id === shown) opens.setAttribute("aria-current", "true");
  else opens.removeAttribute("aria-current");
  return made;
}

function newEntry(id) {
  const askName = () => rename(id, window.prompt("Name of the conversation:", conversations.get(id).name));
  const drop = () => {
    if (!window.confirm(`Delete “${conversations.get(id).name}”?`)) return;
    turnOf(id)?.stop();
    stopCalls(conversations.get(id));
    remove(id);
  };
  return element(
    "li",
    {},
    button("", () => open(id), { className: "name", "data-testid": "conversation" }),
    button("✎", askName, { className: "more", title: "Rename" }),
    button("✕", drop, { className: "more", title: "Delete" }),
  );
}

function rename(id, given) {
  const name = given?.trim();
  if (name) update(id, (record) => (record.name = name));
}

async function importFiles(files) {
  for (const file of files) {
    try {
      const made = imported(await file.text());
      const known = new Set([...conversations.values()].flatMap(({ nodes }) => Object.keys(nodes)));
      const added = made.filter(({ nodes }) => Object.keys(nodes).some((id) => !known.has(id)));
      for (const one of added) update(one.id, () => {}, { created: one });
      open(added.at(-1)?.id ?? shown);
      if (added.length < made.length) complain(`${file.name}: ${made.length - added.length} of ${made.length} conversations are here already`);
    } catch (error) {
      complain(`${file.name} cannot be imported: ${error.message}`);
    }
  }
}

async function suggestTitle() {
  const { id } = current();
  const thinking = { hybrid: { enable_thinking: false }, always: { thinking_budget: 0 } }[served.thinking];
  $("suggest").disabled = true;
  try {
    const messages = [...prompt(current()), { role: "user", content: TITLE }];
    const given = await ask({ model: served.id, messages, max_tokens: 64, ...thinking });
    rename(id, given.trim().split("\n")[0].replace(/^["“*#\s]+|["”*.\s]+$/g, "").slice(0, 80));
  } catch (error) {
    complain(error.message);
  }
  $("suggest").disabled = false;
}

// --- messages --------------------------------------------------------------------------------

function showMessages() {
  const conversation = current();
  const messages = path(conversation);
  if (!messages.length) return $("messages").replaceChildren(emptyView());
  const turn = turnOf(conversation.id);
  const nodes = messages.filter(({ role }) => role === "user" || role === "assistant").map((one) => {
    if (!views.has(one.id)) views.set(one.id, one.role === "user" ? new UserView(ACTIONS) : new ReplyView(ACTIONS));
    const view = views.get(one.id);
    view.update(conversation, one, { turn, path: messages, isLast: one === messages.at(-1) });
    return view.node;
  });
  reconcile($("messages"), nodes);
}

function emptyView() {
  const noChat = NO_CHAT[served?.kind];
  const examples = noChat ? [] : served?.vocab_size < TOY_VOCABULARY ? TOY_EXAMPLES : EXAMPLES;
  return element(
    "div",
    { className: "empty" },
    element("h1", { textContent: served?.id ?? "Qwen3" }),
    element("p", { textContent: noChat ?? "It runs on this machine; nothing that is said here leaves it." }),
    element("div", { className: "examples" }, ...examples.map((words) => button(words, () => say(words)))),
  );
}

/** Show what runs, and what went wrong. */
function showState() {
  const conversation = current();
  const turn = turnOf(conversation.id);
  const [done, total] = turn?.progress ?? [0, 0];
  $("progress").hidden = done >= total;
  $("progress").firstElementChild.style.width = `${(100 * done) / Math.max(total, 1)}%`;
  $("progress").setAttribute("aria-valuenow", String(Math.round((100 * done) / Math.max(total, 1))));
  $("send").hidden = Boolean(turn);
  $("stop").hidden = !turn;
  $("answer-now").hidden = !turn?.thinks;
  const trouble = troubles.get(conversation.id);
  if (trouble) complain(trouble);
  for (const name of FIELDS) {
    if (document.activeElement !== $(name)) $(name).value = conversation.settings[name] ?? "";
  }
  if (document.activeElement !== $("title")) $("title").value = conversation.name;
  $("suggest").disabled = $("title").disabled = !conversations.has(conversation.id);
}

// --- requests --------------------------------------------------------------------------------

const ACTIONS = {
  reply,
  edit: ({ parent, files }, words) => sayAfter(parent, words, files),
  open({ id, parent }) {
    // A reply without text is not stored yet: its question stands for it.
    update(shown, (record) => (record.leaf = record.nodes[id] ? latestBelow(record, id) : parent));
  },
  giveResult(asking, call, text) {
    const options = request();
    if (options) giveResult(shown, asking, call, text, options);
  },
  call(asking, call) {
    const options = request();
    if (options) makeCall(shown, asking, call, options);
  },
  callAlways(asking, call) {
    const options = request();
    if (!options) return;
    allow(call.function.name);
    makeCall(shown, asking, call, options);
    makeAllowed(shown, asking, options);
  },
};

/** Make the calls of a reply that need no question. */
function makeAllowed(id, asking, options) {
  const conversation = conversations.get(id);
  const answered = new Set(resultsOf(conversation, asking).map((one) => one.tool_call_id));
  const calls = allowedCalls(conversation, asking).filter((call) => !answered.has(call.id));
  if (!isLimited(conversation, asking)) for (const call of calls) makeCall(id, asking, call, options);
  else if (calls.length) troubles.set(id, "The model goes on calling tools: from here on each call is asked for.");
}

async function makeCall(id, asking, call, options) {
  if (stateOf(call, conversations.get(id).settings) !== "served") return; // a second click
  troubles.delete(id);
  try {
    const making = make(id, call);
    changed();
    const result = await making;
    giveResult(id, asking, call, result, options);
  } catch (error) {
    if (error.name !== "AbortError") troubles.set(id, error.message);
  }
  changed();
}

/** Store the result of a call; the last one of a reply is followed by the next reply. */
function giveResult(id, asking, call, text, options) {
  const conversation = conversations.get(id);
  const results = conversation ? resultsOf(conversation, asking) : [];
  if (!conversation || results.some((one) => one.tool_call_id === call.id)) return;
  const node = message((results.at(-1) ?? asking).id, "tool", text, { tool_call_id: call.id });
  store(conversation, node);
  if (results.length + 1 === asking.tool_calls.length && conversation.leaf === node.id) start(node.id, options, conversation);
}

function say(words, files) {
  if (isCalling(current())) complain("A tool is being called: wait for its result, or stop it.");
  return !turnOf(shown) && !messageElsewhere() && !isCalling(current()) && sayAfter(current().leaf, words, files);
}

function messageElsewhere() {
  const last = current().nodes[current().leaf];
  return Boolean(last) && isLiveElsewhere(last);
}

/** Add a message after another, and request the reply; return whether the settings allow that. */
function sayAfter(parent, words, files) {
  const options = request();
  if (!options) return false;
  turnOf(shown)?.stop();
  const node = message(parent, "user", words, files?.length ? { files } : {});
  store(current(), node);
  draft = null;
  start(node.id, options);
  toBottom();
  return true;
}

/** Request a reply to a message, or more of a reply that was cut off. */
function reply(id) {
  const options = request();
  if (options) start(id, options);
}

function start(id, options, conversation = current()) {
  turnOf(conversation.id)?.stop();
  troubles.delete(conversation.id);
  if (conversation.id === shown) complain(unkept);
  if (conversation.leaf !== id) update(conversation.id, (record) => (record.leaf = id));
  const turn = new Turn(conversation, id, options, grown);
  $("state").textContent = "The reply is coming.";
  const timer = setInterval(grown, 250); // updates the seconds of thinking between chunks
  turn.ended.then(() => {
    clearInterval(timer);
    if (turn.error) troubles.set(turn.id, turn.error);
    else if (served.thinking === null) learn();
    changed();
    if (turn.node.tool_calls && !turn.node.state && conversations.has(turn.id)) makeAllowed(turn.id, turn.node, turn.options);
    if (turn.id === shown) $("state").textContent = `The reply has ended: ${turn.node.stats || "complete"}`;
  });
  show();
}

/** Return the options of a request, or show what is wrong with them and return nothing. */
function request() {
  try {
    return checkedRequest();
  } catch (error) {
    complain(error.message);
    return null;
  }
}

function checkedRequest() {
  if (!served) throw new Error("The server has not answered yet: try again.");
  const made = { model: served.id };
  if ($("mode").value) made.enable_thinking = $("mode").value === "on";
  if ($("mode").value !== "off") made.thinking_budget = number("budget");
  made.temperature = number("temperature");
  made.top_p = number("top-p");
  made.max_tokens = number("max-tokens");
  const tools = toolsOf({ tools: $("tools").value, "served-tools": $("served-tools").value });
  if (tools.length) made.tools = tools;
  return made;
}

function number(id) {
  const field = $(id);
  if (!field.checkValidity()) throw new Error(`${field.labels[0].firstChild.textContent.trim()}: ${field.validationMessage}`);
  return field.value === "" ? undefined : Number(field.value);
}

/** Close the thinking: the reply goes on with a budget of nothing. */
function answerNow() {
  const turn = turnOf(shown);
  const options = request();
  if (!turn?.thinks || !options) return;
  turn.stop();
  start(turn.node.id, { ...options, thinking_budget: 0 });
}

// --- the rest of the page --------------------------------------------------------------------

function atBottom() {
  const { scrollTop, scrollHeight, clientHeight } = $("messages");
  return scrollHeight - scrollTop - clientHeight < NEAR;
}

function toBottom() {
  $("messages").scrollTop = $("messages").scrollHeight;
}

function send() {
  const field = $("prompt");
  const files = attached();
  if (isReading() || (!field.value.trim() && !files.length)) return;
  if (!say(field.value, files)) return;
  field.value = "";
  takeFiles();
  typed();
}

function typed() {
  const field = $("prompt");
  field.style.height = field.value.length > MEASURED ? "40vh" : "auto";
  if (field.value.length <= MEASURED) field.style.height = `${field.scrollHeight + 2}px`;
  typing(field.value);
  recount();
}

let counting = null; // {timer, controller}

/** Show how many tokens the conversation has with what is typed. */
function recount() {
  clearTimeout(counting?.timer);
  counting?.controller.abort();
  $("tokens").textContent = "";
  const words = $("prompt").value;
  const files = attached();
  if (!served || (!words.trim() && !files.length)) return;
  const controller = new AbortController();
  const timer = setTimeout(async () => {
    try {
      const { leaf, ...conversation } = current();
      const node = message(leaf, "user", words, { files });
      const messages = prompt({ ...conversation, nodes: { ...conversation.nodes, [node.id]: node } }, node.id);
      const total = await count(served.id, messages, toolsOf(conversation.settings), controller.signal);
      $("tokens").textContent = `${total.toLocaleString("en")} of ${served.context_length.toLocaleString("en")} tokens`;
      $("tokens").classList.toggle("bad", total >= served.context_length);
    } catch (error) {
      if (error.name !== "AbortError") $("tokens").textContent = error.message;
    }
  }, COUNT_AFTER);
  counting = { timer, controller };
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

function set(change) {
  if (conversations.has(shown)) update(shown, change);
  else change(draft);
}

function onKey(event) {
  if (event.key === "Escape" && !$("settings").hidden) {
    toggleSettings();
    $("open-settings").focus();
  } else if (event.key === "Escape") {
    turnOf(shown)?.stop();
    closeDrawer();
    changed();
  } else if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    open(blank());
  }
}

function wire() {
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("prompt").addEventListener("keydown", (event) => onEnter(event, send));
  $("prompt").addEventListener("input", typed);
  $("settings").addEventListener("submit", (event) => event.preventDefault());
  $("stop").addEventListener("click", () => turnOf(shown)?.stop());
  $("answer-now").addEventListener("click", answerNow);
  $("new").addEventListener("click", () => open(blank()));
  $("search").addEventListener("input", showList);
  $("export").addEventListener("click", () => download(current().name, exported(current())));
  $("export-all").addEventListener("click", () => download("conversations", newest().map(exported)));
  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", () => importFiles($("import-file").files).then(() => ($("import-file").value = "")));
  $("suggest").addEventListener("click", suggestTitle);
  $("title").addEventListener("change", () => rename(shown, $("title").value));
  $("theme").addEventListener("click", nextTheme);
  $("open-settings").addEventListener("click", toggleSettings);
  $("menu").addEventListener("click", () => {
    const opened = $("drawer").classList.toggle("open");
    $("menu").setAttribute("aria-expanded", String(opened));
  });
  $("messages").addEventListener("click", closeDrawer);
  document.addEventListener("keydown", onKey);
  window.addEventListener("pagehide", leaveAll);
  for (const name of FIELDS) {
    $(name).addEventListener("change", () => {
      const value = $(name).value;
      set((record) => (record.settings[name] = value));
      setting(name, value);
      recount();
    });
  }
  wireFiles();
  onAttach(() => {
    $("send").disabled = isReading();
    recount();
  });
}

function serve(model) {
  served = model;
  $("model").textContent = served.id;
  document.title = served.id;
  $("mode").disabled = served.thinking !== "hybrid";
  $("budget").disabled = served.thinking === "never";
  $("ask").hidden = $("open-settings").hidden = served.kind in NO_CHAT;
  if (served.kind in NO_CHAT) open(blank());
  changed();
}

/** Read what the server knows of the model now that it is loaded. */
async function learn() {
  const found = (await models()).find(({ id }) => id === served.id);
  if (found) serve(found);
}

async function main() {
  wire();
  setTheme(setting("theme") in THEMES ? setting("theme") : "");
  await openStore(changed, (error) => {
    unkept = `This browser does not keep the conversations: its storage is full or switched off (${error?.message}).`;
    complain(unkept);
  });
  $("prompt").value = typing();
  open(newest()[0]?.id ?? blank());
  try {
    const list = await models();
    $("models").hidden = list.length < 2;
    $("models").replaceChildren(...list.map(({ id }) => element("option", { textContent: id })));
    $("models").addEventListener("change", () => serve(list[$("models").selectedIndex]));
    const names = await loadTools();
    $("served-tools").parentElement.hidden = !names.size;
    $("tool-names").textContent = [...names].map(([server, tools]) => `${server}: ${tools.join(", ")}`).join(" · ");
    serve(list[0]);
  } catch (error) {
    complain(`The server cannot be reached: ${error.message}`);
  }
}

main();
