"""Finds stop strings in a text that arrives in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Finds the first stop string to be complete in a text, whatever its pieces are."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.found: str | None = None
        self._matchers = [_PrefixMatcher(stop) for stop in strings]
        self._held = ""  # may be the beginning of a stop string

    def add(self, piece: str) -> str:
        """Append a piece and return the text that can be shown; nothing after a stop string."""
        if not self._matchers:
            return piece
        text = self._held + piece
        ends = [
            (end, -len(matcher.whole), matcher.whole)
            for matcher in self._matchers
            if (end := matcher.in_(piece))
        ]
        if ends:
            # The first one to be complete: the result must not depend on the split into pieces.
            end, _, self.found = min(ends)
            shown = text[: len(self._held) + end - len(self.found)]
            self._held = ""
            return shown
        keep = max(matcher.length for matcher in self._matchers)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return the text that was held back, and start over."""
        held, self._held = self._held, ""
        for matcher in self._matchers:
            matcher.length = 0
        return held


class _PrefixMatcher:
    """Tracks how long a prefix of a string the end of a text is.

    By Knuth, Morris and Pratt: each character takes constant time on average, however long the
    string and whatever the text.
    """

    def __init__(self, whole: str) -> None:
        self.whole = whole
        self.length = 0
        # The failure function, extended on demand: for each length of a prefix, the length of the
        # longest shorter prefix that is also a suffix of it.
        self._failure = [0, 0]

    def in_(self, piece: str) -> int | None:
        """Append a piece; return the place in it after which the string is complete, or None."""
        if not self.length and self.whole[0] not in piece:
            return None
        for place, character in enumerate(piece, 1):
            self.length = self._next_length(self.length, character)
            if self.length == len(self.whole):
                return place
        return None

    def _next_length(self, length: int, character: str) -> int:
        while length and self.whole[length] != character:
            length = self._fallback(length)
        return length + (self.whole[length] == character)

    def _fallback(self, length: int) -> int:
        table = self._failure
        while len(table) <= length:
            table.append(self._next_length(table[-1], self.whole[len(table) - 1]))
        return table[length]
