"""The plain KV cache: keys and values of one sequence in one layer, in the model's dtype.

B batch (1), L new tokens, S tokens seen, Q queries, H query heads, K key/value heads, E head size.
"""

from collections.abc import Sequence
from typing import Self

import mlx.core as mx

from qwen3_mlx.cache.attention import RopeFn, causal_attention

_SMALLEST_GROWTH = 256  # tokens
_ALL = slice(None)


def next_capacity(tokens: int) -> int:
    """Return the capacity in tokens of a cache that grows to hold `tokens`.

    It is always more than `tokens`: a write of exactly the buffer's size would become a view of the
    projection's output and keep all of that alive.
    """
    return tokens + max(_SMALLEST_GROWTH, tokens // 4)


class KVCache:
    """Rotated keys, and values, of the `offset` tokens seen so far.

    The buffers are written in place (donated) only while nothing else refers to them: a view kept
    over a write, or a step still running, makes MLX copy the whole buffer. And each buffer must be
    an array of its own: for slices of a larger array, MLX copies all of it.
    """

    holds_floats = True
    """Whether `append` returns views of buffers in the model's dtype."""

    def __init__(self, capacity: int = 0) -> None:
        """Create an empty cache; the first write allocates `capacity` tokens at once."""
        self.offset = 0
        self.capacity = capacity  # tokens that the next growth of the buffers allocates
        self._allocated = 0
        self._buffers: list[mx.array] = []  # [1, K, capacity, .]: keys, values

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, rope: RopeFn
    ) -> mx.array:
        """Store k and v, and compute attention over all tokens; see `LayerCache.attend`."""
        start = self.offset + k.shape[2] - q.shape[2]
        return self.attend_rotated(rope(q, start), rope(k, self.offset), v, scale=scale)

    def attend_rotated(self, q: mx.array, k: mx.array, v: mx.array, *, scale: float) -> mx.array:
        """Compute the same as `attend` for q and k that are rotated already."""
        keys, values = self.append(k, v)
        return causal_attention(q, keys, values, scale=scale)

    def store(self, k: mx.array, v: mx.array, *, rope: RopeFn) -> None:
        """Add k and v [1, K, L, E] to the cache without computing attention."""
        self.append(rope(k, self.offset), v)

    def append(self, k: mx.array, v: mx.array) -> Sequence[mx.array]:
        """Add rotated k, and v; return views of all keys and values, here [1, K, S, E] each."""
        start, stop = self.offset, self.offset + k.shape[2]
        if self._allocated < stop:
            return self._write([k, v])
        # The same as `_write`, unrolled: this runs for every token, layer and sequence.
        self.offset = stop
        keys, values = self._buffers
        new, seen = (_ALL, _ALL, slice(start, stop)), (_ALL, _ALL, slice(stop))
        keys[new], values[new] = k, v
        return keys[seen], values[seen]

    def reserve(self, capacity: int) -> None:
        """Set the capacity in tokens that the next growth of the buffers allocates."""
        self.capacity = capacity

    def copy(self, tokens: int) -> Self:
        """Return a separate cache of the first `tokens` tokens, or of all if there are fewer.

        The two share no buffer: the first write of the copy allocates its own, with the capacity
        that is reserved by then.
        """
        other = self._empty()
        if tokens := min(tokens, self.offset):
            other.restore([buffer[:, :, :tokens] for buffer in self._buffers])
        return other

    def restore(self, state: Sequence[mx.array]) -> None:
        """Load the `state` of another cache into this empty one; the next write copies it."""
        self.offset = state[0].shape[2]
        self._buffers = list(state)

    def release(self) -> Sequence[mx.array]:
        """Return the state and drop the buffers, until `restore` loads a state again."""
        state = self.state
        self._buffers, self._allocated = [], 0
        return state

    def count_released(self) -> None:
        """Count one more token of a released cache: it stands in a joint buffer."""
        self.offset += 1

    def truncate(self, tokens: int) -> None:
        """Remove all tokens after the first `tokens`; the buffers keep their size."""
        self.offset = min(self.offset, tokens)

    @property
    def state(self) -> tuple[mx.array, ...]:
        """Views of the tokens' keys and values, [1, K, S, .]; must not be held over a write."""
        return tuple(buffer[:, :, : self.offset] for buffer in self._buffers)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, used or not."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def _empty(self) -> Self:
        return type(self)()

    def _write(self, new: Sequence[mx.array]) -> list[mx.array]:
        """Append [1, K, L, .] to each buffer; return views of all tokens."""
        start, stop = self.offset, self.offset + new[0].shape[2]
        if self._allocated < stop:
            self._allocated = self.capacity if self.capacity > stop else next_capacity(stop)
            held = self._buffers
            self._buffers = [
                mx.zeros((1, one.shape[1], self._allocated, one.shape[3]), dtype=one.dtype)
                for one in new
            ]
            for buffer, old in zip(self._buffers, held, strict=False):
                buffer[:, :, :start] = old[:, :, :start]
        self.offset = stop
        for buffer, one in zip(self._buffers, new, strict=True):
            buffer[:, :, start:stop] = one
        return [buffer[:, :, :stop] for buffer in self._buffers]
