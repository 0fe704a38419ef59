"""The current activity of an engine, readable from any thread without locks."""

import time
from collections.abc import Callable
from dataclasses import dataclass

_WINDOW = 10  # seconds over which a rate is averaged


@dataclass(frozen=True, slots=True)
class Activity:
    """State of an engine: what it does at one moment; sizes are in bytes.

    Requests `running` and `waiting` are those of callers; prompts read in idle time do not count.
    Caches hold `cache_bytes` of at most `cache_limit`; `device_bytes` are all arrays of the
    process. No step has ended for `seconds_since_step` seconds although there was work.
    """

    running: int
    waiting: int
    tokens_per_second: float
    cache_bytes: int
    cache_limit: int
    device_bytes: int
    seconds_since_step: float


class Meter:
    """Counts events on one thread; any thread may read their rate."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Each second has an entry, which is replaced as a whole: so readers need no lock.
        self._counts = [(-_WINDOW, 0)] * _WINDOW

    def add(self, count: int) -> None:
        """Add `count` events."""
        now = int(self._clock())
        second, counted = self._counts[now % _WINDOW]
        self._counts[now % _WINDOW] = (now, count + (counted if second == now else 0))

    @property
    def rate(self) -> float:
        """Events a second, over the last ten seconds or since the first event in them."""
        now = self._clock()
        recent = [(second, n) for second, n in list(self._counts) if now - second < _WINDOW]
        since = min((second for second, n in recent if n), default=now)
        return sum(n for _, n in recent) / max(1.0, now - since)
