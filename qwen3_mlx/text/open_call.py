"""The tool call that a reply is writing: its text, its arguments so far, and where it begins.

A checkpoint may leave the tag before a call out (`CallFormat.bare`). Such a call begins and ends by
its text alone.
"""

import secrets
from dataclasses import replace

from qwen3_mlx.text.events import ToolCall
from qwen3_mlx.text.tool_calls import OPEN, ToolCallSyntax

_FUNCTION_END = "</function>"


class OpenCall:
    """A call that is being written; `untagged` if its opening tag was left out.

    Attributes:
        id: the id of the call.
        streamed: the text of its arguments that is certain so far; empty for a draft.
        untagged: True if it has no opening tag.
    """

    def __init__(self, calls: ToolCallSyntax, *, draft: bool, untagged: bool) -> None:
        """Begin a call; the arguments of a `draft`, a call in the thinking, are not streamed."""
        self.id = f"call_{secrets.token_hex(12)}"
        self.streamed = ""
        self.untagged = untagged
        self._calls = calls
        self._pieces: list[str] = []
        self._arguments = None if draft else calls.format.follow()

    @property
    def name(self) -> str:
        """The name of the tool, as far as it is known."""
        return self._arguments.name or "" if self._arguments else ""

    @property
    def broken(self) -> bool:
        """True if the text so far cannot become a call."""
        return self._arguments is not None and self._arguments.broken

    @property
    def text(self) -> str:
        """The text so far, without tags."""
        return "".join(self._pieces)

    def add(self, text: str) -> str:
        """Append text; return the piece of the arguments that has become certain."""
        if not text:
            return ""
        self._pieces.append(text)
        piece = self._arguments.add(text) if self._arguments else ""
        self.streamed += piece
        return piece

    def rest_after_end(self, text: str) -> str | None:
        """Return the part of `text` after the end of an untagged call; None if it goes on."""
        # No piece is empty, so the last len(_FUNCTION_END) pieces contain any end that began before
        # `text`. Joining the whole call for each piece would take quadratic time.
        if _FUNCTION_END not in "".join(self._pieces[-len(_FUNCTION_END) :]) + text:
            return None
        before = self.text
        written, end = before + text, max(0, len(before) + 1 - len(_FUNCTION_END))
        while (place := written.find(_FUNCTION_END, end)) >= 0:
            end = place + len(_FUNCTION_END)
            if self._calls.format.read(written[:end], whole=False):  # not an end within a value
                return written[end:]
        return None

    def parsed(self, *, whole: bool) -> ToolCall | None:
        """Parse the call; `whole` if its closing tag has come. None if it cannot be read."""
        call = self._calls.read(self.text, whole=whole)
        if call is None or not self.streamed:
            return call
        # A key that comes twice makes a call ambiguous: what was streamed is not what was read.
        same = call.name == self.name and call.raw_arguments.startswith(self.streamed)
        return replace(call, id=self.id) if same else None

    def written(self, end: str = "") -> str:
        """Return the text with its tags, as the model has written it."""
        return self.text if self.untagged else f"{OPEN}{self.text}{end}"


class BareCallFinder:
    """Finds the beginning of a call without its tag in a text that arrives in pieces."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        """Look for `beginnings`, each of which starts with `<`."""
        self._beginnings = beginnings
        self._held = ""  # may be the beginning of a call

    def split(self, text: str) -> tuple[str, str]:
        """Append a piece; return the text that can be shown, and the text that begins a call."""
        text, self._held = self._held + text, ""
        place = text.find("<")
        while place >= 0:
            rest = text[place:]
            if rest.startswith(self._beginnings):
                return text[:place], rest
            if any(beginning.startswith(rest) for beginning in self._beginnings):
                self._held = rest
                return text[:place], ""
            place = text.find("<", place + 1)
        return text, ""

    def flush(self) -> str:
        """Return the text that was held back."""
        held, self._held = self._held, ""
        return held
