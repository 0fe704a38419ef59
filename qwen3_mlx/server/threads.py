"""Work on a thread of its own, for the event loop."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def in_daemon(job: Callable[[], T], ended: Callable[[], None] | None = None) -> asyncio.Future[T]:
    """Run a job on a daemon thread: the process does not wait for it when it ends.

    The event loop calls `ended` when the job has, also if the result is not awaited any more.
    """
    done: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    def run() -> None:
        settle: Callable[[], None]
        try:
            settle = partial(done.set_result, job())
        except BaseException as error:  # noqa: BLE001 - raised again where `done` is awaited
            settle = partial(done.set_exception, error)

        def finish() -> None:
            if ended:
                ended()
            if not done.done():
                settle()

        with suppress(RuntimeError):  # the loop is closed
            done.get_loop().call_soon_threadsafe(finish)

    Thread(target=run, name="qwen3-job", daemon=True).start()
    return done
