// Markdown as DOM nodes. Text is never parsed as HTML, so nothing that a model writes can run.

/** Create an element, with properties and children. */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("data-") || key.startsWith("aria-")) made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children);
  return made;
}

/** Create a button that copies the text that `text()` returns. */
export function copyButton(text, properties = {}) {
  const button = element("button", { type: "button", textContent: "Copy", ...properties });
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "Copied";
    } catch {
      button.textContent = "The browser forbids it";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return button;
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)/;
const ALIGNMENT = /^ *\|?(?: *:?-+:? *\|)+ *(?::?-+:?)? *\|? *$/;

/** Return the nodes of a text. */
export function markdown(text) {
  return blocks(text.split("\n"));
}

function blocks(lines) {
  const made = [];
  for (let at = 0; at < lines.length; ) {
    const [node, next] = block(lines, at);
    if (node) made.push(node);
    at = next;
  }
  return made;
}

function block(lines, at) {
  const line = lines[at];
  if (!line.trim()) return [null, at + 1];
  const heading = HEADING.exec(line);
  if (heading) return [element(`h${heading[1].length}`, {}, ...inline(heading[2].replace(/ +#+ *$/, ""))), at + 1];
  if (FENCE.test(line)) return fence(lines, at);
  if (RULE.test(line)) return [element("hr"), at + 1];
  if (QUOTE.test(line)) return quote(lines, at);
  if (ITEM.test(line)) return list(lines, at);
  if (line.includes("|") && ALIGNMENT.test(lines[at + 1] ?? "")) return table(lines, at);
  return paragraph(lines, at);
}

function fence(lines, start) {
  const [, mark, language] = FENCE.exec(lines[start]);
  let end = start + 1;
  while (end < lines.length && !closes(lines[end], mark)) end += 1;
  const code = lines.slice(start + 1, end).join("\n");
  const bar = element("div", { className: "bar" }, element("span", { textContent: language || "text" }), copyButton(() => code));
  const pre = element("pre", { tabIndex: 0 }, element("code", { textContent: code }));
  return [element("div", { className: "code" }, bar, pre), end + 1];
}

function closes(line, mark) {
  const words = line.trim();
  return words.length >= mark.length && words === mark[0].repeat(words.length);
}

function quote(lines, start) {
  let end = start;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inner = lines.slice(start, end).map((line) => line.replace(QUOTE, ""));
  return [element("blockquote", {}, ...blocks(inner)), end];
}

function list(lines, start) {
  const [, indent, mark] = ITEM.exec(lines[start]);
  const ordered = /\d/.test(mark);
  const made = element(ordered ? "ol" : "ul");
  if (ordered) made.start = parseInt(mark, 10);
  let at = start;
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    if (!item || item[1].length > indent.length + 1 || /\d/.test(item[2]) !== ordered) break;
    const width = item[0].length;
    const inner = [lines[at].slice(width)];
    at += 1;
    while (at < lines.length && belongs(lines, at, item[1].length)) {
      const spaces = /^ */.exec(lines[at])[0].length;
      inner.push(lines[at].slice(Math.min(width, spaces)));
      at += 1;
    }
    made.append(listItem(inner));
  }
  return [made, at];
}

/** Return whether a line continues the list item that is indented by `indent` spaces. */
function belongs(lines, at, indent) {
  const line = lines[at];
  const spaces = /^ */.exec(line)[0].length;
  if (!line.trim()) return lines[at + 1] !== undefined && /^ */.exec(lines[at + 1])[0].length > indent && lines[at + 1].trim() !== "";
  if (spaces > indent + 1) return true;
  return !ITEM.test(line) && lines[at - 1].trim() !== "" && !starts(line);
}

function starts(line) {
  return HEADING.test(line) || FENCE.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);
}

function listItem(lines) {
  const task = /^\[([ xX])\] /.exec(lines[0]);
  if (task) lines = [lines[0].slice(4), ...lines.slice(1)];
  const made = element("li");
  const inner = blocks(lines);
  // An item of a single paragraph is shown without the paragraph.
  if (inner[0]?.tagName === "P") inner.splice(0, 1, ...inner[0].childNodes);
  if (task) made.append(element("input", { type: "checkbox", disabled: true, checked: task[1] !== " " }));
  made.append(...inner);
  return made;
}

function table(lines, start) {
  const row = (line, kind) => element("tr", {}, ...cells(line).map((cell) => element(kind, {}, ...inline(cell))));
  const body = element("tbody");
  let at = start + 2;
  for (; at < lines.length && lines[at].includes("|"); at += 1) body.append(row(lines[at], "td"));
  const made = element("table", {}, element("thead", {}, row(lines[start], "th")), body);
  return [element("div", { className: "table" }, made), at];
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function paragraph(lines, start) {
  let end = start + 1;
  while (end < lines.length && lines[end].trim() && !starts(lines[end])) end += 1;
  return [element("p", {}, ...inline(lines.slice(start, end).join("\n"))), end];
}

// Each pattern is tried at each special character; what no pattern matches is text.
const INLINE = [
  [/\\([\\`*_{}[\]()#+\-.!|~<>])/y, (found) => found[1]],
  [/(`+)(?!`)([^]*?[^`])\1(?!`)/y, (found) => element("code", { textContent: found[2].trim() })],
  [/!?\[([^[\]\n]*)\]\(\s*<?([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)>?(?:\s+"[^"\n]*")?\s*\)/y, (found) => link(found[2], found[1], found[0])],
  [/<((?:https?:\/\/|mailto:)[^\s<>]+)>/y, (found) => link(found[1], found[1], found[0])],
  [/https?:\/\/[^\s<>"')\]]*[^\s<>"')\].,;:!?]/y, (found) => link(found[0], found[0], found[0])],
  [/(\*\*|__)(?=\S)((?:(?!\1)[^\n]){1,2000}?\S|\S)\1/y, (found) => element("strong", {}, ...inline(found[2]))],
  [/~~(?=\S)([^~\n]+)~~/y, (found) => element("del", {}, ...inline(found[1]))],
  [/\*(?=[^\s*])([^*\n]{1,2000})\*(?!\*)/y, (found) => element("em", {}, ...inline(found[1]))],
  [/(?: {2,}|\\)\n/y, () => element("br")],
];
const EMPHASIS = /_(?=[^\s_])([^_\n]{1,2000})_(?![\p{L}\p{N}_])/uy;
const SPECIAL = /[\\`!\[<h*_~]| {2,}\n/g;

function inline(text) {
  const made = [];
  let plain = "";
  for (let at = 0; at < text.length; ) {
    SPECIAL.lastIndex = at;
    const next = SPECIAL.exec(text)?.index ?? text.length;
    plain += text.slice(at, next);
    at = next;
    if (at === text.length) break;
    const [node, length] = special(text, at);
    if (node === null) {
      plain += text[at];
      at += 1;
      continue;
    }
    if (plain) made.push(plain);
    plain = "";
    made.push(node);
    at += length;
  }
  return plain ? [...made, plain] : made;
}

function special(text, at) {
  const inWord = at > 0 && /[\p{L}\p{N}_]/u.test(text[at - 1]);
  for (const [pattern, make] of INLINE) {
    const found = matchAt(pattern, text, at);
    if (found && !(inWord && /^(__|https?:)/.test(found[0]))) return [make(found), found[0].length];
  }
  const found = inWord ? null : matchAt(EMPHASIS, text, at);
  return found ? [element("em", {}, ...inline(found[1])), found[0].length] : [null, 1];
}

function matchAt(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

/** Return a link to a web or mail address, or the text as written for any other address. */
function link(address, words, written) {
  if (!/^(https?:\/\/|mailto:)/i.test(address)) return written;
  return element("a", { href: address, rel: "noopener noreferrer", target: "_blank", textContent: words || address });
}
