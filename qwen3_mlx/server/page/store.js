// Conversations and settings, stored in the browser.

const PLACE = "qwen3-conversations";

/** Read the conversations, newest first; none if the stored text cannot be read. */
export function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(PLACE) ?? "[]");
    const whole = kept.filter((one) => one.id && Array.isArray(one.messages));
    for (const message of whole.flatMap((one) => one.messages)) delete message.live; // the page was closed during a reply
    return whole;
  } catch {
    return [];
  }
}

/** Store the conversations; return whether that succeeded. */
export function save(conversations) {
  try {
    localStorage.setItem(PLACE, JSON.stringify(conversations));
    return true;
  } catch {
    return false;
  }
}

/** Read or write a setting of this browser. */
export function setting(name, value) {
  try {
    if (value === undefined) return localStorage.getItem(`qwen3-${name}`) ?? "";
    localStorage.setItem(`qwen3-${name}`, value);
  } catch {
    // Storage is off: the setting holds for this page only.
  }
  return value ?? "";
}

/** Return the messages without the fields that only this page uses. */
export function plain({ messages }) {
  return messages.map(({ role, content, reasoning_content, tool_calls, tool_call_id }) => ({ role, content, reasoning_content, tool_calls, tool_call_id }));
}

/** Download a conversation as a file. */
export function download(conversation) {
  const text = JSON.stringify({ format: "qwen3-mlx conversation", version: 1, messages: plain(conversation) }, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = `${conversation.name.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40) || "conversation"}.json`;
  link.click();
  URL.revokeObjectURL(link.href);
}
