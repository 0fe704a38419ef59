"""bitsandbytes' 4-bit weights, NF4 and FP4: places in a table of 16 numbers, scaled by blocks.

The blocks run over the flattened weight, across the ends of rows.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from qwen3_mlx.checkpoint.formats.matrix import Scheme, StoredRows, expect
from qwen3_mlx.checkpoint.weights import Weights
from qwen3_mlx.errors import CheckpointError

_SIZES = 4  # numbers of a quant_state: rows, width, weights of a block, blocks of a nested one
_MOST = 1 << 40
_STATES = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))


def problem(section: Mapping[str, Any]) -> str:
    """Return why weights of this section cannot be read, or "" if they can."""
    in_8_bits = section.get("load_in_8bit") and not section.get("load_in_4bit")
    return "with load_in_8bit, and only 4 bits can be read" if in_8_bits else ""


def schemes(_: Mapping[str, Any]) -> list[Scheme]:
    """Return how the modules are stored; those without these tensors are plain."""
    nested = ("weight.nested_absmax", "weight.nested_quant_map")
    beside = ("weight.absmax", "weight.quant_map")
    return [Scheme("weight", beside, _four_bits, (*nested, *_STATES))]


def _four_bits(weights: Weights, prefix: str) -> StoredRows:
    """Create the matrix of table[code] · absmax of its block; two codes a byte, the high one first.

    With double quantization, absmax is itself a place in a table, scaled by blocks, plus an offset.
    """
    state = _state(weights, prefix)
    shape, block = state.get("shape"), state.get("blocksize")
    nested, offset = state.get("nested_blocksize"), state.get("nested_offset") or 0.0
    sizes = [*(shape if isinstance(shape, list) else [None]), block, nested or 1]
    are_whole = len(sizes) == _SIZES and all(type(n) is int and 0 < n < _MOST for n in sizes)
    if not are_whole or not isinstance(offset, float) or not math.isfinite(offset):
        raise CheckpointError(f"{prefix}.weight has a quant_state with {state!r:.200}")
    rows, width, block, _ = sizes
    packed, count = f"{prefix}.weight", rows * width
    blocks = -(-count // block)
    expect(weights, packed, ("U8",), (-(-count // 2), 1))
    expect(weights, f"{packed}.quant_map", ("F32",), (16,))
    expect(weights, f"{packed}.absmax", ("U8",) if nested else ("F32",), (blocks,))
    if nested:
        expect(weights, f"{packed}.nested_absmax", ("F32",), (-(-blocks // nested),))
        expect(weights, f"{packed}.nested_quant_map", ("F32",), (256,))

    def vector(name: str) -> mx.array:
        return weights.rows(f"{packed}.{name}", 0, 1).flatten()

    def scales() -> mx.array:
        absmax = vector("absmax")
        if not nested:
            return absmax
        by_block = vector("nested_absmax")[mx.arange(absmax.size) // nested]
        return mx.add(vector("nested_quant_map")[absmax] * by_block, offset)

    def read(start: int, stop: int) -> mx.array:
        first, last = start * width, stop * width
        pairs = weights.rows(packed, first // 2, -(-last // 2))
        codes = mx.concatenate([pairs >> 4, pairs & 15], axis=1).flatten()
        codes = codes[first % 2 : first % 2 + last - first]
        scale = scales()[mx.arange(first, last) // block]
        return (vector("quant_map")[codes] * scale).reshape(stop - start, width)

    return StoredRows(rows, width, read)


def _state(weights: Weights, prefix: str) -> Mapping[str, Any]:
    for name in (f"{prefix}.{state}" for state in _STATES):
        if name in weights.stored:
            raw = bytes(weights.rows(name, 0, 1).flatten().tolist())  # type: ignore[arg-type]
            try:
                found = json.loads(raw)
            except (ValueError, RecursionError):
                found = None
            if isinstance(found, dict):
                return found
    raise CheckpointError(f"{prefix}.weight is quantized, and has no quant_state that can be read")
