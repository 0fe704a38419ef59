"""What comes next if a text goes on as it went on before: prompt lookup, after LZ77.

Only ids here, and no network: prompts and replies repeat names, code and figures, and where they
do, the next tokens can be read off from where they stood last.
"""

from collections.abc import Sequence

_LEAST = 2  # tokens that must be the same for a place to count
_LONGEST = 32  # tokens that are compared
_PLACES = 8  # earlier places that are looked at
_AT_ONCE = 4096  # tokens indexed in one go: a few milliseconds


class Lookup:
    """Finds where the last tokens of `ids` stood before. `ids` belong to somebody who tells."""

    def __init__(self, ids: Sequence[int]) -> None:
        """Begin with nothing indexed; `read_on` does that."""
        self.length = 0  # of the match: tokens before its place that are the last ones, too
        self._ids = ids
        self._place = 0  # where what may come next stood before
        self._last: dict[tuple[int, int], int] = {}  # where each two tokens ended last
        self._before: list[int] = []  # by place: where the two tokens that end there ended before

    @property
    def next(self) -> int | None:
        """The token that may come next, or None where nothing is like this."""
        return self._ids[self._place] if self.length else None

    def read_on(self) -> None:
        """Index more of the ids, and find the match for the last ones once all are."""
        ids, start = self._ids, len(self._before)
        if start == len(ids):
            return
        for place in range(start, min(len(ids), start + _AT_ONCE)):
            pair = (ids[place - 1], ids[place]) if place else (-1, ids[0])
            self._before.append(self._last.get(pair, -1))
            self._last[pair] = place
        self._match()

    def forget(self, count: int) -> None:
        """Take the last `count` ids out; called before they go."""
        for place in range(len(self._ids) - 1, len(self._ids) - 1 - count, -1):
            if place < len(self._before):
                before = self._before.pop()
                pair = (self._ids[place - 1], self._ids[place]) if place else (-1, self._ids[0])
                if before < 0:
                    del self._last[pair]
                else:
                    self._last[pair] = before
        self.length = 0

    def propose(self, count: int) -> list[int]:
        """Give `count` tokens that may come next; none where nothing is like this.

        What went on until now may go on for ever: behind the end the proposal repeats itself.
        """
        if not self.length:
            return []
        known = self._ids[self._place : self._place + count]
        return [known[place % len(known)] for place in range(count)]

    def _match(self) -> None:
        """Find the place before which most of the last tokens stood, the latest of equals."""
        self.length, ids = 0, self._ids
        end = len(self._before) - 1
        if end != len(ids) - 1:
            return
        place = self._before[end] if self._before else -1
        for _ in range(_PLACES):
            if place < 0:
                return
            length = _LEAST
            while length < min(_LONGEST, place + 1) and ids[place - length] == ids[end - length]:
                length += 1
            if length > self.length:
                self.length, self._place = length, place + 1
            place = self._before[place]
