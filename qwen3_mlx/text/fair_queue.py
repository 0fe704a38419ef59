"""Turns at work that only a few can do at once: no client owns them, however much it asks for."""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Condition

from qwen3_mlx.errors import Qwen3Error

LOOK = 0.1
"""Seconds from one look at whether a caller waits still to the next."""


class Caller:
    """A caller for whom something is made; this one waits as long as it takes."""

    client = ""

    @property
    def gone(self) -> bool:
        """Whether nothing is to be done for it any more."""
        return False

    def waiting(self) -> AbstractContextManager[None]:
        """Return what surrounds the time in which nothing of Python's is done for it."""
        return nullcontext()

    def check(self) -> None:
        """Raise a Qwen3Error if it is gone."""
        if self.gone:
            raise Qwen3Error("the request was given up while it was prepared")


PATIENT = Caller()


class FairQueue:
    """A few turns. The client that has the fewest is next, and its callers in their order."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: list[Caller] = []
        self._having = Counter[str]()
        self._changed = Condition()

    @contextmanager
    def one(self, caller: Caller) -> Iterator[None]:
        """Surround what is done in a turn."""
        self.take(caller)
        try:
            yield
        finally:
            self.release(caller)

    def take(self, caller: Caller) -> None:
        """Wait for a turn.

        Raises:
            Qwen3Error: the caller is gone.
        """
        with self._changed:
            self._waiting.append(caller)
            try:
                while not (self._free and self._next() is caller):
                    self._changed.wait(LOOK)
                    caller.check()
                self._free -= 1
                self._having[caller.client] += 1
            finally:
                self._waiting.remove(caller)
                self._changed.notify_all()  # another is next

    def release(self, caller: Caller) -> None:
        """Give a turn back."""
        with self._changed:
            self._free += 1
            self._having[caller.client] -= 1
            self._having += Counter()  # without those that have none
            self._changed.notify_all()

    def _next(self) -> Caller:
        return min(self._waiting, key=lambda caller: self._having[caller.client])
