// Elements, and what several parts of the page do with them.

export const $ = (id) => document.getElementById(id);

/** Create an element, with properties and children. */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (/^(data|aria)-|^role$/.test(key)) made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children);
  return made;
}

/** Create a button that calls `act` when it is clicked. */
export function button(text, act, properties = {}) {
  const made = element("button", { type: "button", textContent: text, ...properties });
  made.addEventListener("click", act);
  return made;
}

/** Create a button that copies the text that `text()` returns. */
export function copyButton(text, properties = {}) {
  const made = button("Copy", async () => {
    made.textContent = (await copy(text())) ? "Copied" : "The browser forbids it";
    setTimeout(() => (made.textContent = "Copy"), 1500);
  }, properties);
  return made;
}

/** Copy a text; return whether that succeeded. The clipboard is for https and this machine only. */
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = element("textarea", { value: text, className: "hidden-text" });
    const focused = document.activeElement;
    document.body.append(field);
    field.select();
    const copied = document.execCommand("copy");
    field.remove();
    focused?.focus();
    return copied;
  }
}

/** Call `act` if a key event is an Enter that sends. */
export function onEnter(event, act) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  act();
}

/** Show an error, or none. */
export function complain(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}
