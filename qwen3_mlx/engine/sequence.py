"""One request as it runs: its tokens, its caches, and what is still to be done."""

from collections.abc import Sequence

import mlx.core as mx

from qwen3_mlx.cache.kv import KVCache, next_capacity
from qwen3_mlx.cache.prefix import common_prefix
from qwen3_mlx.engine.request import Request, RequestResult, SampledLogprob
from qwen3_mlx.engine.sampling import Sampler
from qwen3_mlx.engine.speculation.ngram import NgramProposer
from qwen3_mlx.errors import Qwen3Error

FIRST_ROOM = 256  # tokens of a reply to have room for at once


class SequenceState:
    """A request's state, from its arrival to its end.

    `ids` are the prompt and the reply as far as the host knows them. Where the step in work chooses
    one more, `num_in_flight` is 1. `num_computed` tokens are in the caches, or will be when that
    step is done.
    """

    def __init__(self, request: Request, vocabulary: int, context: int) -> None:
        """Prepare to run `request`; no more than `context` tokens will be held.

        Raises:
            ValueError: it has no ids, or its `logit_bias` names one that is not in the vocabulary.
            Qwen3Error: prompt and reply are longer than the context.
        """
        if not request.ids:
            raise ValueError("a request needs at least one token to go on from")
        if (tokens := len(request.ids) + request.max_tokens) > context:
            raise Qwen3Error(f"the request may take {tokens:,} tokens; the context is {context:,}")
        self.request = request
        self.ids = list(request.ids)
        self.sampler = Sampler(
            request.sampling, seed=request.seed, vocabulary=vocabulary, prompt=request.ids
        )
        self.ngrams: NgramProposer | None = None  # what may come next, where anybody wants to know
        self.cached_tokens: int | None = None  # of the prompt, when it was first begun
        self.num_passes = 0  # in which a token was chosen
        self.proposed = self.accepted = 0  # tokens
        self.num_scored = 0  # tokens of the prompt after which the next one's probability is known
        self.reason: str | None = None  # why the reply has ended, if it has
        self.failure: BaseException | None = None  # of its constraint, to end with
        self.begun = False  # whether a token was chosen
        self.ended = False
        self.logits_rechecked = (
            False  # whether its logits have been checked because it was doubtful
        )
        self.num_to_keep: int | None = None  # tokens, when it has ended; None is all
        self._most = context + 1  # a write must never fill its buffer
        self.reset()

    def reset(self) -> None:
        """Be without caches: to start, or to start anew, with what has been chosen so far."""
        self.layers: list[KVCache] = []
        self.room = 0  # tokens that the caches have room for, or will after their next write
        self.num_computed = 0
        self.num_prefix_hit = 0  # tokens that were kept from another request
        self.num_in_flight = 0
        self.answering = False  # whether all has been read once, so that tokens are being chosen

    @property
    def priority(self) -> int:
        """Who comes first: the least."""
        return self.request.priority

    @property
    def client(self) -> str:
        """Whose request it is."""
        return self.request.client

    @property
    def num_uncomputed(self) -> int:
        """The tokens known that are not in the caches yet."""
        return len(self.ids) - self.num_computed

    @property
    def skippable(self) -> int:
        """The tokens that need not be read if other caches have them.

        The last token is read in any case: its logits are needed, and there is a step to end at.
        """
        most = len(self.ids) - 1
        return most if self.request.on_prompt_logprobs is None else min(most, self.num_scored)

    def unscored(self, length: int) -> range:
        """Return the places, of the next `length` tokens, whose logits score a prompt's token."""
        if self.request.on_prompt_logprobs is None:
            return range(0)
        end = min(self.num_computed + length, len(self.request.ids) - 1)
        return range(
            max(self.num_computed, self.num_scored), max(self.num_computed, self.num_scored, end)
        )

    @property
    def num_output(self) -> int:
        """The tokens of the reply that the host knows."""
        return len(self.ids) - len(self.request.ids)

    @property
    def num_sampled(self) -> int:
        """The tokens of the reply, the one that the host does not know yet included."""
        return self.num_output + self.num_in_flight

    @property
    def needs_mask(self) -> bool:
        """Whether its constraint must be asked before the next token is chosen."""
        try:
            return self.request.constraint is not None and self.request.constraint.needs_mask
        except BaseException as error:  # noqa: BLE001 - this request's alone
            self.failure = error
            return False

    @property
    def complete(self) -> bool:
        """Whether no forward pass is left to be done for this request."""
        if self.request.max_tokens == 0:
            return self.num_uncomputed == 0
        return self.ended or self.num_sampled >= self.request.max_tokens

    def room_for(self, tokens: int) -> int:
        """Give the room that the caches will have once they hold `tokens`."""
        return self.room if tokens <= self.room else min(next_capacity(tokens), self._most)

    def first_room(self) -> int:
        """Give the room to begin with: for all that is known, and some of what is to come."""
        if self.room > len(self.ids):
            return self.room
        return min(len(self.ids) + FIRST_ROOM, self._most)

    def reserve(self, room: int) -> None:
        """Have the caches make so much room at their next write, if they have less."""
        if room > self.room:
            self.room = room
            for layer in self.layers:
                layer.reserve(room)

    def truncate(self, tokens: int) -> None:
        """Have the caches forget what they have seen, or will have, beyond so many tokens."""
        for layer in self.layers:
            layer.truncate(tokens)
        self.num_computed = min(self.num_computed, tokens)

    # --- tokens ---------------------------------------------------------------------------------

    def commit(
        self,
        chosen: Sequence[tuple[int, SampledLogprob | None]],
        proposal: Sequence[int],
        *,
        masked: bool,
    ) -> bool:
        """Take what was chosen: as many tokens as were proposed, and the one that was not.

        `masked` says that each was chosen with the mask that was foreseen for its place. Gives
        whether the reply goes on as if it were alone: what its constraint takes back or forces
        changes what comes next.
        """
        tokens = [token for token, _ in chosen]
        right = common_prefix(tokens, proposal)
        if proposal:
            self.proposed += len(proposal)
            # What was chosen behind the first that differs stands on a token that never came.
            self.truncate(len(self.ids) + right)
        taken, goes_on = 0, True
        while goes_on and taken <= right:
            self.accepted += taken < right
            goes_on = self._commit_one(*chosen[taken], masked=masked)
            taken += 1
        if taken < len(tokens):
            self.sampler.rewind(mx.array(tokens[taken:]))
            self.truncate(len(self.ids) - 1)
        return goes_on

    def force(self) -> bool:
        """Take the tokens that the constraint forces, and say whether there were any."""
        constraint, any_forced = self.request.constraint, False
        while constraint and not self.reason and (forced := constraint.forced_tokens()):
            self.truncate(len(self.ids))  # a proposal may have been something else
            self._append(forced[: self.request.max_tokens - self.num_output], forced=True)
            any_forced = True
        return any_forced

    def _commit_one(self, token: int, chance: SampledLogprob | None, *, masked: bool) -> bool:
        request, constraint = self.request, self.request.constraint
        if request.progress and not self.begun:  # others may have been forced before
            request.progress(len(request.ids), len(request.ids))
        self.begun = True
        if self.ngrams:
            self.ngrams.score(token)
        self._append([token], chance)
        if self.reason or not constraint:
            return not self.reason
        changed = constraint.rollback > 0
        return not (self.force() or changed or (constraint.needs_mask and not masked))

    def _append(
        self, ids: list[int], chance: SampledLogprob | None = None, *, forced: bool = False
    ) -> None:
        """Add tokens to the reply, and see whether that ends it."""
        request, constraint = self.request, self.request.constraint
        end = next((place for place, token in enumerate(ids) if token in request.end_ids), None)
        ids = ids if end is None else ids[: end + 1]
        self.ids += ids
        if forced:  # what is chosen was counted as it was chosen
            self.sampler.force(mx.array(ids))
        if self.ngrams:
            self.ngrams.index_new()
        if constraint:
            constraint.advance(ids)
            if constraint.rollback:
                self._roll_back(constraint.rollback, new=len(ids))
                return
        if chance and request.on_logprobs:
            request.on_logprobs(chance)
        if told := ids[:end]:
            request.sink.advance(told)
        if end is not None or request.sink.finished or (constraint and constraint.finished):
            self.reason = "stop"
        elif self.num_output >= request.max_tokens:
            self.reason = "length"

    def _roll_back(self, count: int, *, new: int) -> None:
        """Take back the last `count` tokens, of which the watcher has not heard of `new`."""
        self.sampler.rewind(mx.array(self.ids[-count:]))
        if self.ngrams:
            self.ngrams.forget(count)
        del self.ids[-count:]
        self.truncate(len(self.ids))
        if count > new:
            self.request.sink.rewind(count - new)

    def result(self, reason: str) -> RequestResult:
        """Sum up a generation that has ended."""
        counts = (self.num_passes, self.proposed, self.accepted)
        return RequestResult(reason, self.num_output, self.cached_tokens or 0, *counts)
