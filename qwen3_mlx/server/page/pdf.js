// The text of PDF documents, by pdf.js in a worker. This module is loaded with the first document.

import { PDFWorker, getDocument } from "/page/vendor/pdf.js";

// The page's policy compiles no WebAssembly; that and fonts are needed to draw pages only.
const OPTIONS = { useWasm: false, disableFontFace: true, useWorkerFetch: false, verbosity: 0 };

/**
 * Return the text of a document, of at most `most` characters, with an empty line between pages.
 * Throws an error whose message begins with the name; `signal` ends the reading.
 */
export async function textOfPdf(name, data, most, signal) {
  const worker = new Worker("/page/vendor/pdf.worker.js", { type: "module" });
  const ended = new Promise((_, reject) => {
    worker.addEventListener("error", () => reject(new Error(`${name} cannot be read: the reader of PDF documents does not run in this browser`)));
    signal.addEventListener("abort", () => reject(signal.reason));
  });
  try {
    signal.throwIfAborted();
    return await Promise.race([read(name, data, worker, most), ended]);
  } finally {
    worker.terminate(); // whatever it still does
  }
}

async function read(name, data, port, most) {
  // pdf.js asks for tables of encodings that are not in the document. They are not here, and the
  // text would be incomplete without a word.
  const tables = {
    asked: false,
    async fetch({ kind }) {
      this.asked ||= kind === "cMapUrl";
      throw new Error(`${kind} is not here`);
    },
  };
  const pages = [];
  let length = 0;
  try {
    const worker = new PDFWorker({ port, verbosity: 0 });
    const pdf = await getDocument({ ...OPTIONS, data, worker, BinaryDataFactory: function () { return tables; } }).promise;
    for (let number = 1; number <= pdf.numPages && length <= most; number += 1) {
      const page = await pdf.getPage(number);
      pages.push(textOf((await page.getTextContent()).items));
      length += pages.at(-1).length;
      page.cleanup();
    }
  } catch (error) {
    if (error.name === "PasswordException") throw new Error(`${name} is encrypted: save it without its password`);
    throw new Error(`${name} cannot be read as a PDF: ${error.message}`);
  }
  if (tables.asked) throw new Error(`${name} has an encoding of Chinese, Japanese or Korean text that this page cannot read: copy its text`);
  if (length > most) throw new Error(`${name} has too much text: a file may have ${most >> 20} MiB of it`);
  if (!length) throw new Error(`${name} has no text: its pages may be pictures`);
  return pages.filter(Boolean).join("\n\n");
}

/** Return the text of a page, line by line. */
function textOf(items) {
  const text = items.map(({ str, hasEOL }) => str + (hasEOL ? "\n" : "")).join("");
  return text.replace(/[ \t]+$/gm, "").replace(/\n{3,}/g, "\n\n").trim();
}
