"""The engine's step: schedule, build the forward pass, run it, commit the chosen tokens.

Runs on the thread that owns the network. A step is built while the step before it runs. Half of its
layers are submitted when those of the step before are done, and the rest when all of it is. Any
earlier it would find caches in use, and its writes would copy them; any later, the device would
wait. So the engine is one token ahead of what it has reported, and drops a token that turns out to
be unwanted.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar
from weakref import WeakSet, proxy

from qwen3_mlx import backend
from qwen3_mlx.cache.disk import DiskPrefixes
from qwen3_mlx.cache.quantized import CacheFormat
from qwen3_mlx.engine.best_effort import free_buffers
from qwen3_mlx.engine.cache_manager import CacheManager
from qwen3_mlx.engine.committer import Committer
from qwen3_mlx.engine.errors import engine_error
from qwen3_mlx.engine.in_flight import CompletedStep, InFlightStep
from qwen3_mlx.engine.last_states import Finish, LastStates, plan_last_states
from qwen3_mlx.engine.logits import Logits, plan_logits
from qwen3_mlx.engine.memory import RESERVE, Budget, Workload
from qwen3_mlx.engine.memory_ledger import Share, claim, release
from qwen3_mlx.engine.request import Request, RequestResult
from qwen3_mlx.engine.scheduler import ScheduledStep, Scheduler
from qwen3_mlx.engine.sequence import SequenceState, refuse_unknown
from qwen3_mlx.engine.speculation.speculator import Speculator
from qwen3_mlx.engine.step_builder import StepBuilder
from qwen3_mlx.errors import ContextError, Qwen3Error
from qwen3_mlx.model.qwen3 import Qwen3

_log = logging.getLogger(__name__)
Job = TypeVar("Job", Logits, LastStates)


class EngineCore:
    """Holds the sequences, their caches and the prefix cache, and advances them step by step."""

    def __init__(
        self,
        model: Qwen3,
        vocabulary: int,
        *,
        cache_format: CacheFormat,
        available: int | None,
        context: int | None,
        disk: DiskPrefixes | None,
        speculator: Speculator | None,
    ) -> None:
        """Claim memory and set up empty caches; see `Engine`."""
        self.model = model
        self.speculator = speculator
        self._vocabulary = vocabulary
        # Weak: the memory of these jobs is free again when they are collected.
        self._jobs: WeakSet[Logits | LastStates] = WeakSet()
        # Weak: a circle would keep the weights in memory until the garbage collector finds it.
        commit = partial(EngineCore._commit_in_flight, proxy(self))
        self.caches = CacheManager(model, cache_format, speculator, disk, commit)
        self.scheduler: Scheduler[SequenceState] = Scheduler(0, self.caches)
        self._builder = StepBuilder(model, vocabulary, self.scheduler, self.caches, speculator)
        self._committer = Committer(self._builder.finite_check, speculator)
        self.token_meter = self._committer.token_meter
        self._in_flight: InFlightStep | None = None
        self._committing: Sequence[SequenceState] = ()  # those of the step that is committed
        self._decoded_at: float | None = None  # when the last step ended, if it decoded
        itemsize = model.model.norm.weight.dtype.size
        work = Workload(
            context=0,
            itemsize=itemsize,
            cache=cache_format,
            chunk=backend.prefill_chunk(),
            fused=backend.has_fused_attention(itemsize),
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
            self.budget = Budget(model.config, work, max(0, self.share.available))
            self.context = min(self.budget.context, context or self.budget.context)
            self._token_bytes = self.budget.bytes_of(1)
            self._set_room()
        except BaseException:
            release(self.share)
            raise

    def add(self, request: Request) -> None:
        """Add a request to those that wait, or end it with an error if it cannot run."""
        rates = self.speculator.ngram_rates if self.speculator and request.max_tokens else None
        try:
            refuse_unknown(request.ids, self.model.config.vocab_size)
            self.scheduler.add(SequenceState(request, self._vocabulary, self.context, rates))
        except BaseException as error:  # noqa: BLE001 - ends this request only
            _notify(request, error)

    # --- the step -------------------------------------------------------------------------------

    def step(self) -> bool:
        """Run the next step, and return False if no work is left."""
        try:
            self._update_budget()
            self._end_cancelled()
            if self._builder.must_wait_for(self._in_flight):
                self._commit_in_flight()
            scheduled = self.scheduler.next_step()
            built = self._builder.build(scheduled, self._in_flight, self.budget)
            done = self._run(built)
            self._commit(done)
        except Exception as error:  # noqa: BLE001 - ends the requests of the step
            self._fail_step(error)
        if self._in_flight or self.scheduler.running or self.scheduler.waiting:
            return True
        self._decoded_at = None
        free_buffers()
        self._update_budget()
        return False

    def _run(self, built: InFlightStep | None) -> CompletedStep | None:
        """Wait for the step in flight and submit `built` in its place; return the completed one."""
        if built:
            self.model.announce()
            if self._in_flight:
                built.submit_first_half(self._in_flight)
        done = self._in_flight.wait() if self._in_flight else None
        if done:
            self._observe(done.step)
        if built:
            # Only now: while the former step holds the cache buffers, writes would copy them. And
            # before the tokens are committed, so that the device works while callbacks run.
            built.submit()
        self._in_flight, self._builder.building = built, ()
        return done

    def _observe(self, step: InFlightStep) -> None:
        """Measure how long a completed step took."""
        now = time.perf_counter()
        if step.num_prefill_tokens:
            self.scheduler.observe(step.num_prefill_tokens, now - step.submitted_at)
            free_buffers()
        elif self.speculator and self._decoded_at is not None:
            self.speculator.observe_step(
                step.num_tokens, now - self._decoded_at, synchronous=step.synchronous
            )
        self._decoded_at = None if step.num_prefill_tokens else now

    def _commit_in_flight(self) -> None:
        """Wait for the step in flight, and commit it."""
        self._commit(self._run(None))

    def _commit(self, done: CompletedStep | None) -> None:
        """Commit the tokens of a completed step, report the requests that end, release theirs."""
        self._committing = done.step.sequences if done else ()
        if done:
            self._committer.commit(done, self._in_flight)
        self._report_ended()
        self._committing = ()

    def _report_ended(self) -> None:
        """Report the requests that have ended, and release their caches.

        A sequence that ends in the step that is committed is released at once: the row that the
        next step may have of it is ignored, and its prefix is then longer by an end token, which
        the next turn has anyway. One that ends otherwise is released once no step has it.
        """
        in_flight = self._in_flight.sequences if self._in_flight else ()
        sequences = (*self.scheduler.running, *self.scheduler.waiting)
        for sequence in [sequence for sequence in sequences if sequence.ended]:
            _notify(sequence.request, sequence.report())
            if sequence in in_flight and sequence not in self._committing:
                continue
            if sequence in self.scheduler.running:  # those that wait have no caches
                self.caches.release(sequence)
            self.scheduler.remove(sequence)

    def _end_cancelled(self) -> None:
        """End the sequences whose request is cancelled or whose constraint has failed."""
        for sequence in (*self.scheduler.waiting, *self.scheduler.running):
            if sequence.ended:
                continue
            if sequence.failure:
                sequence.end(sequence.failure)
            elif sequence.request.cancelled.is_set():
                sequence.end("cancelled")
        self._report_ended()

    # --- failures and the end -------------------------------------------------------------------

    def _fail_step(self, error: Exception) -> None:
        """End the requests of a failed step, and drop their caches and all kept prefixes."""
        # `mx.eval` may return although the device has failed, and the error comes to light later:
        # so the caches of all steps in work are dropped, and those kept meanwhile.
        in_flight = self._in_flight.sequences if self._in_flight else ()
        touched = {*self._committing, *self._builder.building, *in_flight}
        if not touched:  # it failed between steps: no sequence can be named as the cause
            touched = {*self.scheduler.running} or {*self.scheduler.waiting}
        self._abandon_steps()
        for sequence in touched:
            if not sequence.ended:
                sequence.end(engine_error(error))
        self._report_ended()
        self.forget()

    def _abandon_steps(self) -> None:
        """Forget the steps in work: their caches can no longer be relied on."""
        self._in_flight, self._builder.building, self._committing = None, (), ()
        self.caches.abandon_batch()

    def fail_all(self, error: BaseException, arrived: Sequence[Request]) -> None:
        """End all requests that run, wait or have just `arrived`, and drop all caches.

        The last resort, after an error that nothing else has handled: so it calls little that may
        fail again.
        """
        sequences = (*self.scheduler.running, *self.scheduler.waiting)
        self.scheduler.clear()
        self._abandon_steps()
        for sequence in sequences:
            if not sequence.reported:
                _notify(sequence.request, sequence.outcome or engine_error(error))
        for request in arrived:
            _notify(request, engine_error(error))
        # No buffers are freed here: that would wait for the device, which may hang.
        self.caches.drop()
        self._update_budget()

    def cancel_all(self) -> None:
        """Cancel all requests that run or wait, once the step in flight is done."""
        try:
            self.model.wait(self._in_flight.arrays if self._in_flight else [])
        except (RuntimeError, Qwen3Error) as error:
            _log.debug("the last step failed: %s", error)
        self._in_flight = None
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            self.scheduler.remove(sequence)
            if not sequence.ended:
                sequence.end("cancelled")
            _notify(sequence.request, sequence.report())

    def forget(self) -> None:
        """Clear the prefix cache."""
        self.caches.clear()
        self._update_budget()

    # --- memory ---------------------------------------------------------------------------------

    def logits(self, ids: Sequence[int], adapter: int | None = None) -> Logits:
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
        total, chunk = plan_logits(self.model.config, self.budget.work, len(ids), self._free())
        return self._set_aside(Logits(self.model, ids, total, chunk, adapter))

    def last_states(
        self,
        shared: Sequence[int],
        texts: Sequence[Sequence[int]],
        finish: Finish,
        adapter: int | None = None,
    ) -> LastStates:
        """Create the job that computes results of texts, and set its memory aside.

        See `LastStates`.

        Raises:
            Qwen3Error: they take more memory than is free.
        """
        config, work, lengths = self.model.config, self.budget.work, [len(text) for text in texts]
        total, chunk = plan_last_states(config, work, len(shared), lengths, self._free())
        return self._set_aside(LastStates(self.model, shared, texts, finish, total, chunk, adapter))

    def advance_job(self, job: Logits | LastStates) -> bool:
        """Compute one more chunk, a short one while requests run; return whether more is left."""
        running, chunk = self.scheduler.running, job.chunk
        return job.advance(
            self.scheduler.prefill_budget(ScheduledStep(running, []), chunk) if running else chunk
        )

    def _free(self) -> int:
        """Return the bytes that a job may take: all but the caches of requests."""
        self._update_budget()
        in_use = self.scheduler.room_in_use() - self.caches.prefix_room
        return self.budget.available - self.budget.bytes_of(in_use)

    def _set_aside(self, job: Job) -> Job:
        self._jobs.add(job)
        self._update_budget()
        self.caches.evict(self.scheduler.room_in_use() - self.scheduler.room)
        return job

    def _update_budget(self) -> None:
        """Report to the ledger what caches hold, and adapt the room to what they may take now."""
        self.share.held = self.scheduler.room_in_use() * self._token_bytes
        available = self.share.available - sum(job.nbytes for job in self._jobs)
        available = max(0, available)
        if available != self.budget.available:
            self.budget = replace(self.budget, available=available)
            self._set_room()

    def _set_room(self) -> None:
        self.scheduler.room = self.budget.tokens
        self.caches.resize(self.budget.tokens)


def _notify(request: Request, outcome: RequestResult | BaseException | None) -> None:
    """Report the outcome of a request, if there is one to report."""
    if outcome is None:
        return
    try:
        request.on_finish(outcome)
    except BaseException:  # noqa: BLE001 - the steps of other requests go on
        _log.exception("a request's `on_finish` failed")
    if isinstance(outcome, BaseException):
        _log.debug("a request failed", exc_info=outcome)
