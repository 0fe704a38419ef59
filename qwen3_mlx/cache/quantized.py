"""Quantized KV cache: for long contexts in little memory, not for speed.

Attention sees every key and value after quantization, whether a token came alone, in a chunk or in
a batch. So every way to split the work gives the same result.

- 8 bits keep keys and values as good as they were.
- K8V4 spends fewer bits on the values: an error in a value affects that value alone, an error in a
  key changes the softmax over all.
- 4 bits rotate queries and keys after RoPE by an orthonormal Hadamard matrix, which changes no
  score. Without it, a few channels of the keys are many times larger than the others and cost them
  their resolution; with it, all channels have about the same range (QuaRot, arXiv 2404.00456).

Groups lie along the head, so each token is quantized by itself, and a rollback is exact.

G query heads for a key head; other letters as in `kv.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.cache.attention import causal_attention
from qwen3_mlx.cache.kv import KVCache

# Up to this many queries attend to the quantized numbers directly. More would use a matrix kernel
# with a serial loop over the tokens; dequantizing for the fused kernel is faster there.
_FEW_QUERIES = 3
_COARSE_BITS = 4
# Numbers that share a scale and a bias. If the keys have 4 bits as well, values of 4 bits in groups
# of 64 are too coarse: the demo's perplexity rises by 0.23 %.
_GROUP, _SMALLEST_GROUP = 64, 32


@dataclass(frozen=True, slots=True)
class CacheFormat:
    """Bits of keys and of values in a cache; both None for the compute dtype."""

    key_bits: int | None = None
    value_bits: int | None = None

    @property
    def rotated(self) -> bool:
        """True if keys are rotated before they are quantized."""
        return self.key_bits == _COARSE_BITS

    def packings(self, head_dim: int) -> "tuple[Packing, Packing]":
        """Return the packing of keys and the packing of values, of heads of `head_dim` numbers."""
        assert self.key_bits and self.value_bits
        fine = self.rotated or head_dim % _GROUP
        return (
            Packing(self.key_bits, _SMALLEST_GROUP if head_dim % _GROUP else _GROUP),
            Packing(self.value_bits, _SMALLEST_GROUP if fine else _GROUP),
        )

    def nbytes(self, head_dim: int, itemsize: int) -> int:
        """Return the bytes of one key and one value of a head; a scale has `itemsize` bytes."""
        if self == PLAIN:
            return 2 * head_dim * itemsize
        return sum(
            head_dim * packing.bits // 8 + 2 * itemsize * (head_dim // packing.group_size)
            for packing in self.packings(head_dim)
        )


PLAIN = CacheFormat()
CACHE_FORMATS = {
    "bf16": PLAIN,
    "8": CacheFormat(8, 8),
    "k8v4": CacheFormat(8, 4),
    "4": CacheFormat(4, 4),
}


def cache_format(kv_bits: int | str | None, head_dim: int) -> CacheFormat:
    """Return the format that `kv_bits` names: 8, "k8v4", 4, or None for the compute dtype.

    Raises:
        ValueError: there is no such format, or it does not support heads of `head_dim` numbers.
    """
    if kv_bits is None:
        return PLAIN
    fmt = CACHE_FORMATS.get(str(kv_bits).lower())
    if fmt is None or fmt == PLAIN or isinstance(kv_bits, bool):
        raise ValueError(f'kv_bits must be 8, "k8v4" or 4, not {kv_bits!r}')
    if head_dim % _SMALLEST_GROUP:
        raise ValueError(f"kv_bits needs heads of a multiple of 32 numbers, not {head_dim}")
    return fmt


@dataclass(frozen=True, slots=True)
class Packing:
    """Quantization of numbers along the last axis to packed words, scales and biases."""

    bits: int
    group_size: int

    def pack(self, x: mx.array) -> tuple[mx.array, ...]:
        """Return the packed words, the scales and the biases of x."""
        return mx.quantize(x, self.group_size, self.bits)

    def unpack(self, packed: Sequence[mx.array], dtype: mx.Dtype) -> mx.array:
        """Return the numbers that packed words, scales and biases represent."""
        words, scales, biases = packed
        return mx.dequantize(words, scales, biases, self.group_size, self.bits, dtype=dtype)

    def matmul(self, x: mx.array, packed: Sequence[mx.array], *, transpose: bool) -> mx.array:
        """Compute the product of x and a packed matrix, which may be transposed."""
        words, scales, biases = packed
        return mx.quantized_matmul(x, words, scales, biases, transpose, self.group_size, self.bits)


class QuantizedKVCache(KVCache):
    """Rotated keys, and values, in few bits; see the top of this file."""

    holds_floats = False

    def __init__(self, fmt: CacheFormat, head_dim: int, capacity: int = 0) -> None:
        """Create an empty cache; the first write allocates `capacity` tokens at once."""
        super().__init__(capacity)
        self._fmt = fmt
        self._head_dim = head_dim
        self._keys, self._values = fmt.packings(head_dim)

    def attend_rotated(self, q: mx.array, k: mx.array, v: mx.array, *, scale: float) -> mx.array:
        """Store k and v, and compute attention of q over all tokens."""
        if self._fmt.rotated:
            q = mx.hadamard_transform(q)
        packed = self.append(k, v)
        keys, values = packed[:3], packed[3:]
        if q.shape[2] > _FEW_QUERIES or backend.on_cuda():
            # Dequantized for one layer at a time, and freed after its attention. MLX's quantized
            # products for CUDA need dense matrices, and these are views of longer buffers.
            k, v = self._keys.unpack(keys, v.dtype), self._values.unpack(values, v.dtype)
            return causal_attention(q, k, v, scale=scale)
        # The query heads of a key head are rows of one product; q [1, H, Q, E] is [1, K, G·Q, E].
        _, heads, queries, head_dim = q.shape
        _, key_heads, seen, _ = keys[0].shape
        grouped = (q * scale).reshape(1, key_heads, -1, head_dim)
        scores = self._keys.matmul(grouped, keys, transpose=True)
        scores = scores.reshape(1, key_heads, -1, queries, seen)
        if queries > 1:
            own = mx.arange(seen - queries, seen)[:, None]
            scores = mx.where(mx.arange(seen) <= own, scores, -mx.inf)
        weights = mx.softmax(scores, axis=-1, precise=True)
        # The values are multiplied head by head: with few rows MLX splits the tokens among threads.
        out = self._values.matmul(weights, [part[:, :, None] for part in values], transpose=False)
        return out.reshape(1, heads, queries, head_dim)

    def append(self, k: mx.array, v: mx.array) -> Sequence[mx.array]:
        """Add k, rotated by position, and v; return views of all tokens.

        The views are packed words, scales and biases, of the keys and then of the values.
        """
        if self._fmt.rotated:
            k = mx.hadamard_transform(k)
        return self._write([*self._keys.pack(k), *self._values.pack(v)])

    def _empty(self) -> Self:
        return type(self)(self._fmt, self._head_dim)


def new_cache(fmt: CacheFormat, head_dim: int, capacity: int = 0) -> KVCache:
    """Create an empty cache of one layer; the first write allocates `capacity` tokens at once."""
    return QuantizedKVCache(fmt, head_dim, capacity) if fmt.key_bits else KVCache(capacity)
