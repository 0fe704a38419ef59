"""The one thread that owns MLX.

A lazy array belongs to the thread that made it, so everything that computes runs here, from loading
on; other threads hand in work and take evaluated results.
"""

import atexit
import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread, current_thread
from typing import TypeVar

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.errors import Qwen3Error

_INTERRUPTED = 130  # the exit code of a program that Ctrl-C has ended

T = TypeVar("T")

_log = logging.getLogger(__name__)
_CLOSED = "this LLM is closed; load it again"


class Worker:
    """A thread that does the jobs given to it one after another.

    There is no lock: the garbage collector may call `stop`, or anything else, in the middle of any
    of these methods, on the same thread.
    """

    def __init__(self) -> None:
        """Start the thread.

        Raises:
            Qwen3Error: this process was forked from one that uses MLX.
        """
        backend.refuse_fork()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.ending = False  # what runs should come to its end, too
        self._ended = False  # what is posted from now on may be left undone
        self._process = os.getpid()
        self._thread = Thread(target=self._work, name="qwen3-mlx", daemon=True)
        self._thread.start()
        atexit.register(self._end)  # which runs even if no LLM has been made yet to be finalized

    def post(self, job: Callable[[], None]) -> None:
        """Have `job` done later; an error that it raises is logged.

        Raises:
            Qwen3Error: the thread has ended, or is another process's.
        """
        if os.getpid() != self._process:
            raise Qwen3Error(
                "this LLM was loaded before the process forked, and its thread stayed behind; "
                "load it in the new process, started with the spawn method"
            )
        if self.ending:
            raise Qwen3Error(_CLOSED)
        self._jobs.put(job)
        if self._ended:  # between the two lines above: the job may have come too late
            raise Qwen3Error(_CLOSED)

    def check_wait(self) -> None:
        """Check that the current thread may wait for what this one does.

        Raises:
            Qwen3Error: it is the same thread, so that it would wait for ever.
        """
        if self._thread is current_thread():
            raise Qwen3Error(
                "this is a callback on the thread that computes for this LLM, and waiting here "
                "for the same LLM would never end; call it from another thread, or afterwards"
            )

    def call(self, job: Callable[[], T]) -> T:
        """Have `job` done and give its result, or raise its error.

        Raises:
            Qwen3Error: the thread has ended, or it is the current one.
        """
        self.check_wait()
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
        if os.getpid() != self._process:
            return
        self.ending = True
        self._jobs.put(None)
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
            _do(job)
            del job  # or its result would live until the next one
        self._ended = True
        with suppress(Empty):
            while True:  # a job that was being posted when the end came may stand behind it
                if job := self._jobs.get_nowait():
                    _do(job)
        backend.wait_for_work()
        mx.clear_streams()  # MLX's own clean-up at the end of a thread races with the exit


def _do(job: Callable[[], None]) -> None:
    """Do a job; whatever it raises, the thread goes on with the next."""
    try:
        job()
    except BaseException:  # noqa: BLE001 - the thread is everybody's
        with suppress(BaseException):  # of a handler of the log
            _log.exception("a job of the thread that computes failed")
