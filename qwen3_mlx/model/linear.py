"""Linear layers over plain weights, with the fastest product for few rows.

D input size, O output size.
"""

from collections.abc import Callable
from functools import cache

import mlx.core as mx
import mlx.nn as nn

from qwen3_mlx import backend

_MOST_COLUMNS = 32  # rows up to which columns are faster (`python -m benchmarks.products`)
_LEAST_BLOCK, _MOST_BLOCK = 256, 1280  # outputs
Reduce = Callable[[mx.array], mx.array]
"""Sums a block's output over the parts of its weights, where they are held apart."""


def whole(x: mx.array) -> mx.array:
    """Return x: the sum over a single part."""
    return x


def times_weight(x: mx.array, weight: mx.array) -> mx.array:
    """Compute x·weightᵀ for x [..., D] and weight [O, D].

    Few rows are computed as weight·xᵀ where that is faster, and in blocks of the weight: OpenBLAS
    copies a matrix before it multiplies, and the copy of a block stays in the processor's cache.
    """
    outputs, inputs = weight.shape
    rows = x.size // inputs
    if rows > _MOST_COLUMNS or not backend.prefers_columns():
        return x @ weight.T
    columns = x.reshape(rows, inputs).T
    if (blocks := _blocks(outputs)) > 1:
        weight = weight.reshape(blocks, -1, inputs)
        columns = mx.broadcast_to(columns, (blocks, inputs, rows))
    return (weight @ columns).reshape(outputs, rows).T.reshape(*x.shape[:-1], outputs)


@cache
def _blocks(outputs: int) -> int:
    """Return the number of equal blocks of a weight with so many outputs."""
    least = -(-outputs // _MOST_BLOCK)
    counts = range(least, outputs // _LEAST_BLOCK + 1)
    return next((count for count in counts if outputs % count == 0), 1)


class Linear(nn.Linear):
    """MLX's linear layer, computed by `times_weight`."""

    def __call__(self, x: mx.array) -> mx.array:
        """Compute x·weightᵀ + bias for x [..., D]."""
        out = times_weight(x, self["weight"])
        return out + self["bias"] if "bias" in self else out


class Embedding(nn.Embedding):
    """MLX's embedding; as a tied head it is computed by `times_weight`."""

    def as_linear(self, x: mx.array) -> mx.array:
        """Compute the logits x·weightᵀ for x [..., D]."""
        return times_weight(x, self["weight"])
