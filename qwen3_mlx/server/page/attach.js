// Files that are sent with the next message: chosen, dropped or pasted.

import { $, button, complain, element } from "/page/dom.js";

const MOST = 8 << 20; // bytes of a file

let files = [];
let changed = () => {};

/** Return the files that wait: [{name, text}]. */
export const attached = () => files;

/** Call `act` when files have been added or removed. */
export const onAttach = (act) => (changed = act);

/** Take the files away: they have been sent. */
export function takeFiles() {
  files = [];
  show();
}

async function add(list) {
  for (const file of list) {
    try {
      files = [...files, { name: file.name, text: await textOf(file) }];
    } catch (error) {
      complain(error.message);
    }
  }
  show();
}

async function textOf(file) {
  if (/\.pdf$/i.test(file.name)) throw new Error(`${file.name} is a PDF, which this page does not read: copy its text, or give it to qwen3 chat with /file`);
  if (file.size > MOST) throw new Error(`${file.name} is too large: a file may have ${MOST >> 20} MiB`);
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    if (!text.includes("\0")) return text.replace(/\r\n/g, "\n");
  } catch {
    // not UTF-8
  }
  throw new Error(`${file.name} is not text`);
}

function show() {
  const chips = files.map((file) => {
    const remove = button("✕", () => {
      files = files.filter((one) => one !== file);
      show();
    }, { "aria-label": `Remove ${file.name}` });
    return element("li", { "data-testid": "file" }, file.name, remove);
  });
  $("files").replaceChildren(...chips);
  $("files").hidden = !files.length;
  changed();
}

/** Listen for files. */
export function wireFiles() {
  $("attach").addEventListener("click", () => $("attach-file").click());
  $("attach-file").addEventListener("change", async () => {
    await add([...$("attach-file").files]);
    $("attach-file").value = "";
  });
  $("prompt").addEventListener("paste", (event) => {
    if (!event.clipboardData.files.length) return;
    event.preventDefault();
    add([...event.clipboardData.files]);
  });
  document.addEventListener("dragover", (event) => event.dataTransfer.types.includes("Files") && event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    add([...event.dataTransfer.files]);
  });
}
