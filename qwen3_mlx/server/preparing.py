"""What is done for a request before its reply begins: beside the event loop, and with an end.

Rendering, encoding and grammars are done by a thread for each request. A few compute at once, for
they take turns with the event loop and the engine; while a grammar is compiled, others may. The
client for whom the fewest do is next.
The threads are daemons: the process does not wait for them when it ends.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from threading import Event as Flag
from threading import Thread
from typing import Any, TypeVar

from fastapi import Request

from qwen3_mlx.server.errors import ApiError, as_client_error
from qwen3_mlx.text.fair_queue import LOOK, Caller, FairQueue

_AT_ONCE = 4  # requests
_PATIENCE = 60.0  # seconds until a request that waits for others is told to come again

T = TypeVar("T")


class PreparationPool:
    """The requests that are being prepared."""

    def __init__(self) -> None:
        self._turns = FairQueue(_AT_ONCE)
        self._jobs: set[_Job] = set()

    @property
    def state(self) -> dict[str, Any]:
        """What an operator sees; `stuck` are those that go on although they were given up."""
        ages = [job.age for job in self._jobs]
        return {
            "requests": len(ages),
            "longest_seconds": round(max(ages, default=0.0), 1),
            "stuck": sum(age > _PATIENCE + 1 for age in ages),
        }

    @property
    def is_stuck(self) -> bool:
        """Whether no request can be prepared any more."""
        return bool(self.state["stuck"] >= _AT_ONCE)

    async def do(self, request: Request, cancelled: Flag, work: Callable[[Caller], T]) -> T:
        """Do some work for a request on a thread, and return what it does.

        The work is given up, and `cancelled` set, if the client goes away or it takes too long.

        Raises:
            ApiError: it failed, or was given up.
        """
        job = _Job(self._turns, cancelled, request.scope.get("caller", ""))
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        watching = asyncio.create_task(gone(request))
        waited: list[asyncio.Future[Any]] = [done, watching]
        self._jobs.add(job)
        job.start(work, done, partial(self._jobs.discard, job))
        try:
            while not done.done():
                await asyncio.wait(waited, timeout=LOOK, return_when="FIRST_COMPLETED")
                if not done.done():
                    _check(job, gone=watching.done())
            return done.result()
        except ApiError:
            raise
        except Exception as error:
            _check(job, gone=watching.done())  # if it was given up, that is why it has failed
            raise as_client_error(error) from error
        finally:
            watching.cancel()
            if not done.done():
                cancelled.set()
                done.cancel()


class _Job(Caller):
    """The work for one request, which computes when it is its turn."""

    def __init__(self, turns: FairQueue, cancelled: Flag, client: str) -> None:
        self.client = client
        self._turns = turns
        self._cancelled = cancelled
        self._started = time.monotonic()
        self._has_turn = False

    def start(
        self,
        work: Callable[[Caller], T],
        done: asyncio.Future[T],
        ended: Callable[[], None],
    ) -> None:
        """Begin with the work, which settles `done`; `ended` is called by the loop in any case."""

        def run() -> None:
            settle: Callable[[], None]
            try:
                with self.turn():
                    settle = partial(done.set_result, work(self))
            except BaseException as error:  # noqa: BLE001 - raised again where `done` is awaited
                settle = partial(done.set_exception, error)

            def finish() -> None:
                ended()
                if not done.done():
                    settle()

            with suppress(RuntimeError):  # the loop is closed
                done.get_loop().call_soon_threadsafe(finish)

        Thread(target=run, name="qwen3-prepare", daemon=True).start()

    @property
    def age(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._started

    @property
    def gone(self) -> bool:
        """Whether it was given up."""
        return self._cancelled.is_set()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Surround what computes."""
        self._take()
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let others have the turn meanwhile."""
        self._leave()
        try:
            yield
        finally:
            self._take()

    def _take(self) -> None:
        self._turns.take(self)
        self._has_turn = True

    def _leave(self) -> None:
        if self._has_turn:
            self._has_turn = False
            self._turns.release(self)


async def gone(request: Request) -> None:
    """Wait until the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check(job: _Job, *, gone: bool) -> None:
    """Raise an ApiError if a request is to be given up."""
    if gone:
        raise ApiError(499, "the client went away")
    if job.gone:
        raise ApiError(503, "the server is shutting down", code="unavailable")
    if job.age > _PATIENCE:
        raise ApiError(
            503,
            f"the request could not be prepared within {_PATIENCE:g} s: others are; try again",
            code="unavailable",
            headers={"Retry-After": "10"},
        )
