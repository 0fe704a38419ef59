// A reply on its way. It belongs to its conversation, and goes on when another one is shown.

import { ServerError, complete } from "/page/client.js";
import { add, latestBelow, message, prompt } from "/page/conversation.js";
import { announce, conversations, live, put, rescue, update } from "/page/store.js";

const SAVE_EVERY = 1000; // milliseconds
const ANNOUNCE_EVERY = 2000;
const CLOSED_BY = { budget: "its budget", end: "an early end", loop: "the loop guard", request: "request" };

const turns = new Map(); // by conversation: it has one reply at a time
const sending = new Set(); // messages that are being stored

/** Return the reply that runs in a conversation, if there is one. */
export const turnOf = (id) => turns.get(id);

export class Turn {
  /**
   * Begin a reply to the message `to` of a conversation, or go on with the reply `to`.
   * `request` has the options; `changed(turn)` is called when there is more of the reply.
   */
  constructor(conversation, to, request, changed) {
    turns.get(conversation.id)?.stop();
    this.id = conversation.id;
    this.continues = conversation.nodes[to].role === "assistant";
    this.node = this.continues ? conversation.nodes[to] : message(to, "assistant", "");
    this.node.state = "live";
    this.options = request;
    this.request = { ...request, messages: prompt(conversation, to), ...(this.continues && { continue_final_message: true }) };
    this.changed = changed;
    this.controller = new AbortController();
    this.savedAt = this.started = performance.now();
    this.progress = null; // [done, total] tokens of the prompt
    turns.set(this.id, this);
    live.set(this.node.id, [this.id, this.node]);
    if (this.continues) this.thoughtBefore = this.node.thoughtFor ?? 0;
    else put(conversation, this.node);
    this.heart = setInterval(() => this.beat(), ANNOUNCE_EVERY);
    this.ended = this.run();
  }

  /** Tell the other tabs that the reply is alive; end it if one of them has deleted its conversation. */
  beat() {
    if (conversations.has(this.id)) announce(this.id, this.node);
    else this.stop();
  }

  async run() {
    const progress = (...numbers) => {
      this.progress = numbers;
      this.changed(this);
    };
    try {
      await complete(this.request, { signal: this.controller.signal, progress, chunk: (chunk) => this.take(chunk) });
      this.end(statsOf(this), this.reason === "length" ? "partial" : undefined);
    } catch (error) {
      if (error.name === "AbortError") return this.end("stopped", "partial");
      this.error = error instanceof ServerError ? error.message : `The server cannot be reached: ${error.message}`;
      this.end("cut off", "partial");
    }
  }

  /** Stop the reply; it ends at once. */
  stop(stats = "stopped") {
    this.controller.abort();
    this.end(stats, "partial");
  }

  take({ choices, usage, timings }) {
    if (this.isOver) return;
    const node = this.node;
    if (usage) Object.assign(this, { usage, timings });
    for (const { delta, finish_reason: reason, finish_details: details } of choices) {
      if (delta.reasoning_content) {
        this.thinkingSince ??= performance.now();
        node.reasoning_content = (node.reasoning_content ?? "") + delta.reasoning_content;
      }
      if (delta.content) node.content += delta.content;
      for (const part of delta.tool_calls ?? []) addCall(node, part);
      if (reason) Object.assign(this, { reason, details });
      if ((delta.content || delta.tool_calls || reason) && this.thinkingSince) this.thoughtUntil ??= performance.now();
    }
    this.progress = null;
    this.measure();
    if (performance.now() - this.savedAt > SAVE_EVERY) this.save();
    this.changed(this);
  }

  /** Return whether the thinking can be closed. */
  get thinks() {
    return Boolean(this.thinkingSince && !this.thoughtUntil);
  }

  measure() {
    if (this.thinkingSince) this.node.thoughtFor = (this.thoughtBefore ?? 0) + (this.thoughtUntil ?? performance.now()) - this.thinkingSince;
  }

  save() {
    const node = this.node;
    this.savedAt = performance.now();
    if (hasText(node)) update(this.id, (record) => put(record, node), { written: this.isOver ? undefined : node.id });
  }

  end(stats, state) {
    if (this.isOver) return;
    this.isOver = true;
    clearInterval(this.heart);
    this.measure();
    const node = this.node;
    if (turns.get(this.id) === this) turns.delete(this.id);
    live.delete(node.id);
    settleCalls(node);
    if (this.usage) node.thoughtTokens = (this.continues ? node.thoughtTokens ?? 0 : 0) + this.usage.completion_tokens_details.reasoning_tokens;
    node.stats = stats;
    if (state) node.state = state;
    else delete node.state;
    if (hasText(node)) this.save();
    else update(this.id, (record) => drop(record, node));
    this.changed(this);
  }

  /** Keep what has come, at the end of the page. */
  leave() {
    this.stop("cut off");
    if (hasText(this.node)) rescue({ id: this.id, node: this.node });
  }
}

/** Keep what is not stored yet, at the end of the page. */
export function leaveAll() {
  for (const entry of sending) rescue(entry);
  for (const turn of [...turns.values()]) turn.leave();
}

/** Add a message to a conversation, which may be new. */
export function store(conversation, node) {
  const { id } = conversation;
  const created = conversations.has(id) ? undefined : conversation;
  const entry = { id, node, created: created && structuredClone(created) };
  sending.add(entry);
  update(id, (record) => (node.role === "user" ? add : put)(record, node), { created }).then(() => sending.delete(entry));
}

function hasText({ content, reasoning_content, tool_calls }) {
  return Boolean(content || reasoning_content || tool_calls);
}

/** Remove a reply that has no text; where it would be shown, an earlier one to the same question is. */
function drop(record, { id, parent }) {
  delete record.nodes[id];
  if (record.leaf === id || record.leaf === parent) record.leaf = latestBelow(record, parent);
}

function addCall(node, { index, id, function: part }) {
  node.tool_calls ??= [];
  const call = (node.tool_calls[index] ??= { id, type: "function", function: { name: "", arguments: "" } });
  call.function.name += part.name ?? "";
  call.function.arguments += part.arguments ?? "";
}

/** Convert tool calls that were cut off to text: they cannot be run. */
function settleCalls(node) {
  node.tool_calls = node.tool_calls?.filter(({ function: { name, arguments: written } }) => {
    if (parsed(written) !== undefined) return true;
    node.content += `${name}(${written}`;
    return false;
  });
  if (!node.tool_calls?.length) delete node.tool_calls;
}

/** Return the value of JSON text, or undefined if the text is cut off. */
export function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

function statsOf({ usage, timings, reason, details = {} }) {
  if (!usage) return "";
  const cached = usage.prompt_tokens_details.cached_tokens;
  const parts = [
    `${usage.prompt_tokens} tokens in${cached ? ` (${cached} cached)` : ""}`,
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
