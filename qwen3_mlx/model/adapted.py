"""Adapted layers: a low-rank matrix beside the weights of a layer, which stay as they are (LoRA).

D input size, O output size, r rank, X experts. LoRA: arXiv 2106.09685; DoRA: arXiv 2402.09353.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from qwen3_mlx import backend
from qwen3_mlx.model.moe import QuantizedSwitchLinear, SwitchLinear
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


class Adapted(nn.Module):
    """A layer, `linear`, and the low-rank matrix that is added to its weights."""

    def __init__(self, linear: nn.Module, delta: Delta, dtype: mx.Dtype) -> None:
        super().__init__()
        self.linear = linear
        self.lora_a, self.lora_b = delta.a.astype(dtype), delta.b.astype(dtype)
        if delta.magnitude is not None:
            scale = delta.row_scale(_weight_of(linear))
            assert scale is not None
            self.row_scale = scale.astype(dtype)
            if "bias" in linear:  # is scaled with the output, which it must not be
                linear.bias = (linear.bias / scale).astype(dtype)

    def weight_rows(self, rows: mx.array) -> mx.array:
        """Return rows [n, D] of the changed weight, float32."""
        a, b = self["lora_a"].astype(mx.float32), self["lora_b"].astype(mx.float32)
        changed: mx.array = _weight_of(self["linear"], rows) + b[rows] @ a
        return changed * self["row_scale"][rows, None] if "row_scale" in self else changed


class AdaptedLinear(Adapted):
    """An adapted linear layer."""

    def __call__(self, x: mx.array) -> mx.array:
        """Compute x·(W + b·a)ᵀ for x [..., D]."""
        return self.adapt(self["linear"](x), x)

    def adapt(self, out: mx.array, x: mx.array) -> mx.array:
        """Return the output [..., O] for x, of which `out` is what the layer alone computes."""
        out = _add_low_rank(out, x, self["lora_a"], self["lora_b"])
        return out * self["row_scale"] if "row_scale" in self else out


class AdaptedEmbedding(Adapted):
    """An adapted embedding, which as a tied head is adapted alike."""

    def __call__(self, ids: mx.array) -> mx.array:
        """Return rows of W + b·a for ids [...]."""
        out: mx.array = self["linear"](ids) + self["lora_b"][ids] @ self["lora_a"]
        return out * self["row_scale"][ids, None] if "row_scale" in self else out

    def as_linear(self, x: mx.array) -> mx.array:
        """Compute the logits for x [..., D]."""
        out = _add_low_rank(self["linear"].as_linear(x), x, self["lora_a"], self["lora_b"])
        return out * self["row_scale"] if "row_scale" in self else out


class AdaptedSwitchLinear(Adapted):
    """Adapted experts."""

    def __call__(self, x: mx.array, indices: mx.array, *, ordered: bool) -> mx.array:
        """Apply expert `indices[...]` to each row of x; see `SwitchLinear`."""
        out: mx.array = self["linear"](x, indices, ordered=ordered)
        low = x
        for name in ("lora_a", "lora_b"):
            low = mx.gather_mm(
                low,
                self[name].swapaxes(-1, -2),
                rhs_indices=indices,
                sorted_indices=ordered,
            )
        out = out + low
        return out * self["row_scale"][indices][..., None, :] if "row_scale" in self else out


def adapted(layer: nn.Module, delta: Delta, dtype: mx.Dtype) -> Adapted:
    """Return a layer with a change of its weights beside it, held in `dtype`."""
    if isinstance(layer, SwitchLinear | QuantizedSwitchLinear):
        return AdaptedSwitchLinear(layer, delta, dtype)
    embeds = isinstance(layer, nn.Embedding | nn.QuantizedEmbedding)
    return (AdaptedEmbedding if embeds else AdaptedLinear)(layer, delta, dtype)


def weight_rows(layer: nn.Module, rows: mx.array) -> mx.array:
    """Return rows [n, D] of a layer's weight, adapted or quantized or both, as float32."""
    return layer.weight_rows(rows) if isinstance(layer, Adapted) else _weight_of(layer, rows)


def _weight_of(layer: nn.Module, rows: mx.array | slice = slice(None)) -> mx.array:
    """Return a layer's weight, or rows of it, as float32."""
    parts: list[mx.array] = [
        layer[name][rows] for name in ("weight", "scales", "biases") if name in layer
    ]
    if len(parts) == 1:
        return parts[0].astype(mx.float32)
    return Format(layer.bits, layer.group_size, layer.mode).dequantize_float32(*parts)


def _add_low_rank(out: mx.array, x: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """Compute out + x·aᵀ·bᵀ for out [..., O], x [..., D], a [r, D], b [O, r]."""
    if x.size == a.shape[1] and backend.prefers_columns():  # see `times_weight`
        return mx.addmm(out.reshape(-1, 1), b, a @ x.reshape(-1, 1)).reshape(out.shape)
    return mx.addmm(out, x @ a.T, b.T)
