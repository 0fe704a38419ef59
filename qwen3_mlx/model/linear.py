"""Linear layers over plain weights that know the faster way to multiply a single row.

D input size, O output size.
"""

import mlx.core as mx
import mlx.nn as nn

from qwen3_mlx import backend


def times_weight(x: mx.array, weight: mx.array) -> mx.array:
    """Give x·weightᵀ, x [..., D] and weight [O, D].

    For a single row that is weight·xᵀ: the same products in a form for which BLAS libraries have a
    matrix-vector routine, up to twice as fast.
    """
    if x.size == weight.shape[1] and backend.prefers_columns():
        return (weight @ x.reshape(-1, 1)).reshape(*x.shape[:-1], -1)
    return x @ weight.T


class Linear(nn.Linear):
    """MLX's linear layer, with `times_weight`."""

    def __call__(self, x: mx.array) -> mx.array:
        """Give x·weightᵀ + bias for x [..., D]."""
        out = times_weight(x, self["weight"])
        return out + self["bias"] if "bias" in self else out


class Embedding(nn.Embedding):
    """MLX's embedding, with `times_weight` where it serves as the head."""

    def as_linear(self, x: mx.array) -> mx.array:
        """Give the logits x·weightᵀ for x [..., D]."""
        return times_weight(x, self["weight"])
