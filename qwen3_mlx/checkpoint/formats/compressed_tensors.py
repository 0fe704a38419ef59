"""compressed-tensors: packed integers of 1 to 8 bits, 8-bit floats and NVFP4.

Which modules are quantized, to how many bits and in which groups, the tensors themselves say.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import mlx.core as mx

from qwen3_mlx.checkpoint.formats import fp8
from qwen3_mlx.checkpoint.formats.affine import affine_rows, group_size, unpack_stream
from qwen3_mlx.checkpoint.formats.fp8 import e4m3_values, scaled_rows
from qwen3_mlx.checkpoint.formats.matrix import FLOATS, WORDS, Scheme, StoredRows, expect
from qwen3_mlx.checkpoint.weights import Weights
from qwen3_mlx.errors import CheckpointError

_FORMATS = (
    *("pack-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized"),
    *("int-quantized", "mixed-precision"),
)
_BITS = range(1, 9)
_NVFP4_GROUP = 16
# The values of 4-bit floats with 2 bits of exponent and 1 of mantissa (E2M1).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BLOCK = [128, 128]


def problem(section: Mapping[str, Any]) -> str:
    """Return why weights of this section cannot be read, or "" if they can."""
    groups = section.get("config_groups")
    if groups is not None and not _are_objects(groups):
        return "with config_groups that are no objects"
    for group in _groups(section):
        block = _weights(group).get("block_structure")
        if block is not None and not fp8.is_block(block):
            return f"with block_structure {block!r}, and needed is one such as [128, 128]"
    formats = [section.get("format"), *(group.get("format") for group in _groups(section))]
    if other := next((name for name in formats if name and str(name) not in _FORMATS), None):
        return f"in the format {other!r}, and only {', '.join(_FORMATS)} can be read"
    for key in ("transform_config", "sparsity_config"):
        stated = section.get(key)
        if stated and not (isinstance(stated, Mapping) and stated.get("format") == "dense"):
            return f"with a {key}, which is not read"
    return ""


def schemes(section: Mapping[str, Any]) -> list[Scheme]:
    """Return how the modules are stored; those without these tensors are plain."""
    blocks = (_weights(group).get("block_structure") for group in _groups(section))
    block = next(filter(None, blocks), _BLOCK)
    symmetric = [_weights(group).get("symmetric", True) for group in _groups(section)]
    activations = ("input_scale", "input_zero_point", "input_global_scale")
    return [
        Scheme("weight_packed", ("weight_scale", "weight_global_scale"), _nvfp4, activations),
        Scheme(
            "weight_packed",
            ("weight_scale", "weight_shape"),
            partial(_packed, needs_zeros=bool(symmetric) and not any(symmetric)),
            ("weight_zero_point", *activations),
        ),
        Scheme(
            "weight", ("weight_scale",), lambda w, prefix: _whole(w, prefix, block), activations
        ),
    ]


def usual(section: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the bits and the group size of integers; None if other numbers are stored."""
    for stated in map(_weights, _groups(section)):
        if stated.get("type") == "int" and isinstance(stated.get("num_bits"), int):
            return stated["num_bits"], stated.get("group_size") or 0
    return None


def _are_objects(groups: Any) -> bool:
    """Return whether the groups, and what they say of weights, are objects."""
    return isinstance(groups, Mapping) and all(
        isinstance(group, Mapping) and isinstance(group.get("weights") or {}, Mapping)
        for group in groups.values()
    )


def _groups(section: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = section.get("config_groups")
    return [group for group in groups.values() if isinstance(group, Mapping)] if groups else []


def _weights(group: Mapping[str, Any]) -> Mapping[str, Any]:
    return group.get("weights") or {}


def _packed(weights: Weights, prefix: str, *, needs_zeros: bool) -> StoredRows:
    """Create the matrix of (q − zero) · scale, each row a stream of codes of 1 to 8 bits.

    A code is q + 2^(bits - 1), and a stored zero likewise: the halves cancel each other. Zeros are
    packed along the rows. Without zeros, zero is 0.
    """
    if f"{prefix}.weight_g_idx" in weights.stored:
        raise CheckpointError(f"{prefix} has groups in an order of their own, which is not read")
    packed, scale = f"{prefix}.weight_packed", f"{prefix}.weight_scale"
    rows, words = expect(weights, packed, WORDS)
    expect(weights, f"{prefix}.weight_shape", ("I64",), (2,))
    shape: Any = weights.rows(f"{prefix}.weight_shape", 0, 1).flatten().tolist()
    width = shape[1]
    bits = next((bits for bits in _BITS if -(-width * bits // 32) == words), None)
    if shape[0] != rows or bits is None:
        raise CheckpointError(f"{prefix} is packed in a way that is not known: {shape} as {words}")
    groups = expect(weights, scale, FLOATS)[1]
    expect(weights, scale, FLOATS, (rows, groups))
    zeros = f"{prefix}.weight_zero_point"
    has_zeros = zeros in weights.stored
    if needs_zeros and not has_zeros:
        raise CheckpointError(f"{zeros} is missing, and the weights are stated as not symmetric")
    if has_zeros:
        expect(weights, zeros, WORDS, (-(-rows * bits // 32), groups))

    def read_groups(start: int, stop: int) -> tuple[mx.array, mx.array, mx.array]:
        codes = unpack_stream(weights.rows(packed, start, stop), bits)[:, :width]
        scales = weights.rows(scale, start, stop).astype(mx.float32)
        if not has_zeros:
            return codes, scales, -float(1 << bits - 1) * scales
        # Blocks start at multiples of 32 rows, and so at whole words.
        stored = weights.rows(zeros, start * bits // 32, -(-stop * bits // 32))
        zero = unpack_stream(stored.T, bits)[:, : stop - start].T
        return codes, scales, -zero.astype(mx.float32) * scales

    return affine_rows(rows, width, bits, group_size(prefix, width, groups), read_groups)


def _whole(weights: Weights, prefix: str, block: list[int]) -> StoredRows:
    """Create the matrix of number · scale: of the matrix, of each row, or of each block."""
    codes, scales = f"{prefix}.weight", f"{prefix}.weight_scale"
    rows, width = expect(weights, codes, ("F8_E4M3", "I8"))
    shape = weights.stored[scales].shape
    if len(shape) < 2:
        block = [rows, width]
    elif shape == (rows, 1):
        block = [1, width]
    if weights.stored[codes].dtype == "F8_E4M3":
        return scaled_rows(weights, codes, scales, *block)
    expect(weights, scales, FLOATS, (rows, 1))

    def read_groups(start: int, stop: int) -> tuple[mx.array, mx.array, mx.array]:
        numbers = weights.rows(codes, start, stop).astype(mx.int32) + 128
        scale = weights.rows(scales, start, stop).astype(mx.float32)
        return numbers.astype(mx.uint32), scale, -128 * scale

    return affine_rows(rows, width, 8, width, read_groups)


def _nvfp4(weights: Weights, prefix: str) -> StoredRows:
    """Create the matrix of number · scale of its 16 / global scale; the low code comes first."""
    packed, scale = f"{prefix}.weight_packed", f"{prefix}.weight_scale"
    rows, half = expect(weights, packed, ("U8",))
    expect(weights, scale, ("F8_E4M3",), (rows, 2 * half // _NVFP4_GROUP))
    expect(weights, f"{prefix}.weight_global_scale", ("F32",), (1,))

    def read(start: int, stop: int) -> mx.array:
        pairs = weights.rows(packed, start, stop)
        codes = mx.stack([pairs & 15, pairs >> 4], axis=-1).reshape(stop - start, -1, _NVFP4_GROUP)
        table = mx.array([*_E2M1, *(-value for value in _E2M1)])
        whole = weights.rows(f"{prefix}.weight_global_scale", 0, 1)
        scales = e4m3_values()[weights.rows(scale, start, stop)] / whole
        return (table[codes] * scales[..., None]).flatten(1)

    return StoredRows(rows, 2 * half, read)
