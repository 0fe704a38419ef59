"""Causal attention with MLX's fused kernels, and the interface of a layer's cache.

B batch, L new tokens, S tokens seen, Q queries (the last of the L), H query heads,
K key/value heads, E head size.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import mlx.core as mx

from qwen3_mlx import backend

RopeFn = Callable[[mx.array, int | tuple[int, ...]], mx.array]

# Metal's kernel for few queries takes up to 8 queries, and up to 32 rows (queries times query
# heads for each key head). The kernel for many queries starts at 9. A call between the two limits
# runs unfused and holds the whole score matrix.
FEW_QUERIES = 8
_FEW_ROWS = 32


class LayerCache(Protocol):
    """The cache of one layer: stores new keys and values and computes attention over all."""

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, rope: RopeFn
    ) -> mx.array:
        """Return the attended values [B, H, Q, E] of q [B, H, Q, E] over the cache and k, v.

        q and k are normalised and not yet rotated. k and v are [B, K, L, E]; the queries belong to
        the last Q of the L new tokens.
        """


class NoCache:
    """Attention over whole sequences without a cache, as in training."""

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, rope: RopeFn
    ) -> mx.array:
        """Compute attention over k and v alone; see `LayerCache.attend`."""
        q, k = rope(q, k.shape[2] - q.shape[2]), rope(k, 0)
        return causal_attention(q, k, v, scale=scale)


def attend_per_sequence(
    q: mx.array, seen: Sequence[Sequence[mx.array]], *, scale: float
) -> mx.array:
    """Compute attention [T, H, 1, E] of T queries [T, H, 1, E], each over its own keys and values.

    MLX's CPU build splits a fused call into a dozen operations, and their number determines the
    time. So on the CPU the operations that can run for all queries at once do so.
    """
    count, heads, _, size = q.shape
    if backend.on_gpu():
        each = zip(mx.split(q, count), seen, strict=True)
        return mx.concatenate([causal_attention(one, k, v, scale=scale) for one, (k, v) in each])
    key_heads = seen[0][0].shape[1]
    grouped = mx.split((q * scale).reshape(count, key_heads, heads // key_heads, size), count)
    answers = [
        mx.softmax(one @ k.swapaxes(-1, -2), axis=-1, precise=True) @ v
        for one, (k, v) in zip(grouped, seen, strict=True)
    ]
    return mx.concatenate(answers).reshape(count, heads, 1, size)


def attend_batched(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | None
) -> mx.array:
    """Compute attention of B queries [B, H, 1, E] over k and v [B, K, S, E], row by row.

    `mask` [B, H, 1, S] is true for the keys of each query; None means all keys of its row.
    """
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def max_fused_queries(heads: int, key_heads: int) -> int:
    """Return the most queries that the fused kernel for few queries takes."""
    return max(1, min(FEW_QUERIES, _FEW_ROWS * key_heads // heads))


def causal_attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float) -> mx.array:
    """Compute softmax(q·kᵀ·scale)·v; each query sees the keys up to its own position.

    q [B, H, Q, E] and k, v [B, K, S, E]; the last query is aligned with the last key. The result
    is [B, H, Q, E].
    """
    queries = q.shape[2]
    if queries == 1:
        # A single query sees every key, and a mask would rule out the faster kernels.
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=None)
    most = max_fused_queries(q.shape[1], k.shape[1])
    if queries > FEW_QUERIES or queries <= most:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
    parts, keys = [], k.shape[2]
    for start in range(0, queries, most):
        stop = min(start + most, queries)
        seen = keys - queries + stop
        part = causal_attention(q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen], scale=scale)
        parts.append(part)
    return mx.concatenate(parts, axis=2)
