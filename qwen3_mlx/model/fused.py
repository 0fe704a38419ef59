"""Fused projections: linear layers over the same input, stored and computed as one matrix."""

import copy
from collections.abc import Sequence
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn

from qwen3_mlx.model.adapted import AdaptedLinear
from qwen3_mlx.model.linear import Linear

_ROW_PARAMETERS = ("weight", "scales", "biases", "bias")


class RowFused:
    """Linear layers over the same input whose weights are row blocks of one matrix.

    The layers keep their names and their parameters. The parameters become views of the joint
    storage, so saving, adapters and sharding work as before. Quantization works row by row, so
    joining rows changes no number. The joint matrix is used for a single token only. With several
    tokens the layers are used one by one: the parts of a joint result would have to be copied
    before the norms of q and k. Of adapted layers the weights are joined, and each part of the
    result is adapted by itself.
    """

    def __init__(
        self, owner: nn.Module, names: Sequence[str], *, head_dim: int | None = None
    ) -> None:
        """Join the layers `owner[name]`, which must agree in layout (see `can_fuse`).

        With `head_dim` the outputs have the layout of attention, heads before tokens.
        """
        layers = [_plain(owner[name]) for name in names]
        self.names = names
        self.joint = copy.copy(layers[0])
        ends = list(accumulate(layer["weight"].shape[0] for layer in layers))
        for kind in _ROW_PARAMETERS:
            if layers[0].get(kind) is None:
                continue
            self.joint[kind] = joined = mx.concatenate([layer[kind] for layer in layers])
            # Evaluated kind by kind, so that only one kind is in memory twice.
            mx.eval(joined)
            for layer, start, stop in zip(layers, [0, *ends], ends, strict=False):
                layer[kind] = joined[start:stop]  # a row slice of a dense array: a view, no copy
                mx.eval(layer[kind])
        self._axis = 1 if head_dim else 2
        self._shape = (1, -1, 1, head_dim) if head_dim else (1, 1, -1)
        self._row_ends = ends[:-1]
        self._ends = [end // (head_dim or 1) for end in ends[:-1]]
        self._parts = [
            (name, owner[name], layer["weight"]) for name, layer in zip(names, layers, strict=True)
        ]
        self._is_adapted = any(_plain(owner[name]) is not owner[name] for name in names)

    def holds(self, owner: nn.Module) -> bool:
        """Return whether `owner` still has the joined layers with the joined weights.

        An update replaces a layer or its weight; the joint matrix is then stale.
        """
        for name, layer, view in self._parts:
            if owner[name] is not layer or _plain(layer)["weight"] is not view:
                return False
        return True

    def __call__(self, x: mx.array) -> list[mx.array]:
        """Compute each layer's output for one token, x [1, 1, D].

        The shape is [1, 1, out], or with `head_dim` [1, out / head_dim, 1, head_dim].
        """
        joint: mx.array = self.joint(x)
        if not self._is_adapted:
            return list(mx.split(joint.reshape(self._shape), self._ends, axis=self._axis))
        parts = []
        outputs = mx.split(joint, self._row_ends, axis=2)
        for out, (_, layer, _) in zip(outputs, self._parts, strict=True):
            whole = layer.adapt(out, x) if isinstance(layer, AdaptedLinear) else out
            parts.append(whole.reshape(self._shape))
        return parts


def _plain(layer: nn.Module) -> nn.Module:
    """Return the layer that an adapted one changes; others as they are."""
    return layer["linear"] if isinstance(layer, AdaptedLinear) else layer


def can_fuse(owner: nn.Module, names: Sequence[str]) -> bool:
    """Return whether the layers agree in class, bits, group size, mode and bias."""

    def layout(layer: nn.Module) -> tuple[object, ...]:
        quantization = [getattr(layer, name, None) for name in ("bits", "group_size", "mode")]
        return (type(layer), *quantization, *(layer.get(kind) is None for kind in _ROW_PARAMETERS))

    layers = [_plain(owner[name]) for name in names]
    layouts = {layout(layer) for layer in layers}
    return len(layouts) == 1 and type(layers[0]) in (Linear, nn.QuantizedLinear)
