"""What is trained: low-rank matrices beside the linear layers, or the tensors of whole layers.

Names, layout and initialisation are mlx-lm's, so that the trained parameters are an adapter of its
format. LoRA: arXiv 2106.09685; DoRA: arXiv 2402.09353.

D input size, O output size, r rank, X experts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from qwen3_mlx import backend
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.model.adapted import gathered, weight_rows
from qwen3_mlx.model.moe import QuantizedSwitchLinear, Routing, SwitchLinear
from qwen3_mlx.model.qwen3 import Qwen3

LORA, DORA, FULL = "lora", "dora", "full"
TYPES = (LORA, DORA, FULL)
ROUTER = "mlp.gate"
"""Not trained: it would send tokens to experts that were not trained for them."""
_EXPERTS = (SwitchLinear, QuantizedSwitchLinear)
_QUANTIZED = (nn.QuantizedLinear, QuantizedSwitchLinear)


class _Trained(nn.Module):
    """A layer with low-rank matrices beside its weights; `is_off` leaves them out."""

    is_off = False

    def __init__(self, linear: nn.Module, rank: int, scale: float, key: mx.array) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale
        *outer, outputs, inputs = _shape(linear)
        bound = 1 / math.sqrt(inputs)
        first = (*outer, rank, inputs) if outer else (inputs, rank)
        self.lora_a = mx.random.uniform(-bound, bound, first, key=key)
        self.lora_b = mx.zeros((*outer, outputs, rank) if outer else (rank, outputs))

    def _matrices(self, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Return both matrices in a compute dtype; in float32 they would need a copy of x."""
        return self["lora_a"].astype(dtype), self["lora_b"].astype(dtype)


class LoRALinear(_Trained):
    """x·Wᵀ + scale·x·a·b, with a [D, r] and b [r, O]."""

    def __call__(self, x: mx.array) -> mx.array:
        """Compute the output [..., O] for x [..., D]."""
        out: mx.array = self["linear"](x)
        return out if self.is_off else out + self._low(x)

    def _low(self, x: mx.array) -> mx.array:
        a, b = self._matrices(x.dtype)
        return self.scale * ((x @ a) @ b)


class LoRAExperts(_Trained):
    """The same for experts, with a [X, r, D] and b [X, O, r]."""

    def __call__(self, x: mx.array, routing: Routing) -> mx.array:
        """Apply its expert to each row of x; see `SwitchLinear`."""
        out: mx.array = self["linear"](x, routing)
        if self.is_off:
            return out
        dtype = x.dtype if backend.on_gpu() else mx.float32  # a CPU gathers in float32 only
        a, b = (matrix.swapaxes(-1, -2) for matrix in self._matrices(dtype))
        low = gathered(x, a, b, routing.experts, ordered=routing.ordered)
        return out + (self.scale * low).astype(x.dtype)


class DoRALinear(LoRALinear):
    """`LoRALinear` with the rows of its whole weight scaled to a trained length, m [O]."""

    def __init__(self, linear: nn.Module, rank: int, scale: float, key: mx.array) -> None:
        super().__init__(linear, rank, scale, key)
        self.m = mx.linalg.norm(weight_rows(linear, slice(None)), axis=1)

    def __call__(self, x: mx.array) -> mx.array:
        """Compute the output [..., O] for x [..., D]."""
        linear = self["linear"]
        out: mx.array = linear(x)
        if self.is_off:
            return out
        bias = linear["bias"] if "bias" in linear else None
        out = (out if bias is None else out - bias) + self._low(x)
        change = (self.scale * self["lora_b"].T) @ self["lora_a"].T
        # The paper treats the norm as a constant: that saves memory and costs nothing (4.3).
        whole = mx.stop_gradient(weight_rows(linear, slice(None)) + change)
        out = (self["m"] / mx.linalg.norm(whole, axis=1)).astype(x.dtype) * out
        return out if bias is None else out + bias


def attach(
    model: Qwen3, kind: str, *, rank: int, scale: float, layers: int, seed: int
) -> Sequence[str]:
    """Freeze a model but for what is trained in its last `layers` layers; return adapted names.

    The names are those of modules within a layer; there are none with type full.

    Raises:
        Qwen3Error: the type cannot train a module of this model.
    """
    model.freeze()
    tuned = model.layers[-layers:]
    for layer in tuned:
        layer.unfuse()
    modules = [
        (layer, name, module)
        for layer in tuned
        for name, module in layer.named_modules()
        if isinstance(module, (nn.Linear, nn.QuantizedLinear, *_EXPERTS)) and name != ROUTER
    ]
    if kind == FULL:
        if any(isinstance(module, _QUANTIZED) for *_, module in modules):
            raise Qwen3Error(
                "type full trains the weights themselves, and these are quantized: take the type "
                "lora, or an unquantized checkpoint (dequantize=True makes one of this)"
            )
        for layer in tuned:
            layer.unfreeze()
        return []
    if kind == DORA and any(isinstance(module, _EXPERTS) for *_, module in modules):
        raise Qwen3Error("type dora has no form for experts: take the type lora")
    keys = mx.random.split(mx.random.key(seed), len(modules))
    for key, (layer, name, module) in zip(keys, modules, strict=True):
        form = DoRALinear if kind == DORA else LoRALinear
        trained = LoRAExperts if isinstance(module, _EXPERTS) else form
        layer.update_modules(tree_unflatten([(name, trained(module, rank, scale, key))]))
    mx.eval(model.parameters())
    return sorted({name for _, name, _ in modules})


def trained_parameters(model: Qwen3) -> dict[str, mx.array]:
    """Return what is trained, by the names of an adapter's tensors."""
    named: list[tuple[str, Any]] = tree_flatten(model.trainable_parameters())  # type: ignore[assignment]
    return dict(named)


@contextmanager
def base_model(model: Qwen3, untrained: Mapping[str, mx.array]) -> Iterator[None]:
    """Create a context in which a model computes what it did before it was trained.

    `untrained` are the trained tensors of type full as they were; there are none with adapters.
    """
    adapters = [module for module in model.modules() if isinstance(module, _Trained)]
    now = {name: model.tensors()[name] for name in untrained}
    try:
        for module in adapters:
            module.is_off = True
        model.load_weights(list(untrained.items()), strict=False)
        yield
    finally:
        for module in adapters:
            module.is_off = False
        model.load_weights(list(now.items()), strict=False)


def _shape(linear: nn.Module) -> tuple[int, ...]:
    """Return the shape of a layer's weight, unpacked."""
    *outer, inputs = linear["weight"].shape
    packed = isinstance(linear, _QUANTIZED)
    return (*outer, inputs * 32 // linear.bits if packed else inputs)
