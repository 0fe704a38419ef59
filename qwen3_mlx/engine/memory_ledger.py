"""What the engines of a process may take of its memory together: no byte is promised twice.

Each engine is sure of what its longest request takes, because longer ones are all that it refuses.
What is left beyond that is divided equally, anew with each engine that comes or goes.
"""

from collections.abc import Callable
from threading import RLock


class Share:
    """What one engine may take for caches and activations, in bytes."""

    def __init__(self, least: int) -> None:
        self.least = least  # for its longest request; no other engine gets it
        self.available = least  # in all; changes as other engines come and go
        self.held = 0  # by its caches now


_shares: list[Share] = []
_lock = RLock()  # a collection may release one in the middle of what is done here


def owed() -> int:
    """Return the bytes that engines are sure of and have not allocated yet."""
    with _lock:
        return sum(max(0, share.least - share.held) for share in list(_shares))


def claim(free: Callable[[], int], least_of: Callable[[int], int]) -> Share:
    """Give a new engine its share.

    `free` measures the bytes that caches and activations may still take; `least_of` tells how many
    of those that nobody is sure of the new engine's longest request takes.
    """
    with _lock:
        unpromised = free() - owed()
        share = Share(least_of(max(0, unpromised)))
        others, beyond = list(_shares), max(0, unpromised - share.least)
        for one in (share, *others):
            one.available = max(one.least, one.held) + beyond // (len(others) + 1)
        _shares.append(share)
        return share


def release(share: Share) -> None:
    """Divide a share among the other engines; it may be released twice."""
    with _lock:
        if share in _shares:
            _shares.remove(share)
            for other in _shares:
                other.available += share.available // len(_shares)
