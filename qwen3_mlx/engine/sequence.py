"""The state of one running request: its tokens, its caches, and how far both have come."""

from collections.abc import Sequence

import mlx.core as mx

from qwen3_mlx.cache.kv import next_capacity
from qwen3_mlx.cache.prefix import common_prefix
from qwen3_mlx.cache.sequence_caches import SequenceCaches
from qwen3_mlx.engine.request import Phase, Request, RequestResult, SampledLogprob
from qwen3_mlx.engine.sampling import Sampler
from qwen3_mlx.engine.speculation.ngram import AcceptanceRates, NgramProposer
from qwen3_mlx.errors import Qwen3Error

FIRST_ROOM = 256  # tokens of the reply that a sequence has room for when it starts


class SequenceState:
    """State of a request, from its arrival to its end.

    `ids` are the prompt and the reply as far as the host knows them. Where the step in flight
    chooses one more, `num_in_flight` is 1. `num_computed` tokens are in the caches, or will be when
    that step is done; `num_prefix_hit` came from the prefix cache. Only its methods change fields.
    """

    def __init__(
        self,
        request: Request,
        vocabulary: int,
        context: int,
        ngram_rates: AcceptanceRates | None = None,
    ) -> None:
        """Create the state of `request`, of at most `context` tokens; `ngram_rates` for lookup.

        Raises:
            ValueError: it has no ids, or its `logit_bias` names one that is not in the vocabulary.
            Qwen3Error: prompt and reply are longer than the context.
        """
        _check_length(request, context)
        self.request = request
        self.priority, self.client = request.priority, request.client
        self.outcome: RequestResult | BaseException | None = None  # set by `end`
        self.reported = False  # True once the outcome is
        self.ids = list(request.ids)
        self._vocabulary = vocabulary
        self.sampler = Sampler(
            request.sampling, seed=request.seed, vocabulary=vocabulary, prompt=request.ids
        )
        self.ngrams = NgramProposer(self.ids, ngram_rates) if ngram_rates else None
        self.cached_tokens: int | None = None  # prompt tokens in the prefix cache at admission
        self.num_passes = 0  # forward passes in which a token was chosen
        self.num_drafted = self.num_accepted = 0  # draft tokens
        self.num_scored = request.score_from  # prompt positions whose next token has its logprob
        self.failure: BaseException | None = None  # raised by the constraint; ends the request
        self._prompt_reported = False
        # One more than it may take: a write must never fill its buffer (see `next_capacity`).
        # A prompt that is only read is kept for a request that has more.
        more = request.max_tokens or FIRST_ROOM
        self._max_room = min(len(request.ids) + more, context) + 1
        self.drop_caches()

    # --- phases ---------------------------------------------------------------------------------

    def start(self, caches: SequenceCaches, num_computed: int) -> None:
        """Begin the prefill, with caches that hold the first `num_computed` tokens."""
        self.phase = Phase.PREFILL
        self.caches = caches
        self.num_computed = self.num_prefix_hit = num_computed
        if self.cached_tokens is None:
            self.cached_tokens = min(num_computed, len(self.request.ids))

    def begin_pass(self, tokens: int, *, last_chunk: bool, scored: range | None) -> None:
        """Count a forward pass that reads `tokens` more, draft tokens included.

        The counters run ahead of the device; `truncate` takes back what is rejected or dropped.
        """
        self.num_computed += tokens
        if scored is not None:
            self.num_scored = max(self.num_scored, scored.stop)
        if last_chunk:
            self.phase = Phase.DECODE
            self.num_in_flight = int(self.request.max_tokens > 0)
            self.num_passes += self.num_in_flight

    def end_pass(self) -> None:
        """Count no token in flight: the step that chooses it is done."""
        self.num_in_flight = 0

    def end(self, outcome: str | BaseException) -> None:
        """End the request with an error, or with the reason stop, length or cancelled."""
        if isinstance(outcome, str):
            counts = (self.num_passes, self.num_drafted, self.num_accepted)
            self.outcome = RequestResult(outcome, self.num_output, self.cached_tokens or 0, *counts)
        else:
            self.outcome = outcome
        self.phase = Phase.ENDED

    def report(self) -> RequestResult | BaseException | None:
        """Return the outcome of an ended request, and None if it has been returned before."""
        if self.reported:
            return None
        self.reported = self.ended
        return self.outcome

    def drop_caches(self) -> None:
        """Drop the caches; unless it has ended, the request starts again with its tokens so far."""
        if self.outcome is None:
            self.phase = Phase.WAITING
        self.caches = SequenceCaches()
        self.num_computed = self.num_prefix_hit = self.num_in_flight = 0

    @property
    def ended(self) -> bool:
        """True if the request has its outcome."""
        return self.phase is Phase.ENDED

    @property
    def room(self) -> int:
        """The tokens that the caches have room for, or will after their next write."""
        return self.caches.room

    @property
    def num_uncomputed(self) -> int:
        """The known tokens that are not in the caches yet."""
        return len(self.ids) - self.num_computed

    @property
    def num_output(self) -> int:
        """The tokens of the reply that the host knows."""
        return len(self.ids) - len(self.request.ids)

    @property
    def needs_mask(self) -> bool:
        """True if the constraint masks the next token."""
        try:
            return self.request.constraint is not None and self.request.constraint.needs_mask
        except BaseException as error:  # noqa: BLE001 - ends this request only
            self.failure = error  # a step for all is being built, which must go on
            return False

    @property
    def complete(self) -> bool:
        """True if this request needs no more forward passes."""
        if self.request.max_tokens == 0:
            return self.num_uncomputed == 0
        # With the token in flight, so that no step is built beyond `max_tokens`.
        return self.ended or self.num_output + self.num_in_flight >= self.request.max_tokens

    def initial_room(self) -> int:
        """Return the room to start with: for all known tokens and `FIRST_ROOM` of the reply."""
        room = self.caches.room
        return room if room > len(self.ids) else min(len(self.ids) + FIRST_ROOM, self._max_room)

    def room_for(self, tokens: int) -> int:
        """Return the room once the caches hold `tokens`: it grows by a quarter at a time."""
        room = self.caches.room
        return room if tokens <= room else min(next_capacity(tokens), self._max_room)

    def reserve(self, room: int) -> None:
        """Grow the caches to `room` tokens at their next write, if they have less."""
        self.caches.reserve(room)

    def truncate(self, tokens: int) -> None:
        """Remove all but the first `tokens` from the caches."""
        self.caches.truncate(tokens)
        self.num_computed = min(self.num_computed, tokens)

    def index_ngrams(self) -> None:
        """Index new tokens for n-gram lookup; after an error the sequence goes without."""
        proposer, self.ngrams = self.ngrams, None
        if proposer:
            proposer.index_new()
            self.ngrams = proposer

    # --- tokens ---------------------------------------------------------------------------------

    def commit(
        self,
        chosen: Sequence[tuple[int, SampledLogprob | None]],
        draft: Sequence[int],
        *,
        masked: bool,
    ) -> bool:
        """Append the accepted draft tokens and the first token that differs or follows them.

        `chosen` are the tokens of all rows: one for each draft token in `draft` and one more.
        `masked` is True if each was chosen with its lookahead mask. Returns whether a step that was
        built ahead on these tokens stays valid: it does not if the reply has ended, or if the
        constraint takes back, forces or masks what comes next.
        """
        tokens = [token for token, _ in chosen]
        num_matching = common_prefix(tokens, draft)
        if draft:
            self.num_drafted += len(draft)
            # Tokens behind the first that differs were computed from a rejected draft token.
            self.truncate(len(self.ids) + num_matching)
        num_committed, next_step_valid = 0, True
        # An accepted token counts only if it is committed: the reply may end before it.
        while next_step_valid and num_committed <= num_matching:
            self.num_accepted += num_committed < num_matching
            next_step_valid = self._commit_one(*chosen[num_committed], masked=masked)
            num_committed += 1
        if num_committed < len(tokens):
            # Dropped tokens are drawn again, so a seed gives the same reply without speculation.
            self.sampler.rewind(mx.array(tokens[num_committed:]))
            self.truncate(len(self.ids) - 1)
        return next_step_valid

    def force(self) -> bool:
        """Append the tokens that the constraint forces; return whether there were any."""
        constraint, any_forced = self.request.constraint, False
        # In a loop: a constraint that has taken forced tokens may force more, or take them back.
        while constraint and not self.ended and (forced := constraint.forced_tokens()):
            refuse_unknown(forced, self._vocabulary)
            self.truncate(len(self.ids))  # the caches may hold other draft tokens there
            self._append(forced[: self.request.max_tokens - self.num_output], forced=True)
            any_forced = True
        return any_forced

    def _commit_one(self, token: int, logprob: SampledLogprob | None, *, masked: bool) -> bool:
        """Append one chosen token and those forced after it; return as `commit` does."""
        request, constraint = self.request, self.request.constraint
        # Not by the length of the reply: tokens may have been forced before.
        if request.progress and not self._prompt_reported:
            request.progress(len(request.ids), len(request.ids))
        self._prompt_reported = True
        if self.ngrams:
            self.ngrams.observe(token)
        self._append([token], logprob)
        if self.ended or not constraint:
            return not self.ended
        # Read before `force`: the next `advance` resets it.
        rolled_back = constraint.rollback > 0
        return not (self.force() or rolled_back or (constraint.needs_mask and not masked))

    def _append(
        self, ids: list[int], logprob: SampledLogprob | None = None, *, forced: bool = False
    ) -> None:
        """Append tokens to the reply, and end the request if they end it."""
        request, constraint = self.request, self.request.constraint
        end = next((index for index, token in enumerate(ids) if token in request.end_ids), None)
        ids = ids if end is None else ids[: end + 1]
        self.ids += ids
        if forced:  # chosen tokens were counted when they were sampled
            self.sampler.force(mx.array(ids))
        if self.ngrams:
            self.ngrams.index_new()
        # The constraint comes before the sink: tokens that it takes back at once are never shown.
        if constraint:
            constraint.advance(ids)
            if constraint.rollback:
                self._roll_back(constraint.rollback, unseen=len(ids))
                return
        if logprob and request.on_logprobs:
            request.on_logprobs(logprob)
        if shown := ids[:end]:
            request.sink.advance(shown)
        if end is not None or request.sink.finished or (constraint and constraint.finished):
            self.end("stop")
        elif self.num_output >= request.max_tokens:
            self.end("length")

    def _roll_back(self, count: int, *, unseen: int) -> None:
        """Remove the last `count` tokens, of which the sink has not received the last `unseen`."""
        self.sampler.rewind(mx.array(self.ids[-count:]))
        if self.ngrams:
            self.ngrams.rewind(count)  # before the ids go: it reads them
        del self.ids[-count:]
        self.truncate(len(self.ids))
        if count > unseen:
            self.request.sink.rewind(count - unseen)


def refuse_unknown(ids: Sequence[int], rows: int) -> None:
    """Refuse ids beyond the rows of the embedding: MLX would read other memory for them.

    Raises:
        Qwen3Error: there is one.
    """
    if (largest := max(ids, default=0)) >= rows:
        raise Qwen3Error(f"the model knows {rows:,} tokens, and token {largest} is none of them")


def _check_length(request: Request, context: int) -> None:
    if not request.ids:
        raise ValueError("a request needs at least one token to go on from")
    if (tokens := len(request.ids) + request.max_tokens) > context:
        raise Qwen3Error(f"the request may take {tokens:,} tokens; the context is {context:,}")
