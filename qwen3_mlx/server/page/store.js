// Conversations, one record each in IndexedDB, shared by the tabs of this browser; and settings.

import { add, ofMessages } from "/page/conversation.js";

const TABLE = "conversations";
const OLD = "qwen3-conversations"; // in localStorage: all conversations of earlier versions
const UNSAVED = "qwen3-unsaved-"; // in localStorage: a message that its tab could not store before it was closed
const LIVE_FOR = 5000; // milliseconds after which a reply that another tab wrote counts as ended

/** The conversations by their ids, as this tab knows them. */
export const conversations = new Map();

const channel = new BroadcastChannel("qwen3-conversations");
/** The replies that this tab writes, by their ids: [id of the conversation, message] each. */
export const live = new Map();

const pending = new Map(); // changes that are being stored, by conversation
const heard = new Map(); // when another tab last had a live reply
const loaded = Date.now(); // until then another tab may have had any
let database = null;
let onChange = () => {};
let onFailure = () => {};

/** Read the conversations; `changed(id)` is called when one has changed here or in another tab. */
export async function open(changed, failed) {
  onChange = changed;
  onFailure = failed;
  try {
    database = await opened();
    database.onclose = () => {
      database = null;
      failed(new Error("it has been cleared"));
    };
    for (const record of await request(database.transaction(TABLE).objectStore(TABLE).getAll())) conversations.set(record.id, record);
    channel.addEventListener("message", receive);
    setTimeout(onChange, LIVE_FOR + 100);
    recover();
    await migrate();
  } catch (error) {
    failed(error);
  }
}

function receive({ data: { id, written } }) {
  if (written) {
    heard.set(written, Date.now());
    setTimeout(() => onChange(id), LIVE_FOR + 100);
  }
  update(id, null);
}

function opened() {
  const asked = indexedDB.open("qwen3-mlx", 1);
  asked.onupgradeneeded = () => asked.result.createObjectStore(TABLE, { keyPath: "id" });
  return request(asked);
}

function request(asked) {
  return new Promise((resolve, reject) => {
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
}

/**
 * Apply a change to a conversation, here at once and to the stored record, which other tabs may
 * have changed; resolves to whether it is stored. A conversation that has been deleted is not stored
 * again. `created` is one that may be new, `written` the id of a reply that is being written.
 */
export function update(id, change, { created, written } = {}) {
  const copy = created && structuredClone(created);
  if (created && !conversations.has(id)) conversations.set(id, created);
  const known = conversations.get(id);
  if (change && known) {
    change(known);
    onChange(id);
  }
  if (!database) return Promise.resolve(false);
  pending.set(id, (pending.get(id) ?? 0) + 1);
  return new Promise((resolve) => {
    const transaction = database.transaction(TABLE, change ? "readwrite" : "readonly");
    const asked = transaction.objectStore(TABLE).get(id);
    let record;
    asked.onsuccess = () => {
      record = asked.result ?? copy;
      if (!record || !change) return;
      change(record);
      transaction.objectStore(TABLE).put(record);
    };
    transaction.oncomplete = () => {
      if (change) channel.postMessage({ id, written });
      settle(id, () => database && know(id, record));
      resolve(true);
    };
    transaction.onabort = () => {
      database = null; // what is stored lacks this change: from here on the tab keeps its own
      settle(id, () => {});
      onFailure(transaction.error);
      resolve(false);
    };
  });
}

/** Count a change as stored; after the last one the stored record is what this tab knows. */
function settle(id, last) {
  pending.set(id, pending.get(id) - 1);
  if (pending.get(id)) return;
  pending.delete(id);
  last();
}

function know(id, record) {
  if (record) conversations.set(id, record);
  else conversations.delete(id);
  for (const [owner, node] of live.values()) if (owner === id && record) put(record, node);
  onChange(id);
}

/** Add a reply or a result, and show it where what it answers is the last message that is shown. */
export function put(record, node) {
  record.nodes[node.id] = node;
  if (record.leaf === node.parent) record.leaf = node.id;
}

/** Delete a conversation. */
export function remove(id) {
  const forget = () => {
    conversations.delete(id);
    onChange(id);
  };
  forget();
  if (!database) return;
  const transaction = database.transaction(TABLE, "readwrite");
  transaction.objectStore(TABLE).delete(id);
  transaction.oncomplete = () => {
    forget();
    channel.postMessage({ id });
  };
}

/** Return whether another tab is writing a reply. */
export function isLiveElsewhere(node) {
  return node.state === "live" && !live.has(node.id) && Date.now() - (heard.get(node.id) ?? loaded) < LIVE_FOR;
}

/** Tell the other tabs that this one still has a reply, be it without text for long, or a call. */
export function announce(id, node) {
  channel.postMessage({ id, written: node.id });
}

/** Return whether another tab has told so of this reply or call. */
export function isAnnounced(id) {
  return Date.now() - (heard.get(id) ?? -Infinity) < LIVE_FOR;
}

/**
 * Write a message that is not stored at the end of this page, {id, node, created}: a database may be
 * too slow then.
 */
export function rescue(entry) {
  try {
    localStorage.setItem(UNSAVED + entry.node.id, JSON.stringify(entry));
  } catch {
    // Storage is off or full: what was stored a second ago has to do.
  }
}

/** Store what `rescue` wrote. */
function recover() {
  const keys = Object.keys(localStorage).filter((one) => one.startsWith(UNSAVED));
  const entries = keys.map((key) => [key, JSON.parse(localStorage.getItem(key))]);
  // The last message is shown; a question and its reply may be of the same millisecond.
  entries.sort(([, { node: one }], [, { node: other }]) => one.made - other.made || (one.role === "assistant" ? 1 : -1));
  for (const [key, { id, node, created }] of entries) {
    const change = (record) => {
      const stored = record.nodes[node.id];
      if (stored && (stored.state !== "live" || length(stored) > length(node))) return;
      (node.role === "user" ? add : put)(record, node);
    };
    update(id, change, { created }).then((kept) => kept && localStorage.removeItem(key));
  }
}

const length = ({ content, reasoning_content: thought = "" }) => content.length + thought.length;

/** Take over the conversations of earlier versions, once; they are deleted when they are stored. */
async function migrate() {
  const old = JSON.parse(localStorage.getItem(OLD) ?? "[]").filter((one) => one.id && Array.isArray(one.messages));
  const stored = old.map(({ id, name, messages }, index) => {
    const created = { ...ofMessages(messages, name, String(id)), updated: old.length - index };
    return update(created.id, () => {}, { created });
  });
  if ((await Promise.all(stored)).every(Boolean)) localStorage.removeItem(OLD);
}

/** Read or write a setting of this browser. */
export const setting = (name, value) => kept("localStorage", name, value);

/** Read or write the message that is being typed in this tab. */
export const typing = (value) => kept("sessionStorage", "draft", value);

function kept(storage, name, value) {
  try {
    if (value === undefined) return window[storage].getItem(`qwen3-${name}`) ?? "";
    window[storage].setItem(`qwen3-${name}`, value);
  } catch {
    // Storage is off: the value holds for this page only.
  }
  return value ?? "";
}

/** Download a value as a file. */
export function download(name, value) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(value, null, 1)], { type: "application/json" }));
  link.download = `${name.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "conversation"}.json`;
  link.click();
  URL.revokeObjectURL(link.href);
}
