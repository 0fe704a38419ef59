// Files that are sent with the next message: chosen, dropped or pasted.

import { $, button, complain, element } from "/page/dom.js";

const MOST = 8 << 20; // bytes of a file of text, and characters of a PDF document's text
const MOST_OF_PDF = 50 << 20; // bytes of a PDF document, with its pictures

let files = []; // {name, text, reading}: `reading` ends the reading of one that has no text yet
let changed = () => {};

/** Return the files that wait: [{name, text}]. */
export const attached = () => files.filter((file) => !file.reading).map(({ name, text }) => ({ name, text }));

/** Return whether a file is still being read. */
export const isReading = () => files.some((file) => file.reading);

/** Call `act` when files have been added or removed. */
export const onAttach = (act) => (changed = act);

/** Take the files away: they have been sent. */
export function takeFiles() {
  files = [];
  show();
}

/** Read files one after the other; each is shown while it is read. */
async function add(list) {
  const added = list.map((file) => ({ name: file.name, reading: new AbortController() }));
  files = [...files, ...added];
  show();
  for (const [index, entry] of added.entries()) {
    try {
      entry.text = await textOf(list[index], entry.reading.signal);
      delete entry.reading;
    } catch (error) {
      files = files.filter((one) => one !== entry);
      if (error.name !== "AbortError") complain(error.message);
    }
    show();
  }
}

async function textOf(file, signal) {
  const isPdf = /\.pdf$/i.test(file.name) || (await file.slice(0, 5).text()) === "%PDF-";
  const most = isPdf ? MOST_OF_PDF : MOST;
  if (file.size > most) throw new Error(`${file.name} is too large: a ${isPdf ? "PDF" : "file"} may have ${most >> 20} MiB`);
  const data = await file.arrayBuffer();
  signal.throwIfAborted();
  return isPdf ? textOfPdf(file.name, data, signal) : decoded(file.name, data);
}

async function textOfPdf(name, data, signal) {
  // What pdf.js needs of a browser, and was new in 2026.
  const reader = await import("/page/pdf.js").catch(() => {
    throw new Error(`${name} cannot be read: the server does not give the reader of PDF documents`);
  });
  return reader.textOfPdf(name, data, MOST, signal);
}

function decoded(name, data) {
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(data);
    if (!text.includes("\0")) return text.replace(/\r\n/g, "\n");
  } catch {
    // not UTF-8
  }
  throw new Error(`${name} is not text`);
}

function show() {
  const chips = files.map((file) => {
    const remove = button("✕", () => {
      file.reading?.abort();
      files = files.filter((one) => one !== file);
      show();
    }, { "aria-label": `Remove ${file.name}` });
    return element("li", { "data-testid": file.reading ? "file-being-read" : "file" }, file.reading ? `Reading ${file.name}…` : file.name, remove);
  });
  $("files").replaceChildren(...chips);
  $("files").hidden = !files.length;
  changed();
}

/** Listen for files. */
export function wireFiles() {
  $("attach").addEventListener("click", () => $("attach-file").click());
  $("attach-file").addEventListener("change", () => {
    add([...$("attach-file").files]);
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
