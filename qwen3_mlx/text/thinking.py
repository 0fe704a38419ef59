"""Detects whether and how a checkpoint can think, from its template and its tokens."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.text.messages import Message
from qwen3_mlx.text.template import ChatTemplate
from qwen3_mlx.text.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"
_SWITCH = re.compile(r"(?<![\w/])/(no_)?think(?![\w/]|\.\w)")
_USER = {"role": "user", "content": "?"}
# Some templates require a system turn.
_PROBES = ([_USER], [{"role": "system", "content": "?"}, _USER])


@dataclass(frozen=True, slots=True)
class Thinking:
    """The thinking modes of a checkpoint.

    `can_think` and `can_answer_directly` are both true for a hybrid checkpoint. `opens_in_prompt`
    is true if the prompt itself ends inside the thinking.
    """

    can_think: bool
    can_answer_directly: bool
    opens_in_prompt: bool
    open_id: int | None
    close_id: int | None

    @classmethod
    def of(cls, template: ChatTemplate | None, tokenizer: Tokenizer) -> "Thinking":
        """Detect the modes by rendering the template with thinking on and off, never by a name."""
        open_id, close_id = tokenizer.id_of(OPEN), tokenizer.id_of(CLOSE)
        if template is None or open_id is None or close_id is None:
            return cls(False, True, False, None, None)
        rendered = [_rendered_both_ways(template, probe) for probe in _PROBES]
        if not (both := next(filter(None, rendered), None)):
            return cls(CLOSE in template.source, True, False, open_id, close_id)
        on, off = both
        opens = on.rstrip().endswith(OPEN)
        # A template that strips the thinking of earlier turns belongs to a model that thinks.
        thinks = on != off or opens or CLOSE in template.source
        if not thinks:
            return cls(False, True, False, None, None)
        return cls(True, on != off, opens, open_id, close_id)

    @property
    def hybrid(self) -> bool:
        """True if thinking can be switched on and off."""
        return self.can_think and self.can_answer_directly

    def resolve(self, wish: bool | None) -> bool:
        """Return whether a reply will think, for thinking=True, False or None (the default).

        Raises:
            TypeError: `wish` is neither a bool nor None.
            Qwen3Error: the checkpoint does not support the requested mode.
        """
        if wish is not None and not isinstance(wish, bool):
            raise TypeError(f"thinking must be True, False or None, not {wish!r}")
        if wish is True and not self.can_think:
            raise Qwen3Error(
                "this checkpoint cannot think; leave thinking out, or load a hybrid one such as "
                "Qwen/Qwen3-8B"
            )
        if wish is False and not self.can_answer_directly:
            raise Qwen3Error(
                "this checkpoint always thinks; leave thinking out, or load a hybrid one such as "
                "Qwen/Qwen3-8B"
            )
        return self.can_think if wish is None else wish


def _rendered_both_ways(
    template: ChatTemplate, messages: Sequence[Message]
) -> tuple[str, str] | None:
    """Return the prompt with thinking on and off, or None if the template refuses the messages."""
    try:
        return template.render(messages, thinking=True), template.render(messages, thinking=False)
    except Qwen3Error:
        return None


def soft_switch(messages: Sequence[Message]) -> bool | None:
    """Return the mode of the last `/think` or `/no_think` in a user or system message, or None.

    The switches stay in the text: a hybrid model is trained to obey the last of them.
    """
    texts = [m["content"] for m in messages if m["role"] in ("user", "system")]
    found = [match[1] for text in texts for match in _SWITCH.finditer(text)]
    return found[-1] is None if found else None
