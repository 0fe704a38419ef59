"""The n-gram proposer (prompt lookup): proposes what followed the same tokens before.

Token ids only, without a network: prompts and replies repeat names, code and figures, and where
they do, the next tokens can be copied from the last occurrence. Matches are found by hash chains,
as in LZ77.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_MAX_MATCH = 32  # tokens that are compared
_MAX_CANDIDATES = 8  # earlier occurrences that are compared
_INDEX_CHUNK = 4096  # tokens indexed in one call: a few milliseconds
# Acceptance rates assumed before any is observed, by the binary digits of the match length.
_PRIOR_RATES = {1: 0.3, 2: 0.5, 3: 0.7}
_PRIOR_RATE_LONGER = 0.8  # for longer matches
_PRIOR_WEIGHT = 4.0  # observations that a prior rate counts as
_RATE_DECAY = 0.98  # weight of the old observations when a new one arrives


@dataclass(slots=True)
class AcceptanceRate:
    """The share of recent draft tokens that were accepted, as a decaying average."""

    hits: float
    tries: float = _PRIOR_WEIGHT

    @classmethod
    def from_prior(cls, share: float) -> "AcceptanceRate":
        """Create a rate with the prior `share`."""
        return cls(share * _PRIOR_WEIGHT)

    def observe(self, *, hit: bool) -> None:
        """Record whether a token that was proposed, or would have been, was accepted."""
        self.hits = _RATE_DECAY * self.hits + hit
        self.tries = _RATE_DECAY * self.tries + 1

    @property
    def share(self) -> float:
        """The acceptance rate, 0 to 1."""
        return self.hits / self.tries


class AcceptanceRates:
    """Acceptance rates by the length of the match, over all sequences."""

    def __init__(self) -> None:
        self._rates: dict[int, AcceptanceRate] = {}

    def of(self, length: int) -> AcceptanceRate:
        """Return the rate of matches of about `length` tokens."""
        digits = length.bit_length()
        if digits not in self._rates:
            prior = _PRIOR_RATES.get(digits, _PRIOR_RATE_LONGER)
            self._rates[digits] = AcceptanceRate.from_prior(prior)
        return self._rates[digits]


class NgramProposer:
    """Finds earlier occurrences of the last tokens of `ids`, and proposes what followed them.

    `ids` is shared: its owner calls `index_new` after appending, and `rewind` before removing.
    """

    def __init__(self, ids: Sequence[int], rates: AcceptanceRates) -> None:
        """Create a proposer with nothing indexed; outcomes are recorded in `rates`."""
        self.length = 0  # tokens of the match: so many before `_position` equal the last ones
        self._ids = ids
        self._rates = rates
        self._position = 0  # index in `ids` of the token that followed the match
        self._chains = _Chain(1), _Chain(2)

    @property
    def next(self) -> int | None:
        """The first draft token, or None if there is no match."""
        return self._ids[self._position] if self.length else None

    @property
    def rate(self) -> AcceptanceRate:
        """The acceptance rate of matches as long as the current one."""
        return self._rates.of(self.length)

    def observe(self, token: int) -> None:
        """Record whether the first draft token was right; call it before `token` is appended."""
        if self.length:
            self.rate.observe(hit=token == self.next)

    def index_new(self) -> None:
        """Index up to `_INDEX_CHUNK` more ids; once all are indexed, match the last ones."""
        start = len(self._chains[0])
        if start == len(self._ids):
            return
        for chain in self._chains:
            chain.extend(self._ids, min(len(self._ids), start + _INDEX_CHUNK))
        self._match()

    def rewind(self, count: int) -> None:
        """Remove the last `count` ids from the index; call it before they leave `ids`."""
        for chain in self._chains:
            chain.truncate(self._ids, len(self._ids) - count)
        self.length = 0

    def propose(self, count: int) -> list[int]:
        """Return `count` draft tokens; none if there is no match.

        Where fewer tokens follow the match, they are repeated: the text may go on in that loop.
        """
        if not self.length:
            return []
        following = self._ids[self._position : self._position + count]
        return [following[index % len(following)] for index in range(count)]

    def _match(self) -> None:
        """Find the position before which most of the last tokens occur, the latest of equals."""
        self.length, ids, end = 0, self._ids, len(self._ids) - 1
        if len(self._chains[0]) <= end:
            return
        for chain in reversed(self._chains):
            for position in chain.occurrences(end):
                length = chain.width
                while (
                    length < min(_MAX_MATCH, position + 1)
                    and ids[position - length] == ids[end - length]
                ):
                    length += 1
                if length > self.length:
                    self.length, self._position = length, position + 1
            if self.length:
                return


class _Chain:
    """Hash chains of n-grams of `width` tokens.

    `_previous` has, by position, where the n-gram that ends there ended before, or -1; `_last` has
    the last position of each n-gram.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._last: dict[tuple[int, ...], int] = {}
        self._previous: list[int] = []

    def __len__(self) -> int:
        return len(self._previous)

    def extend(self, ids: Sequence[int], stop: int) -> None:
        for position in range(len(self), stop):
            gram = self._gram(ids, position)
            self._previous.append(self._last.get(gram, -1))
            self._last[gram] = position

    def truncate(self, ids: Sequence[int], stop: int) -> None:
        for position in range(len(self) - 1, stop - 1, -1):
            previous, gram = self._previous.pop(), self._gram(ids, position)
            if previous < 0:
                del self._last[gram]
            else:
                self._last[gram] = previous

    def occurrences(self, position: int) -> Iterator[int]:
        """Yield where the n-gram that ends at `position` ended before, the latest first."""
        for _ in range(_MAX_CANDIDATES):
            position = self._previous[position]
            if position < 0:
                return
            yield position

    def _gram(self, ids: Sequence[int], position: int) -> tuple[int, ...]:
        """Return the n-gram that ends at `position`; it is shorter at the beginning."""
        return tuple(ids[max(0, position + 1 - self.width) : position + 1])
