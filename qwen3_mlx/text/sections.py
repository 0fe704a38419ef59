"""Follows the tokens of a reply: the text of each, and the section that it belongs to.

This is the one place that decodes a reply and knows whether it is inside the thinking. Parser,
thinking budget and grammar read it.
"""

from codecs import utf_8_decode
from enum import Enum, auto
from typing import NamedTuple

from qwen3_mlx.text.thinking import Thinking
from qwen3_mlx.text.tokenizer import Tokenizer


class Section(Enum):
    """How far a reply has come; it thinks once, before its answer."""

    START = auto()  # nothing visible so far: the thinking may open
    THINKING = auto()
    CLOSED = auto()  # the thinking is closed, and nothing visible of the answer has come
    ANSWER = auto()


class DecodedToken(NamedTuple):
    """A token of a reply: its text, and the section it leads to.

    Attributes:
        section: the section after the token. Only a tag opens or closes the thinking.
        text: the text that the token completes; a tag's own name is not part of it.
        held: bytes of an incomplete character at the end.
        undecoded: the number of last tokens that are nothing but such bytes.
    """

    section: Section
    text: str = ""
    held: bytes = b""
    undecoded: int = 0


class SectionTracker:
    """Decodes the tokens of a reply, and follows its section.

    The engine passes each token to the constraint first, which appends it here; the parser reads
    the same tokens afterwards, by their place.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        thinking: Thinking | None,
        *,
        inside: bool = False,
        begun: bool = False,
        end_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Create the tracker; the prompt may end `inside` the thinking, or have `begun` a section.

        Without `thinking` every token is text, as in a raw completion. The `end_ids` have no text.
        """
        self.begun = begun
        self.open_id = thinking.open_id if thinking else None
        self._close_id = thinking.close_id if thinking else None
        self._end_ids = end_ids
        self._token_bytes = tokenizer.token_bytes
        first = Section.THINKING if inside else Section.ANSWER if begun else Section.START
        self.last = DecodedToken(first)
        self._tokens: list[DecodedToken] = []
        self._first = self.last

    @property
    def inside(self) -> bool:
        """True while the reply is inside the thinking."""
        return self.last.section is Section.THINKING

    def advance(self, token: int) -> None:
        """Append the next token."""
        section, _, held, undecoded = self.last
        if token == self.open_id and section is Section.START:
            self.last = DecodedToken(Section.THINKING, held.decode(errors="replace"))
        elif token == self._close_id and section is Section.THINKING:
            self.last = DecodedToken(Section.CLOSED, held.decode(errors="replace"))
        elif token in self._end_ids:
            self.last = DecodedToken(section, "", held, undecoded)
        else:
            data = held + self._token_bytes(token)
            text, decoded = utf_8_decode(data, "replace", False)
            held = data[decoded:]
            if section is not Section.THINKING and text.strip():
                section = Section.ANSWER
            self.last = DecodedToken(section, text, held, undecoded + 1 if held and not text else 0)
        self._tokens.append(self.last)

    def read(self, place: int, token: int) -> DecodedToken:
        """Return the token at `place`, counted from 0; append it if no constraint has done so."""
        if place == len(self._tokens):
            self.advance(token)
        return self._tokens[place]

    def rewind(self, count: int) -> None:
        """Remove the last `count` tokens."""
        del self._tokens[len(self._tokens) - count :]
        self.last = self._tokens[-1] if self._tokens else self._first

    def flushed(self) -> str:
        """Return the bytes of an incomplete character at the end of the reply, as U+FFFD."""
        return self.last.held.decode(errors="replace")
