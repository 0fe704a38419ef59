"""Caches of finished sequences, kept for requests that begin with the same tokens.

The engine counts memory in tokens of cache, so this store does, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qwen3_mlx.cache.kv import KVCache

_MOST = 16  # laptops serve a handful of conversations
_LEAST = 16  # tokens; less is read again as fast as it is kept
_SLACK = 16  # tokens at the end of a prompt that a continued conversation may render differently


@dataclass(slots=True, eq=False)
class Prefix:
    """Tokens, and the caches, one a layer, that have seen them, and perhaps more after them.

    The first `prompt` tokens were a request's, the others its reply. `room` is the tokens that the
    caches have room for, or will have after their next write.
    """

    ids: list[int]
    layers: list[KVCache]
    prompt: int
    room: int
    saved: bool = False  # on disk, or not worth it


class PrefixStore:
    """Keeps prefixes, at most `limit` tokens of cache, and gives up the least recently used."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: list[Prefix] = []  # least recently used first

    @property
    def held(self) -> int:
        """The tokens that the kept caches have room for."""
        return sum(prefix.room for prefix in self._kept)

    def insert(self, prefix: Prefix) -> None:
        """Keep a prefix; the caller must not use its caches any more."""
        if len(prefix.ids) < _LEAST:
            return
        for other in self._kept:
            if common_prefix(other.ids, prefix.ids) == len(prefix.ids):  # it has all of this, too
                self._kept.remove(other)
                self._kept.append(other)
                return
        self._kept = [
            other for other in self._kept if common_prefix(other.ids, prefix.ids) < len(other.ids)
        ]
        self._kept.append(prefix)
        self.evict(self.held - self.limit)
        del self._kept[:-_MOST]

    def acquire(self, ids: Sequence[int], most: int) -> Prefix | None:
        """Give the longest prefix kept of the first `most` ids, or None.

        A request that goes on from all of another's prompt gets that one's caches, rewound to what
        both have in common. Where they part earlier, the tokens are shared, by a system turn say,
        and it gets a copy; whoever goes on with the other finds it as it was.
        """
        best, length = None, _LEAST - 1
        for prefix in self._kept:
            if (found := min(most, common_prefix(prefix.ids, ids))) > length:
                best, length = prefix, found
        if best is None:
            return None
        self._kept.remove(best)
        if length + _SLACK < min(best.prompt, len(best.ids)):
            self._kept.append(best)
            copies = [layer.copy(length) for layer in best.layers]
            return Prefix(best.ids[:length], copies, length, 0)
        for layer in best.layers:
            layer.truncate(length)
        return Prefix(best.ids[:length], best.layers, min(best.prompt, length), best.room)

    def match_length(self, ids: Sequence[int], most: int) -> int:
        """Count the ids at the start, at most `most`, that `acquire` would give."""
        longest = max((common_prefix(kept.ids, ids) for kept in self._kept), default=0)
        return min(most, longest) if longest >= _LEAST else 0

    def unsaved(self) -> Prefix | None:
        """Give one that is not on disk yet, those in use last first."""
        return next((prefix for prefix in reversed(self._kept) if not prefix.saved), None)

    def evict(self, tokens: int) -> int:
        """Give up prefixes until `tokens` tokens are free, and say how many were."""
        freed = 0
        while freed < tokens and self._kept:
            freed += self._kept.pop(0).room
        return freed

    def clear(self) -> None:
        """Give up all."""
        self._kept.clear()


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Count the ids at the start that are the same in both lists."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
