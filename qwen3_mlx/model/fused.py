"""Projections of one input stored as one matrix, and computed at once where one token runs."""

import copy
from collections.abc import Sequence
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn

_BY_ROW = ("weight", "scales", "biases", "bias")


class RowFused:
    """Linear layers over the same input whose weights are row blocks of one matrix.

    The layers keep their names and their parameters, which become views of the joint storage, so
    saving, adapters and sharding see what they expect. Quantization works row by row, so joining
    rows changes no number. With several tokens the layers are used one by one: the split of a
    joint result would have to be copied before the norms of q and k.
    """

    def __init__(self, layers: Sequence[nn.Module], *, head_dim: int | None = None) -> None:
        """Join `layers`, whose format must agree (see `can_fuse`), and evaluate the result.

        With `head_dim` their outputs come as attention wants them, the heads in front.
        """
        self._joint = copy.copy(layers[0])
        ends = list(accumulate(layer["weight"].shape[0] for layer in layers))
        for name in _BY_ROW:
            if layers[0].get(name) is None:
                continue
            joined = mx.concatenate([layer[name] for layer in layers])
            mx.eval(joined)
            self._joint[name] = joined
            for layer, start, stop in zip(layers, [0, *ends], ends, strict=False):
                layer[name] = joined[start:stop]
                mx.eval(layer[name])
        self._axis = 1 if head_dim else 2
        self._shape = (1, -1, 1, head_dim) if head_dim else (1, 1, -1)
        self._ends = [end // (head_dim or 1) for end in ends[:-1]]
        self._layers = tuple(layers)
        self._views = tuple(layer["weight"] for layer in layers)

    def stands_for(self, *layers: nn.Module) -> bool:
        """Say whether these are still the layers that were joined, with those weights.

        An adapter or an update puts others in their place; the joint matrix is then stale.
        """
        for layer, joined, view in zip(layers, self._layers, self._views):  # noqa: B905 - hot
            if layer is not joined or layer["weight"] is not view:
                return False
        return True

    def __call__(self, x: mx.array) -> list[mx.array]:
        """Give each layer's output for one token, x [1, 1, D].

        That is [1, 1, out], or with heads [1, out / head_dim, 1, head_dim].
        """
        joint: mx.array = self._joint(x).reshape(self._shape)
        return list(mx.split(joint, self._ends, axis=self._axis))


def can_fuse(layers: Sequence[nn.Module]) -> bool:
    """Say whether the layers' formats agree: same class, bits, group size, mode and bias."""

    def form(layer: nn.Module) -> tuple[object, ...]:
        quantization = [getattr(layer, name, None) for name in ("bits", "group_size", "mode")]
        return (type(layer), *quantization, *(layer.get(name) is None for name in _BY_ROW))

    return type(layers[0]) in (nn.Linear, nn.QuantizedLinear) and (
        len({form(layer) for layer in layers}) == 1
    )
