"""The one thread that owns MLX.

A lazy array belongs to the thread that made it, so everything that computes runs here, from loading
on; other threads hand in work and take evaluated results.
"""

from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

import mlx.core as mx

T = TypeVar("T")


class Worker:
    """A thread that does the jobs given to it one after another."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="qwen3-mlx", daemon=True)
        self._thread.start()

    def post(self, job: Callable[[], None]) -> None:
        """Have `job` done later; it must not raise."""
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
        """End the thread when the jobs given so far are done; may be called twice."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # or its result would live until the next one
        mx.clear_streams()  # MLX's own clean-up at the end of a thread races with the exit
