"""The plain cache: keys and values of one sequence in one layer, in the dtype of the model.

B batch (1), L new tokens, S tokens seen, Q queries, H query heads, K key/value heads, E head size.
"""

import mlx.core as mx

from qwen3_mlx.cache.attention import Rotate, causal_attention

_SMALLEST_GROWTH = 256  # tokens


def grown_capacity(tokens: int) -> int:
    """Give the tokens that a cache has room for after growing to hold `tokens`."""
    return tokens + max(_SMALLEST_GROWTH, tokens // 4)


class KVCache:
    """Keys, rotated, and values of the `offset` tokens seen so far.

    The two buffers are written in place. That holds only while nobody else refers to them: a view
    kept over a write, or a step still running, makes MLX copy the whole buffer.
    """

    def __init__(self, capacity: int = 0) -> None:
        """Make an empty cache; `capacity` tokens are allocated at once by the first write."""
        self.offset = 0
        self._capacity = capacity
        self._keys: mx.array | None = None  # [1, K, capacity, E]
        self._values: mx.array | None = None

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, rope: Rotate
    ) -> mx.array:
        """Store k and v, and answer attention over all seen; see `LayerCache.attend`."""
        q = rope(q, self.offset + k.shape[2] - q.shape[2])
        keys, values = self._append(rope(k, self.offset), v)
        return causal_attention(q, keys, values, scale=scale)

    def attend_rotated(self, q: mx.array, k: mx.array, v: mx.array, *, scale: float) -> mx.array:
        """Do the same for q and k that are rotated already."""
        keys, values = self._append(k, v)
        return causal_attention(q, keys, values, scale=scale)

    def store(self, k: mx.array, v: mx.array, *, rope: Rotate) -> None:
        """Keep k and v [1, K, L, E] without asking anything of them."""
        self._append(rope(k, self.offset), v)

    def _append(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        start, self.offset = self.offset, self.offset + k.shape[2]
        if self._keys is None or self._values is None or self._keys.shape[2] < self.offset:
            self._keys = self._grown(self._keys, k, start)
            self._values = self._grown(self._values, v, start)
        self._keys[:, :, start : self.offset] = k
        self._values[:, :, start : self.offset] = v
        return self._keys[:, :, : self.offset], self._values[:, :, : self.offset]

    def _grown(self, held: mx.array | None, new: mx.array, seen: int) -> mx.array:
        # Always beyond the new tokens: a write of exactly the buffer's size would become a view
        # of the projection's output and keep all of that alive.
        planned = self._capacity > self.offset
        capacity = self._capacity if planned else grown_capacity(self.offset)
        grown = mx.zeros((1, new.shape[1], capacity, new.shape[3]), dtype=new.dtype)
        if held is not None:
            grown[:, :, :seen] = held[:, :, :seen]
        return grown

    def rewind(self, tokens: int) -> None:
        """Forget the last `tokens` tokens.

        Raises:
            ValueError: fewer have been seen.
        """
        if not 0 <= tokens <= self.offset:
            raise ValueError(f"cannot rewind {tokens} of {self.offset} tokens")
        self.offset -= tokens

    @property
    def state(self) -> tuple[mx.array, ...]:
        """The keys and values seen, [1, K, S, E] each; not to be kept over the next write."""
        if self._keys is None or self._values is None:
            return ()
        return self._keys[:, :, : self.offset], self._values[:, :, : self.offset]

    @property
    def nbytes(self) -> int:
        """The bytes allocated, whether used yet or not."""
        if self._keys is None or self._values is None:
            return 0
        return self._keys.nbytes + self._values.nbytes
