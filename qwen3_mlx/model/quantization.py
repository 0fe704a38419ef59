"""Quantization formats of MLX: bits, group size and mode, and the bytes that they take."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

AFFINE = "affine"  # groups have a scale and a bias; in the other modes only a scale, of 8 bits
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUP_SIZES = (32, 64, 128)
# Bits and group sizes that MLX's kernels support, by mode.
_FORMATS = {
    AFFINE: (AFFINE_BITS, AFFINE_GROUP_SIZES),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
# MLX's bits and group_size where a config leaves them out, or has null as mlx-lm sometimes writes.
_DEFAULTS = {AFFINE: (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
_ROUTER_BITS = 8


@dataclass(frozen=True, slots=True)
class Format:
    """One way to quantize a matrix: `group_size` weights of a row share a scale."""

    bits: int
    group_size: int
    mode: str = AFFINE

    def __post_init__(self) -> None:
        if self.mode not in _FORMATS:
            raise ValueError(f"quantization mode must be one of {', '.join(_FORMATS)}")
        bits, groups = _FORMATS[self.mode]
        for name in ("bits", "group_size"):
            if type(getattr(self, name)) is not int:
                raise TypeError(f"{name} must be a whole number, not {getattr(self, name)!r}")
        if self.bits not in bits:
            raise ValueError(f"bits must be one of {_listed(bits)}, not {self.bits}")
        if self.group_size not in groups:
            raise ValueError(f"group_size must be one of {_listed(groups)}, not {self.group_size}")

    @classmethod
    def of(cls, mode: str, bits: int | None, group_size: int | None) -> "Format":
        """Create a format; bits or group size that are None become the defaults of the mode."""
        default_bits, default_size = _DEFAULTS.get(mode, (0, 0))
        return cls(
            default_bits if bits is None else bits,
            default_size if group_size is None else group_size,
            mode,
        )

    @property
    def has_biases(self) -> bool:
        """True if a group has a bias beside its scale, both in floats."""
        return self.mode == AFFINE

    def for_module(self, path: str) -> "Format":
        """Return the format in which to quantize the module at `path`.

        The router of a mixture of experts keeps 8 bits: it decides which experts run.
        """
        is_router = path.endswith("mlp.gate")
        return Format(max(self.bits, _ROUTER_BITS), 64) if is_router else self

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether the rows of a weight of `shape` are whole groups."""
        return shape[-1] % self.group_size == 0

    def tensors(self, shape: tuple[int, ...], dtype: mx.Dtype) -> dict[str, tuple[Any, mx.Dtype]]:
        """Return shape and dtype of each tensor that a weight of `shape` is quantized to.

        `dtype` is that of scales and biases in the affine mode.
        """
        *outer, inputs = shape
        packed, groups = (*outer, inputs * self.bits // 32), (*outer, inputs // self.group_size)
        if not self.has_biases:
            return {"weight": (packed, mx.uint32), "scales": (groups, mx.uint8)}
        return {"weight": (packed, mx.uint32), "scales": (groups, dtype), "biases": (groups, dtype)}

    def nbytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Return the bytes of these tensors; `itemsize` is that of their dtype."""
        weights = math.prod(shape)
        group_bytes = 2 * itemsize if self.has_biases else 1
        return weights * self.bits // 8 + weights // self.group_size * group_bytes

    def dequantize_float32(
        self, weight: mx.array, scales: mx.array, biases: mx.array | None = None
    ) -> mx.array:
        """Compute the weights of packed rows in float32, whatever the dtype of the scales."""
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        return mx.dequantize(weight, scales, biases, **self.as_config(), dtype=mx.float32)

    def as_config(self) -> dict[str, Any]:
        """Return the format as a section of config.json, and as arguments of MLX's functions."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


FormatOf = Callable[[str], Format | None]
"""Returns the format of the module at a path; None if its weights are not quantized."""


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
