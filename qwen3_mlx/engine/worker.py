"""The worker thread: the one thread that owns MLX.

A lazy array belongs to the thread that made it, so everything that computes runs here, from loading
on; other threads submit jobs and receive evaluated results.
"""

import atexit
import logging
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from queue import Empty, SimpleQueue
from threading import Thread, current_thread
from typing import Any, TypeVar

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.errors import Qwen3Error

_INTERRUPTED = 130  # exit code of a program ended by Ctrl-C
_SLICE_SECONDS = 0.2

T = TypeVar("T")

_log = logging.getLogger(__name__)
_NO_WAIT = nullcontext()
_CLOSED = "this LLM is closed; load it again"


class WorkerThread(Thread):
    """The thread of a worker.

    `waits_for` is another worker's, while a callback waits for it. `is_replaced` is True once the
    thread is given up: when it wakes, it must not touch anything.
    """

    waits_for: "WorkerThread | None" = None
    is_replaced = False


class Worker:
    """Runs jobs on a thread of its own, one after another.

    There is no lock: the garbage collector may call `stop`, or any other method, in the middle of
    these methods, on the same thread.
    """

    def __init__(self) -> None:
        """Start the thread.

        Raises:
            Qwen3Error: this process was forked from one that uses MLX.
        """
        backend.refuse_fork()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.ending = False  # set by `stop`: running requests are cancelled
        self._ended = False  # jobs posted from now on may not run
        self._process = os.getpid()
        self._was_replaced = False
        self._running: Future[Any] | None = None  # whose result `call` waits for
        self._thread = self._start_thread()
        atexit.register(self._end)  # not by the LLM's finalizer: there may be no LLM yet

    def _start_thread(self) -> WorkerThread:
        thread = WorkerThread(target=self._run_jobs, name="qwen3-mlx", daemon=True)
        thread.start()
        return thread

    def replace(self, error: Exception) -> None:
        """Replace a thread that hangs in a job by another, which runs the jobs behind that one.

        A call that waits for the job raises `error`. Should the thread wake, the job must find
        `WorkerThread.is_replaced` and never return.
        """
        self._thread.is_replaced = self._was_replaced = True
        running, self._running = self._running, None
        self._thread = self._start_thread()
        if running:
            running.set_exception(error)

    def post(self, job: Callable[[], None]) -> None:
        """Queue `job`; an error that it raises is logged.

        Raises:
            Qwen3Error: the thread has ended, or is another process's.
        """
        self.check_process()
        if self.ending:
            raise Qwen3Error(_CLOSED)
        self._jobs.put(job)
        if self._ended:  # it may have ended between the two lines above
            raise Qwen3Error(_CLOSED)

    @property
    def forked(self) -> bool:
        """True if this process was forked from that of the thread, which stayed behind."""
        return os.getpid() != self._process

    def check_process(self) -> None:
        """Check that this is the process of the thread; call it before any lock is taken.

        Raises:
            Qwen3Error: this process was forked from that one.
        """
        if self.forked:
            raise Qwen3Error(
                "this LLM was loaded before the process forked, and its thread stayed behind; "
                "load it in the new process, started with the spawn method"
            )

    def wait(self) -> AbstractContextManager[None]:
        """Return the context in which the current thread waits for a result of this one.

        Raises:
            Qwen3Error: this one waits for the current thread, or is it, so that neither would end;
                or this process was forked from that of the thread.
        """
        self.check_process()
        current = current_thread()
        return self._wait_on(current) if isinstance(current, WorkerThread) else _NO_WAIT

    @contextmanager
    def _wait_on(self, current: WorkerThread) -> Iterator[None]:
        thread: WorkerThread | None = self._thread
        current.waits_for = thread  # before following the chain: other threads do the same
        try:
            while thread and thread is not current:
                thread = thread.waits_for
            if thread:
                raise Qwen3Error(
                    "this is a callback on the thread that computes for this LLM, and waiting here "
                    "for the same LLM would never end; call it from another thread, or afterwards"
                )
            yield
        finally:
            current.waits_for = None

    def call(self, job: Callable[[], T]) -> T:
        """Run `job` on the thread; return its result, or raise its error.

        Raises:
            Qwen3Error: the thread has ended, or it is the current one.
        """
        future: Future[T] = Future()

        def run() -> None:
            self._running = future
            try:
                future.set_result(job())
            except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                future.set_exception(error)
            self._running = None

        with self.wait():
            self.post(run)
            # In slices: a signal just before a wait without an end is only seen after it.
            while not wait([future], _SLICE_SECONDS).done:
                pass
            return future.result()

    def stop(self) -> None:
        """End the thread after the jobs queued so far; may be called twice, and from a job."""
        if self.forked:
            return
        self.ending = True
        self._jobs.put(None)
        # In a callback, or collected there, a join could deadlock, also that of another worker.
        if not isinstance(current_thread(), WorkerThread):
            self._thread.join()
            atexit.unregister(self._end)

    def _end(self) -> None:
        """Stop before the process exits, however often it is interrupted."""
        if self.forked:
            return
        try:
            self.stop()
        except KeyboardInterrupt:
            # An ordinary exit would hang in OpenBLAS while the thread computes.
            for file in (sys.stdout, sys.stderr):
                file.flush()
            os._exit(_INTERRUPTED)

    def _run_jobs(self) -> None:
        stream = backend.acquire_stream()
        mx.set_default_stream(stream)
        while (job := self._jobs.get()) is not None:
            _run_job(job)
            del job  # or what it refers to would live until the next job
        self._ended = True
        with suppress(Empty):
            while True:  # a job posted while the thread ended may stand behind the None
                if job := self._jobs.get_nowait():
                    _run_job(job)
        backend.release_stream(stream)
        if self._was_replaced:
            return  # the other thread's streams would be waited for
        mx.clear_streams()  # MLX's own clean-up at the end of a thread races with the process exit


def _run_job(job: Callable[[], None]) -> None:
    """Run a job; whatever it raises, the thread goes on with the next."""
    try:
        job()
    except BaseException:  # noqa: BLE001 - the thread serves all callers
        with suppress(BaseException):  # a log handler may raise
            _log.exception("a job of the thread that computes failed")
