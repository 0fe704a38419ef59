"""Projections of one input stored as one matrix, and computed at once where one token runs."""

import copy
from collections.abc import Sequence
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn

from qwen3_mlx.model.linear import Linear

_BY_ROW = ("weight", "scales", "biases", "bias")


class RowFused:
    """Linear layers over the same input whose weights are row blocks of one matrix.

    The layers keep their names and their parameters, which become views of the joint storage, so
    saving, adapters and sharding see what they expect. Quantization works row by row, so joining
    rows changes no number. With several tokens the layers are used one by one: the split of a
    joint result would have to be copied before the norms of q and k.
    """

    def __init__(
        self, owner: nn.Module, names: Sequence[str], *, head_dim: int | None = None
    ) -> None:
        """Join the layers `owner[name]`, whose form must agree (see `can_fuse`).

        With `head_dim` their outputs come as attention wants them, the heads in front.
        """
        layers = [owner[name] for name in names]
        self._joint = copy.copy(layers[0])
        ends = list(accumulate(layer["weight"].shape[0] for layer in layers))
        for kind in _BY_ROW:
            if layers[0].get(kind) is None:
                continue
            self._joint[kind] = joined = mx.concatenate([layer[kind] for layer in layers])
            mx.eval(joined)
            for layer, start, stop in zip(layers, [0, *ends], ends, strict=False):
                layer[kind] = joined[start:stop]
                mx.eval(layer[kind])
        self._axis = 1 if head_dim else 2
        self._shape = (1, -1, 1, head_dim) if head_dim else (1, 1, -1)
        self._ends = [end // (head_dim or 1) for end in ends[:-1]]
        self._parts = [
            (name, layer, layer["weight"]) for name, layer in zip(names, layers, strict=True)
        ]

    def holds(self, owner: nn.Module) -> bool:
        """Say whether `owner` still has the layers that were joined, with those weights.

        An adapter or an update puts others in their place; the joint matrix is then stale.
        """
        for name, layer, view in self._parts:
            if owner[name] is not layer or layer["weight"] is not view:
                return False
        return True

    def __call__(self, x: mx.array) -> list[mx.array]:
        """Give each layer's output for one token, x [1, 1, D].

        That is [1, 1, out], or with heads [1, out / head_dim, 1, head_dim].
        """
        joint: mx.array = self._joint(x).reshape(self._shape)
        return list(mx.split(joint, self._ends, axis=self._axis))


def can_fuse(owner: nn.Module, names: Sequence[str]) -> bool:
    """Say whether the layers agree in form: class, bits, group size, mode and bias."""

    def form(layer: nn.Module) -> tuple[object, ...]:
        quantization = [getattr(layer, name, None) for name in ("bits", "group_size", "mode")]
        return (type(layer), *quantization, *(layer.get(kind) is None for kind in _BY_ROW))

    forms = {form(owner[name]) for name in names}
    return len(forms) == 1 and type(owner[names[0]]) in (Linear, nn.QuantizedLinear)
