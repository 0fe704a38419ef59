// Markdown, mathematics and code as DOM nodes. All markup passes the sanitiser, and the page's
// policy runs no script of a text's.

import { copyButton, element } from "/page/dom.js";
import hljs from "/page/vendor/highlight.js";

const MAX_NESTING = 40; // levels of quotes and lists
const MAX_HIGHLIGHTED = 50_000; // characters of a block of code
const WINDOW = 8192; // characters that are parsed at once
const MAX_BLOCK = 65_536; // characters of a block of prose; a longer one is shown as plain text
const LONG = 100_000; // characters of a text whose blocks are laid out only where they are seen
const SLICE = 12; // milliseconds of work, after which the page may react

const md = new globalThis.markdownit({ linkify: true, maxNesting: MAX_NESTING, highlight: highlighted });
md.inline.ruler.before("escape", "math", inlineMath);
md.block.ruler.before("fence", "math", blockMath, { alt: ["paragraph", "reference", "blockquote", "list"] });
md.renderer.rules.math = (tokens, index) => formula(tokens[index].content, tokens[index].block);
// A picture would be loaded from elsewhere: it is shown as a link.
md.renderer.rules.image = (tokens, index) => {
  const { attrs, content } = tokens[index];
  const address = md.utils.escapeHtml(Object.fromEntries(attrs).src);
  return `<a href="${address}">${md.utils.escapeHtml(content) || address}</a>`;
};
// The policy forbids style attributes.
for (const name of ["th_open", "td_open"]) {
  md.renderer.rules[name] = (tokens, index, options, env, renderer) => {
    const token = tokens[index];
    const aligned = /(left|center|right)$/.exec(token.attrGet("style") ?? "");
    token.attrs = aligned ? [["class", `to-${aligned[1]}`]] : null;
    return renderer.renderToken(tokens, index, options);
  };
}

function highlighted(code, language) {
  if (!hljs.getLanguage(language) || code.length > MAX_HIGHLIGHTED) return "";
  return hljs.highlight(code, { language, ignoreIllegals: true }).value;
}

// --- mathematics -----------------------------------------------------------------------------

const OPENING = /\$\$|\$|\\\(|\\\[/y;
const CLOSING = { $: "$", $$: "$$", "\\(": "\\)", "\\[": "\\]" };

/** Return the formula that begins at a place: [its source, whether it is a display, its end]. */
function mathAt(text, at, most) {
  OPENING.lastIndex = at;
  const open = OPENING.exec(text)?.[0];
  if (!open) return null;
  const start = at + open.length;
  const end = text.slice(start, most).indexOf(CLOSING[open]) + start;
  const source = text.slice(start, end);
  if (!source.trim()) return null;
  // "$5 and $6" is no formula.
  if (open === "$" && (/^\s|[\s\\]$|\n/.test(source) || /\d/.test(text[end + 1] ?? ""))) return null;
  return [source, open !== "$" && open !== "\\(", end + CLOSING[open].length];
}

function inlineMath(state, silent) {
  const found = mathAt(state.src, state.pos, Math.min(state.posMax, state.pos + 2000));
  if (!found) return false;
  if (!silent) Object.assign(state.push("math", "math", 0), { content: found[0], block: found[1] });
  state.pos = found[2];
  return true;
}

function blockMath(state, line, last, silent) {
  const start = state.bMarks[line] + state.tShift[line];
  if (!/^(\$\$|\\\[)/.test(state.src.slice(start, start + 2))) return false;
  const found = mathAt(state.src, start, Math.min(state.eMarks[last - 1], start + 10_000));
  if (!found) return false;
  let next = line;
  while (state.eMarks[next] < found[2]) next += 1;
  if (state.src.slice(found[2], state.eMarks[next]).trim()) return false; // prose follows in its line
  if (silent) return true;
  Object.assign(state.push("math", "math", 0), { content: found[0], block: true, map: [line, next + 1] });
  state.line = next + 1;
  return true;
}

function formula(source, displayMode) {
  const made = globalThis.temml.renderToString(source, { displayMode, throwOnError: false, maxExpand: 100, maxSize: [20, 20] });
  return made.replaceAll(' style="', ' data-style="');
}

// --- nodes -----------------------------------------------------------------------------------

/** Return the nodes of a part of a text. */
function nodes(html) {
  const made = globalThis.DOMPurify.sanitize(html, { RETURN_DOM_FRAGMENT: true, FORBID_TAGS: ["img", "style", "form"], FORBID_ATTR: ["style", "id", "name"] });
  for (const node of made.querySelectorAll("[data-style]")) node.style.cssText = node.dataset.style;
  for (const node of made.querySelectorAll("a")) Object.assign(node, { rel: "noopener noreferrer", target: "_blank" });
  for (const node of made.querySelectorAll("table")) wrap(node, element("div", { className: "table", tabIndex: 0, role: "group", "aria-label": "Table" }));
  for (const node of made.querySelectorAll("li")) checkbox(node);
  for (const node of made.querySelectorAll("pre")) codeBlock(node);
  return made;
}

function wrap(node, around) {
  node.replaceWith(around);
  around.append(node);
}

function checkbox(item) {
  const text = document.createTreeWalker(item, NodeFilter.SHOW_TEXT).nextNode();
  const found = /^\s*\[([ xX])\] /.exec(text?.data ?? "");
  if (!found) return;
  text.data = text.data.slice(found[0].length);
  text.before(element("input", { type: "checkbox", disabled: true, checked: found[1] !== " ", "aria-label": "Task" }));
}

function codeBlock(pre) {
  const code = pre.firstElementChild ?? pre;
  const language = /language-(\S+)/.exec(code.className)?.[1] ?? "text";
  const bar = element("div", { className: "bar" }, element("span", { textContent: language }), copyButton(() => code.textContent.replace(/\n$/, "")));
  const around = element("div", { className: "code" });
  pre.tabIndex = 0;
  pre.setAttribute("role", "group");
  pre.setAttribute("aria-label", `Code: ${language}`);
  wrap(pre, around);
  around.prepend(bar);
}

/** Return the ends of the top-level blocks of a parsed text: [number of tokens, lines] each. */
function blockEnds(tokens) {
  const ends = [];
  let line = 0;
  tokens.forEach((token, index) => {
    line = Math.max(line, token.map?.[1] ?? 0);
    if (token.level === 0 && token.nesting <= 0) ends.push([index + 1, line]);
  });
  return ends;
}

function offsetOf(text, start, lines) {
  let at = start;
  for (let line = 0; line < lines && at < text.length; line += 1) at = (text.indexOf("\n", at) + 1 || text.length + 1);
  return Math.min(at, text.length);
}

/**
 * A text that is shown as Markdown, and may grow. Blocks that are complete are rendered once; what
 * follows them is rendered again. Long texts are rendered in slices, between which the page reacts.
 */
export class MarkdownView {
  constructor(node) {
    this.node = node;
    this.text = "";
    this.done = 0; // characters whose blocks are complete
    this.open = []; // nodes of what follows
  }

  /** Show a text; one that begins as the shown one does is taken for its continuation. */
  show(text) {
    text = text.replace(/\r\n?/g, "\n");
    if (text === this.text) return;
    if (!text.startsWith(this.text.slice(0, this.done))) {
      this.done = 0;
      this.open = [];
      this.node.replaceChildren();
    }
    this.text = text;
    this.node.classList.toggle("long", text.length > LONG);
    if (!this.waiting) this.run();
  }

  /** Render a slice; then wait, the longer the slower the text is to render. */
  run() {
    const started = performance.now();
    const more = this.advance();
    const took = performance.now() - started;
    if (!more && took < SLICE) return;
    this.waiting = setTimeout(() => {
      this.waiting = undefined;
      if (more || this.shown !== this.text) this.run();
    }, more ? 0 : Math.min(4 * took, 2000));
  }

  /** Render for the length of a slice; return whether more is left. */
  advance() {
    const started = performance.now();
    while (this.step()) if (performance.now() - started > SLICE) return true;
    this.shown = this.text;
    return false;
  }

  /** Render what one window holds; return whether text follows it. */
  step() {
    const { text, done } = this;
    const source = this.window ?? WINDOW;
    const piece = text.slice(done, done + source);
    const rest = done + source < text.length;
    const env = {};
    const tokens = md.parse(piece, env);
    const ends = blockEnds(tokens);
    if (rest && ends.length < 2) return this.widen(tokens[0]?.type === "fence");
    this.window = undefined;
    const [count, lines] = ends.at(-2) ?? [0, 0];
    for (const node of this.open) node.remove();
    const render = (some) => [...nodes(md.renderer.render(some, md.options, env)).childNodes];
    this.node.append(...render(tokens.slice(0, count)));
    this.done = offsetOf(text, done, lines);
    this.open = rest ? [] : render(tokens.slice(count));
    this.node.append(...this.open);
    return rest;
  }

  /** Parse more at once, since a block is longer than the window; prose is not parsed then. */
  widen(fence) {
    this.window = (this.window ?? WINDOW) * 2;
    if (fence || this.window <= MAX_BLOCK) return true;
    this.window = undefined;
    for (const node of this.open) node.remove();
    this.open = [];
    const shown = this.text.slice(this.done, this.done + WINDOW);
    this.node.append(element("p", { className: "plain", textContent: shown }));
    this.done += shown.length;
    return true;
  }
}
