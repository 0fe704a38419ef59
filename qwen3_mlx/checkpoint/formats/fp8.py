"""FP8: 8-bit floats (e4m3) with a scale for each block."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from qwen3_mlx.checkpoint.formats.matrix import FLOATS, Scheme, StoredRows, expect
from qwen3_mlx.checkpoint.weights import Weights


def problem(section: Mapping[str, Any]) -> str:
    """Return why weights of this section cannot be read, or "" if they can."""
    block = section.get("weight_block_size")
    if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
        return ""
    return f"with weight_block_size {block!r}, and needed is one such as [128, 128]"


def schemes(section: Mapping[str, Any]) -> list[Scheme]:
    """Return how the modules are stored."""
    block = section["weight_block_size"]
    return [Scheme("weight", ("weight_scale_inv",), lambda w, prefix: _fp8(w, prefix, *block))]


def _fp8(weights: Weights, prefix: str, block_rows: int, block_columns: int) -> StoredRows:
    """Create the matrix of number · scale of its block (which the format calls inverse scale)."""
    codes, scales = f"{prefix}.weight", f"{prefix}.weight_scale_inv"
    rows, width = expect(weights, codes, ("F8_E4M3",))
    expect(weights, scales, FLOATS, (-(-rows // block_rows), -(-width // block_columns)))

    def read(start: int, stop: int) -> mx.array:
        first, last = start // block_rows, -(-stop // block_rows)
        scale = weights.rows(scales, first, last).astype(mx.float32)
        by_row = mx.arange(start, stop) // block_rows - first
        by_column = mx.arange(width) // block_columns
        return mx.array(E4M3)[weights.rows(codes, start, stop)] * scale[by_row][:, by_column]

    return StoredRows(rows, width, read)


def _values() -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
    """Compute the 256 values of 8-bit floats with 4 bits of exponent and 3 of mantissa.

    The exponent's bias is 7; there is no infinity, and 0x7F and 0xFF are NaN (OCP 8-bit floating
    point specification, 2023, "E4M3").
    """
    codes = np.arange(256)
    exponents, mantissas = codes >> 3 & 15, codes & 7
    sizes = np.where(
        exponents == 0,
        mantissas / 8 * 2.0**-6,
        (1 + mantissas / 8) * 2.0 ** (exponents.astype(np.float64) - 7),
    )
    sizes[(codes & 127) == 127] = np.nan
    return np.where(codes < 128, sizes, -sizes).astype(np.float32)


E4M3 = _values()
