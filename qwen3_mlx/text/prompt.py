"""Prompts in which the control tokens are those of the template alone.

A message may contain `<|im_end|>` or `</think>`: a question about them, a pasted page, what a tool
has found. Encoded as control tokens they would end its turn and begin another one. So they are
replaced by placeholders before a template renders the messages, and encoded as plain text after it.
"""

import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qwen3_mlx.text.messages import Message, think_block

_TAGS = ("think", "tool_call", "tool_response")  # which the templates of some checkpoints leave out


class Prompt(str):
    """A rendered prompt: the text, and which parts of it are encoded without control tokens.

    `parts` are (text, is_plain), which joined are the whole; `Tokenizer.encode` honours them.
    """

    parts: Sequence[tuple[str, bool]]

    def __new__(cls, parts: Sequence[tuple[str, bool]]) -> "Prompt":
        """Join the parts."""
        prompt = super().__new__(cls, "".join(text for text, _ in parts))
        prompt.parts = tuple(parts)
        return prompt


class ControlTokens:
    """The names of a checkpoint's control tokens, kept apart from the same words in messages."""

    def __init__(self, added: Mapping[str, bool], template: str) -> None:
        """Take the added tokens' names with whether they are special, and the chat template.

        Those that are special, or that the template writes, are control tokens. Others may be mere
        vocabulary, and stay what they are.
        """
        tags = {f"<{slash}{tag}>" for tag in _TAGS for slash in ("", "/")}
        self._names = [
            name
            for name, special in added.items()
            if special or name in tags or (name in template and not name.isspace())
        ]
        self._control = _any_of(self._names)
        self._added = _any_of(added)
        # Letters and digits alone: what a template does to text, JSON included, leaves them whole.
        self._mark = f"q{secrets.token_hex(8)}n"
        self._placeholder = re.compile(rf"{self._mark}(\d+)q")
        self._numbers = {name: number for number, name in enumerate(self._names)}

    def hide(self, value: Any) -> Any:
        """Replace the names of control tokens in text, or in all text of lists and mappings."""
        if isinstance(value, str):
            return self._control.sub(lambda found: self._placeholder_of(found[0]), value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        return value

    def hide_in_message(self, message: Message) -> dict[str, Any]:
        """Do so in a message, but for the tags of a think block that an assistant's begins with.

        Clients that do not tell thinking and answer apart send it back so, and templates know it.
        """
        hidden: dict[str, Any] = self.hide({**message})
        if block := think_block(message):
            opening, thinking, closing, answer = block
            hidden["content"] = f"{opening}{self.hide(thinking)}{closing}{self.hide(answer)}"
        return hidden

    def prompt(self, rendered: str) -> Prompt:
        """Put the names back into rendered text, as plain text."""
        if not self._placeholder.search(rendered):
            return Prompt([(rendered, False)])
        parts, controlled = list[tuple[str, bool]](), ""
        for piece in self._added.split(rendered):
            if self._placeholder.search(piece):
                parts.append((controlled, False))
                parts.append((self._placeholder.sub(self._name_of, piece), True))
                controlled = ""
            else:
                controlled += piece
        return Prompt([part for part in (*parts, (controlled, False)) if part[0]])

    def _placeholder_of(self, name: str) -> str:
        return f"{self._mark}{self._numbers[name]}q"

    def _name_of(self, placeholder: re.Match[str]) -> str:
        return self._names[int(placeholder[1])]


def _any_of(names: Collection[str]) -> re.Pattern[str]:
    """Compile a pattern with one group that finds the longest of the names."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
