"""Notices that a reply goes in circles: the same tokens, again and again."""

from collections.abc import Hashable

_GRAM = 4  # tokens by which a place is known again
_LEAST = 256  # tokens that must repeat what stood before them
_TIMES = 4  # and so many times as many as the circle is long


class RepetitionDetector:
    """Follows the tokens of a reply, in constant time for each.

    A text is in a circle of d tokens while each token is that of d tokens ago. A long word list or
    a table repeats itself now and then; only what does so for `_LEAST` tokens, and through `_TIMES`
    whole circles, is called endless.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._last: dict[Hashable, int] = {}  # where each gram stood last
        self._distance = self._run = 0
        self._before: list[tuple[int | None, int, int]] = []  # what each token has overwritten

    def add(self, token: int) -> bool:
        """Take the next token and say whether the text is in an endless circle."""
        place = len(self._ids)
        self._ids.append(token)
        gram = tuple(self._ids[-_GRAM:])
        earlier = self._last.get(gram)
        self._before.append((earlier, self._distance, self._run))
        self._last[gram] = place
        distance = 0 if earlier is None else place - earlier
        self._run = self._run + 1 if distance and distance == self._distance else 0
        self._distance = distance
        return self._run >= max(_LEAST, _TIMES * distance)

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens."""
        for _ in range(count):
            gram = tuple(self._ids[-_GRAM:])
            earlier, self._distance, self._run = self._before.pop()
            if earlier is None:
                del self._last[gram]
            else:
                self._last[gram] = earlier
            self._ids.pop()
