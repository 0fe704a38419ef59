"""The mixture-of-experts feed-forward block of Qwen3-MoE.

T tokens, k experts for each of them, X experts in all, D hidden, I expert width.
"""

import math
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from qwen3_mlx.model.config import Experts
from qwen3_mlx.model.linear import Linear, Reduce, whole
from qwen3_mlx.model.quantization import AFFINE

# From this many rows on they are sorted by expert, so that each expert's weights are read once.
_MIN_ROWS_TO_SORT = 64


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Compute silu(gate)·up, as one kernel."""
    activated: mx.array = nn.silu(gate)
    return activated * up


@dataclass(frozen=True, slots=True)
class Routing:
    """The expert of each row of a layer's input.

    Attributes:
        experts: for each row, or k for each token, the number of the expert.
        ordered: whether the rows are sorted by expert.
        tokens: for each row, or once for the k of a token, the number of the token.
        count: the number of tokens.
    """

    experts: mx.array
    ordered: bool
    tokens: mx.array
    count: int


class SwitchLinear(nn.Module):
    """One linear layer for each expert, stacked: weight [X, out, in]."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = math.sqrt(1 / inputs)
        self.weight = mx.random.uniform(-bound, bound, (experts, outputs, inputs))

    def __call__(self, x: mx.array, routing: Routing) -> mx.array:
        """Apply its expert to each row of x [..., 1, in]; return [..., 1, out]."""
        weight = self["weight"].swapaxes(-1, -2)
        return mx.gather_mm(x, weight, rhs_indices=routing.experts, sorted_indices=routing.ordered)

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = AFFINE
    ) -> "QuantizedSwitchLinear":
        """Return the layer with quantized weights; `nn.quantize` calls this."""
        return QuantizedSwitchLinear(self["weight"], group_size, bits, mode)


class QuantizedSwitchLinear(nn.Module):
    """`SwitchLinear` with quantized weights."""

    def __init__(
        self, weight: mx.array, group_size: int | None, bits: int | None, mode: str
    ) -> None:
        super().__init__()
        self.weight, self.scales, *biases = mx.quantize(weight, group_size, bits, mode=mode)
        if biases:
            self.biases = biases[0]
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.freeze()

    def __call__(self, x: mx.array, routing: Routing) -> mx.array:
        """Apply its expert to each row of x; see `SwitchLinear`."""
        return mx.gather_qmm(
            x,
            self["weight"],
            self["scales"],
            self.get("biases"),
            rhs_indices=routing.experts,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=routing.ordered,
        )


class SwitchMLP(nn.Module):
    """A SwiGLU block for each expert, under mlx-lm's checkpoint names."""

    def __init__(self, config: Experts, hidden_size: int) -> None:
        super().__init__()
        sizes = config.num_experts, hidden_size, config.moe_intermediate_size
        self.gate_proj = SwitchLinear(*sizes)
        self.up_proj = SwitchLinear(*sizes)
        self.down_proj = SwitchLinear(config.num_experts, sizes[2], hidden_size)

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Apply to each row of x [T, D] its experts, indices [T, k]; return [T, k, D]."""
        count = x.shape[0]
        if indices.size < _MIN_ROWS_TO_SORT:
            routing = Routing(indices, False, mx.arange(count)[:, None], count)
            return self._apply(x.reshape(count, 1, 1, -1), routing).squeeze(-2)
        chosen = indices.flatten()
        order = mx.argsort(chosen)
        tokens = order // indices.shape[1]
        # Reshaped, not indexed with None: of the strides that gives, MLX's products copy the rows.
        rows = x.reshape(count, 1, -1)[tokens]
        out = self._apply(rows, Routing(chosen[order], True, tokens, count))
        return out[mx.argsort(order)].reshape(*indices.shape, -1)

    def _apply(self, x: mx.array, routing: Routing) -> mx.array:
        gate, up = self.gate_proj(x, routing), self.up_proj(x, routing)
        return self.down_proj(swiglu(gate, up), routing)


class MoE(nn.Module):
    """A router that picks k experts for each token and mixes their outputs."""

    fused = None  # there is no joint matrix: the experts' are gathered one by one

    def __init__(self, config: Experts, hidden_size: int) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.normalise = config.norm_topk_prob
        self.gate = Linear(hidden_size, config.num_experts, bias=False)
        self.switch_mlp = SwitchMLP(config, hidden_size)
        self.reduce: Reduce = whole

    def fuse(self) -> None:
        """Leave all as it is."""

    def unfuse(self) -> None:
        """Leave all as it is."""

    def __call__(self, x: mx.array) -> mx.array:
        """Compute the weighted sum of the chosen experts' outputs for x [B, L, D]."""
        rows = x.reshape(-1, x.shape[-1])
        # Softmax over all experts in float32 before the choice, as the router was trained.
        weights = mx.softmax(self.gate(rows).astype(mx.float32), axis=-1)
        chosen = mx.argpartition(weights, kth=-self.top_k, axis=-1)[:, -self.top_k :]
        chosen = mx.stop_gradient(chosen)  # a choice of indices has no gradient
        weights = mx.take_along_axis(weights, chosen, axis=-1)
        if self.normalise:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        out = self.switch_mlp(rows, chosen)
        mixed = (out * weights[..., None].astype(x.dtype)).sum(axis=-2)
        return self.reduce(mixed.reshape(x.shape))
