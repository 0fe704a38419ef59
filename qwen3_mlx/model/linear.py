"""Linear layers over plain weights, with the fastest product for a single row.

D input size, O output size.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from qwen3_mlx import backend

Reduce = Callable[[mx.array], mx.array]
"""Sums a block's output over the parts of its weights, where they are held apart."""


def whole(x: mx.array) -> mx.array:
    """Return x: the sum over a single part."""
    return x


def times_weight(x: mx.array, weight: mx.array) -> mx.array:
    """Compute x·weightᵀ for x [..., D] and weight [O, D].

    A single row is computed as weight·xᵀ where that is faster: BLAS libraries have a matrix-vector
    routine for it, up to twice as fast.
    """
    if x.size == weight.shape[1] and backend.prefers_columns():
        return (weight @ x.reshape(-1, 1)).reshape(*x.shape[:-1], -1)
    return x @ weight.T


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
