"""What comes next if a text goes on as it went on before: prompt lookup, after LZ77.

Only ids here, and no network: prompts and replies repeat names, code and figures, and where they
do, the next tokens can be read off from where they stood last.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_LONGEST = 32  # tokens that are compared
_PLACES = 8  # earlier places that are looked at
_AT_ONCE = 4096  # tokens indexed in one go: a few milliseconds
# The share of proposals believed to come true, before any has been seen: by the binary digits of
# the length of the match.
_BELIEVED = {1: 0.3, 2: 0.5, 3: 0.7}
_BELIEVED_OF_LONGER, _WEIGHT = 0.8, 4.0
_MEMORY = 0.98  # how much a new observation leaves of those before


@dataclass(slots=True)
class AcceptanceRate:
    """How often a proposed token was the one that came, of late."""

    hits: float
    tries: float = _WEIGHT

    @classmethod
    def believed(cls, share: float) -> "AcceptanceRate":
        """Begin with what is believed."""
        return cls(share * _WEIGHT)

    def observe(self, *, hit: bool) -> None:
        """Take note of a token that was proposed, or would have been."""
        self.hits = _MEMORY * self.hits + hit
        self.tries = _MEMORY * self.tries + 1

    @property
    def share(self) -> float:
        """The share of proposals that come true."""
        return self.hits / self.tries


class AcceptanceRates:
    """How often what was found came, by the length of the match; of all texts together."""

    def __init__(self) -> None:
        self._rates: dict[int, AcceptanceRate] = {}

    def of(self, length: int) -> AcceptanceRate:
        """Give that of matches of about `length` tokens."""
        digits = length.bit_length()
        if digits not in self._rates:
            believed = _BELIEVED.get(digits, _BELIEVED_OF_LONGER)
            self._rates[digits] = AcceptanceRate.believed(believed)
        return self._rates[digits]


class NgramProposer:
    """Finds where the last tokens of `ids` stood before. `ids` belong to somebody who tells."""

    def __init__(self, ids: Sequence[int], rates: AcceptanceRates) -> None:
        """Begin with nothing indexed; `index_new` does that. What comes true goes into `rates`."""
        self.length = 0  # of the match: tokens before its place that are the last ones, too
        self._ids = ids
        self._rates = rates
        self._place = 0  # where what may come next stood before
        self._chains = _Chain(1), _Chain(2)

    @property
    def next(self) -> int | None:
        """The token that may come next, or None where nothing is like this."""
        return self._ids[self._place] if self.length else None

    @property
    def rate(self) -> AcceptanceRate:
        """How often the next token is right where the match is as long as now."""
        return self._rates.of(self.length)

    def score(self, token: int) -> None:
        """See whether the next token was right; called before `token` is there."""
        if self.length:
            self.rate.observe(hit=token == self.next)

    def index_new(self) -> None:
        """Index more of the ids, and find the match for the last ones once all are."""
        start = len(self._chains[0])
        if start == len(self._ids):
            return
        for chain in self._chains:
            chain.extend(self._ids, min(len(self._ids), start + _AT_ONCE))
        self._match()

    def forget(self, count: int) -> None:
        """Take the last `count` ids out; called before they go."""
        for chain in self._chains:
            chain.cut(self._ids, len(self._ids) - count)
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
        self.length, ids, end = 0, self._ids, len(self._ids) - 1
        if len(self._chains[0]) <= end:
            return
        for chain in reversed(self._chains):
            for place in chain.before(end):
                length = chain.width
                while (
                    length < min(_LONGEST, place + 1) and ids[place - length] == ids[end - length]
                ):
                    length += 1
                if length > self.length:
                    self.length, self._place = length, place + 1
            if self.length:
                return


class _Chain:
    """By place, where the `width` tokens that end there ended before; the last of each, by them."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._last: dict[tuple[int, ...], int] = {}
        self._before: list[int] = []

    def __len__(self) -> int:
        return len(self._before)

    def extend(self, ids: Sequence[int], stop: int) -> None:
        for place in range(len(self), stop):
            gram = self._gram(ids, place)
            self._before.append(self._last.get(gram, -1))
            self._last[gram] = place

    def cut(self, ids: Sequence[int], stop: int) -> None:
        for place in range(len(self) - 1, stop - 1, -1):
            before, gram = self._before.pop(), self._gram(ids, place)
            if before < 0:
                del self._last[gram]
            else:
                self._last[gram] = before

    def before(self, place: int) -> Iterator[int]:
        """Give the places where the tokens that end at `place` ended before, the latest first."""
        for _ in range(_PLACES):
            place = self._before[place]
            if place < 0:
                return
            yield place

    def _gram(self, ids: Sequence[int], place: int) -> tuple[int, ...]:
        """Give the tokens that end at a place; fewer at the beginning."""
        return tuple(ids[max(0, place + 1 - self.width) : place + 1])
