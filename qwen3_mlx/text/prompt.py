"""Keeps control tokens in the text of messages from becoming control tokens of the prompt.

A message may contain `<|im_end|>` or `</think>`: a question about them, a pasted page, the result
of a tool. Encoded as control tokens they would end the turn and begin another one. So they are
replaced by placeholders before a template renders the messages, and encoded as plain text after it.
"""

import re
import secrets
from collections.abc import Mapping
from typing import Any

from qwen3_mlx.text.messages import Message, think_block
from qwen3_mlx.text.tokenizer import Prompt, Tokenizer

_TAGS = frozenset(
    f"<{slash}{tag}>" for tag in ("think", "tool_call", "tool_response") for slash in ("", "/")
)
_DELIMITERS = "<|/>"


class ControlTokens:
    """The added tokens of a checkpoint that control a conversation."""

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        """Collect the tokens that are special, look special, or are written by the chat template.

        Other added tokens are vocabulary: they are encoded as such in any text.
        """
        self.tokenizer = tokenizer
        self._names = frozenset(
            name
            for name, is_special in tokenizer.added_tokens.items()
            if is_special
            or name in _TAGS
            or (name.startswith("<|") and name.endswith("|>"))
            or (not name[:1].isalnum() and not name.isspace() and name in template)
        )
        lengths = range(2, max(map(len, self._names), default=0))
        self._lengths = lengths
        self._beginnings = {name[:n] for name in self._names for n in lengths if n < len(name)}
        self._endings = {name[-n:] for name in self._names for n in lengths if n < len(name)}
        self._inner = {name.strip(_DELIMITERS) for name in self._names} - {""}

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return the places of control tokens in a text, as (start, stop) in characters."""
        spans = self.tokenizer.added_spans(text)
        return [span for span in spans if self._is_control(text[slice(*span)])]

    def may_join(self, text: str) -> tuple[bool, bool]:
        """Return whether text may form a control token with the text before it, and after it.

        Some templates write `'<' ~ key ~ '>'`.
        """
        if text.strip(_DELIMITERS) in self._inner:
            return True, True
        before = any(text[:n] in self._endings for n in self._lengths)
        return before, any(text[-n:] in self._beginnings for n in self._lengths)

    def _is_control(self, name: str) -> bool:
        # A span with another name became an added token by Unicode normalisation.
        return name in self._names or name not in self.tokenizer.added_tokens


class ControlTokenEscaper:
    """Hides the control tokens in the messages of one conversation while they are rendered."""

    def __init__(self, control: ControlTokens) -> None:
        self._control = control
        # Letters and digits only: templates, and the JSON that they write, do not change them.
        self._mark = f"q{secrets.token_hex(8)}n"
        self._placeholder = re.compile(rf"{self._mark}(\d+)q")
        self._hidden: list[str] = []

    def hide(self, value: Any) -> Any:
        """Replace control tokens in text, or in all text of lists and mappings."""
        if isinstance(value, str):
            return self._hide_text(value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        return value

    def hide_in_message(self, message: Message) -> dict[str, Any]:
        """Replace them in a message, except the tags of a leading think block of the assistant.

        Clients that do not separate thinking and answer send it back so, and templates parse it.
        """
        hidden = {name: self.hide(value) for name, value in message.items() if name != "role"}
        if block := think_block(message):
            opening, thinking, closing, answer = block
            hidden["content"] = f"{opening}{self.hide(thinking)}{closing}{self.hide(answer)}"
        return {"role": message["role"], **hidden}

    def show(self, text: str) -> str:
        """Return the text with the placeholders replaced by what they hide."""
        return self._placeholder.sub(lambda found: self._hidden[int(found[1])], text)

    def prompt(self, rendered: str) -> Prompt:
        """Return rendered messages as a prompt that has the hidden text as plain text."""
        parts, controlled, place = list[tuple[str, bool]](), "", 0
        spans = self._control.tokenizer.added_spans(rendered) if self._hidden else []
        for start, stop in [*spans, (len(rendered), len(rendered))]:
            between = rendered[place:start]
            if self._placeholder.search(between):
                parts += [(controlled, False), (self.show(between), True)]
                controlled, between = "", ""
            controlled += between + rendered[start:stop]
            place = stop
        return Prompt([part for part in (*parts, (controlled, False)) if part[0]])

    def _hide_text(self, text: str) -> str:
        pieces, place = list[str](), 0
        for start, stop in self._control.spans(text):
            pieces += [text[place:start], self._placeholder_of(text[start:stop])]
            place = stop
        pieces.append(text[place:])
        before, after = self._control.may_join(text)
        if before:
            pieces.insert(0, self._placeholder_of(""))
        if after:
            pieces.append(self._placeholder_of(""))
        return text if len(pieces) == 1 else _HiddenText("".join(pieces), text)

    def _placeholder_of(self, text: str) -> str:
        self._hidden.append(text)
        return f"{self._mark}{len(self._hidden) - 1}q"


class _HiddenText(str):
    """Text with placeholders; `startswith` and `endswith` answer for the original text.

    The published templates recognise a tool's result in a user message by its tags.
    """

    def __new__(cls, text: str, shown: str) -> "_HiddenText":
        hidden = super().__new__(cls, text)
        hidden._shown = shown  # type: ignore[attr-defined]
        return hidden

    def startswith(self, *arguments: Any) -> bool:
        return self._shown.startswith(*arguments)  # type: ignore[attr-defined, no-any-return]

    def endswith(self, *arguments: Any) -> bool:
        return self._shown.endswith(*arguments)  # type: ignore[attr-defined, no-any-return]
