"""Speculative decoding: several tokens from one forward pass, without changing the output.

Draft tokens are proposed, by n-gram lookup or by a draft model, and one pass of the large model
reads all of them. Each position is then sampled exactly as it would be without them: with the same
logits, penalties and mask, and with the same randomness, which depends only on the seed and the
position. As long as the sampled token is the draft token, the next position is computed already;
the first that differs is taken, and what follows it is rolled back. Rejection sampling (arXiv
2211.17192) keeps the distribution of the output; this keeps the output itself, and accepts a token
just as often where one token is proposed for each position, as here.

Draft tokens cost time: a pass over more rows takes longer, and the pipeline waits for the token
that they follow. So the tokens expected of them are weighed against the measured time of such
passes, and the plan with the most tokens a second is taken, which may be none. Acceptance rates of
n-gram lookup are observed also while nothing is proposed.

The rows of a step are the tokens of all sequences that it reads.
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
from qwen3_mlx.engine.speculation.ngram import AcceptanceRate, AcceptanceRates
from qwen3_mlx.engine.speculation.step_cost import StepCostModel, chip_costs
from qwen3_mlx.model.config import ModelConfig

_MAX_WIDE_CONTEXT = 4096  # tokens; beyond, kernels for many queries do not split the keys
_MIN_SPEEDUP = 1.1  # expected speedup for which the pipeline waits
_PRIOR_DRAFT_RATE = 0.6  # acceptance rate of a draft model, assumed before any is observed
# A draft model that does not pay is tried again after a pause, which doubles up to a limit.
_TRIAL_TOKENS = 2
_MIN_PAUSE, _MAX_PAUSE = 64, 1024  # steps without draft tokens of the model


@dataclass(frozen=True, slots=True)
class _Plan:
    """A number of draft tokens for one sequence, and what a step is expected to give with them."""

    count: int  # draft tokens
    rate: float  # acceptance rate
    tokens: float  # that the step is expected to give, over all sequences
    seconds: float  # that it is expected to take
    drafted: bool = False  # by the draft model
    trial: bool = False  # taken whatever its speed, to measure the draft model

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


class Speculator:
    """Chooses the proposer and the number of draft tokens for each sequence of an engine."""

    def __init__(
        self,
        config: ModelConfig,
        draft: DraftModel | None = None,
        costs: StepCostModel | None = None,
    ) -> None:
        """Create a speculator of n-gram lookup, and of `draft` where that promises more.

        `costs` are the expected times of passes; None takes the table's for this machine.
        """
        self.draft = draft
        self._costs = costs or StepCostModel(chip_costs(backend.architecture()))
        self._max_queries = max_fused_queries(
            config.num_attention_heads, config.num_key_value_heads
        )
        self._num_weights = count_weights(config)
        self.ngram_rates = AcceptanceRates()
        self._draft_rate = AcceptanceRate.from_prior(_PRIOR_DRAFT_RATE)
        self._num_drafted: dict[SequenceState, int] = {}  # draft tokens, in this step
        self._drafting_seconds = 0.0  # of this step
        self._pause, self._steps_since_draft = _MIN_PAUSE, 0

    @property
    def token_bytes(self) -> int:
        """The bytes of a token in the draft model's KV cache."""
        return self.draft.token_bytes if self.draft else 0

    def make_cache(self) -> list[KVCache]:
        """Create the draft model's caches of a sequence; none without a draft model."""
        return self.draft.make_cache() if self.draft else []

    def should_wait(self, sequence: SequenceState, rows: int) -> bool:
        """Return whether to wait for the token in flight, to propose draft tokens behind it.

        `rows` are those of a step that does not wait. The draft of n-gram lookup begins with the
        token in flight, so it is proposed only if that one is right.
        """
        plan = self._best_plan(sequence, rows - 1)
        if not plan.count:
            return False
        probability = 1.0 if plan.drafted else plan.rate
        tokens = probability * plan.tokens + (1 - probability) * rows
        not_proposed = self._costs.of(rows, synchronous=True)
        seconds = probability * plan.seconds + (1 - probability) * not_proposed
        return tokens / seconds > _MIN_SPEEDUP * rows / self._costs.of(rows, synchronous=False)

    def propose(
        self, sequences: Sequence[SequenceState], rows: int
    ) -> dict[SequenceState, list[int]]:
        """Return draft tokens for some of `sequences`.

        This step reads all their known tokens; it has `rows` rows without draft tokens.
        """
        proposals: dict[SequenceState, list[int]] = {}
        num_drafted: dict[SequenceState, int] = {}
        for sequence in sequences:
            plan = self._best_plan(sequence, rows - 1)
            rows += plan.count
            if plan.drafted:
                num_drafted[sequence] = plan.count
                self._pause = min(2 * self._pause, _MAX_PAUSE) if plan.trial else _MIN_PAUSE
            elif plan.count and sequence.ngrams:
                proposals[sequence] = sequence.ngrams.propose(plan.count)
        self._num_drafted, started = num_drafted, time.perf_counter()
        if self.draft and num_drafted and (drafts := self.draft.propose(num_drafted)):
            proposals |= drafts
            self._steps_since_draft = 0
        self._drafting_seconds = time.perf_counter() - started
        return proposals

    def observe(self, sequence: SequenceState, accepted: int) -> None:
        """Record how many draft tokens of a sequence were accepted."""
        if proposed := self._num_drafted.pop(sequence, 0):
            # Behind the first rejected token nothing is known.
            for position in range(min(accepted + 1, proposed)):
                self._draft_rate.observe(hit=position < accepted)

    def observe_step(self, rows: int, seconds: float, *, synchronous: bool) -> None:
        """Record the time of a step, the host's work included."""
        self._costs.observe(rows, seconds - self._drafting_seconds, synchronous=synchronous)
        self._steps_since_draft, self._drafting_seconds = self._steps_since_draft + 1, 0.0

    def _best_plan(self, sequence: SequenceState, others: int) -> _Plan:
        """Return the fastest plan for a sequence, beside `others` rows of the step.

        Without draft tokens the next steps need not wait, unless a mask makes them.
        """
        seconds = self._costs.of(others + 1, synchronous=sequence.needs_mask)
        plans = [_Plan(0, 0.0, others + 1, seconds)]
        # Draft tokens never exceed `max_tokens`, and never make the caches grow.
        limit = min(
            sequence.request.max_tokens - sequence.num_output - 1,
            sequence.room - len(sequence.ids) - 1,
        )
        if limit < 1:
            return plans[0]
        ngrams = sequence.ngrams
        if ngrams and ngrams.length:
            plans += self._plans(sequence, ngrams.rate.share, others, limit)
        if self.draft:
            if self._steps_since_draft >= self._pause:
                return _Plan(min(_TRIAL_TOKENS, limit), 1.0, 1.0, 1e-9, drafted=True, trial=True)
            draft_seconds = (
                self._costs.of(1, synchronous=True) * self.draft.size / self._num_weights
            )
            if self._costs.measured and self.draft.seconds.value:
                draft_seconds = self.draft.seconds.value
            plans += self._plans(sequence, self._draft_rate.share, others, limit, draft_seconds)
        return max(plans, key=lambda plan: plan.speed)

    def _plans(
        self,
        sequence: SequenceState,
        rate: float,
        others: int,
        limit: int,
        draft_seconds: float = 0.0,
    ) -> Iterator[_Plan]:
        """Yield plans of up to `limit` draft tokens at an acceptance `rate`.

        A draft token takes `draft_seconds`; 0.0 for those of n-gram lookup.
        """
        wide = not draft_seconds and len(sequence.ids) <= _MAX_WIDE_CONTEXT
        for width in self._costs.table:
            if 1 < width <= self._max_queries or (width > FEW_QUERIES and wide):
                count = min(width - 1, limit)
                tokens = others + sum(rate**position for position in range(count + 1))
                seconds = self._costs.of(others + 1 + count, synchronous=True)
                seconds += draft_seconds * count
                yield _Plan(count, rate, tokens, seconds, drafted=draft_seconds > 0)
