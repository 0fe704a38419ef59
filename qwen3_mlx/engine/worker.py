"""The one thread that owns MLX.

A lazy array belongs to the thread that made it, so everything that computes runs here, from loading
on; other threads hand in work and take evaluated results.
"""

import atexit
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Lock, Thread, current_thread
from typing import TypeVar

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.errors import Qwen3Error

_INTERRUPTED = 130  # the exit code of a program that Ctrl-C has ended

T = TypeVar("T")


class Worker:
    """A thread that does the jobs given to it one after another."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.ending = False  # what runs should come to its end, too
        self._lock = Lock()  # nothing may be posted behind the end
        self._process = os.getpid()
        self._thread = Thread(target=self._work, name="qwen3-mlx", daemon=True)
        self._thread.start()
        atexit.register(self._end)  # which runs even if no LLM has been made yet to be finalized

    def post(self, job: Callable[[], None]) -> None:
        """Have `job` done later; it must not raise.

        Raises:
            Qwen3Error: the thread has ended, or is another process's.
        """
        if os.getpid() != self._process:
            raise Qwen3Error(
                "this LLM was loaded before the process forked, and its thread stayed behind; "
                "load it in the new process, started with the spawn method"
            )
        with self._lock:
            if self.ending:
                raise Qwen3Error("this LLM is closed; load it again")
            self._jobs.put(job)

    def call(self, job: Callable[[], T]) -> T:
        """Have `job` done and give its result, or raise its error."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(job())
            except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                future.set_exception(error)

        self.post(run)
        return future.result()

    def stop(self) -> None:
        """End the thread after the jobs given so far; may be called twice, and from a job."""
        with self._lock:
            self.ending = True
            self._jobs.put(None)
        if os.getpid() != self._process:
            return
        if self._thread is not current_thread():  # else in a callback, or collected there
            self._thread.join()
            atexit.unregister(self._end)

    def _end(self) -> None:
        """Stop before the process exits, however often it is interrupted."""
        if os.getpid() != self._process:
            return
        try:
            self.stop()
        except KeyboardInterrupt:  # an ordinary exit would hang in OpenBLAS while this one computes
            for file in (sys.stdout, sys.stderr):
                file.flush()
            os._exit(_INTERRUPTED)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # or its result would live until the next one
        backend.wait_for_work()
        mx.clear_streams()  # MLX's own clean-up at the end of a thread races with the exit
