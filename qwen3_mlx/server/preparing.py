"""Work for requests, outside the event loop and with a timeout: preparing them, computing texts.

Each request has a thread that renders, encodes and compiles grammars. Only a few of them compute at
once, because they share the interpreter with the event loop and the engine; a thread that waits for
a grammar to be compiled lets another compute. The client with the fewest turns is next.
The threads are daemons: the process does not wait for them when it ends.
"""

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Event as Flag
from typing import Any, TypeVar

from fastapi import Request

from qwen3_mlx.server.errors import ApiError, as_client_error
from qwen3_mlx.server.threads import in_daemon
from qwen3_mlx.text.fair_queue import POLL_SECONDS, Caller, FairQueue

_MAX_COMPUTING = 4  # requests that compute at once
_TIMEOUT = 60.0  # seconds until a preparation is given up with a 503

T = TypeVar("T")


class PreparationPool:
    """The requests that are being prepared."""

    def __init__(self, timeout: float = _TIMEOUT) -> None:
        """Create the pool; work is given up after `timeout` seconds."""
        self._timeout = timeout
        self._turns = FairQueue(_MAX_COMPUTING)
        self._jobs: set[_Job] = set()

    @property
    def state(self) -> dict[str, Any]:
        """State for /health; `stuck` counts work that goes on although it was given up."""
        ages = [job.age for job in self._jobs]
        return {
            "requests": len(ages),
            "longest_seconds": round(max(ages, default=0.0), 1),
            "stuck": sum(age > self._timeout + 1 for age in ages),
        }

    @property
    def is_stuck(self) -> bool:
        """True if stuck work leaves no turn for others."""
        return bool(self.state["stuck"] >= _MAX_COMPUTING)

    async def run(self, request: Request, cancelled: Flag, work: Callable[[Caller], T]) -> T:
        """Run the preparation of a request on a thread, and return its result.

        If the client disconnects or the timeout passes, the work is given up and `cancelled` set.

        Raises:
            ApiError: the work failed or was given up.
        """
        job = _Job(self._turns, cancelled, request.scope.get("caller", ""))
        self._jobs.add(job)
        done = in_daemon(partial(job.run, work), partial(self._jobs.discard, job))
        disconnected = asyncio.create_task(wait_for_disconnect(request))
        awaited: list[asyncio.Future[Any]] = [done, disconnected]
        try:
            while not done.done():
                await asyncio.wait(awaited, timeout=POLL_SECONDS, return_when="FIRST_COMPLETED")
                if not done.done():
                    self._check(job, disconnected=disconnected.done())
            return done.result()
        except ApiError:
            raise
        except Exception as error:
            # Work that was given up fails for that reason.
            self._check(job, disconnected=disconnected.done())
            raise as_client_error(error) from error
        finally:
            disconnected.cancel()
            if not done.done():
                cancelled.set()
                done.cancel()

    def _check(self, job: "_Job", *, disconnected: bool) -> None:
        """Raise an ApiError if the work must be given up."""
        if disconnected:
            raise ApiError(499, "the client went away")
        if job.gone:
            raise ApiError(503, "the server is shutting down", code="unavailable")
        if job.age > self._timeout:
            raise self._too_late()

    def _too_late(self) -> ApiError:
        return ApiError(
            503,
            f"the request could not be prepared within {self._timeout:g} s beside others; "
            "try again",
            code="unavailable",
            headers={"Retry-After": "10"},
        )


class ComputingPool(PreparationPool):
    """The requests whose texts are encoded and computed; each takes memory for both."""

    def __init__(self, timeout: float | None) -> None:
        """Create the pool; `timeout` is in seconds, None is no limit."""
        super().__init__(timeout or math.inf)

    def _too_late(self) -> ApiError:
        return ApiError(
            504,
            f"the texts were not computed within {self._timeout:g} s (--request-timeout); send "
            "fewer at once, or try again when the server is less busy",
            code="timeout",
        )


class _Job(Caller):
    """The preparation of one request; it computes during its turns."""

    def __init__(self, turns: FairQueue, cancelled: Flag, client: str) -> None:
        self.client = client
        self._turns = turns
        self._cancelled = cancelled
        self._started = time.monotonic()
        self._has_turn = False

    def run(self, work: Callable[[Caller], T]) -> T:
        """Run the work in a turn, and return its result."""
        with self.turn():
            return work(self)

    @property
    def age(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def gone(self) -> bool:
        """True if the work was given up."""
        return self._cancelled.is_set()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold a turn while the block computes."""
        self._take()
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Release the turn while the block waits."""
        self._leave()
        try:
            yield
        finally:
            self._take()

    def _take(self) -> None:
        self._turns.acquire(self)
        self._has_turn = True

    def _leave(self) -> None:
        if self._has_turn:
            self._has_turn = False
            self._turns.release(self)


async def wait_for_disconnect(request: Request) -> None:
    """Wait until the client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
