"""The engine's step: schedule, build the forward pass, run it, commit the chosen tokens.

Runs on the thread that owns the network. A step is built while the step before it runs, and is
submitted when that one is done: submitted earlier, it would find the caches in use, and its writes
would copy them. So the engine is one token ahead of what it has reported, and drops a token that
turns out to be unwanted.
"""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING
from weakref import WeakSet

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.cache.attention import LayerCache
from qwen3_mlx.cache.disk import DiskPrefixes
from qwen3_mlx.engine.activity import Meter
from qwen3_mlx.engine.cache_manager import CacheManager, best_effort, free_buffers
from qwen3_mlx.engine.forward import BatchSlice, forward, prefill_chunks
from qwen3_mlx.engine.logits import Logits, plan_logits
from qwen3_mlx.engine.logprobs import LogprobBatch
from qwen3_mlx.engine.memory import RESERVE, Budget, Workload
from qwen3_mlx.engine.memory_ledger import Share, claim, release
from qwen3_mlx.engine.prompt_logprobs import PromptLogprobBatch
from qwen3_mlx.engine.request import Request, RequestResult, SampledLogprob
from qwen3_mlx.engine.sampling import choose
from qwen3_mlx.engine.scheduler import Scheduler, Step
from qwen3_mlx.engine.sequence import SequenceState
from qwen3_mlx.engine.speculation.speculator import Speculator
from qwen3_mlx.errors import CheckpointError, ContextError, Qwen3Error
from qwen3_mlx.model.qwen3 import Qwen3

if TYPE_CHECKING:
    from qwen3_mlx.engine.hooks import Mask

_log = logging.getLogger(__name__)
_DEVICE_FAILED = (
    "the device failed, probably because it is out of memory ({}); its caches were dropped"
)
_ENGINE_FAILED = (
    "the engine failed ({}: {}); this is a bug, and the caches of the step were dropped"
)


@dataclass(slots=True)
class InFlightStep:
    """A step that is built, and then submitted to the device. N rows, V vocabulary."""

    rows: Sequence[SequenceState]  # [N]; a sequence with draft tokens has several adjacent rows
    sequences: Sequence[SequenceState]  # those whose caches the step writes
    tokens: mx.array | None  # [N], the chosen ones
    synchronous: bool  # True if it was built only after the step before it had been committed
    num_tokens: int  # tokens that the forward pass reads
    num_prefill_tokens: int  # tokens of prompts among them
    arrays: list[mx.array]  # all that must be evaluated when the step is done
    logprobs: LogprobBatch | None = None
    draft_tokens: Mapping[SequenceState, list[int]] = field(default_factory=dict)
    lookahead_masks: Mapping[SequenceState, object] = field(default_factory=dict)
    submitted: float = 0.0
    discarded: list[SequenceState] = field(default_factory=list)  # their chosen token is dropped
    logits: mx.array | None = None  # [N, V]
    finite: mx.array | None = None  # [N], set if a request's first token is among those chosen
    prompt_logprobs: PromptLogprobBatch | None = None


class EngineCore:
    """Holds the sequences, their caches and the prefix cache, and advances them step by step."""

    def __init__(
        self,
        model: Qwen3,
        vocabulary: int,
        available: int | None,
        context: int | None,
        disk: DiskPrefixes | None,
        speculator: Speculator | None,
    ) -> None:
        """Claim memory and set up empty caches; see `Engine`."""
        self.model = model
        self.speculator = speculator
        self._vocabulary = vocabulary
        work = Workload(
            context=0,
            itemsize=model.model.norm.weight.dtype.size,
            cache=model.cache_format,
            chunk=backend.prefill_chunk(),
            fused=backend.on_gpu(),
            draft_token_bytes=speculator.token_bytes if speculator else 0,
        )

        def min_bytes(free: int) -> int:
            budget = Budget(model.config, work, free)
            return budget.min_bytes(min(budget.context, context or budget.context))

        if available is None:
            self.share = claim(lambda: backend.available_memory() - RESERVE, min_bytes)
        else:  # the caller has set this memory aside: the ledger does not count it
            self.share = Share(available - RESERVE)
        try:
            self._set_up(model, work, context, disk)
        except BaseException:
            release(self.share)
            raise

    def _set_up(
        self, model: Qwen3, work: Workload, context: int | None, disk: DiskPrefixes | None
    ) -> None:
        self.budget = Budget(model.config, work, max(0, self.share.available))
        self.context = min(self.budget.context, context or self.budget.context)
        # Weak: the memory of these jobs is free again when they are collected.
        self._logits_jobs: WeakSet[Logits] = WeakSet()
        self.scheduler: Scheduler[SequenceState] = Scheduler(self.budget.tokens, self)
        self.token_meter = Meter()
        self.caches = CacheManager(model, self.speculator, disk, self.budget.tokens)
        self._in_flight_step: InFlightStep | None = None
        self._committed_at: float | None = None  # set while steps follow one another at once
        # After an error these name the sequences whose caches an unfinished step may have touched.
        self._building: Sequence[SequenceState] = ()
        self._committing: Sequence[SequenceState] = ()

    def add(self, request: Request) -> None:
        """Add a request to those that wait, or end it with an error if it cannot run."""
        try:
            sequence = SequenceState(request, self._vocabulary, self.context)
            if self.speculator and request.max_tokens:
                sequence.ngrams = self.speculator.ngram_proposer(sequence.ids)
            self.scheduler.add(sequence)
        except BaseException as error:  # noqa: BLE001 - ends this request only
            self._notify(request, error)

    def step(self) -> bool:
        """Run the next step, and return False if no work is left."""
        try:
            self._update_budget()
            self._drop_cancelled()
            if self._in_flight_step and self._next_depends_on(self._in_flight_step):
                self._commit()
            next_step = self._build(self.scheduler.next_step())
            self._commit(next_step)
        except Exception as error:  # noqa: BLE001 - ends the requests of the step
            self._fail_step(error)
        if self._in_flight_step or self.scheduler.running or self.scheduler.waiting:
            return True
        self._committed_at = None
        free_buffers()
        self._update_budget()
        return False

    def forget(self) -> None:
        """Clear the prefix cache."""
        self.caches.clear()
        self._update_budget()

    def logits(self, ids: Sequence[int]) -> Logits:
        """Create the job that computes the logits of all ids, and set its memory aside.

        Raises:
            ContextError: there are more ids than the context window has.
            Qwen3Error: they take more memory than is free.
        """
        if len(ids) > self.context:
            raise ContextError(
                f"{len(ids):,} ids are more than the context window of {self.context:,}; "
                "ask for the logits of fewer"
            )
        self._update_budget()
        config = self.model.config
        free = self.budget.available - self.budget.bytes_of(
            self.scheduler.held() - self.held_by_prefixes()
        )
        total, chunk = plan_logits(config, self.budget.work, len(ids), free)
        logits = Logits(self.model, ids, total, chunk)
        self._logits_jobs.add(logits)
        self._update_budget()
        self.evict(self.scheduler.held() - self.scheduler.room)
        return logits

    def advance_logits(self, logits: Logits) -> bool:
        """Compute one more chunk, a short one while requests run; return whether ids are left."""
        running, chunk = self.scheduler.running, logits.chunk
        return logits.advance(
            self.scheduler.prefill_budget(Step(running, []), chunk) if running else chunk
        )

    def _update_budget(self) -> None:
        """Report to the ledger what caches hold, and adapt the room to what they may take now."""
        self.share.held = self.budget.bytes_of(self.scheduler.held())
        available = self.share.available - sum(logits.nbytes for logits in self._logits_jobs)
        available = max(0, available)
        if available != self.budget.available:
            self.budget = replace(self.budget, available=available)
            self.scheduler.room = self.budget.tokens
            self.caches.resize(self.budget.tokens)

    def cancel_all(self) -> None:
        """Cancel all requests that run or wait, once the step in flight is done."""
        try:
            mx.eval(self._in_flight_step.arrays if self._in_flight_step else [])
        except RuntimeError as error:
            _log.debug("the last step failed: %s", error)
        self._in_flight_step = None
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            self.scheduler.remove(sequence)
            if not sequence.ended:
                self._notify(sequence.request, sequence.result("cancelled"))

    def fail_all(self, error: BaseException, arrived: Sequence[Request]) -> None:
        """End all requests that run, wait or have just `arrived`, and drop all caches.

        The last resort, after an error that nothing else has handled: so it calls little that may
        fail again.
        """
        unfinished = [s for s in (*self.scheduler.running, *self.scheduler.waiting) if not s.ended]
        self.scheduler.clear()
        self._in_flight_step, self._building, self._committing = None, (), ()
        self.caches.abandon_batch()
        for sequence in unfinished:
            sequence.ended = True
        for request in (*(sequence.request for sequence in unfinished), *arrived):
            self._notify(request, _as_engine_error(error))
        self.forget()

    def _drop_cancelled(self) -> None:
        """End the sequences whose request is cancelled or whose constraint has failed."""
        for sequence in (*self.scheduler.waiting, *self.scheduler.running):
            if sequence.failure and not sequence.ended:
                self._finish(sequence, sequence.failure)
            if sequence.request.cancelled.is_set() and not sequence.ended:
                self._finish(sequence, sequence.result("cancelled"))

    # --- build ----------------------------------------------------------------------------------

    def _next_depends_on(self, step: InFlightStep) -> bool:
        """Return whether the next step can be built only when the tokens of `step` are known."""
        # With draft tokens it is open how many come next; a mask is computed from the last token.
        if step.draft_tokens or any(sequence.needs_mask for sequence in step.rows):
            return True
        num_rows, speculator = len(step.rows), self.speculator
        return speculator is not None and any(
            speculator.should_wait(sequence, num_rows) for sequence in step.rows
        )

    def _build(self, step: Step[SequenceState]) -> InFlightStep | None:
        """Build a forward pass and the sampling after it, without waiting for the device."""
        # Sequences whose last token is still on the device come first: their ids are taken from the
        # array of the step in flight, and those that the host knows follow behind it.
        in_flight = [sequence for sequence in step.decoding if sequence.num_in_flight]
        on_host = [sequence for sequence in step.decoding if not sequence.num_in_flight]
        self._building = on_host  # before `_propose`: a draft model writes their caches
        draft_tokens, lookahead_masks = self._propose(on_host, len(step.decoding))
        on_host = [sequence for sequence in on_host if not sequence.ended]
        lengths = [1] * len(in_flight) + [sequence.num_uncomputed for sequence in on_host]
        chunks = self._prefill_chunks(step)
        on_host += chunks
        lengths += chunks.values()
        if not lengths:
            return None
        self._building = [*in_flight, *on_host]
        ids = self._input_ids(in_flight, on_host, lengths[len(in_flight) :], draft_tokens)
        rows, slices, arrays = list[SequenceState](), [], list[mx.array]()
        draft_by_row: dict[int, int] = {}  # the draft token read before a row of `rows`
        # By sequence: prompt positions to score, and the hidden state of the first of them.
        prompt_positions: dict[SequenceState, tuple[range, int]] = {}
        # The forward pass returns hidden states of the last positions of each slice, end to end.
        # For prompt logprobs that is more than those whose logits are sampled from.
        logit_rows, num_hidden = list[int](), 0
        for sequence, length in zip(self._building, lengths, strict=True):
            self._index_ngrams(sequence)
            is_last_chunk = sequence.num_in_flight == 1 or length == sequence.num_uncomputed
            draft = draft_tokens.get(sequence, [])
            samples = is_last_chunk and sequence.request.max_tokens > 0
            num_rows = 1 + len(draft) if samples else 0
            unscored = sequence.positions_to_score(length)
            num_wanted = max(
                num_rows, sequence.num_computed + length - unscored.start if unscored else 0
            )
            if sequence.request.on_prompt_logprobs and not sequence.answering:
                prompt_positions[sequence] = unscored, num_hidden
                sequence.num_scored = max(sequence.num_scored, unscored.stop)
            slices.append(
                BatchSlice(self.caches.of_model(sequence), length + len(draft), num_wanted)
            )
            num_hidden += num_wanted
            logit_rows += range(num_hidden - num_rows, num_hidden)
            draft_by_row |= dict(enumerate(draft, len(rows) + 1))
            rows += [sequence] * num_rows
            # The counters run ahead of the device: the next step is built before this one is done.
            # If draft tokens are rejected, or the choice is dropped, `truncate` takes them back.
            sequence.num_computed += length + len(draft)
            sequence.answering |= is_last_chunk
            sequence.num_in_flight = int(samples)
            sequence.num_passes += samples
        logits, prompt_logprobs = self._forward(ids, slices, prompt_positions, logit_rows)
        arrays += prompt_logprobs.arrays if prompt_logprobs else ()
        for part in slices:
            # The logits do not depend on these caches: without this they would stay unevaluated,
            # and each chunk would add to the graph.
            if not part.wanted:
                arrays += [array for layer in part.layers for array in layer.state]
        tokens = logprobs = finite = None
        if logits is not None:
            masks = self._masks(rows, logits, lookahead_masks)
            tokens = choose(logits, [s.sampler for s in rows], masks, draft_by_row)
            logprobs = LogprobBatch.of(logits, tokens, rows, self._vocabulary)
            arrays += [tokens, *(logprobs.arrays if logprobs else ())]
            # The first logits of each request are checked for NaN and infinity; later ones only if
            # the reply looks like that of a broken network (`recheck_logits`).
            if any(sequence.num_passes == 1 for sequence in rows):
                finite = mx.isfinite(logits[:, : self._vocabulary]).all(axis=-1)
                arrays.append(finite)
        return InFlightStep(
            rows,
            sequences=self._building,
            tokens=tokens,
            synchronous=self._in_flight_step is None,
            num_tokens=ids.size,
            num_prefill_tokens=sum(chunks.values()),
            arrays=arrays,
            logprobs=logprobs,
            draft_tokens=draft_tokens,
            lookahead_masks=lookahead_masks,
            logits=logits,
            finite=finite,
            prompt_logprobs=prompt_logprobs,
        )

    def _forward(
        self,
        ids: mx.array,
        slices: Sequence[BatchSlice],
        prompt_positions: Mapping[SequenceState, tuple[range, int]],
        logit_rows: Sequence[int],
    ) -> tuple[mx.array | None, PromptLogprobBatch | None]:
        """Return the logits of `logit_rows`, and the logprobs of prompts, both unevaluated."""
        batched = self._batched_layers(slices)
        if not prompt_positions:
            return forward(self.model, ids, slices, batched), None
        hidden = forward(self.model, ids, slices, batched, head=False)
        prompt_logprobs = PromptLogprobBatch.of(
            self.model, hidden, prompt_positions, self._vocabulary
        )
        if hidden is None or not logit_rows:
            return None, prompt_logprobs
        return self.model.head(hidden[mx.array(list(logit_rows))]), prompt_logprobs

    def _batched_layers(self, slices: Sequence[BatchSlice]) -> Sequence[LayerCache] | None:
        """Return caches that hold all sequences of the step, if it only decodes; else None."""
        if all(part.length == part.wanted == 1 for part in slices):
            room = self.scheduler.room - self.scheduler.held()
            return self.caches.batched_layers([part.layers for part in slices], room)
        self.caches.split_batch()
        return None

    def _propose(
        self, sequences: Sequence[SequenceState], num_rows: int
    ) -> "tuple[dict[SequenceState, list[int]], dict[SequenceState, list[Mask | None]]]":
        """Return draft tokens for some sequences, and the lookahead masks for them."""
        proposals = self.speculator.propose(sequences, num_rows) if self.speculator else {}
        lookahead_masks: dict[SequenceState, list[Mask | None]] = {}
        for sequence in [sequence for sequence in proposals if sequence.needs_mask]:
            assert sequence.request.constraint
            try:
                masks = sequence.request.constraint.lookahead_masks(proposals[sequence])
                lookahead_masks[sequence] = [_check_mask(mask) for mask in masks]
                proposals[sequence] = proposals[sequence][: len(masks) - 1]
                # The draft model's caches hold the draft tokens that the constraint has cut off.
                sequence.truncate(len(sequence.ids) - 1)
            except BaseException as error:  # noqa: BLE001 - ends this request only
                self._finish(sequence, error)
        draft_tokens = {s: draft for s, draft in proposals.items() if draft and not s.ended}
        return draft_tokens, {s: masks for s, masks in lookahead_masks.items() if not s.ended}

    def _index_ngrams(self, sequence: SequenceState) -> None:
        """Index new tokens for the n-gram proposer; after an error the sequence goes without."""
        proposer, sequence.ngrams = sequence.ngrams, None
        if proposer:
            with best_effort("indexing n-grams"):
                proposer.index_new()
                sequence.ngrams = proposer

    def _input_ids(
        self,
        in_flight: Sequence[SequenceState],
        on_host: Sequence[SequenceState],
        lengths: Sequence[int],
        draft_tokens: Mapping[SequenceState, list[int]],
    ) -> mx.array:
        """Return the tokens of a step end to end: those on the device, then those of the host.

        `lengths` are those of the `on_host` sequences, whose draft tokens follow behind each.
        """
        pieces = []
        if in_flight:
            assert self._in_flight_step and self._in_flight_step.tokens is not None
            tokens, rows = self._in_flight_step.tokens, self._in_flight_step.rows
            if list(in_flight) != list(rows):
                tokens = tokens[mx.array([rows.index(sequence) for sequence in in_flight])]
            pieces.append(tokens)
        if on_host:
            ids = [
                token
                for sequence, length in zip(on_host, lengths, strict=True)
                for token in (
                    *sequence.ids[sequence.num_computed : sequence.num_computed + length],
                    *draft_tokens.get(sequence, ()),
                )
            ]
            pieces.append(mx.array(ids, dtype=mx.int32))
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)

    def _prefill_chunks(self, step: Step[SequenceState]) -> dict[SequenceState, int]:
        """Return the tokens to prefill in this step, by sequence.

        That is a chunk of the first prompt, and all of those that still fit beside it.
        """
        chunks: dict[SequenceState, int] = {}
        limit = remaining = 0
        if step.prefilling:
            position = max(sequence.num_computed for sequence in step.prefilling)
            limit = min(self.budget.chunk(position, self.scheduler.held()), backend.prefill_chunk())
            limit = remaining = self.scheduler.prefill_budget(step, limit)
        for sequence in step.prefilling:
            fits = not chunks or sequence.num_uncomputed <= remaining
            if fits and self._report_progress(sequence):
                chunks[sequence] = min(remaining, prefill_chunks(sequence.num_uncomputed, limit)[0])
                remaining -= chunks[sequence]
        return chunks

    def _report_progress(self, sequence: SequenceState) -> bool:
        """Report how much of a prompt is computed; return False if the callback raised."""
        request = sequence.request
        try:
            if request.progress:
                request.progress(min(sequence.num_computed, len(request.ids)), len(request.ids))
        except BaseException as error:  # noqa: BLE001 - ends this request only
            self._finish(sequence, error)
        return not sequence.ended

    def _masks(
        self,
        rows: Sequence[SequenceState],
        logits: mx.array,
        lookahead_masks: "Mapping[SequenceState, list[Mask | None]]",
    ) -> "dict[int, Mask]":
        """Return the masks by row; sequences with lookahead masks have theirs already."""
        masks: dict[int, Mask | None] = {}
        to_mask = [
            (row, s) for row, s in enumerate(rows) if s.needs_mask and s not in lookahead_masks
        ]
        if to_mask:
            # The device computes the logits while the host computes the masks.
            mx.async_eval(logits)
        for row, sequence in to_mask:
            assert sequence.request.constraint
            try:
                masks[row] = _check_mask(sequence.request.constraint.mask())
            except BaseException as error:  # noqa: BLE001 - ends this request only
                self._finish(sequence, error)
        for sequence, by_position in lookahead_masks.items():
            masks |= dict(enumerate(by_position, rows.index(sequence)))
        return {row: mask for row, mask in masks.items() if mask is not None}

    # --- run and commit -------------------------------------------------------------------------

    def _commit(self, next_step: InFlightStep | None = None) -> None:
        """Wait for the step in flight, submit `next_step`, and commit the tokens of the former."""
        step = self._in_flight_step
        values = self._wait_for(step) if step else []
        logprobs = step.logprobs.read(values, step.rows) if step and step.logprobs else {}
        prompt_logprobs = step.prompt_logprobs.read() if step and step.prompt_logprobs else {}
        if next_step:
            # Only now: while the former step holds the cache buffers, writes would copy them. And
            # before the tokens are committed, so that the device works while callbacks run.
            mx.async_eval(next_step.arrays)
            next_step.submitted = time.perf_counter()
        self._in_flight_step, self._building = next_step, ()
        if not step:
            return
        self._committing = step.sequences
        for sequence, scores in prompt_logprobs.items():
            self._report_prompt_logprobs(sequence, scores)
        for sequence, rows in groupby(range(len(values)), key=step.rows.__getitem__):
            # For a sequence of the next step, `_build` has set the count already.
            if not self._is_in_flight(sequence):
                sequence.num_in_flight = 0
            if not sequence.ended and sequence not in step.discarded:
                tokens = [(values[row], logprobs.get(row)) for row in rows]
                self._commit_tokens(sequence, tokens, step)
        for sequence in step.sequences:
            if sequence.ended:
                # If the next step has a row of it, too, that is computed once and dropped; the kept
                # prefix is then longer by an end token, which the next turn has anyway.
                self._release(sequence)
            elif not (
                sequence.request.max_tokens
                or sequence.num_uncomputed
                or self._is_in_flight(sequence)
            ):
                self._finish(sequence, sequence.result("length"))
        self._committing = ()

    def _wait_for(self, step: InFlightStep) -> list[int]:
        """Wait until `step` is done, and return the tokens that it chose, by row."""
        mx.eval(step.arrays)
        values: list[int] = []
        if step.tokens is not None:
            values = step.tokens.tolist()  # type: ignore[assignment]
        # A reference kept here would have the next step copy the caches instead of writing in
        # place: MLX donates a buffer only if nothing else holds it.
        step.arrays, step.tokens = [], None
        now = time.perf_counter()
        if step.num_prefill_tokens:
            self.scheduler.observe(step.num_prefill_tokens, now - step.submitted)
            free_buffers()
        elif self.speculator and self._committed_at is not None:
            self.speculator.observe_step(
                step.num_tokens, now - self._committed_at, synchronous=step.synchronous
            )
        self._committed_at = None if step.num_prefill_tokens else now
        return values

    def _is_in_flight(self, sequence: SequenceState) -> bool:
        return self._in_flight_step is not None and sequence in self._in_flight_step.sequences

    def _commit_tokens(
        self,
        sequence: SequenceState,
        chosen: Sequence[tuple[int, SampledLogprob | None]],
        step: InFlightStep,
    ) -> None:
        """Append the chosen tokens to a sequence, and finish, roll back or continue it."""
        draft, num_accepted = step.draft_tokens.get(sequence, ()), sequence.accepted
        try:
            if sequence.failure:
                raise sequence.failure
            if step.finite is not None:
                self._check_finite(sequence, step, step.finite)
            num_output = sequence.num_output
            undisturbed = sequence.commit(chosen, draft, masked=sequence in step.lookahead_masks)
            self.token_meter.add(sequence.num_output - num_output)
            if draft and self.speculator:
                self.speculator.observe(sequence, sequence.accepted - num_accepted)
            if (
                not sequence.logits_rechecked
                and sequence.request.recheck_logits
                and sequence.request.recheck_logits()
            ):
                sequence.logits_rechecked = True
                self._check_logits(sequence, step)
        except BaseException as error:  # noqa: BLE001 - ends this request only
            self._finish(sequence, self._root_cause(error, sequence, step))
            return
        if sequence.reason:
            self._finish(sequence, sequence.result(sequence.reason))
        elif not undisturbed:
            self._discard_in_flight(sequence)

    def _report_prompt_logprobs(
        self, sequence: SequenceState, scores: Sequence[SampledLogprob]
    ) -> None:
        """Pass the logprobs of the prompt tokens that were read to the request's callback."""
        try:
            if not all(math.isfinite(score.logprob) for score in scores):
                raise self._nonfinite_error()
            if sequence.request.on_prompt_logprobs and not sequence.ended:
                sequence.request.on_prompt_logprobs(scores)
        except BaseException as error:  # noqa: BLE001 - ends this request only
            self._finish(sequence, error)

    def _check_logits(self, sequence: SequenceState, step: InFlightStep) -> None:
        """Raise a CheckpointError if the sequence's logits in `step` have NaN or infinity."""
        assert step.logits is not None
        finite = mx.isfinite(step.logits[:, : self._vocabulary]).all(axis=-1)
        self._check_finite(sequence, step, finite)

    def _root_cause(
        self, error: BaseException, sequence: SequenceState, step: InFlightStep
    ) -> BaseException:
        """Return the error to report: where the logits are NaN, a grammar fails as well."""
        if isinstance(error, ValueError):
            try:
                self._check_logits(sequence, step)
            except CheckpointError as broken:
                return broken
            except Exception:  # noqa: BLE001 - the first error is the one to report
                return error
        return error

    def _check_finite(self, sequence: SequenceState, step: InFlightStep, finite: mx.array) -> None:
        """Raise a CheckpointError if the logits of a sequence's rows are not `finite` [N]."""
        # `tolist` reads what is evaluated; indexing the array would be a computation of its own,
        # which waits for the step in flight.
        if not finite.tolist()[step.rows.index(sequence)]:  # type: ignore[index]
            raise self._nonfinite_error()

    def _nonfinite_error(self) -> CheckpointError:
        """Create the error of a network whose logits are not finite."""
        dtype = self.model.model.norm.weight.dtype
        wider = "" if dtype == mx.float32 else ', or load it with --dtype float32 (dtype="float32")'
        return CheckpointError(
            f"the logits of {self.model.source} have NaN or infinity among them, so it cannot "
            "choose a token: its weights are damaged, or computing exceeds the range of "
            f"{str(dtype).removeprefix('mlx.core.')}; download or convert it again{wider}"
        )

    def _discard_in_flight(self, sequence: SequenceState) -> None:
        """Drop the token that the step in flight chooses: it follows tokens that have changed."""
        step = self._in_flight_step
        if step and step.tokens is not None and sequence in step.rows:
            row = step.rows.index(sequence)
            # The draw of the dropped token is repeated, so a seed gives the same reply either way.
            sequence.sampler.rewind(step.tokens[row : row + 1])
            step.discarded.append(sequence)
            sequence.num_in_flight = 0
        sequence.truncate(len(sequence.ids) - 1)

    # --- admission, preemption, release ---------------------------------------------------------

    def admit(self, sequence: SequenceState) -> None:
        """Create a sequence's caches, filled from the prefix cache; see `CacheOwner`."""
        try:
            # At the first admission only: after a preemption `ids` has the forced tokens already.
            if sequence.cached_tokens is None:
                sequence.force()
        except BaseException as error:  # noqa: BLE001 - ends this request only
            self._finish(sequence, error)
            return
        if sequence.reason:
            self._finish(sequence, sequence.result(sequence.reason))
            return
        try:
            self.caches.allocate(sequence)
        except Exception as error:  # noqa: BLE001 - ends this request only
            self._finish(sequence, _as_engine_error(error))
            return
        sequence.num_prefix_hit = sequence.num_computed
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(sequence.num_computed, len(sequence.request.ids))

    def preempt(self, sequence: SequenceState) -> None:
        """Move a sequence's caches to the prefix cache; it starts again from there, or earlier."""
        # The step in flight writes these caches. Committing it may end the sequence.
        self._commit()
        if not sequence.ended:
            self.caches.keep(sequence, sequence.num_computed)
            sequence.reset()

    def held_by_prefixes(self) -> int:
        """Return the tokens that the prefix cache has room for."""
        return self.caches.held_by_prefixes

    def evict(self, tokens: int) -> None:
        """Evict kept prefixes with room for so many tokens, as far as there are any."""
        self.caches.evict(tokens)

    def _finish(self, sequence: SequenceState, outcome: RequestResult | BaseException) -> None:
        """Report the outcome of a sequence, and release it unless a step in flight has it.

        In that case `_commit` releases it.
        """
        sequence.ended = True
        completed = isinstance(outcome, RequestResult) and outcome.reason != "cancelled"
        failed = isinstance(outcome, BaseException)
        # Of a cancelled request only the prefix that it was given stays.
        sequence.num_to_keep = None if completed else 0 if failed else sequence.num_prefix_hit
        self._notify(sequence.request, outcome)
        if not self._is_in_flight(sequence):
            self._release(sequence)

    def _release(self, sequence: SequenceState) -> None:
        """Remove an ended sequence from the scheduler, and keep its prefix."""
        if sequence in self.scheduler.running:
            keep = sequence.num_computed if sequence.num_to_keep is None else sequence.num_to_keep
            # `num_computed` may count tokens that the host does not know: without ids, no prefix.
            self.caches.keep(sequence, min(keep, sequence.num_computed, len(sequence.ids)))
        elif sequence not in self.scheduler.waiting:
            return
        self.scheduler.remove(sequence)
        sequence.reset()
        free_buffers()

    def _notify(self, request: Request, outcome: RequestResult | BaseException) -> None:
        try:
            request.on_finish(outcome)
        except BaseException:  # noqa: BLE001 - the steps of other requests go on
            _log.exception("a request's `on_finish` failed")
        if isinstance(outcome, BaseException):
            _log.debug("a request failed", exc_info=outcome)

    def _fail_step(self, error: Exception) -> None:
        """End the requests of a failed step, and drop their caches and all kept prefixes."""
        # `mx.eval` may return although the device has failed, and the error comes to light later:
        # so the caches of all steps in work are dropped, and those kept meanwhile.
        touched = {
            *self._committing,
            *self._building,
            *(self._in_flight_step.sequences if self._in_flight_step else ()),
        }
        if not touched:  # it failed between steps: no sequence can be named as the cause
            touched = {*self.scheduler.running} or {*self.scheduler.waiting}
        self._in_flight_step, self._building, self._committing = None, (), ()
        self.caches.abandon_batch()
        for sequence in touched:
            if sequence.ended:
                sequence.num_to_keep = 0
                self._release(sequence)
            else:
                self._finish(sequence, _as_engine_error(error))
        self.forget()


def _as_engine_error(error: BaseException) -> Qwen3Error:
    """Return the error that the requests of a failed step end with."""
    if isinstance(error, Qwen3Error):
        return error
    if isinstance(error, RuntimeError | MemoryError):
        failure = Qwen3Error(_DEVICE_FAILED.format(str(error) or repr(error)))
    else:
        failure = Qwen3Error(_ENGINE_FAILED.format(type(error).__name__, error))
    failure.__cause__ = error
    return failure


def _check_mask(mask: "Mask | None") -> "Mask | None":
    """Return `mask`, or raise a ValueError if it allows no token."""
    if mask is not None and not mask.any():
        raise ValueError("the constraint of this request allows no token")
    return mask
