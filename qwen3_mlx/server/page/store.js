// Conversations, kept in the browser.

const PLACE = "qwen3-conversations";

/** Read them, newest first; what is there and cannot be read counts as none. */
export function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(PLACE) ?? "[]");
    const whole = kept.filter((one) => one.id && Array.isArray(one.messages));
    for (const message of whole.flatMap((one) => one.messages)) delete message.live; // it was left so
    return whole;
  } catch {
    return [];
  }
}

/** Keep them, and say whether that was possible. */
export function save(conversations) {
  try {
    localStorage.setItem(PLACE, JSON.stringify(conversations));
    return true;
  } catch {
    return false;
  }
}

/** Read or write one of the settings of this browser. */
export function setting(name, value) {
  try {
    if (value === undefined) return localStorage.getItem(`qwen3-${name}`) ?? "";
    localStorage.setItem(`qwen3-${name}`, value);
  } catch {
    // Then it holds for this page only.
  }
  return value ?? "";
}

/** Give the messages without what only this page knows of them. */
export function plain({ messages }) {
  return messages.map(({ role, content, reasoning_content, tool_calls, tool_call_id }) => ({ role, content, reasoning_content, tool_calls, tool_call_id }));
}

/** Offer a conversation as a file. */
export function download(conversation) {
  const text = JSON.stringify({ format: "qwen3-mlx conversation", version: 1, messages: plain(conversation) }, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `${conversation.name.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "conversation"}.json`;
  link.click();
  URL.revokeObjectURL(link.href);
}
