"""FP8: 8-bit floats (e4m3) with a scale for each block."""

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import mlx.core as mx

from qwen3_mlx.checkpoint.formats.matrix import FLOATS, Scheme, StoredRows, expect
from qwen3_mlx.checkpoint.weights import Weights


def problem(section: Mapping[str, Any]) -> str:
    """Return why weights of this section cannot be read, or "" if they can."""
    block = section.get("weight_block_size")
    if is_block(block):
        return ""
    return f"with weight_block_size {block!r}, and needed is one such as [128, 128]"


def is_block(value: object) -> bool:
    """Return whether a value is the size of a block: rows and columns."""
    return (
        isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)
    )


def schemes(section: Mapping[str, Any]) -> list[Scheme]:
    """Return how the modules are stored."""
    block = section["weight_block_size"]

    def decode(weights: Weights, prefix: str) -> StoredRows:
        return scaled_rows(weights, f"{prefix}.weight", f"{prefix}.weight_scale_inv", *block)

    return [Scheme("weight", ("weight_scale_inv",), decode)]


def scaled_rows(
    weights: Weights, codes: str, scales: str, block_rows: int, block_columns: int
) -> StoredRows:
    """Create the matrix of number · scale of its block (which FP8 calls inverse scale)."""
    rows, width = expect(weights, codes, ("F8_E4M3",))
    blocks = (-(-rows // block_rows), -(-width // block_columns))
    expect(weights, scales, FLOATS, (1,) if weights.stored[scales].shape == (1,) else blocks)

    def read(start: int, stop: int) -> mx.array:
        first, last = start // block_rows, -(-stop // block_rows)
        scale = weights.rows(scales, first, last).astype(mx.float32)
        by_row = mx.arange(start, stop) // block_rows - first
        by_column = mx.arange(width) // block_columns
        return e4m3_values()[weights.rows(codes, start, stop)] * scale[by_row][:, by_column]

    return StoredRows(rows, width, read)


@cache
def e4m3_values() -> mx.array:
    """Compute the 256 values of 8-bit floats with 4 bits of exponent and 3 of mantissa, float32.

    The exponent's bias is 7; there is no infinity, and 0x7F and 0xFF are NaN (OCP 8-bit floating
    point specification, 2023, "E4M3").
    """
    values = []
    for code in range(128):
        exponent, mantissa = divmod(code, 8)
        size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
        values.append(math.nan if code == 0x7F else size)
    return mx.array(values + [-value for value in values])
