"""Repetition detector: recognises a reply that repeats the same tokens without end."""

from collections.abc import Hashable

_NGRAM = 4  # tokens by which an earlier place is recognised
_MIN_REPEATED = 256  # tokens that must equal those one period before
_MIN_ROUNDS = 4  # periods that must have been repeated as well


class RepetitionDetector:
    """Follows the tokens of a reply, in constant time for each.

    A text has the period d while each token equals the one d tokens before. A long word list or a
    table also repeats itself now and then. Only a text that does so for `_MIN_REPEATED` tokens, and
    for `_MIN_ROUNDS` whole periods, counts as an endless loop.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._last: dict[Hashable, int] = {}  # the last place of each n-ngram
        self._distance = self._run = 0
        self._history: list[
            tuple[int | None, int, int]
        ] = []  # the values that each token has replaced

    def add(self, token: int) -> bool:
        """Append the next token and return whether the text is in an endless loop."""
        place = len(self._ids)
        self._ids.append(token)
        ngram = tuple(self._ids[-_NGRAM:])
        earlier = self._last.get(ngram)
        self._history.append((earlier, self._distance, self._run))
        self._last[ngram] = place
        distance = 0 if earlier is None else place - earlier
        self._run = self._run + 1 if distance and distance == self._distance else 0
        self._distance = distance
        return self._run >= max(_MIN_REPEATED, _MIN_ROUNDS * distance)

    def rewind(self, count: int) -> None:
        """Remove the last `count` tokens."""
        for _ in range(count):
            ngram = tuple(self._ids[-_NGRAM:])
            earlier, self._distance, self._run = self._history.pop()
            if earlier is None:
                del self._last[ngram]
            else:
                self._last[ngram] = earlier
            self._ids.pop()
