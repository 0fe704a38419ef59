// The messages of the conversation that is shown.

import { siblings } from "/page/conversation.js";
import { button, copyButton, element, onEnter } from "/page/dom.js";
import { MarkdownView } from "/page/markdown.js";
import { isLiveElsewhere } from "/page/store.js";
import { callView, stateOf } from "/page/tools.js";

const CLIPPED = 4000; // characters of the user's words that are shown at first

/** Show these children of a node, and move only those that are elsewhere. */
export function reconcile(parent, children) {
  children.forEach((child, index) => {
    if (parent.children[index] !== child) parent.insertBefore(child, parent.children[index] ?? null);
  });
  while (parent.children.length > children.length) parent.lastElementChild.remove();
}

/** Return ‹ 2/3 › for a message that has others in its place, or nothing. */
function versions(conversation, node, actions) {
  const all = siblings(conversation, node);
  if (all.length < 2) return [];
  const at = all.indexOf(all.find(({ id }) => id === node.id));
  const to = (index, text, label) => button(text, () => actions.open(all[index]), { disabled: !all[index], "aria-label": label, "data-testid": label.split(" ")[0].toLowerCase() });
  return [to(at - 1, "‹", "Previous version"), element("span", { textContent: `${at + 1}/${all.length}`, "data-testid": "version" }), to(at + 1, "›", "Next version")];
}

/** Shows what the user said. */
export class UserView {
  constructor(actions) {
    this.actions = actions;
    this.node = element("div", { className: "message user", role: "article", "aria-label": "You", "data-testid": "message-user" });
  }

  update(conversation, message, { isLast }) {
    const signature = JSON.stringify([siblings(conversation, message).map(({ id }) => id), isLast]);
    if (this.editing || signature === this.signature) return;
    this.signature = signature;
    this.redraw = () => {
      this.editing = false;
      this.node.replaceChildren(...this.parts(conversation, message, isLast));
    };
    this.redraw();
  }

  parts(conversation, message, isLast) {
    const bar = element("div", { className: "actions" }, ...versions(conversation, message, this.actions));
    bar.append(button("Edit", () => this.edit(message), { "data-testid": "edit" }));
    if (isLast) bar.append(button("Answer this", () => this.actions.reply(message.id), { "data-testid": "reply" }));
    const files = (message.files ?? []).map(({ name, text }) => element("details", { className: "file" }, element("summary", { textContent: name }), clipped(text, "pre")));
    return [...files, ...(message.content ? [clipped(message.content, "div")] : []), bar];
  }

  edit(message) {
    this.editing = true;
    const field = element("textarea", { value: message.content, "aria-label": "Your message" });
    const done = () => {
      if (!field.value.trim() && !message.files) return;
      if (this.actions.edit(message, field.value)) this.redraw();
    };
    field.addEventListener("keydown", (event) => onEnter(event, done));
    this.node.replaceChildren(field, element("div", { className: "actions" }, button("Send", done), button("Cancel", this.redraw)));
    field.focus();
  }
}

/** Return a text, its end behind a button if it is long. */
function clipped(text, name) {
  const words = element(name, { className: "words", textContent: text.slice(0, CLIPPED) });
  if (text.length <= CLIPPED) return words;
  const more = button(`Show all ${text.length.toLocaleString("en")} characters`, () => more.replaceWith(text.slice(CLIPPED)));
  words.append("… ", more);
  return words;
}

/** Shows a reply, while it comes and after it. */
export class ReplyView {
  constructor(actions) {
    this.actions = actions;
    this.summary = element("summary");
    this.thought = element("div", { className: "thought" }, "");
    this.thinking = element("details", { className: "thinking", "data-testid": "thinking" }, this.summary, this.thought);
    this.answer = element("div", { className: "answer", "data-testid": "answer" });
    this.markdown = new MarkdownView(this.answer);
    this.calls = element("div");
    this.bar = element("div", { className: "actions" });
    this.node = element("div", { className: "message", role: "article", "aria-label": "Reply", "data-testid": "message-assistant" }, this.thinking, this.answer, this.calls, this.bar);
    this.thinking.addEventListener("toggle", () => this.showThought());
  }

  update(conversation, message, { turn, path, isLast }) {
    this.message = message;
    const { reasoning_content: thought, content, thoughtFor = 0, thoughtTokens } = message;
    const running = turn?.node.id === message.id;
    this.thinking.hidden = !thought;
    const thinks = running && turn.thinks;
    const seconds = (thoughtFor / 1000).toFixed(thinks ? 0 : 1);
    this.summary.textContent = thinks ? `Thinking… ${seconds} s` : `Thought for ${seconds} s${thoughtTokens ? ` · ${thoughtTokens} tokens` : ""}`;
    this.showThought();
    this.markdown.show(content);
    if (running) return this.finish("running", []);
    const calls = message.tool_calls ?? [];
    const after = path.slice(path.indexOf(message) + 1);
    const isOpen = after.every(({ role }) => role === "tool");
    const answers = calls.map(({ id }) => after.find((one) => one.tool_call_id === id));
    const elsewhere = isLiveElsewhere(message);
    const signature = JSON.stringify([siblings(conversation, message).map(({ id }) => id), message.stats, message.state, calls.map((call) => stateOf(call, conversation.settings)), answers.map(Boolean), elsewhere, isLast, isOpen, content.length]);
    const waits = isLast ? message.state && !calls.length : calls.length && isOpen && answers.every(Boolean);
    this.finish(
      signature,
      () => this.actionsFor(conversation, message, elsewhere, waits && path.at(-1).id),
      () => calls.map((call, index) => callView(call, answers[index], conversation.settings, isOpen && !elsewhere ? this.callActions(message) : undefined)),
    );
  }

  showThought() {
    const thought = this.message?.reasoning_content ?? "";
    const shown = this.thought.firstChild;
    if (!this.thinking.open || shown.data === thought) return;
    if (thought.startsWith(shown.data)) shown.appendData(thought.slice(shown.length));
    else shown.data = thought;
  }

  finish(signature, bar, calls) {
    if (this.signature === signature) return;
    this.signature = signature;
    this.bar.replaceChildren(...(calls ? bar() : bar));
    this.calls.replaceChildren(...(calls ? calls() : []));
  }

  callActions(message) {
    return {
      call: (call) => this.actions.call(message, call),
      callAlways: (call) => this.actions.callAlways(message, call),
      give: (call, text) => this.actions.giveResult(message, call, text),
    };
  }

  /** Return the buttons; `goOn` is the id of the message to go on from, if one waits for more. */
  actionsFor(conversation, message, elsewhere, goOn) {
    if (elsewhere) return [element("span", { textContent: "Another tab is writing this." })];
    return [
      ...versions(conversation, message, this.actions),
      copyButton(() => message.content, { "data-testid": "copy" }),
      button("Retry", () => this.actions.reply(message.parent), { "data-testid": "retry" }),
      ...(goOn ? [button("Go on", () => this.actions.reply(goOn), { "data-testid": "go-on" })] : []),
      element("span", { textContent: message.state === "live" ? "cut off" : message.stats ?? "", "data-testid": "stats" }),
    ];
  }
}
