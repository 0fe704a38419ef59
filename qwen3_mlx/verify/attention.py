"""Checks of attention: fused kernels, RoPE, the norm of heads, and the caches that attend.

H/K query and key heads, E head size, Q queries, S keys.
"""

from collections.abc import Sequence
from functools import partial
from itertools import product

import mlx.core as mx

from qwen3_mlx.cache.attention import RopeFn, attend_batched, causal_attention, max_fused_queries
from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.cache.quantized import CACHE_FORMATS, PLAIN, CacheFormat, new_cache
from qwen3_mlx.model.config import Yarn
from qwen3_mlx.model.rope import yarn_periods
from qwen3_mlx.verify.check import Check, Numbers

_HEADS = ((16, 8), (32, 8), (40, 8), (64, 8), (64, 4))  # of all published sizes
_LONG = 8200  # keys: beyond 1,024, 4,096 and 8,192 Metal has other kernels
_MEDIUM = (1100, 4200)


def _attention(
    numbers: Numbers, heads: tuple[int, int], size: int, queries: Sequence[int], keys: int
) -> list[mx.array]:
    """Attend over views of longer buffers, as a cache gives them."""
    k, v = (numbers.normal(1, heads[1], keys + 256, size)[:, :, :keys] for _ in range(2))
    qs = [numbers.normal(1, heads[0], count, size) for count in queries]
    return [causal_attention(q, k, v, scale=size**-0.5) for q in qs]


def _batch(numbers: Numbers, heads: tuple[int, int], keys: int) -> list[mx.array]:
    """Attend for four sequences in joint buffers, equally long and not."""
    k, v = (numbers.normal(4, heads[1], keys + 99, 128)[:, :, :keys] for _ in range(2))
    q = numbers.normal(4, heads[0], 1, 128)
    seen = mx.array(numbers.draw.random((4, 1, 1, keys)) > 0.3)
    mask = mx.contiguous(mx.broadcast_to(seen, (4, heads[0], 1, keys)))
    return [attend_batched(q, k, v, scale=128**-0.5, mask=one) for one in (None, mask)]


def _rope(numbers: Numbers, *, yarn: bool) -> list[mx.array]:
    """Rotate one token, a chunk, and one token of each of four sequences."""
    periods = yarn_periods(128, 1e6, Yarn(4.0, 32768, 1.0)) if yarn else None
    rotated = []
    for batch, length in ((1, 1), (1, 9), (1, 300), (4, 1)):
        offset = mx.array(3000 if batch == 1 else [3000, 17, 0, 40000], dtype=mx.int32)
        x = numbers.normal(batch, length, 16, 128).transpose(0, 2, 1, 3)
        base = None if yarn else 1e6
        rotated.append(
            mx.fast.rope(
                x, 128, traditional=False, base=base, scale=1.0, offset=offset, freqs=periods
            )
        )
    return rotated


def _norm(numbers: Numbers) -> list[mx.array]:
    """Normalise heads and hidden states, and small ones, for which epsilon counts."""
    shapes = ((1, 3, 16, 128), (1, 3, 4, 64), (1, 70, 5120))
    small = numbers.hold(numbers.draw.standard_normal(shapes[0]) / 1000)
    return [
        mx.fast.rms_norm(x, numbers.normal(x.shape[-1]), 1e-6)
        for x in (*(numbers.normal(*shape) for shape in shapes), small)
    ]


def _unmoved(x: mx.array, offset: int | tuple[int, ...]) -> mx.array:
    return x


def _cache(numbers: Numbers, fmt: CacheFormat) -> list[mx.array]:
    """Write a chunk, single tokens, and tokens in the place of ones that are taken back."""
    cache: KVCache = new_cache(fmt, 128)
    rope: RopeFn = _unmoved
    found = []
    for length in (300, 1, 1, 3, 9):
        k, v = (numbers.normal(1, 4, length, 128) for _ in range(2))
        q = numbers.normal(1, 16, length, 128)
        found.append(cache.attend(q, k, v, scale=128**-0.5, rope=rope)[:, :, -1])
        mx.eval(found[-1], cache.state)  # or a whole buffer would be copied for each write
        cache.truncate(cache.offset - 2 if length == 3 else cache.offset)
    return [*found, *cache.state] if fmt == PLAIN else found


def fused(dtype: mx.Dtype) -> float:
    """Call every kernel that must be fused; MLX raises a ValueError where it would not be."""
    for (heads, key_heads), size in product(_HEADS, (64, 128)):
        few = range(1, max_fused_queries(heads, key_heads) + 1)
        for queries in (*few, 9, 65):
            q = mx.zeros((1, heads, queries, size), dtype)
            k = mx.zeros((1, key_heads, 300, size), dtype)
            mask = None if queries == 1 else "causal"
            mx.eval(
                mx.fast.scaled_dot_product_attention(
                    q, k, k, scale=1.0, mask=mask, force_fused=True
                )
            )
    return 0.0


CHECKS = [
    Check("norm of heads and states", _norm),
    Check("rope", partial(_rope, yarn=False)),
    Check("rope with YaRN", partial(_rope, yarn=True)),
    *(
        Check(
            f"attention, heads {heads[0]}/{heads[1]} of {size}, 1 to 9 and 65 queries",
            partial(_attention, heads=heads, size=size, queries=(*range(1, 10), 65), keys=300),
        )
        for heads, size in product(_HEADS, (64, 128))
    ),
    *(
        Check(
            f"attention, {count} heads a key head, {_LONG:,} keys",
            partial(_attention, heads=(count, 1), size=128, queries=(1, 2, 4), keys=_LONG),
        )
        for count in (2, 4, 5, 8, 16)
    ),
    *(
        Check(
            f"attention, 4 heads a key head, {keys:,} keys",
            partial(_attention, heads=(8, 2), size=128, queries=(1, 2, 4), keys=keys),
        )
        for keys in _MEDIUM
    ),
    *(
        Check(
            f"attention of a batch, heads {heads[0]}/{heads[1]}, {keys:,} keys",
            partial(_batch, heads=heads, keys=keys),
        )
        for heads, keys in (((16, 8), 300), ((32, 4), 300), ((4, 2), _LONG), ((16, 2), _LONG))
    ),
    *(
        # A number between two codes may be rounded either way.
        Check(f"cache, {name}", partial(_cache, fmt=fmt), 1.0 if fmt == PLAIN else 5.0)
        for name, fmt in CACHE_FORMATS.items()
    ),
]
