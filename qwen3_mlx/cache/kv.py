"""The plain cache: keys and values of one sequence in one layer, in the dtype of the model.

B batch (1), L new tokens, S tokens seen, Q queries, H query heads, K key/value heads, E head size.
"""

import mlx.core as mx

from qwen3_mlx.cache.attention import Rotate, causal_attention

_SMALLEST_GROWTH = 256  # tokens


def grown_capacity(tokens: int) -> int:
    """Give the tokens that a cache has room for after growing to hold `tokens`.

    Always more: a write of exactly the buffer's size would become a view of the projection's
    output and keep all of that alive.
    """
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
        self._allocated = 0
        self._keys: mx.array | None = None  # [1, K, capacity, E]
        self._values: mx.array | None = None

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, rope: Rotate
    ) -> mx.array:
        """Store k and v, and answer attention over all seen; see `LayerCache.attend`."""
        keys, values = self.append(rope(k, self.offset), v)
        q = rope(q, self.offset - q.shape[2])
        return causal_attention(q, keys, values, scale=scale)

    def store(self, k: mx.array, v: mx.array, *, rope: Rotate) -> None:
        """Keep k and v [1, K, L, E] without asking anything of them."""
        self.append(rope(k, self.offset), v)

    def reserve(self, capacity: int) -> None:
        """Have room for `capacity` tokens when the next write needs more than there is."""
        self._capacity = capacity

    def copy(self, tokens: int) -> "KVCache":
        """Give a cache of its own that has seen the first `tokens` tokens; both share no buffer.

        The buffers are made by its first write, with the room that is reserved until then.
        """
        other = KVCache()
        other.offset = tokens
        if tokens and self._keys is not None and self._values is not None:
            other._keys = self._keys[:, :, :tokens]
            other._values = self._values[:, :, :tokens]
        return other

    def append(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Store v and k, rotated, and give views of all seen, [1, K, S, E] each."""
        start, stop = self.offset, self.offset + k.shape[2]
        if self._keys is None or self._values is None or self._allocated < stop:
            self._allocated = self._capacity if self._capacity > stop else grown_capacity(stop)
            self._keys = self._moved(self._keys, k)
            self._values = self._moved(self._values, v)
        self.offset = stop
        self._keys[:, :, start:stop] = k
        self._values[:, :, start:stop] = v
        return self._keys[:, :, :stop], self._values[:, :, :stop]

    def _moved(self, held: mx.array | None, new: mx.array) -> mx.array:
        buffer = mx.zeros((1, new.shape[1], self._allocated, new.shape[3]), dtype=new.dtype)
        if held is not None:
            buffer[:, :, : self.offset] = held[:, :, : self.offset]
        return buffer

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
