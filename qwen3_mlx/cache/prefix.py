"""Prefix cache: the KV caches of finished sequences, kept for requests with the same first tokens.

Sizes are in tokens of cache, the unit in which the engine counts memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qwen3_mlx.cache.sequence_caches import SequenceCaches

_MAX_PREFIXES = 16  # a laptop serves a handful of conversations
_MIN_TOKENS = 16  # prefill of fewer tokens is as fast as keeping them
_SLACK = 16  # tokens at the end of a prompt that a continued conversation may render differently


# Compared by identity: equality would compare thousands of ids whenever a list is searched.
@dataclass(slots=True, eq=False)
class Prefix:
    """Tokens, and the caches that have seen them, and perhaps tokens after them.

    The first `prompt` tokens were the prompt of a request, the others its reply. `adapter` is the
    number of the adapter that computed the caches: requests with another cannot use them.
    """

    ids: list[int]
    caches: SequenceCaches
    prompt: int
    saved: bool = False  # on disk, or not worth it
    adapter: int | None = None

    def common(self, ids: Sequence[int], adapter: int | None) -> int:
        """Return the number of leading ids that a request can use."""
        return common_prefix(self.ids, ids) if adapter == self.adapter else 0


class PrefixStore:
    """Keeps prefixes of at most `limit` tokens of cache; the least recently used go first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: list[Prefix] = []  # least recently used first

    @property
    def room(self) -> int:
        """The room of the kept caches, in tokens."""
        return sum(prefix.caches.room for prefix in self._kept)

    def insert(self, prefix: Prefix) -> None:
        """Add a prefix; the caller must not use its caches any more."""
        if len(prefix.ids) < _MIN_TOKENS:
            return
        for other in self._kept:
            # A kept prefix that begins with all of these tokens serves every request that this one
            # would serve. It only becomes the most recently used.
            if other.common(prefix.ids, prefix.adapter) == len(prefix.ids):
                self._kept.remove(other)
                self._kept.append(other)
                return
        # The reverse: a kept prefix with which the new one begins is of no more use.
        self._kept = [
            other
            for other in self._kept
            if other.common(prefix.ids, prefix.adapter) < len(other.ids)
        ]
        # Appended before the eviction, so that the new one counts. It is evicted last, and only if
        # it exceeds the limit by itself.
        self._kept.append(prefix)
        self.evict(self.room - self.limit)
        del self._kept[:-_MAX_PREFIXES]

    def acquire(
        self,
        ids: Sequence[int],
        max_tokens: int,
        adapter: int | None = None,
        *,
        always_copy: bool = False,
    ) -> Prefix | None:
        """Return the longest kept prefix of the first `max_tokens` ids of an adapter, or None.

        A request that continues from the whole prompt of another gets the other's caches, truncated
        to the common tokens. A request that shares less, a system turn for example, gets a copy;
        the original stays as it is for requests that continue it. So it does with `always_copy`.
        """
        best, length = None, _MIN_TOKENS - 1
        for prefix in self._kept:
            if (found := min(max_tokens, prefix.common(ids, adapter))) > length:
                best, length = prefix, found
        if best is None:
            return None
        # Caches in use must not stay in the store: they are written in place, and another request
        # could acquire them.
        self._kept.remove(best)
        # The ids part well before the end of the other prompt: this is another conversation. Small
        # differences at the end (`_SLACK`) are the same conversation, rendered with its next turn.
        if always_copy or length + _SLACK < min(best.prompt, len(best.ids)):
            self._kept.append(best)  # now the most recently used
            return Prefix(best.ids[:length], best.caches.copy(length), length, adapter=adapter)
        # Moved instead of copied: nothing is allocated, so `room` stays that of the buffers.
        best.caches.truncate(length)
        prompt = min(best.prompt, length)
        return Prefix(best.ids[:length], best.caches, prompt, adapter=adapter)

    def match_length(self, ids: Sequence[int], max_tokens: int, adapter: int | None = None) -> int:
        """Return the number of leading ids, at most `max_tokens`, that `acquire` would return."""
        longest = max((kept.common(ids, adapter) for kept in self._kept), default=0)
        return min(max_tokens, longest) if longest >= _MIN_TOKENS else 0

    def unsaved(self) -> Prefix | None:
        """Return a prefix that is not on disk yet, or None; those of adapters are not saved."""
        # The most recently used first: it is the most likely to be needed again.
        unsaved = (one for one in reversed(self._kept) if not one.saved and one.adapter is None)
        return next(unsaved, None)

    def evict(self, tokens: int) -> int:
        """Remove prefixes until `tokens` tokens are freed; return how many were.

        More than `tokens` may be freed, because prefixes go whole; fewer if none is left.
        """
        freed = 0
        while freed < tokens and self._kept:
            freed += self._kept.pop(0).caches.room
        return freed

    def clear(self) -> None:
        """Remove all prefixes."""
        self._kept.clear()


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of leading ids that are the same in both lists."""
    # Binary search over slices: comparing slices runs in C, and is many times faster than a loop
    # over the ids of a long prompt. Invariant: the first `low` ids are equal.
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
