"""Rotary position embeddings (RoPE), plain or stretched by YaRN.

This module computes angles only. YaRN's attention factor is part of `ModelConfig.attention_scale`.
"""

import math
from collections.abc import Callable
from functools import cache, partial

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.cache.attention import RopeFn
from qwen3_mlx.model.config import ModelConfig, Yarn

_Rotation = Callable[[mx.array, mx.array], mx.array]


class Rope:
    """The rotation, shared by all layers; it has no weights."""

    def __init__(self, config: ModelConfig) -> None:
        # MLX's CPU build splits a rotation into a dozen operations unless it is compiled. Each
        # shape is compiled anew, so only the shape that recurs with every token is.
        self._rotate, self._rotate_one = _rotations(
            config.head_dim, config.rope_theta, config.yarn, compiles=not backend.on_gpu()
        )

    def for_pass(self) -> RopeFn:
        """Return the rotation of one forward pass: `rotate(x, offset)` for x [B, H, L, E].

        `offset` is the position of the first of the L tokens, or a tuple with one position for
        each row of B. Each offset is converted to a device array once a pass, instead of once for
        every layer's q and k.
        """
        arrays: dict[int | tuple[int, ...], mx.array] = {}

        def rotate(x: mx.array, offset: int | tuple[int, ...]) -> mx.array:
            at = arrays.get(offset)
            if at is None:
                at = arrays[offset] = mx.array(offset, dtype=mx.int32)
            return self._rotate_one(x, at) if x.shape[2] == 1 else self._rotate(x, at)

        return rotate


@cache
def _rotations(
    dims: int, base: float, yarn: Yarn | None, *, compiles: bool
) -> tuple[_Rotation, _Rotation]:
    """Return a rotation, and the same for single tokens, compiled if it `compiles`.

    Both are kept for ever. If a compiled function is freed while the thread that has used it ends
    (`mx.clear_streams`), MLX 0.32 makes two threads wait for ever: one for its lock, and the other
    for the interpreter's.
    """
    periods = yarn_periods(dims, base, yarn) if yarn else None
    if periods is not None:
        mx.eval(periods)  # of this thread, and used by others
    rotate = partial(_rotate, dims=dims, base=None if yarn else base, periods=periods)
    return rotate, mx.compile(rotate) if compiles else rotate


def _rotate(
    x: mx.array, offset: mx.array, *, dims: int, base: float | None, periods: mx.array | None
) -> mx.array:
    return mx.fast.rope(
        x,
        dims,
        traditional=False,  # Qwen3 rotates halves, not neighbouring pairs
        base=base,
        scale=1.0,
        offset=offset,
        freqs=periods,
    )


def yarn_periods(dims: int, base: float, yarn: Yarn) -> mx.array:
    """Compute the inverse angular frequency of each pair of dimensions, float32 [dims / 2].

    Pairs that turn more than `beta_fast` times within the trained window keep their frequency.
    Pairs that turn less than `beta_slow` times are slowed by `factor`. Pairs between are blended
    (YaRN, arXiv 2309.00071, section 3.2, with the rounding of the range that Qwen's settings use).
    """

    def pair_with_turns(turns: float) -> float:
        window = yarn.original_max_position_embeddings
        return dims * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_with_turns(yarn.beta_fast), pair_with_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    pairs = mx.arange(dims // 2, dtype=mx.float32)
    slowed = mx.clip((pairs - low) / ((high - low) or 0.001), 0, 1)
    periods = base ** (2 * pairs / dims)
    return 1 / (slowed / (yarn.factor * periods) + (1 - slowed) / periods)
