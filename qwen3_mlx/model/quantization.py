"""Quantization formats of MLX: bits, group size and mode, and the bytes that they take."""

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

# Bits and group sizes that MLX's kernels support, by mode.
_FORMATS = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
# MLX's bits and group_size where a config leaves them out, or has null as mlx-lm sometimes writes.
MODE_DEFAULTS = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
_ROUTER_BITS = 8


@dataclass(frozen=True, slots=True)
class Format:
    """One way to quantize a matrix: `group_size` weights of a row share a scale."""

    bits: int
    group_size: int
    mode: str = "affine"

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
        default_bits, default_size = MODE_DEFAULTS.get(mode, (0, 0))
        return cls(
            default_bits if bits is None else bits,
            default_size if group_size is None else group_size,
            mode,
        )

    def for_module(self, path: str) -> "Format":
        """Return the format in which to quantize the module at `path`.

        The router of a mixture of experts keeps 8 bits: it decides which experts run.
        """
        is_router = path.endswith("mlp.gate")
        return Format(max(self.bits, _ROUTER_BITS), 64) if is_router else self

    def tensors(self, shape: tuple[int, ...], dtype: mx.Dtype) -> dict[str, tuple[Any, mx.Dtype]]:
        """Return shape and dtype of each tensor that a weight of `shape` is quantized to.

        `dtype` is that of scales and biases in the affine mode; the other modes have no biases,
        and scales of 8 bits.
        """
        *outer, inputs = shape
        packed, groups = (*outer, inputs * self.bits // 32), (*outer, inputs // self.group_size)
        if self.mode != "affine":
            return {"weight": (packed, mx.uint32), "scales": (groups, mx.uint8)}
        return {"weight": (packed, mx.uint32), "scales": (groups, dtype), "biases": (groups, dtype)}

    def nbytes(self, shape: tuple[int, ...], dtype: mx.Dtype) -> int:
        """Return the bytes that a weight of `shape` takes when quantized."""
        parts = self.tensors(shape, dtype).values()
        return sum(math.prod(size) * kind.size for size, kind in parts)

    def as_config(self) -> dict[str, Any]:
        """Return the format as a section of config.json."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
