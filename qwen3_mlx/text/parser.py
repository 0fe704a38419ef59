"""Token ids in, events out: thinking and answer told apart, stop strings found.

What is thinking is decided by token id, never by text, so a tag that stands in somebody's words
changes nothing.
"""

from collections.abc import Callable, Sequence

from qwen3_mlx.text.events import Reasoning, Text
from qwen3_mlx.text.thinking import Thinking
from qwen3_mlx.text.tokenizer import Detokenizer, Tokenizer

Emit = Callable[[Reasoning | Text], None]


class Parser:
    """Follows one generation; the engine tells it the ids, and stops when it is `finished`.

    The line breaks around the thinking belong to the format and are left out of both texts.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        emit: Emit,
        *,
        thinking: Thinking | None = None,
        inside: bool = False,
        stop: Sequence[str] = (),
    ) -> None:
        """Start to parse; `inside` says that the prompt has opened the thinking.

        Without `thinking` every token is text, as in a raw completion.
        """
        self.finished = False
        self.stopped_by: str | None = None
        self.reasoning_tokens = 0
        self._emit = emit
        self._detokenizer = Detokenizer(tokenizer)
        self._open_id = thinking.open_id if thinking else None
        self._close_id = thinking.close_id if thinking else None
        self._inside = inside
        self._at_seam = inside  # next to a tag, where line breaks are format
        self._breaks = ""  # line breaks in the thinking that may yet turn out to be its last
        self._stop = StopStrings(stop)

    @property
    def details(self) -> dict[str, str]:
        """What `Finish` tells of the text: the stop string that ended it, if one did."""
        return {} if self.stopped_by is None else {"stop": self.stopped_by}

    def advance(self, ids: Sequence[int]) -> None:
        """Take the next ids of the generation."""
        for token in ids:
            if self.finished:
                return
            if token == self._open_id:
                self._turn(inside=True)
            elif token == self._close_id and self._inside:
                self._turn(inside=False)
            else:
                self.reasoning_tokens += self._inside
                self._say(self._detokenizer.add(token))

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens, all bytes of a character that is not finished."""
        self._detokenizer.flush()
        self.reasoning_tokens -= count * self._inside

    def close(self) -> None:
        """Say what is still held back; nothing comes after."""
        if not self.finished:
            self._say(self._detokenizer.flush())
            self._say_answer(self._stop.flush())
            if self._inside and self._breaks and not self._at_seam:
                self._emit(Reasoning(self._breaks))
        self.finished = True

    def _turn(self, *, inside: bool) -> None:
        self._say(self._detokenizer.flush())
        if inside:
            self._say_answer(self._stop.flush())
        self._inside, self._at_seam, self._breaks = inside, True, ""

    def _say(self, text: str) -> None:
        if self._at_seam:
            text = text.lstrip("\n")
            self._at_seam = not text
        if not text:
            return
        if self._inside:
            text = self._breaks + text
            kept = text.rstrip("\n")
            self._breaks = text[len(kept) :]
            if kept:
                self._emit(Reasoning(kept))
            return
        self._say_answer(self._stop.add(text))
        if self._stop.found is not None:
            self.finished, self.stopped_by = True, self._stop.found

    def _say_answer(self, text: str) -> None:
        if text:
            self._emit(Text(text))


class StopStrings:
    """Finds the first stop string to be complete in a text that comes in pieces."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.found: str | None = None
        self._strings = tuple(strings)
        self._held = ""  # may be the beginning of a stop string

    def add(self, piece: str) -> str:
        """Give what can be shown of the text so far; from a stop string on, nothing can."""
        if not self._strings:
            return piece
        text = self._held + piece
        places = [(text.find(stop), stop) for stop in self._strings if stop in text]
        if places:
            # The first to be complete, so that it does not matter how the text is cut into pieces.
            place, self.found = min(places, key=lambda found: (found[0] + len(found[1]), found[0]))
            self._held = ""
            return text[:place]
        keep = max(_overlap(text, stop) for stop in self._strings)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Give what was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Count the characters at the end of `text` that begin `stop`."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
