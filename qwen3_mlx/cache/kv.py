"""The plain cache: keys and values of one sequence in one layer, in the dtype of the model.

B batch (1), L new tokens, S tokens seen, Q queries, H query heads, K key/value heads, E head size.
"""

from collections.abc import Sequence
from typing import Self

import mlx.core as mx

from qwen3_mlx.cache.attention import RopeFn, causal_attention

_SMALLEST_GROWTH = 256  # tokens
_ALL = slice(None)


def next_capacity(tokens: int) -> int:
    """Give the tokens that a cache has room for after growing to hold `tokens`.

    Always more: a write of exactly the buffer's size would become a view of the projection's
    output and keep all of that alive.
    """
    return tokens + max(_SMALLEST_GROWTH, tokens // 4)


class KVCache:
    """Keys, rotated, and values of the `offset` tokens seen so far.

    The buffers are written in place. That holds only while nobody else refers to them: a view kept
    over a write, or a step still running, makes MLX copy the whole buffer. And it holds for buffers
    of their own: of slices of a larger one, MLX copies all.
    """

    def __init__(self, capacity: int = 0) -> None:
        """Make an empty cache; `capacity` tokens are allocated at once by the first write."""
        self.offset = 0
        self._capacity = capacity
        self._allocated = 0
        self._buffers: list[mx.array] = []  # [1, K, capacity, .]: keys, values

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, rope: RopeFn
    ) -> mx.array:
        """Store k and v, and answer attention over all seen; see `LayerCache.attend`."""
        start = self.offset + k.shape[2] - q.shape[2]
        return self.attend_rotated(rope(q, start), rope(k, self.offset), v, scale=scale)

    def attend_rotated(self, q: mx.array, k: mx.array, v: mx.array, *, scale: float) -> mx.array:
        """Do as `attend` does for q and k that are rotated already."""
        keys, values = self.append(k, v)
        return causal_attention(q, keys, values, scale=scale)

    def store(self, k: mx.array, v: mx.array, *, rope: RopeFn) -> None:
        """Keep k and v [1, K, L, E] without asking anything of them."""
        self.append(rope(k, self.offset), v)

    def append(self, k: mx.array, v: mx.array) -> Sequence[mx.array]:
        """Store k, rotated, and v, and give views of all seen; here [1, K, S, E] of each."""
        start, stop = self.offset, self.offset + k.shape[2]
        if self._allocated < stop:
            return self._write([k, v])
        # What runs for every token, layer and sequence is written out.
        self.offset = stop
        keys, values = self._buffers
        new, seen = (_ALL, _ALL, slice(start, stop)), (_ALL, _ALL, slice(stop))
        keys[new], values[new] = k, v
        return keys[seen], values[seen]

    def reserve(self, capacity: int) -> None:
        """Have room for `capacity` tokens when the next write needs more than there is."""
        self._capacity = capacity

    def copy(self, tokens: int) -> Self:
        """Give a cache of its own that has seen the first `tokens` tokens, or as many as this has.

        They share no buffer. Its own are made by its first write, with the room that is reserved
        until then.
        """
        other = self._empty()
        if tokens := min(tokens, self.offset):
            other.restore([buffer[:, :, :tokens] for buffer in self._buffers])
        return other

    def restore(self, state: Sequence[mx.array]) -> None:
        """Have an empty cache see what another's `state` has; as after `copy`."""
        self.offset = state[0].shape[2]
        self._buffers = list(state)

    def release(self) -> Sequence[mx.array]:
        """Give away what is kept of the tokens seen, until `restore` brings it back."""
        state = self.state
        self._buffers, self._allocated = [], 0
        return state

    def truncate(self, tokens: int) -> None:
        """Forget all that was seen behind the first `tokens` tokens."""
        self.offset = min(self.offset, tokens)

    @property
    def state(self) -> tuple[mx.array, ...]:
        """What is kept of the tokens seen, [1, K, S, .]; not to be held over the next write."""
        return tuple(buffer[:, :, : self.offset] for buffer in self._buffers)

    @property
    def nbytes(self) -> int:
        """The bytes allocated, whether used yet or not."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def _empty(self) -> Self:
        return type(self)()

    def _write(self, new: Sequence[mx.array]) -> list[mx.array]:
        """Append [1, K, L, .] to each buffer, and give views of all seen."""
        start, stop = self.offset, self.offset + new[0].shape[2]
        if self._allocated < stop:
            self._allocated = self._capacity if self._capacity > stop else next_capacity(stop)
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
