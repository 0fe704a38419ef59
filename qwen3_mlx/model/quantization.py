"""The formats in which MLX multiplies quantized matrices, and the bytes that they take."""

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

# What MLX's kernels read: bits and group sizes of each mode.
_FORMATS = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
# What MLX takes where a config leaves bits or group_size out, or null as mlx-lm sometimes does.
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
        """Give a format with what MLX takes for the mode where bits or group size are None."""
        usual = MODE_DEFAULTS.get(mode, (0, 0))
        return cls(
            usual[0] if bits is None else bits, usual[1] if group_size is None else group_size, mode
        )

    def for_module(self, path: str) -> "Format":
        """Give the format to quantize the module at `path` with.

        The router of a mixture of experts keeps 8 bits: it decides what runs at all.
        """
        is_router = path.endswith("mlp.gate")
        return Format(max(self.bits, _ROUTER_BITS), 64) if is_router else self

    def tensors(self, shape: tuple[int, ...], dtype: mx.Dtype) -> dict[str, tuple[Any, mx.Dtype]]:
        """Give shape and dtype of each tensor that a weight of that shape becomes."""
        *outer, inputs = shape
        packed, groups = (*outer, inputs * self.bits // 32), (*outer, inputs // self.group_size)
        if self.mode != "affine":
            return {"weight": (packed, mx.uint32), "scales": (groups, mx.uint8)}
        return {"weight": (packed, mx.uint32), "scales": (groups, dtype), "biases": (groups, dtype)}

    def nbytes(self, shape: tuple[int, ...], dtype: mx.Dtype) -> int:
        """Give the bytes that a weight of that shape takes."""
        parts = self.tensors(shape, dtype).values()
        return sum(math.prod(size) * kind.size for size, kind in parts)

    def as_config(self) -> dict[str, Any]:
        """Give the format as config.json states it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
