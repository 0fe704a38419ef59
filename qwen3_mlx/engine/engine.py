"""Runs requests, any number at once: prompts in, tokens to their watchers, outcomes out."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from threading import RLock
from typing import Protocol
from weakref import finalize

import mlx.core as mx

from qwen3_mlx.cache.disk import DiskPrefixes
from qwen3_mlx.engine.activity import Activity
from qwen3_mlx.engine.core import EngineCore
from qwen3_mlx.engine.logits import Logits
from qwen3_mlx.engine.memory_ledger import release
from qwen3_mlx.engine.request import IDLE, Request, RequestResult
from qwen3_mlx.engine.sampling_params import NEUTRAL, SamplingParams
from qwen3_mlx.engine.speculation.speculator import Speculator
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.model.qwen3 import Qwen3

_MOST_AHEAD = 16  # prompts to be read in idle time: as many as prefixes are kept


class Thread(Protocol):
    """The thread that owns the network."""

    ending: bool

    def check_process(self) -> None:
        """Check that this is the thread's process; a Qwen3Error if not."""

    def post(self, job: Callable[[], None]) -> None:
        """Have a job done later; a Qwen3Error if the thread has ended."""


class Engine:
    """Takes requests from any thread; all else happens on the thread that owns the network.

    `budget` is what caches and activations may take when it is made, `context` the longest request;
    `share` is what they may take as other engines come and go.
    """

    def __init__(
        self,
        model: Qwen3,
        worker: Thread | None = None,
        *,
        vocabulary: int,
        available: int | None = None,
        context: int | None = None,
        disk: DiskPrefixes | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        """Run `model`, which belongs to `worker`; ids from `vocabulary` on are never chosen.

        Without a worker `step` is to be called for it to go on, by the thread that made the model.
        `available` are the bytes that caches and activations may take, with a reserve; None is what
        the machine can give now. No request may be longer than `context`. Long prompts are also
        kept on `disk`. What `speculator` proposes is verified.
        """
        self.model = model
        self.speculates = speculator is not None
        self._core = EngineCore(model, vocabulary, available, context, disk, speculator)
        self.budget, self.context = self._core.budget, self._core.context
        self.share = self._core.share
        finalize(self, release, self.share).atexit = False
        self._worker = worker
        self._inbox: SimpleQueue[Request] = SimpleQueue()
        self._ahead: deque[Request] = deque()  # the latest of what is read in idle time
        self._lock = RLock()  # a finalizer may submit something in the middle of `_post`
        self._posted = False  # whether a turn is in the worker's queue
        self._stepped = time.monotonic()  # when a step ended last, or there was nothing to do

    # --- from any thread ------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Run `request` when its turn comes; its watcher and `done` hear of it.

        Raises:
            Qwen3Error: the engine's thread has ended.
        """
        if self._worker:
            self._worker.check_process()
        if not self._pending():
            self._stepped = time.monotonic()
        self._inbox.put(request)
        self._post()

    def read_ahead(self, ids: Sequence[int]) -> None:
        """Have `ids` read while nothing else is to be done, for requests that begin with them.

        Under steady load that time may never come, so only the latest few are kept waiting.

        Raises:
            Qwen3Error: the engine's thread has ended.
        """
        request = Request(
            ids=ids,
            sampling=NEUTRAL,
            max_tokens=0,
            seed=0,
            end_ids=frozenset(),
            sink=_LogitsSink(),
            on_finish=lambda outcome: None,
            priority=IDLE,
        )
        self.submit(request)
        self._ahead.append(request)
        if len(self._ahead) > _MOST_AHEAD:
            self.cancel(self._ahead.popleft())

    def cancel(self, request: Request) -> None:
        """End `request` within a step."""
        request.cancelled.set()

    def activity(self) -> Activity:
        """Return what is being done; without waiting, so that the parts may be a step apart."""
        scheduler = self._core.scheduler
        running, waiting = (
            sum(job.priority < IDLE for job in list(jobs))
            for jobs in (scheduler.running, scheduler.waiting)
        )
        return Activity(
            running,
            waiting + self._inbox.qsize(),
            round(self._core.token_meter.rate, 1),
            self.share.held,
            self.share.available,
            mx.get_active_memory(),
            time.monotonic() - self._stepped if self._pending() else 0.0,
        )

    def _pending(self) -> int:
        scheduler = self._core.scheduler
        return len(scheduler.running) + len(scheduler.waiting) + self._inbox.qsize()

    # --- on the engine's thread -----------------------------------------------------------------

    def step(self) -> bool:
        """Do the next step, or some idle work; False if there is nothing left to do."""
        self._drain_inbox()
        more = self._core.step()
        self._stepped = time.monotonic()
        if more or self._core.save(interrupted=lambda: not self._inbox.empty()):
            return True
        return not self._inbox.empty()

    def stream(
        self, ids: Sequence[int], *, max_tokens: int, sampling: SamplingParams, seed: int = 0
    ) -> Iterator[int]:
        """Give the tokens that continue `ids`, stepping the engine; for programs without a worker.

        None of them ends the reply. Closing the iterator cancels it.
        """
        watcher, outcomes = _LogitsSink(), list[RequestResult | BaseException]()
        request = Request(
            ids=ids,
            sampling=sampling.over(NEUTRAL),
            max_tokens=max_tokens,
            seed=seed,
            end_ids=frozenset(),
            sink=watcher,
            on_finish=outcomes.append,
        )
        self._inbox.put(request)
        try:
            while not outcomes or watcher.tokens:
                if watcher.tokens:
                    yield watcher.tokens.pop(0)
                else:
                    self.step()
        finally:
            request.cancelled.set()
            while self.step():
                pass
        if isinstance(outcomes[0], BaseException):
            raise outcomes[0]

    def forget(self) -> None:
        """Give up all kept prefixes."""
        self._core.forget()

    def logits(self, ids: Sequence[int]) -> Logits:
        """Begin to compute the logits of all ids; `read_on` goes on.

        Raises:
            Qwen3Error: they do not fit; a ContextError: there are more ids than the context has.
        """
        return self._core.logits(ids)

    def read_on(self, logits: Logits) -> bool:
        """Compute a chunk more, and say whether some are left."""
        return self._core.advance_logits(logits)

    def _run_once(self) -> None:
        """Do a step and stand in line again: other work of the thread comes in between."""
        with self._lock:
            self._posted = False
        try:
            if self._worker and self._worker.ending:
                self._end_all()
            elif self.step():
                try:
                    self._post()
                except Qwen3Error:  # closed meanwhile
                    self._end_all()
        except BaseException as error:  # noqa: BLE001 - or requests would wait for ever
            self._core.fail_all(error, [*self._new_requests()])

    def _post(self) -> None:
        with self._lock:
            if self._worker and not self._posted:
                self._worker.post(self._run_once)
                self._posted = True

    def _end_all(self) -> None:
        self._drain_inbox()
        self._core.cancel_all()
        while self._core.save(interrupted=lambda: False):
            pass

    def _drain_inbox(self) -> None:
        for request in self._new_requests():
            self._core.add(request)

    def _new_requests(self) -> Iterator[Request]:
        while True:
            try:
                request = self._inbox.get_nowait()
            except Empty:
                return
            yield request


class _LogitsSink:
    """Holds the tokens of `Engine.stream` until they are asked for."""

    finished = False

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def advance(self, ids: Sequence[int]) -> None:
        """Take the next tokens."""
        self.tokens += ids

    def rewind(self, count: int) -> None:
        """Forget the last tokens."""
        del self.tokens[len(self.tokens) - count :]
