"""The engine as other threads see it: submits requests, steps the core, streams tokens."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Event, RLock
from weakref import finalize

import mlx.core as mx

from qwen3_mlx.cache.disk import DiskPrefixes
from qwen3_mlx.cache.quantized import PLAIN, CacheFormat
from qwen3_mlx.engine.activity import Activity
from qwen3_mlx.engine.core import EngineCore
from qwen3_mlx.engine.hooks import TokenCollector
from qwen3_mlx.engine.last_states import Finish, LastStates
from qwen3_mlx.engine.logits import Logits
from qwen3_mlx.engine.memory_ledger import release
from qwen3_mlx.engine.request import IDLE, Request, RequestResult, SampledLogprob, Scores
from qwen3_mlx.engine.sampling_params import NEUTRAL, SamplingParams
from qwen3_mlx.engine.speculation.speculator import Speculator
from qwen3_mlx.engine.worker import Worker
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.model.qwen3 import Qwen3

_MAX_PREFETCHES = 16  # prompts waiting to be read in idle time: as many as prefixes are kept


class Engine:
    """Accepts requests from any thread; all else happens on the thread that owns the network.

    `budget` is what caches and activations may take at the start, `context` the longest request in
    tokens; `share` is what they may take as other engines come and go.
    """

    def __init__(
        self,
        model: Qwen3,
        worker: Worker | None = None,
        *,
        vocabulary: int,
        cache_format: CacheFormat = PLAIN,
        available: int | None = None,
        context: int | None = None,
        disk: DiskPrefixes | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        """Create an engine for `model`, which belongs to `worker`.

        Ids from `vocabulary` on are never chosen. Without a worker, the thread that made the model
        calls `step`. The KV caches have `cache_format`. `available` are the bytes that caches and
        activations may take, with a reserve; None is what the machine can give now. No request may
        be longer than `context` tokens. Long prompts are also kept on `disk`. `speculator` proposes
        draft tokens.
        """
        self.model = model
        self.speculates = speculator is not None
        self._core = EngineCore(
            model,
            vocabulary,
            cache_format=cache_format,
            available=available,
            context=context,
            disk=disk,
            speculator=speculator,
        )
        self.budget, self.context = self._core.budget, self._core.context
        self.share = self._core.share
        finalize(self, release, self.share).atexit = False
        self._worker = worker
        self._inbox: SimpleQueue[Request] = SimpleQueue()
        self._prefetches: deque[Request] = deque()  # the latest, read in idle time
        self._lock = RLock()  # reentrant: a finalizer may submit in the middle of `_post`
        self._ended: BaseException | None = None
        self._posted = False  # True while `_run_once` is in the worker's queue
        self._last_step_at = time.monotonic()  # or the time when work arrived

    # --- from any thread ------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Add `request`; its sink receives the tokens, `on_finish` the outcome.

        Raises:
            Qwen3Error: the engine's thread has ended.
        """
        if self._worker:
            self._worker.check_process()
        if not self._pending():
            self._last_step_at = time.monotonic()
        self._inbox.put(request)
        self._post()

    def prefetch(self, ids: Sequence[int], adapter: int | None = None) -> None:
        """Prefill `ids` in idle time, for requests that begin with them and use this adapter.

        Under steady load that time may never come, so only the latest few wait for it.

        Raises:
            Qwen3Error: the engine's thread has ended.
        """
        request = Request(
            ids=ids,
            sampling=NEUTRAL,
            max_tokens=0,
            seed=0,
            end_ids=frozenset(),
            sink=TokenCollector(),
            on_finish=lambda outcome: None,
            priority=IDLE,
            adapter=adapter,
        )
        self.submit(request)
        self._prefetches.append(request)
        if len(self._prefetches) > _MAX_PREFETCHES:
            self.cancel(self._prefetches.popleft())

    def score(
        self,
        ids: Sequence[int],
        start: int,
        on_finish: Callable[[Scores | BaseException], None],
        cancelled: Event,
        adapter: int | None = None,
    ) -> None:
        """Score the ids from `start` on, each with the likeliest token in its place.

        `on_finish` is called on the engine's thread.

        Raises:
            Qwen3Error: the engine's thread has ended.
        """
        logprobs: list[SampledLogprob] = []

        def finish(outcome: RequestResult | BaseException) -> None:
            if isinstance(outcome, BaseException):
                on_finish(outcome)
            elif outcome.reason == "cancelled":
                on_finish(Qwen3Error("the scoring was cancelled"))
            else:
                on_finish(Scores(logprobs, outcome.cached_tokens))

        self.submit(
            Request(
                ids=ids[:-1],  # nothing follows the last
                following=ids[-1],
                score_from=start - 1,
                sampling=NEUTRAL,
                max_tokens=0,
                seed=0,
                end_ids=frozenset(),
                sink=TokenCollector(),
                on_finish=finish,
                on_prompt_logprobs=logprobs.extend,
                top_logprobs=1,
                cancelled=cancelled,
                adapter=adapter,
            )
        )

    def cancel(self, request: Request) -> None:
        """Cancel `request`; it ends within a step."""
        request.cancelled.set()

    def activity(self) -> Activity:
        """Return the current activity. Nothing is locked, so its fields may be a step apart."""
        scheduler = self._core.scheduler
        running, waiting = (
            sum(sequence.priority < IDLE for sequence in list(sequences))
            for sequences in (scheduler.running, scheduler.waiting)
        )
        return Activity(
            running,
            waiting + self._inbox.qsize(),
            round(self._core.token_meter.rate, 1),
            self.share.held,
            self.share.available,
            mx.get_active_memory(),
            time.monotonic() - self._last_step_at if self._pending() else 0.0,
        )

    def _pending(self) -> int:
        scheduler = self._core.scheduler
        return len(scheduler.running) + len(scheduler.waiting) + self._inbox.qsize()

    # --- on the engine's thread -----------------------------------------------------------------

    def step(self) -> bool:
        """Run the next step, or some idle work; return False if no work is left."""
        for request in self._new_requests():
            self._core.add(request)
        has_work = self._core.step()
        self._last_step_at = time.monotonic()
        if has_work or self._core.caches.save(interrupted=lambda: not self._inbox.empty()):
            return True
        return not self._inbox.empty()

    def stream(
        self, ids: Sequence[int], *, max_tokens: int, sampling: SamplingParams, seed: int = 0
    ) -> Iterator[int]:
        """Yield the tokens that continue `ids`, and step the engine; for use without a worker.

        No token ends the reply. Closing the iterator cancels it.
        """
        collector, outcomes = TokenCollector(), list[RequestResult | BaseException]()
        request = Request(
            ids=ids,
            sampling=sampling.over(NEUTRAL),
            max_tokens=max_tokens,
            seed=seed,
            end_ids=frozenset(),
            sink=collector,
            on_finish=outcomes.append,
        )
        self._inbox.put(request)
        try:
            while not outcomes:
                self.step()
                yield from collector.take()
        finally:
            request.cancelled.set()
            while self.step():
                pass
        if isinstance(outcomes[0], BaseException):
            raise outcomes[0]

    def forget(self) -> None:
        """Clear the prefix cache."""
        self._core.forget()

    def logits(self, ids: Sequence[int], adapter: int | None = None) -> Logits:
        """Create the job that computes the logits of all ids; `advance_job` advances it.

        Raises:
            ContextError: there are more ids than the context window has.
            Qwen3Error: the logits take more memory than is free.
        """
        return self._core.logits(ids, adapter)

    def last_states(
        self,
        shared: Sequence[int],
        texts: Sequence[Sequence[int]],
        finish: Finish,
        adapter: int | None = None,
    ) -> LastStates:
        """Create the job that computes results of texts; `advance_job` advances it.

        Raises:
            Qwen3Error: they take more memory than is free.
        """
        return self._core.last_states(shared, texts, finish, adapter)

    def advance_job(self, job: Logits | LastStates) -> bool:
        """Compute one more chunk; return whether more is left."""
        return self._core.advance_job(job)

    def end(self, error: BaseException) -> None:
        """End all requests with `error`, and those to come; nothing is computed any more."""
        self._ended = error
        self._core.fail_all(error, [*self._new_requests()])

    def _run_once(self) -> None:
        """Run a step and queue the next one, behind other jobs of the worker."""
        with self._lock:
            self._posted = False
        if self._ended:
            self.end(self._ended)
            return
        try:
            if self._worker and self._worker.ending:
                self._cancel_all()
            elif self.step():
                try:
                    self._post()
                except Qwen3Error:  # the worker was stopped meanwhile
                    self._cancel_all()
        except BaseException as error:  # noqa: BLE001 - or requests would never end
            self._core.fail_all(error, [*self._new_requests()])

    def _post(self) -> None:
        with self._lock:
            if self._worker and not self._posted:
                self._worker.post(self._run_once)
                self._posted = True

    def _cancel_all(self) -> None:
        for request in self._new_requests():
            self._core.add(request)
        self._core.cancel_all()
        while self._core.caches.save(interrupted=lambda: False):
            pass

    def _new_requests(self) -> Iterator[Request]:
        with suppress(Empty):
            while True:
                yield self._inbox.get_nowait()
