"""Divides a process's memory among its engines, so that no byte is promised twice.

Each engine is guaranteed what its longest request takes, because it refuses only longer ones. The
rest is divided equally, again with each engine that comes or goes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock


class Share:
    """The bytes that one engine may take for caches and activations."""

    def __init__(self, guaranteed: int) -> None:
        self.guaranteed = guaranteed  # for its longest request
        self.available = guaranteed  # in all; changes as other engines come and go
        self.held = 0  # by its caches now; written by its engine


_shares: list[Share] = []
_lock = RLock()  # reentrant: the garbage collector may release a share in here


def unallocated_guarantees() -> int:
    """Return the bytes that are guaranteed to engines and not allocated yet."""
    with _lock:
        return sum(max(0, share.guaranteed - share.held) for share in list(_shares))


def claim(free: Callable[[], int], min_bytes: Callable[[int], int]) -> Share:
    """Return the share of a new engine, and divide the rest again.

    `free` measures the bytes that caches and activations may still take. `min_bytes` returns how
    many of the bytes that are not guaranteed to others the new engine's longest request takes.
    """
    with _lock:
        unpromised = free() - unallocated_guarantees()
        share = Share(min_bytes(max(0, unpromised)))
        others, rest = list(_shares), max(0, unpromised - share.guaranteed)
        for each in (share, *others):
            each.available = max(each.guaranteed, each.held) + rest // (len(others) + 1)
        _shares.append(share)
        return share


@contextmanager
def reserved(nbytes: int) -> Iterator[None]:
    """Keep bytes from new engines while the block runs, for models that will be loaded later."""
    share = Share(nbytes)
    share.available = 0  # so that nothing is divided among the others in the end
    with _lock:
        _shares.append(share)
    try:
        yield
    finally:
        release(share)


def release(share: Share) -> None:
    """Divide a share among the other engines; releasing it again has no effect."""
    with _lock:
        if share in _shares:
            _shares.remove(share)
            for other in _shares:
                other.available += share.available // len(_shares)
