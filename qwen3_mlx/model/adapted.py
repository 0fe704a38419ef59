"""Adapted layers: low-rank matrices beside the weights of a layer, which stay as they are (LoRA).

A layer may have those of several adapters, of which each row of a pass uses one or none.

N rows, n adapters, D input size, O output size, r rank, X experts.
LoRA: arXiv 2106.09685; DoRA: arXiv 2402.09353.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from qwen3_mlx.model.moe import QuantizedSwitchLinear, Routing, SwitchLinear
from qwen3_mlx.model.quantization import Format


@dataclass(frozen=True, slots=True)
class Delta:
    """The change of a weight W: W + b·a, and with a magnitude its rows scaled to that length.

    `a` is [r, D], `b` [O, r], `magnitude` [O], with X in front for experts; all are float32. What
    scales the product is part of `b`.
    """

    a: mx.array
    b: mx.array
    magnitude: mx.array | None = None

    def row_scale(self, weight: mx.array) -> mx.array | None:
        """Return the factors [O] that scale the rows of W + b·a to the magnitude (DoRA)."""
        if self.magnitude is None:
            return None
        return self.magnitude / mx.linalg.norm(weight + self.b @ self.a, axis=-1)

    def merged(self, weight: mx.array) -> mx.array:
        """Return the changed weight, float32, of W [O, D]."""
        weight = weight.astype(mx.float32)
        scale, changed = self.row_scale(weight), weight + self.b @ self.a
        return changed if scale is None else changed * scale[..., None]

    def merged_rows(self, rows: mx.array, start: int) -> mx.array:
        """Return the changed rows of W, of which `rows` are those from `start` on.

        The rows of all experts count as one sequence.
        """
        outputs, pieces = self.b.shape[-2], []
        stop = start + rows.shape[0]
        for expert in range(start // outputs, -(-stop // outputs)):
            base = expert * outputs
            own = slice(max(start, base) - base, min(stop - base, outputs))
            parts = [self.a, self.b, self.magnitude]
            if self.b.ndim == 3:
                parts = [None if part is None else part[expert] for part in parts]
            a, b, magnitude = parts
            assert a is not None and b is not None
            delta = Delta(a, b[own], None if magnitude is None else magnitude[own])
            pieces.append(delta.merged(rows[own.start + base - start : own.stop + base - start]))
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)


@dataclass(frozen=True, slots=True)
class Rows:
    """The adapters of the rows of a pass: `index` [N], and `mask` [N], 0 for rows without one."""

    index: mx.array
    mask: mx.array


class Selection:
    """Chooses the adapter of each row of a forward pass, for all layers of a network.

    Without a choice it is `default`: an adapter's number, or None for the network alone.
    """

    def __init__(self, default: int | None = None) -> None:
        self._default: int | None = default
        self._rows: dict[int, Rows] = {}

    @contextmanager
    def choosing(self, adapters: Sequence[int | None], *counts: Sequence[int]) -> Iterator[None]:
        """Choose for the passes that are built in the block: `adapters`, one for each sequence.

        Each of `counts` has the number of each sequence's rows, in all layers or in some: layers
        tell them apart by their sum. Sequences lie end to end.
        """
        default, first = self._default, adapters[0]
        if all(adapter == first for adapter in adapters):
            self._default = default if first is None else first
        else:
            self._rows = {sum(count): _rows_of(adapters, count) for count in counts}
        try:
            yield
        finally:
            self._default, self._rows = default, {}

    def of(self, count: int) -> "Rows | int | None":
        """Return the adapter of all `count` rows of a layer's input, or those of each."""
        return self._rows[count] if self._rows else self._default


def _rows_of(adapters: Sequence[int | None], counts: Sequence[int]) -> Rows:
    each = [adapter for adapter, count in zip(adapters, counts, strict=True) for _ in range(count)]
    mask = mx.array([adapter is not None for adapter in each])
    return Rows(mx.array([adapter or 0 for adapter in each], dtype=mx.int32), mask)


class Adapted(nn.Module):
    """A layer, `linear`, and the low-rank matrices that are added to its weights, one at a time.

    `lora_a` [n, D, r] and `lora_b` [n, r, O] hold those of n adapters, padded to the same rank.
    Products of a row are fastest in this order. With magnitudes there are `row_scale` [n, O], which
    scales the output, and where the layer has a bias `row_shift` [n, O], which undoes that for it.
    """

    def __init__(
        self,
        linear: nn.Module,
        deltas: Sequence[Delta | None],
        selection: Selection,
        dtype: mx.Dtype,
    ) -> None:
        super().__init__()
        self.linear = linear
        rank = max(delta.a.shape[-2] for delta in deltas if delta)
        some = next(delta for delta in deltas if delta)
        padded = [_padded(delta, some, rank) for delta in deltas]
        self.lora_a = mx.stack([a.swapaxes(-1, -2) for a, _ in padded]).astype(dtype)
        self.lora_b = mx.stack([b.swapaxes(-1, -2) for _, b in padded]).astype(dtype)
        if any(delta and delta.magnitude is not None for delta in deltas):
            weight = _weight_of(linear)
            ones = mx.ones(weight.shape[:-1])
            scales = [delta.row_scale(weight) if delta else None for delta in deltas]
            scale = mx.stack([ones if own is None else own for own in scales])
            self.row_scale = scale.astype(dtype)
            if "bias" in linear:
                self.row_shift = (linear.bias * (1 - scale)).astype(dtype)
        self._selection = selection
        names = ("lora_a", "lora_b", "row_scale", "row_shift")
        # The arrays of each adapter: slices, which are views, unlike what an index returns.
        self._each = [
            tuple(self[name][one : one + 1].squeeze(0) if name in self else None for name in names)
            for one in range(len(deltas))
        ]
        mx.eval(self.parameters(), self._each)


class AdaptedLinear(Adapted):
    """An adapted linear layer."""

    def __call__(self, x: mx.array) -> mx.array:
        """Compute x·(W + b·a)ᵀ for x [..., D]."""
        return self.adapt(self["linear"](x), x)

    def adapt(self, out: mx.array, x: mx.array) -> mx.array:
        """Return the output [..., O] for x, of which `out` is what the layer alone computes."""
        chosen = self._selection.of(x.size // x.shape[-1])
        if chosen is None:
            return out
        if isinstance(chosen, Rows):
            return self._adapt_rows(out, x, chosen)
        a, b, scale, shift = self["_each"][chosen]
        assert a is not None and b is not None
        return _scaled(mx.addmm(out, x @ a, b), scale, shift)

    def _adapt_rows(self, out: mx.array, x: mx.array, rows: Rows) -> mx.array:
        mask = rows.mask[:, None]
        flat = x.reshape(-1, 1, x.shape[-1])
        low = gathered(flat, self["lora_a"], self["lora_b"], rows.index, ordered=False)
        low = mx.where(mask, low[:, 0], 0)
        flat = out.reshape(low.shape) + low
        if "row_scale" in self:
            shift = self["row_shift"][rows.index] if "row_shift" in self else None
            flat = mx.where(mask, _scaled(flat, self["row_scale"][rows.index], shift), flat)
        return flat.reshape(out.shape)


class AdaptedEmbedding(Adapted):
    """An adapted embedding, which as a tied head is adapted alike; it has one adapter."""

    def __call__(self, ids: mx.array) -> mx.array:
        """Return rows of W + b·a for ids [...]."""
        a, b, scale, _ = self["_each"][0]
        assert a is not None and b is not None
        out: mx.array = self["linear"](ids) + mx.take(b, ids, axis=1).moveaxis(0, -1) @ a.T
        return out if scale is None else out * scale[ids, None]

    def as_linear(self, x: mx.array) -> mx.array:
        """Compute the logits for x [..., D]."""
        a, b, scale, shift = self["_each"][0]
        assert a is not None and b is not None
        return _scaled(mx.addmm(self["linear"].as_linear(x), x @ a, b), scale, shift)


class AdaptedSwitchLinear(Adapted):
    """Adapted experts."""

    def __call__(self, x: mx.array, routing: Routing) -> mx.array:
        """Apply to each row of x its expert; see `SwitchLinear`."""
        out: mx.array = self["linear"](x, routing)
        chosen = self._selection.of(routing.count)
        if chosen is None:
            return out
        if isinstance(chosen, int):
            a, b, scale, _ = self["_each"][chosen]
            assert a is not None and b is not None
            out = out + gathered(x, a, b, routing.experts, ordered=routing.ordered)
            return out if scale is None else out * scale[routing.experts][..., None, :]
        experts = self["lora_a"].shape[1]
        which = chosen.index[routing.tokens] * experts + routing.experts
        mask = chosen.mask[routing.tokens][..., None, None]
        a, b = self["lora_a"].flatten(0, 1), self["lora_b"].flatten(0, 1)
        adapted = out + gathered(x, a, b, which, ordered=False)
        if "row_scale" in self:
            adapted = adapted * self["row_scale"].flatten(0, 1)[which][..., None, :]
        chosen_rows: mx.array = mx.where(mask, adapted, out)
        return chosen_rows


def adapted(
    layer: nn.Module, deltas: Sequence[Delta | None], selection: Selection, dtype: mx.Dtype
) -> Adapted:
    """Return a layer with changes of its weights beside it, held in `dtype`; one at least."""
    kind: type[Adapted] = AdaptedLinear
    if isinstance(layer, SwitchLinear | QuantizedSwitchLinear):
        kind = AdaptedSwitchLinear
    elif isinstance(layer, nn.Embedding | nn.QuantizedEmbedding):
        kind = AdaptedEmbedding
    return kind(layer, deltas, selection, dtype)


def weight_rows(layer: nn.Module, rows: mx.array | slice) -> mx.array:
    """Return rows [n, D] of a layer's weight, adapted or quantized or both, as float32."""
    if not isinstance(layer, Adapted):
        return _weight_of(layer, rows)
    a, b, scale, _ = layer["_each"][0]
    assert a is not None and b is not None
    changed: mx.array = _weight_of(layer["linear"], rows) + (a @ b[:, rows]).T.astype(mx.float32)
    return changed if scale is None else changed * scale[rows, None]


def _weight_of(layer: nn.Module, rows: mx.array | slice = slice(None)) -> mx.array:
    """Return a layer's weight, or rows of it, as float32."""
    parts: list[mx.array] = [
        layer[name][rows] for name in ("weight", "scales", "biases") if name in layer
    ]
    if len(parts) == 1:
        return parts[0].astype(mx.float32)
    return Format(layer.bits, layer.group_size, layer.mode).dequantize_float32(*parts)


def _padded(delta: Delta | None, like: Delta, rank: int) -> tuple[mx.array, mx.array]:
    """Return a and b of a rank, with zeros where there are none."""
    if delta is None:
        delta = Delta(mx.zeros_like(like.a), mx.zeros_like(like.b))
    more = rank - delta.a.shape[-2]
    batch = [(0, 0)] * (delta.a.ndim - 2)
    return (
        mx.pad(delta.a, [*batch, (0, more), (0, 0)]) if more > 0 else delta.a[..., :rank, :],
        mx.pad(delta.b, [*batch, (0, 0), (0, more)]) if more > 0 else delta.b[..., :rank],
    )


def _scaled(out: mx.array, scale: mx.array | None, shift: mx.array | None) -> mx.array:
    out = out if scale is None else out * scale
    return out if shift is None else out + shift


def gathered(x: mx.array, a: mx.array, b: mx.array, which: mx.array, *, ordered: bool) -> mx.array:
    """Compute x·a·b with the pair `which[...]` for each row of x [..., 1, D]."""
    for matrix in (a, b):
        x = mx.gather_mm(x, matrix, rhs_indices=which, sorted_indices=ordered)
    return x
