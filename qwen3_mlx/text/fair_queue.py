"""Fair queue for a few workers: no client can occupy all of them with many requests."""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Condition

from qwen3_mlx.errors import Qwen3Error

POLL_SECONDS = 0.1
"""Seconds between two checks whether a caller is still waiting."""


class Caller:
    """The caller of a queued job; this base class waits without limit."""

    client = ""

    @property
    def gone(self) -> bool:
        """True if the result is no longer wanted."""
        return False

    def waiting(self) -> AbstractContextManager[None]:
        """Return a context manager for the time outside Python code, when other callers may run."""
        return nullcontext()

    def check(self) -> None:
        """Raise a Qwen3Error if the caller is gone."""
        if self.gone:
            raise Qwen3Error("the request was cancelled while it was prepared")


LOCAL_CALLER = Caller()
"""The caller of what this process itself does: it belongs to no client, and stays."""


class FairQueue:
    """Shares `count` turns: the client with the fewest is next, its callers in order."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: list[Caller] = []
        self._turns_of = Counter[str]()
        self._changed = Condition()

    @contextmanager
    def turn(self, caller: Caller) -> Iterator[None]:
        """Hold a turn for the duration of the context."""
        self.acquire(caller)
        try:
            yield
        finally:
            self.release(caller)

    def acquire(self, caller: Caller) -> None:
        """Wait for a turn.

        Raises:
            Qwen3Error: the caller is gone.
        """
        with self._changed:
            self._waiting.append(caller)
            try:
                while not (self._free and self._next() is caller):
                    self._changed.wait(POLL_SECONDS)
                    caller.check()
                self._free -= 1
                self._turns_of[caller.client] += 1
            finally:
                self._waiting.remove(caller)
                self._changed.notify_all()  # another caller is first in line now

    def release(self, caller: Caller) -> None:
        """Return a turn to the queue."""
        with self._changed:
            self._free += 1
            self._turns_of[caller.client] -= 1
            self._turns_of += Counter()  # drops clients without a turn
            self._changed.notify_all()

    def _next(self) -> Caller:
        return min(self._waiting, key=lambda caller: self._turns_of[caller.client])
