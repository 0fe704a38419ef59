"""Strings that end a text, found as it comes."""

from collections.abc import Sequence


class StopStrings:
    """Finds the first stop string to be complete in a text that comes in pieces."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.found: str | None = None
        self._seen = [_PrefixMatcher(stop) for stop in strings]
        self._held = ""  # may be the beginning of a stop string

    def add(self, piece: str) -> str:
        """Give what can be shown of the text so far; from a stop string on, nothing can."""
        if not self._seen:
            return piece
        text = self._held + piece
        ends = [
            (end, -len(seen.whole), seen.whole) for seen in self._seen if (end := seen.in_(piece))
        ]
        if ends:
            # The first to be complete, so that it does not matter how the text is cut into pieces.
            end, _, self.found = min(ends)
            shown = text[: len(self._held) + end - len(self.found)]
            self._held = ""
            return shown
        keep = max(seen.length for seen in self._seen)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Give what was held back, and begin anew."""
        held, self._held = self._held, ""
        for seen in self._seen:
            seen.length = 0
        return held


class _PrefixMatcher:
    """How much of a string the end of a text is: by Knuth, Morris and Pratt, for each character is
    looked at about once, however long the string and whatever the text.
    """

    def __init__(self, whole: str) -> None:
        self.whole = whole
        self.length = 0
        # By lengths, as far as they were needed: the longest shorter beginning that ends the same.
        self._shorter = [0, 0]

    def in_(self, piece: str) -> int | None:
        """Take what the text goes on with; give how far the string is complete, if it is."""
        if not self.length and self.whole[0] not in piece:
            return None
        for place, character in enumerate(piece, 1):
            self.length = self._longer(self.length, character)
            if self.length == len(self.whole):
                return place
        return None

    def _longer(self, length: int, character: str) -> int:
        while length and self.whole[length] != character:
            length = self._shorter_than(length)
        return length + (self.whole[length] == character)

    def _shorter_than(self, length: int) -> int:
        known = self._shorter
        while len(known) <= length:
            known.append(self._longer(known[-1], self.whole[len(known) - 1]))
        return known[length]
