"""What the engine does, step by step, on the thread that owns the network.

A step is built while the one before it runs, and submitted when that one is done: submitted
earlier, it would find the caches in use, and its writes would copy them. So the engine is a token
ahead of what it has told, and drops what turns out to be unwanted.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING
from weakref import WeakSet

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.cache.attention import LayerCache
from qwen3_mlx.cache.batched import BatchedCaches
from qwen3_mlx.cache.disk import DiskPrefixes
from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.cache.prefix import Prefix, PrefixStore
from qwen3_mlx.cache.quantized import PLAIN
from qwen3_mlx.engine.activity import Meter
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
_HOST_BOUND = 2048  # the width of 1.7B: above, the host is done before the device
_KEPT_SHARE = 4  # kept prefixes may take one part in so many of the room for caches
_OUT_OF_MEMORY = "the device failed, probably for want of memory ({}); its caches were dropped"
_FAULT = "the engine failed ({}: {}); this is a bug, and the caches that it was at were dropped"


@dataclass(slots=True)
class InFlightStep:
    """A step that has been handed to the device."""

    rows: Sequence[SequenceState]  # by row; who has a proposal has several rows, side by side
    sequences: Sequence[SequenceState]  # whose caches are written
    tokens: mx.array | None  # [N], those chosen
    synchronous: bool  # whether it was built only when the one before it had been told
    size: int  # tokens that it goes over
    chunk: int  # those of prompts among them
    arrays: list[mx.array]  # all that must be there when it is done
    logprobs: LogprobBatch | None = None
    proposals: Mapping[SequenceState, list[int]] = field(default_factory=dict)
    masked: Mapping[SequenceState, object] = field(default_factory=dict)  # in all of their rows
    submitted: float = 0.0
    discarded: list[SequenceState] = field(
        default_factory=list
    )  # whose token is not wanted after all
    logits: mx.array | None = None  # [N, V]
    finite: mx.array | None = None  # [N], if a request's first token is among those chosen
    prompt_logprobs: PromptLogprobBatch | None = None


class EngineCore:
    """Holds those who run, their caches and the kept ones, and takes a step of all at a time."""

    def __init__(
        self,
        model: Qwen3,
        vocabulary: int,
        available: int | None,
        context: int | None,
        disk: DiskPrefixes | None,
        speculator: Speculator | None,
    ) -> None:
        """See `Engine`."""
        self.model = model
        self.speculator = speculator
        self._vocabulary = vocabulary
        work = Workload(
            context=0,
            itemsize=model.model.norm.weight.dtype.size,
            cache=model.cache_format,
            chunk=backend.prefill_chunk(),
            fused=backend.on_gpu(),
            beside=speculator.token_bytes if speculator else 0,
        )

        def least_of(free: int) -> int:
            budget = Budget(model.config, work, free)
            return budget.least(min(budget.context, context or budget.context))

        if available is None:
            self.share = claim(lambda: backend.available_memory() - RESERVE, least_of)
        else:  # which is the caller's to give
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
        self._logits_jobs: WeakSet[Logits] = (
            WeakSet()
        )  # whose memory is free when they are collected
        self.scheduler: Scheduler[SequenceState] = Scheduler(self.budget.tokens, self)
        self.token_meter = Meter()  # tokens
        self._prefixes = PrefixStore(self.budget.tokens // _KEPT_SHARE)
        self._disk = disk
        self._depth = len(model.layers)  # of a sequence's caches, those of `model`
        worth_it = model.config.hidden_size <= _HOST_BOUND and model.cache_format == PLAIN
        self._batched = BatchedCaches() if worth_it and not self.speculator else None
        self._in_flight_step: InFlightStep | None = None
        self._committed_at: float | None = None  # when, if the next step follows at once
        self._building: Sequence[
            SequenceState
        ] = ()  # those whose caches the step being built writes
        self._committing: Sequence[SequenceState] = ()  # those of the step that is being told

    def add(self, request: Request) -> None:
        """Have a request run when its turn comes, or hear at once why it cannot."""
        try:
            sequence = SequenceState(request, self._vocabulary, self.context)
            if self.speculator and request.max_tokens:
                sequence.ngrams = self.speculator.ngram_proposer(sequence.ids)
            self.scheduler.add(sequence)
        except BaseException as error:  # noqa: BLE001 - this request's alone
            self._notify(request, error)

    def step(self) -> bool:
        """Do the next step; False if there is nothing left to do."""
        try:
            self._update_budget()
            self._drop_cancelled()
            if self._in_flight_step and self._next_depends_on(self._in_flight_step):
                self._commit()
            flight = self._build(self.scheduler.next_step())
            self._commit(flight)
        except Exception as error:  # noqa: BLE001 - those whose step it was hear of it
            self._fail_step(error)
        if self._in_flight_step or self.scheduler.running or self.scheduler.waiting:
            return True
        self._committed_at = None
        _free_buffers()
        self._update_budget()
        return False

    def forget(self) -> None:
        """Give up all kept prefixes."""
        self._prefixes.clear()
        _free_buffers()
        self._update_budget()

    def logits(self, ids: Sequence[int]) -> Logits:
        """Begin to compute the logits of all ids, and set their memory aside.

        Raises:
            ContextError: there are more than the context has.
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
        """Compute a chunk more, a short one beside requests, and say whether some are left."""
        running, chunk = self.scheduler.running, logits.chunk
        return logits.advance(
            self.scheduler.prefill_budget(Step(running, []), chunk) if running else chunk
        )

    def _update_budget(self) -> None:
        """Take note of what caches hold, and keep to what they may take now."""
        self.share.held = self.budget.bytes_of(self.scheduler.held())
        available = self.share.available - sum(logits.nbytes for logits in self._logits_jobs)
        available = max(0, available)
        if available != self.budget.available:
            self.budget = replace(self.budget, available=available)
            self.scheduler.room = self.budget.tokens
            self._prefixes.limit = self.budget.tokens // _KEPT_SHARE

    def cancel_all(self) -> None:
        """End whatever runs or waits, when the step in work is done."""
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
        """End whatever runs, waits or has just `arrived` with an error, and drop all caches.

        For an error that nothing else has taken care of, so it calls little that may fail again.
        """
        open_ones = [s for s in (*self.scheduler.running, *self.scheduler.waiting) if not s.ended]
        self.scheduler.clear()
        self._in_flight_step, self._building, self._committing = None, (), ()
        if self._batched:
            self._batched.abandon()
        for sequence in open_ones:
            sequence.ended = True
        for request in (*(sequence.request for sequence in open_ones), *arrived):
            self._notify(request, _failure(error))
        self.forget()

    def _drop_cancelled(self) -> None:
        """End whoever is not wanted any more, or whose constraint has failed."""
        for sequence in (*self.scheduler.waiting, *self.scheduler.running):
            if sequence.failure and not sequence.ended:
                self._end(sequence, sequence.failure)
            if sequence.request.cancelled.is_set() and not sequence.ended:
                self._end(sequence, sequence.result("cancelled"))

    # --- a step ---------------------------------------------------------------------------------

    def _next_depends_on(self, flight: InFlightStep) -> bool:
        """Whether the next step depends on what this one chooses."""
        if flight.proposals or any(sequence.needs_mask for sequence in flight.rows):
            return True
        rows, speculator = len(flight.rows), self.speculator
        return speculator is not None and any(
            speculator.should_wait(sequence, rows) for sequence in flight.rows
        )

    def _build(self, step: Step[SequenceState]) -> InFlightStep | None:
        """Lay out a forward pass and the choice of tokens after it, and wait for nothing."""
        # Those whose token is still on the device come first, then those whose ids are known.
        ahead = [sequence for sequence in step.decoding if sequence.num_in_flight]
        known = [sequence for sequence in step.decoding if not sequence.num_in_flight]
        self._building = known  # a draft model writes their caches
        proposals, foreseen = self._propose(known, len(step.decoding))
        known = [sequence for sequence in known if not sequence.ended]
        lengths = [1] * len(ahead) + [sequence.num_uncomputed for sequence in known]
        chunks = self._prefill_chunks(step)
        known += chunks
        lengths += chunks.values()
        if not lengths:
            return None
        self._building = [*ahead, *known]
        ids = self._ids(ahead, known, lengths[len(ahead) :], proposals)
        choosing, parts, arrays = list[SequenceState](), [], list[mx.array]()
        proposed: dict[int, int] = {}  # by row
        scoring: dict[SequenceState, tuple[range, int]] = {}  # places, and the row of the first
        wanted_rows, row = list[int](), 0  # of the hidden states, those whose logits are wanted
        for sequence, length in zip(self._building, lengths, strict=True):
            self._index_ngrams(sequence)
            last = sequence.num_in_flight == 1 or length == sequence.num_uncomputed
            proposal = proposals.get(sequence, [])
            wanted = last and sequence.request.max_tokens > 0
            rows = 1 + len(proposal) if wanted else 0
            places = sequence.unscored(length)
            asked = max(rows, sequence.num_computed + length - places.start if places else 0)
            if sequence.request.on_prompt_logprobs and not sequence.answering:
                scoring[sequence] = places, row
                sequence.num_scored = max(sequence.num_scored, places.stop)
            parts.append(BatchSlice(sequence.layers[: self._depth], length + len(proposal), asked))
            row += asked
            wanted_rows += range(row - rows, row)
            proposed |= dict(enumerate(proposal, len(choosing) + 1))
            choosing += [sequence] * rows
            sequence.num_computed += length + len(proposal)
            sequence.answering |= last
            sequence.num_in_flight = int(wanted)
            sequence.num_passes += wanted
        logits, scores = self._forward(ids, parts, scoring, wanted_rows)
        arrays += scores.arrays if scores else ()
        for part in parts:
            if not part.wanted:  # nothing else reads what it writes
                arrays += [array for layer in part.layers for array in layer.state]
        tokens = chances = finite = None
        if logits is not None:
            masks = self._masks(choosing, logits, foreseen)
            tokens = choose(logits, [s.sampler for s in choosing], masks, proposed)
            chances = LogprobBatch.of(logits, tokens, choosing, self._vocabulary)
            arrays += [tokens, *(chances.arrays if chances else ())]
            if any(sequence.num_passes == 1 for sequence in choosing):
                finite = mx.isfinite(logits[:, : self._vocabulary]).all(axis=-1)
                arrays.append(finite)
        return InFlightStep(
            choosing,
            sequences=self._building,
            tokens=tokens,
            synchronous=self._in_flight_step is None,
            size=ids.size,
            chunk=sum(chunks.values()),
            arrays=arrays,
            logprobs=chances,
            proposals=proposals,
            masked=foreseen,
            logits=logits,
            finite=finite,
            prompt_logprobs=scores,
        )

    def _forward(
        self,
        ids: mx.array,
        parts: Sequence[BatchSlice],
        scoring: Mapping[SequenceState, tuple[range, int]],
        rows: Sequence[int],
    ) -> tuple[mx.array | None, PromptLogprobBatch | None]:
        """Return the logits of `rows`, and the scores of prompts, of what the parts ask for."""
        joined = self._batched_layers(parts)
        if not scoring:
            return forward(self.model, ids, parts, joined), None
        hidden = forward(self.model, ids, parts, joined, head=False)
        scores = PromptLogprobBatch.of(self.model, hidden, scoring, self._vocabulary)
        if hidden is None or not rows:
            return None, scores
        return self.model.head(hidden[mx.array(list(rows))]), scores

    def _batched_layers(self, parts: Sequence[BatchSlice]) -> Sequence[LayerCache] | None:
        """Give caches that answer for all parts at once, where that is faster."""
        if self._batched and all(part.length == part.wanted == 1 for part in parts):
            room = self.scheduler.room - self.scheduler.held()
            return self._batched.layers([part.layers for part in parts], room)
        self._split_batch()
        return None

    def _propose(
        self, known: Sequence[SequenceState], rows: int
    ) -> "tuple[dict[SequenceState, list[int]], dict[SequenceState, list[Mask | None]]]":
        """Have it proposed what comes next, and ask the constraints that mask what they allow."""
        proposals = self.speculator.propose(known, rows) if self.speculator else {}
        foreseen: dict[SequenceState, list[Mask | None]] = {}
        for sequence in [proposed for proposed in proposals if proposed.needs_mask]:
            assert sequence.request.constraint
            try:
                masks = sequence.request.constraint.lookahead_masks(proposals[sequence])
                foreseen[sequence] = [_not_empty(mask) for mask in masks]
                proposals[sequence] = proposals[sequence][: len(masks) - 1]
                sequence.truncate(len(sequence.ids) - 1)  # what a draft model saw of the rest
            except BaseException as error:  # noqa: BLE001 - this request's alone
                self._end(sequence, error)
        kept = {s: proposal for s, proposal in proposals.items() if proposal and not s.ended}
        return kept, {s: masks for s, masks in foreseen.items() if not s.ended}

    def _index_ngrams(self, sequence: SequenceState) -> None:
        """Find what may come next where that is looked for; no more after an error."""
        lookup, sequence.ngrams = sequence.ngrams, None
        if lookup:
            with _optional("looking up what may come next"):
                lookup.index_new()
                sequence.ngrams = lookup

    def _ids(
        self,
        ahead: Sequence[SequenceState],
        known: Sequence[SequenceState],
        lengths: Sequence[int],
        proposals: Mapping[SequenceState, list[int]],
    ) -> mx.array:
        """Lay the tokens of a step end to end: those on the device, and `lengths` known ones.

        Behind those of a sequence comes what is proposed to follow them.
        """
        pieces = []
        if ahead:
            assert self._in_flight_step and self._in_flight_step.tokens is not None
            tokens, choosing = self._in_flight_step.tokens, self._in_flight_step.rows
            if list(ahead) != list(choosing):
                tokens = tokens[mx.array([choosing.index(sequence) for sequence in ahead])]
            pieces.append(tokens)
        if known:
            ids = [
                token
                for sequence, length in zip(known, lengths, strict=True)
                for token in (
                    *sequence.ids[sequence.num_computed : sequence.num_computed + length],
                    *proposals.get(sequence, ()),
                )
            ]
            pieces.append(mx.array(ids, dtype=mx.int32))
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)

    def _prefill_chunks(self, step: Step[SequenceState]) -> dict[SequenceState, int]:
        """Give whose prompts are read on in this step, and by how many tokens.

        It is a chunk of the first, and all of those that find room beside it.
        """
        chunks: dict[SequenceState, int] = {}
        most = left = 0
        if step.prefilling:
            deepest = max(sequence.num_computed for sequence in step.prefilling)
            most = min(self.budget.chunk(deepest, self.scheduler.held()), backend.prefill_chunk())
            most = left = self.scheduler.prefill_budget(step, most)
        for sequence in step.prefilling:
            if (not chunks or sequence.num_uncomputed <= left) and self._report_progress(sequence):
                chunks[sequence] = min(left, prefill_chunks(sequence.num_uncomputed, most)[0])
                left -= chunks[sequence]
        return chunks

    def _report_progress(self, sequence: SequenceState) -> bool:
        """Tell how much of a prompt has been read, and whether that was taken well."""
        request = sequence.request
        try:
            if request.progress:
                request.progress(min(sequence.num_computed, len(request.ids)), len(request.ids))
        except BaseException as error:  # noqa: BLE001 - this request's alone
            self._end(sequence, error)
        return not sequence.ended

    def _masks(
        self,
        choosing: Sequence[SequenceState],
        logits: mx.array,
        foreseen: "Mapping[SequenceState, list[Mask | None]]",
    ) -> "dict[int, Mask]":
        """Ask the constraints, by row, what is allowed, while the device computes the logits.

        Those that were asked for a proposal are not asked again.
        """
        masks: dict[int, Mask | None] = {}
        asked = [(row, s) for row, s in enumerate(choosing) if s.needs_mask and s not in foreseen]
        if asked:
            mx.async_eval(logits)
        for row, sequence in asked:
            assert sequence.request.constraint
            try:
                masks[row] = _not_empty(sequence.request.constraint.mask())
            except BaseException as error:  # noqa: BLE001 - this request's alone
                self._end(sequence, error)
        for sequence, ahead in foreseen.items():
            masks |= dict(enumerate(ahead, choosing.index(sequence)))
        return {row: mask for row, mask in masks.items() if mask is not None}

    def _commit(self, following: InFlightStep | None = None) -> None:
        """Wait for the step in work, hand `following` to the device, and tell what was chosen."""
        done = self._in_flight_step
        values = self._wait_for(done) if done else []
        chances = done.logprobs.read(values, done.rows) if done and done.logprobs else {}
        scores = done.prompt_logprobs.read() if done and done.prompt_logprobs else {}
        if following:
            mx.async_eval(following.arrays)
            following.submitted = time.perf_counter()
        self._in_flight_step, self._building = following, ()
        if not done:
            return
        self._committing = done.sequences
        for sequence, heard in scores.items():
            self._report_prompt_logprobs(sequence, heard)
        for sequence, rows in groupby(range(len(values)), key=done.rows.__getitem__):
            if not self._is_in_flight(sequence):
                sequence.num_in_flight = 0
            if not sequence.ended and sequence not in done.discarded:
                tokens = [(values[row], chances.get(row)) for row in rows]
                self._commit_tokens(sequence, tokens, done)
        for sequence in done.sequences:
            if sequence.ended:
                self._release(sequence)
            elif not (
                sequence.request.max_tokens
                or sequence.num_uncomputed
                or self._is_in_flight(sequence)
            ):
                self._end(sequence, sequence.result("length"))
        self._committing = ()

    def _wait_for(self, flight: InFlightStep) -> list[int]:
        mx.eval(flight.arrays)
        values: list[int] = []
        if flight.tokens is not None:
            values = flight.tokens.tolist()  # type: ignore[assignment]
        flight.arrays, flight.tokens = [], None  # or the next step would find the caches in use
        now = time.perf_counter()
        if flight.chunk:
            self.scheduler.observe(flight.chunk, now - flight.submitted)
            _free_buffers()
        elif self.speculator and self._committed_at is not None:
            self.speculator.observe_step(
                flight.size, now - self._committed_at, synchronous=flight.synchronous
            )
        self._committed_at = None if flight.chunk else now
        return values

    def _is_in_flight(self, sequence: SequenceState) -> bool:
        return self._in_flight_step is not None and sequence in self._in_flight_step.sequences

    def _commit_tokens(
        self,
        sequence: SequenceState,
        chosen: Sequence[tuple[int, SampledLogprob | None]],
        flight: InFlightStep,
    ) -> None:
        """Have a sequence take what was chosen for it, and see to what comes of that."""
        proposal, accepted = flight.proposals.get(sequence, ()), sequence.accepted
        try:
            if sequence.failure:
                raise sequence.failure
            if flight.finite is not None:
                self._refuse_nonfinite(sequence, flight, flight.finite)
            told = sequence.num_output
            goes_on = sequence.commit(chosen, proposal, masked=sequence in flight.masked)
            self.token_meter.add(sequence.num_output - told)
            if proposal and self.speculator:
                self.speculator.observe(sequence, sequence.accepted - accepted)
            if (
                not sequence.logits_rechecked
                and sequence.request.recheck_logits
                and sequence.request.recheck_logits()
            ):
                sequence.logits_rechecked = True
                self._check_logits(sequence, flight)
        except BaseException as error:  # noqa: BLE001 - this request's alone
            self._end(sequence, self._cause_of(error, sequence, flight))
            return
        if sequence.reason:
            self._end(sequence, sequence.result(sequence.reason))
        elif not goes_on:
            self._discard_in_flight(sequence)

    def _report_prompt_logprobs(
        self, sequence: SequenceState, scores: Sequence[SampledLogprob]
    ) -> None:
        """Hand on how likely the tokens of a prompt are, as far as it has been read."""
        try:
            if not all(math.isfinite(chance.logprob) for chance in scores):
                raise self._nonfinite_error()
            if sequence.request.on_prompt_logprobs and not sequence.ended:
                sequence.request.on_prompt_logprobs(scores)
        except BaseException as error:  # noqa: BLE001 - this request's alone
            self._end(sequence, error)

    def _check_logits(self, sequence: SequenceState, flight: InFlightStep) -> None:
        assert flight.logits is not None
        finite = mx.isfinite(flight.logits[:, : self._vocabulary]).all(axis=-1)
        self._refuse_nonfinite(sequence, flight, finite)

    def _cause_of(
        self, error: BaseException, sequence: SequenceState, flight: InFlightStep
    ) -> BaseException:
        """Return what has made a sequence fail: a grammar also fails where a network is broken."""
        if isinstance(error, ValueError):
            try:
                self._check_logits(sequence, flight)
            except CheckpointError as broken:
                return broken
            except Exception:  # noqa: BLE001 - the first error is the one to be known
                return error
        return error

    def _refuse_nonfinite(
        self, sequence: SequenceState, flight: InFlightStep, finite: mx.array
    ) -> None:
        """Raise a CheckpointError if the logits of a sequence's rows are not `finite` [N]."""
        # A list is read from what is evaluated; an element would be a computation of its own, which
        # waits for the step in work.
        if not finite.tolist()[flight.rows.index(sequence)]:  # type: ignore[index]
            raise self._nonfinite_error()

    def _nonfinite_error(self) -> CheckpointError:
        """Create the error of a network that gives no numbers."""
        dtype = self.model.model.norm.weight.dtype
        wider = "" if dtype == mx.float32 else ', or load it with --dtype float32 (dtype="float32")'
        return CheckpointError(
            f"the logits of {self.model.source} have NaN or infinity among them, so it cannot "
            "choose a token: its weights are damaged, or computing exceeds the range of "
            f"{str(dtype).removeprefix('mlx.core.')}; download or convert it again{wider}"
        )

    def _discard_in_flight(self, sequence: SequenceState) -> None:
        """Drop the token that the step in work chooses: it goes on from what is no longer so."""
        flight = self._in_flight_step
        if flight and flight.tokens is not None and sequence in flight.rows:
            row = flight.rows.index(sequence)
            sequence.sampler.rewind(flight.tokens[row : row + 1])
            flight.discarded.append(sequence)
            sequence.num_in_flight = 0
        sequence.truncate(len(sequence.ids) - 1)

    # --- beginnings and ends --------------------------------------------------------------------

    def admit(self, job: SequenceState) -> None:
        """Give a sequence its caches, with what is kept of its tokens (see `scheduler.Memory`)."""
        try:
            if job.cached_tokens is None:
                job.force()
        except BaseException as error:  # noqa: BLE001 - this request's alone
            self._end(job, error)
            return
        if job.reason:
            self._end(job, job.result(job.reason))
            return
        try:
            job.layers = self._make_layers()
            self._restore(job)
        except Exception as error:  # noqa: BLE001 - this request's alone
            self._end(job, _failure(error))
            return
        job.num_prefix_hit = job.num_computed
        if job.cached_tokens is None:
            job.cached_tokens = min(job.num_computed, len(job.request.ids))

    def _make_layers(self) -> list[KVCache]:
        layers = self.model.make_cache()
        return layers + self.speculator.make_cache() if self.speculator else layers

    def _restore(self, job: SequenceState) -> None:
        """Fill a sequence's caches with what is kept of its tokens, on disk or in memory."""
        most = job.skippable
        disk, prefixes = self._disk, self._prefixes
        try:
            if disk and disk.match_length(job.ids, most) > prefixes.match_length(job.ids, most):
                job.num_computed = disk.read(job.ids, most, job.layers[: self._depth])
            if not job.num_computed and (kept := prefixes.acquire(job.ids, most)):
                job.layers, job.room, job.num_computed = kept.layers, kept.room, len(kept.ids)
        except Exception as error:  # noqa: BLE001 - all can be read anew
            _log.warning("a kept prompt cannot be restored: %s", str(error) or repr(error))
            job.reset()
            job.layers = self._make_layers()

    def preempt(self, job: SequenceState) -> None:
        """Put a sequence's caches among those kept; it will begin anew from there, or earlier."""
        self._commit()
        if not job.ended:
            self._split_batch()
            self._keep_prefix(job, job.num_computed)
            job.reset()

    def held_by_prefixes(self) -> int:
        """The tokens that kept prefixes have room for."""
        return self._prefixes.held

    def evict(self, tokens: int) -> None:
        """Give up kept prefixes for so many tokens, as far as there are any."""
        self._prefixes.evict(tokens)
        _free_buffers()

    def _end(self, sequence: SequenceState, outcome: RequestResult | BaseException) -> None:
        sequence.ended = True
        well = isinstance(outcome, RequestResult) and outcome.reason != "cancelled"
        failed = isinstance(outcome, BaseException)
        # Of a cancelled request only what was there before it stays.
        sequence.num_to_keep = None if well else 0 if failed else sequence.num_prefix_hit
        self._notify(sequence.request, outcome)
        if not self._is_in_flight(sequence):
            self._release(sequence)

    def _release(self, sequence: SequenceState) -> None:
        """Let go of a sequence that has ended and that no step in work touches."""
        if sequence in self.scheduler.running:
            self._split_batch()
            keep = sequence.num_computed if sequence.num_to_keep is None else sequence.num_to_keep
            self._keep_prefix(sequence, min(keep, sequence.num_computed, len(sequence.ids)))
        elif sequence not in self.scheduler.waiting:
            return
        self.scheduler.remove(sequence)
        sequence.reset()
        _free_buffers()

    def _split_batch(self) -> None:
        """Have every sequence hold its own caches, before they are used for something else."""
        if self._batched:
            self._batched.split()

    def _keep_prefix(self, sequence: SequenceState, tokens: int) -> None:
        if tokens:
            prompt = len(sequence.request.ids)
            with _optional("keeping a prompt"):
                prefix = Prefix(sequence.ids[:tokens], sequence.layers, prompt, sequence.room)
                self._prefixes.insert(prefix)

    def save(self, *, interrupted: Callable[[], bool]) -> bool:
        """Write the prompt of a kept prefix to disk; False if there is none left to be written."""
        if not self._disk:
            return False
        try:
            if not (prefix := self._prefixes.unsaved()):
                return False
            ids = prefix.ids[: prefix.prompt]
            prefix.saved = not self._disk.wants(ids) or self._disk.write(
                ids, prefix.layers[: self._depth], interrupted
            )
        except Exception as error:  # noqa: BLE001 - work goes on without it
            _log.warning("prompts are no longer kept on disk: %s", str(error) or repr(error))
            self._disk = None
        return True

    def _notify(self, request: Request, outcome: RequestResult | BaseException) -> None:
        try:
            request.on_finish(outcome)
        except BaseException:  # noqa: BLE001 - the others' steps go on
            _log.exception("a request's end could not be told")
        if isinstance(outcome, BaseException):
            _log.debug("a request failed", exc_info=outcome)

    def _fail_step(self, error: Exception) -> None:
        """Drop every cache that a failed step may have touched, and the kept ones."""
        touched = {
            *self._committing,
            *self._building,
            *(self._in_flight_step.sequences if self._in_flight_step else ()),
        }
        if not touched:  # it failed in between: whose fault it is cannot be said
            touched = {*self.scheduler.running} or {*self.scheduler.waiting}
        self._in_flight_step, self._building, self._committing = None, (), ()
        if self._batched:
            self._batched.abandon()
        for sequence in touched:
            if sequence.ended:
                sequence.num_to_keep = 0
                self._release(sequence)
            else:
                self._end(sequence, _failure(error))
        self.forget()


@contextmanager
def _optional(what: str) -> Iterator[None]:
    """Go on without what is done in here, if it fails: it would only have saved time."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - see above
        _log.warning("%s failed, and is done without: %s", what, str(error) or repr(error))


def _free_buffers() -> None:
    """Give the memory of freed arrays back."""
    with _optional("freeing memory"):
        mx.clear_cache()


def _failure(error: BaseException) -> Qwen3Error:
    """Say what an error of a step means to the requests that had a part in it."""
    if isinstance(error, Qwen3Error):
        return error
    if isinstance(error, RuntimeError | MemoryError):
        failure = Qwen3Error(_OUT_OF_MEMORY.format(str(error) or repr(error)))
    else:
        failure = Qwen3Error(_FAULT.format(type(error).__name__, error))
    failure.__cause__ = error
    return failure


def _not_empty(mask: "Mask | None") -> "Mask | None":
    """Give a mask that allows something, or raise a ValueError."""
    if mask is not None and not mask.any():
        raise ValueError("the constraint of this request allows no token")
    return mask
