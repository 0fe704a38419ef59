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

The rows of a step are the tokens of all sequences that it goes over.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qwen3_mlx import backend
from qwen3_mlx.cache.attention import FEW_QUERIES, max_fused_queries
from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.engine.memory import count_weights
from qwen3_mlx.engine.sequence import SequenceState
from qwen3_mlx.engine.speculation.draft_model import DraftModel
from qwen3_mlx.engine.speculation.ngram import AcceptanceRate, AcceptanceRates, NgramProposer
from qwen3_mlx.engine.speculation.step_cost import StepCostModel, chip_costs
from qwen3_mlx.model.config import ModelConfig

_WIDE_CONTEXT = 4096  # tokens; kernels for many queries do not share out a longer one's keys
_WORTH = 1.1  # how much faster it must promise to be
_DRAFTS_RIGHT = 0.6  # the share that is believed before any has been seen
# A draft model that does not pay is tried again with so many tokens, after so many others.
_TRIAL, _FIRST_PAUSE, _LONGEST_PAUSE = 2, 64, 1024


@dataclass(frozen=True, slots=True)
class _Plan:
    """How many tokens to propose, and what a step with them promises: tokens, in seconds."""

    count: int
    rate: float  # of proposals that come true
    tokens: float
    seconds: float
    drafted: bool = False  # by the draft model
    trial: bool = False  # whatever it promises

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


class Speculator:
    """Decides who is proposed what, for all sequences of an engine."""

    def __init__(
        self,
        config: ModelConfig,
        draft: DraftModel | None = None,
        costs: StepCostModel | None = None,
    ) -> None:
        """Propose by lookup, and with `draft` where that promises more.

        `costs` are what is believed of passes; None is what the table says of this machine.
        """
        self.draft = draft
        self._costs = costs or StepCostModel(chip_costs(backend.architecture()))
        self._most = max_fused_queries(config.num_attention_heads, config.num_key_value_heads)
        self._size = count_weights(config)
        self._rates = AcceptanceRates()  # of lookup
        self._draft_rate = AcceptanceRate.believed(_DRAFTS_RIGHT)
        self._drafted: dict[SequenceState, int] = {}  # in the step in work
        self._drafting = 0.0  # seconds of it
        self._pause, self._waited = _FIRST_PAUSE, 0

    @property
    def token_bytes(self) -> int:
        """The bytes that the draft model keeps of a token."""
        return self.draft.token_bytes if self.draft else 0

    def make_cache(self) -> list[KVCache]:
        """Make what the draft model needs for a sequence, if there is one."""
        return self.draft.make_cache() if self.draft else []

    def ngram_proposer(self, ids: Sequence[int]) -> NgramProposer:
        """Make what sees what comes next in `ids`."""
        return NgramProposer(ids, self._rates)

    def should_wait(self, sequence: SequenceState, rows: int) -> bool:
        """Say whether to wait for the token on its way, so as to propose what follows it.

        `rows` are those of the step that would not wait. What lookup would propose begins with the
        token on its way, so it will be proposed if that one is right.
        """
        plan = self._best(sequence, rows - 1)
        if not plan.count:
            return False
        right = 1.0 if plan.drafted else plan.rate
        tokens = right * plan.tokens + (1 - right) * rows
        seconds = right * plan.seconds + (1 - right) * self._costs.of(rows, synchronous=True)
        return tokens / seconds > _WORTH * rows / self._costs.of(rows, synchronous=False)

    def propose(
        self, sequences: Sequence[SequenceState], rows: int
    ) -> dict[SequenceState, list[int]]:
        """Give what is proposed to go on with, for some of `sequences`.

        All that is known of them is read in this step, of `rows` rows without any proposals.
        """
        found: dict[SequenceState, list[int]] = {}
        drafted: dict[SequenceState, int] = {}
        for sequence in sequences:
            plan = self._best(sequence, rows - 1)
            rows += plan.count
            if plan.drafted:
                drafted[sequence] = plan.count
                self._pause = min(2 * self._pause, _LONGEST_PAUSE) if plan.trial else _FIRST_PAUSE
            elif plan.count and sequence.ngrams:
                found[sequence] = sequence.ngrams.propose(plan.count)
        self._drafted, started = drafted, time.perf_counter()
        if self.draft and drafted and (drafts := self.draft.propose(drafted)):
            found |= drafts
            self._waited = 0
        self._drafting = time.perf_counter() - started
        return found

    def observe(self, sequence: SequenceState, accepted: int) -> None:
        """Take note of how many of the tokens proposed for a sequence were right."""
        if proposed := self._drafted.pop(sequence, 0):
            for place in range(min(accepted + 1, proposed)):
                self._draft_rate.observe(hit=place < accepted)

    def observe_step(self, rows: int, seconds: float, *, synchronous: bool) -> None:
        """Take note of what a step took, the host's work included."""
        self._costs.observe(rows, seconds - self._drafting, synchronous=synchronous)
        self._waited, self._drafting = self._waited + 1, 0.0

    def _best(self, sequence: SequenceState, others: int) -> _Plan:
        """Weigh the ways to go on with a sequence, beside `others` rows of a step.

        Without a proposal the steps to come need not wait, but for those that a mask has wait.
        """
        alone = self._costs.of(others + 1, synchronous=sequence.needs_mask)
        plans = [_Plan(0, 0.0, others + 1, alone)]
        most = min(
            sequence.request.max_tokens - sequence.num_output - 1,
            sequence.room - len(sequence.ids) - 1,
        )
        if most < 1:
            return plans[0]
        lookup = sequence.ngrams
        if lookup and lookup.length:
            plans += self._candidates(sequence, lookup.rate.share, others, most)
        if self.draft:
            if self._waited >= self._pause:
                return _Plan(min(_TRIAL, most), 1.0, 1.0, 1e-9, drafted=True, trial=True)
            each = self._costs.of(1, synchronous=True) * self.draft.size / self._size
            if self._costs.measured and self.draft.seconds:
                each = self.draft.seconds
            plans += self._candidates(sequence, self._draft_rate.share, others, most, each)
        return max(plans, key=lambda plan: plan.speed)

    def _candidates(
        self, sequence: SequenceState, rate: float, others: int, most: int, each: float = 0.0
    ) -> Iterator[_Plan]:
        """Give plans for proposals that come true at `rate`; a draft takes `each` seconds."""
        wide = not each and len(sequence.ids) <= _WIDE_CONTEXT
        for width in self._costs.table:
            if 1 < width <= self._most or (width > FEW_QUERIES and wide):
                count = min(width - 1, most)
                tokens = others + sum(rate**place for place in range(count + 1))
                seconds = self._costs.of(others + 1 + count, synchronous=True) + each * count
                yield _Plan(count, rate, tokens, seconds, drafted=each > 0)
