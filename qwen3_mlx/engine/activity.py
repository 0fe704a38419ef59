"""What an engine is doing, for other threads to see without waiting for its own."""

import time
from collections.abc import Callable
from dataclasses import dataclass

_SECONDS = 10  # that a speed is the average of


@dataclass(frozen=True, slots=True)
class Activity:
    """What an engine does at a moment; sizes are in bytes.

    Requests `running` and `waiting` are those of callers: what is read in idle time is not counted.
    Caches hold `cache_bytes` of at most `cache_limit`; `device_bytes` are all arrays of the
    process. No step has ended for `silent` seconds although there was work.
    """

    running: int
    waiting: int
    tokens_per_second: float
    cache_bytes: int
    cache_limit: int
    device_bytes: int
    silent: float


class Meter:
    """Counts events on one thread; any thread may ask how many a second there were lately."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Each second has its place, which is replaced as a whole: a reader needs no lock.
        self._counts = [(-_SECONDS, 0)] * _SECONDS

    def add(self, count: int) -> None:
        """Count so many more."""
        now = int(self._clock())
        second, before = self._counts[now % _SECONDS]
        self._counts[now % _SECONDS] = (now, count + (before if second == now else 0))

    @property
    def rate(self) -> float:
        """The events a second, over the last ten seconds or since the first in them."""
        now = self._clock()
        recent = [(second, n) for second, n in list(self._counts) if now - second < _SECONDS]
        since = min((second for second, n in recent if n), default=now)
        return sum(n for _, n in recent) / max(1.0, now - since)
