"""The check whether a network stays within the range of float16, which is narrower than bfloat16's.

Qwen3's feed-forward layers write a few very large numbers, about the same for every text, into the
states of the first tokens and of separators.

T tokens, D hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from qwen3_mlx.cache.attention import NoCache
from qwen3_mlx.model.block import MLP, Block
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.model.rope import Rope

# Half of float16's greatest number: another text may reach more than this one.
_MOST = 65504 / 2


def overflows(model: Qwen3, ids: Sequence[int]) -> bool:
    """Return whether some layer exceeds the safe range, or computes what is not finite.

    Its output is looked at, and what the projections of its feed-forward block read and compute,
    which are its widest numbers. `ids` [T] are those of a text.
    """
    x, rope = model.model.embed_tokens(mx.array(list(ids))[None]), Rope(model.config).for_pass()
    peaks = []
    for layer in model.layers:
        with _watched(layer) as within:
            x = layer(x, None, NoCache(), rope)  # [1, T, D]
        peaks.append(mx.stack([*within, mx.abs(x).max()]).max())
        mx.eval(peaks[-1])  # or the states of all layers would be held
    return not bool((mx.stack(peaks) <= _MOST).all())  # NaN compares as false


@contextmanager
def _watched(layer: Block) -> Iterator[list[mx.array]]:
    """Create a context that collects the peaks of what the feed-forward's projections handle."""
    block = layer.mlp if isinstance(layer.mlp, MLP) else layer.mlp.switch_mlp
    projections, peaks = dict(block.children()), list[mx.array]()

    def watch(projection: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def call(x: mx.array, *further: Any) -> mx.array:
            y = projection(x, *further)
            peaks.extend((mx.abs(x).max(), mx.abs(y).max()))
            return y

        return call

    for name, projection in projections.items():
        block[name] = watch(projection)
    try:
        yield peaks
    finally:
        dict.update(block, projections)
