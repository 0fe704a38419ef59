"""Speculative decoding: several tokens from one forward pass, and not one of them another.

Tokens are proposed, by lookup or by a small model, and one pass of the large model goes over all of
them. Each place is then sampled exactly as it would be without: with the same logits, penalties,
mask, and the same randomness, which depends on the seed and the place alone. As long as the token
so chosen is the one that was proposed, the next place has been computed, too; the first that
differs is taken, and what follows it is forgotten. Rejection sampling (arXiv 2211.17192) keeps the
distribution of the output; this keeps the output itself, and accepts a token just as often where
the proposal is a single one, as it is here.

A proposal costs time, since a pass over more rows takes longer, and the pipeline must wait to know
its beginning. So a gate weighs what it will probably bring against what such passes have been
measured to take, and proposes as many tokens as promise the most tokens a second, or none. How
often proposals come true is kept track of while none is made, too.

k proposed tokens, rows of a step: tokens of all sequences that it goes over.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qwen3_mlx.cache.attention import FEW_QUERIES, most_queries
from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.engine.drafting import DraftModel
from qwen3_mlx.engine.memory import count_weights
from qwen3_mlx.engine.sequence import Sequence as Running
from qwen3_mlx.model.config import ModelConfig

# Seconds of a pass over so many rows, where a pass over one row takes 1: 4-bit weights, by chip.
# M3 and M4 (M4 Pro, Qwen3-8B: github.com/ml-explore/mlx, issue 3839), M5 (issue 3791), M3 Ultra
# (issues 4265, 3764). The kernel of M1 and M2 reads the weights anew for each row until, from 6
# rows on, another takes all at once: there only long proposals can pay.
_OLD = {1: 1.0, 2: 2.0, 6: 6.0, 16: 6.0, 32: 6.0}
_M3_ULTRA = {1: 1.0, 2: 1.7, 4: 2.3, 8: 6.1}
_M3_M4 = {1: 1.0, 2: 1.11, 3: 1.31, 4: 1.45, 6: 1.98, 8: 2.45}
_M5 = {1: 1.0, 3: 1.11, 5: 1.45, 6: 1.7, 8: 2.2}
_CPU = {1: 1.0, 2: 1.1, 4: 1.25, 8: 1.3}  # measured: float32, OpenBLAS on two cores
_FIRST_OF_APPLE, _M3, _M5_GENERATION = 13, 15, 17

_WIDE_CONTEXT = 4096  # tokens; kernels for many queries do not share out a longer one's keys
_WORTH = 1.1  # how much faster it must promise to be
_PRIOR_RATE, _PRIOR_WEIGHT = 0.6, 4.0  # of drafts that came true, before any has been seen
_PRIOR_RATES = {1: 0.3, 2: 0.5, 3: 0.7}  # of lookup, by the digits of the match's length in binary
_PRIOR_OF_LONG = 0.8
_MEMORY = 0.98  # how much a new observation leaves of those before
_SECONDS_MEMORY = 0.8
_STALE = 500  # steps after which a width that was not measured again is thought anew of
# A draft model that does not pay is tried again with so many tokens, after so many others.
_TRIAL, _FIRST_PAUSE, _LONGEST_PAUSE = 2, 64, 1024


def costs_of(architecture: str) -> Mapping[int, float]:
    """Give the relative costs of passes by their rows, for what MLX calls the device."""
    digits = "".join(filter(str.isdigit, architecture.partition("_g")[2]))
    generation = int(digits) if digits else 0
    if generation < _FIRST_OF_APPLE:
        return _CPU
    if generation < _M3:
        return _OLD
    if generation >= _M5_GENERATION:
        return _M5
    return _M3_ULTRA if generation == _M3 and architecture.endswith("d") else _M3_M4


class Costs:
    """What steps of so many rows take: measured, and where not yet, as the table has it.

    A step that `waited` was built only when the one before it had been told.
    """

    def __init__(self, table: Mapping[int, float]) -> None:
        self.table = table
        self._seconds: dict[tuple[bool, int], float] = {}
        self._seen: dict[tuple[bool, int], int] = {}  # by number of the step: when it was measured
        self._steps = 0

    @property
    def measured(self) -> bool:
        """Whether `of` gives seconds."""
        return bool(self._seconds)

    def observe(self, rows: int, seconds: float, *, waited: bool) -> None:
        """Take note of a step."""
        self._steps += 1
        kind = waited, rows
        before = self._seconds.get(kind)
        if before is not None:
            seconds = min(seconds, 3 * before)  # the machine had something else to do
            seconds = _SECONDS_MEMORY * before + (1 - _SECONDS_MEMORY) * seconds
        if kind in self._seen:  # the first also sets up what such a step needs
            self._seconds[kind] = seconds
        self._seen[kind] = self._steps
        for other in [one for one in self._seconds if self._steps - self._seen[one] > _STALE]:
            del self._seconds[other]

    def of(self, rows: int, *, waited: bool) -> float:
        """Give the seconds of a step, or, where none was measured, in passes of one row."""
        expected = self._expected(rows)
        if not self._seconds:
            return expected
        if (waited, rows) in self._seconds:
            return self._seconds[waited, rows]
        alike = [one for one in self._seconds if one[0] == waited] or list(self._seconds)
        nearest = min(alike, key=lambda one: abs(one[1] - rows))
        return self._seconds[nearest] * expected / self._expected(nearest[1])

    def _expected(self, rows: int) -> float:
        low = max(known for known in self.table if known <= rows)
        high = min((known for known in self.table if known >= rows), default=None)
        if high is None:
            return self.table[low] * rows / low
        share = (rows - low) / (high - low) if high > low else 0.0
        return self.table[low] + share * (self.table[high] - self.table[low])


@dataclass(slots=True)
class Rate:
    """How often a proposed token was the one that came, of late."""

    hits: float
    tries: float = _PRIOR_WEIGHT

    @classmethod
    def believed(cls, share: float) -> "Rate":
        """Begin with what is believed."""
        return cls(share * _PRIOR_WEIGHT)

    def observe(self, *, hit: bool) -> None:
        """Take note of a token that was proposed, or would have been."""
        self.hits = _MEMORY * self.hits + hit
        self.tries = _MEMORY * self.tries + 1

    @property
    def share(self) -> float:
        """The share of proposals that come true."""
        return self.hits / self.tries


@dataclass(frozen=True, slots=True)
class _Plan:
    """How many tokens to propose, and what a step with them promises: tokens, in seconds."""

    count: int
    rate: float  # of proposals that come true
    tokens: float
    seconds: float
    drafted: bool = False  # by the draft model

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


class Speculator:
    """Decides who is proposed what, for all sequences of an engine."""

    def __init__(self, config: ModelConfig, costs: Costs, draft: DraftModel | None = None) -> None:
        """Propose by lookup, and with `draft` where that promises more."""
        self.draft = draft
        self._costs = costs
        self._most = most_queries(config.num_attention_heads, config.num_key_value_heads)
        self._size = count_weights(config)
        self._rates: dict[int, Rate] = {}  # of lookup, by the length of the match
        self._draft_rate = Rate.believed(_PRIOR_RATE)
        self._drafted: dict[Running, int] = {}  # in the step in work
        self._pause, self._waited = _FIRST_PAUSE, 0

    @property
    def token_bytes(self) -> int:
        """The bytes that the draft model keeps of a token."""
        return self.draft.token_bytes if self.draft else 0

    def make_cache(self) -> list[KVCache]:
        """Make what the draft model needs for a sequence, if there is one."""
        return self.draft.make_cache() if self.draft else []

    def willing(self, sequence: Running, rows: int) -> bool:
        """Say whether to wait for the token on its way, so as to propose what follows it.

        `rows` are those of the step that would not wait. What lookup would propose begins with the
        token on its way, so it will be proposed if that one is right.
        """
        plan = self._plan(sequence, rows - 1)
        if not plan.count:
            return False
        right = 1.0 if plan.drafted else plan.rate
        tokens = right * plan.tokens + (1 - right) * rows
        seconds = right * plan.seconds + (1 - right) * self._costs.of(rows, waited=True)
        return tokens / seconds > _WORTH * rows / self._costs.of(rows, waited=False)

    def propose(self, sequences: Sequence[Running], rows: int) -> dict[Running, list[int]]:
        """Give what is proposed to go on with, for some of `sequences`.

        All that is known of them is read in this step, of `rows` rows without any proposals.
        """
        found: dict[Running, list[int]] = {}
        drafted: dict[Running, int] = {}
        for sequence in sequences:
            plan = self._plan(sequence, rows - 1)
            rows += plan.count
            if plan.drafted:
                drafted[sequence] = plan.count
            elif plan.count:
                found[sequence] = sequence.lookup.propose(plan.count)
        if self.draft and drafted:
            found |= self.draft.propose(drafted)
            self._drafted = drafted
            self._waited = 0
        return found

    def compare(self, sequence: Running, token: int) -> None:
        """See whether lookup knew that `token` would come; to be called before it is there."""
        self._waited += 1
        if (known := sequence.lookup.next) is not None:
            self._rate_of(sequence).observe(hit=token == known)

    def observe(self, sequence: Running, accepted: int) -> None:
        """Take note of how many of the tokens proposed for a sequence were right."""
        if proposed := self._drafted.pop(sequence, 0):
            for place in range(min(accepted + 1, proposed)):
                self._draft_rate.observe(hit=place < accepted)
            self._pause = _FIRST_PAUSE if accepted else min(2 * self._pause, _LONGEST_PAUSE)

    def took(self, rows: int, seconds: float, *, waited: bool) -> None:
        """Take note of what a step took, the host's work included."""
        self._costs.observe(rows, seconds, waited=waited)

    def _rate_of(self, sequence: Running) -> Rate:
        digits = sequence.lookup.length.bit_length()
        if digits not in self._rates:
            self._rates[digits] = Rate.believed(_PRIOR_RATES.get(digits, _PRIOR_OF_LONG))
        return self._rates[digits]

    def _plan(self, sequence: Running, others: int) -> _Plan:
        """Weigh the ways to go on with a sequence, beside `others` rows of a step."""
        plans = [_Plan(0, 0.0, others + 1, self._costs.of(others + 1, waited=True))]
        most = min(
            sequence.request.max_tokens - sequence.told - 1,
            sequence.room - len(sequence.ids) - 1,
        )
        if most < 1:
            return plans[0]
        if sequence.lookup.length:
            plans += self._plans(sequence, self._rate_of(sequence).share, others, most)
        if self.draft:
            if self._waited >= self._pause:
                return _Plan(min(_TRIAL, most), 1.0, 1.0, 1e-9, drafted=True)
            each = self._costs.of(1, waited=True) * self.draft.size / self._size
            if self._costs.measured and self.draft.seconds:
                each = self.draft.seconds
            plans += self._plans(sequence, self._draft_rate.share, others, most, each)
        return max(plans, key=lambda plan: plan.speed)

    def _plans(
        self, sequence: Running, rate: float, others: int, most: int, each: float = 0.0
    ) -> Iterator[_Plan]:
        """Give plans for proposals that come true at `rate`; a draft takes `each` seconds."""
        wide = not each and len(sequence.ids) <= _WIDE_CONTEXT
        for width in self._costs.table:
            if 1 < width <= self._most or (width > FEW_QUERIES and wide):
                count = min(width - 1, most)
                tokens = others + sum(rate**place for place in range(count + 1))
                seconds = self._costs.of(others + 1 + count, waited=True) + each * count
                yield _Plan(count, rate, tokens, seconds, drafted=each > 0)
