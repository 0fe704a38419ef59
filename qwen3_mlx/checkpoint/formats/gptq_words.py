"""GPTQ: integers in words along the inputs, with a scale and a zero for each group."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from qwen3_mlx.checkpoint.formats.affine import affine_rows, group_size, unpack
from qwen3_mlx.checkpoint.formats.matrix import FLOATS, WORDS, Scheme, StoredRows, expect
from qwen3_mlx.checkpoint.weights import Weights
from qwen3_mlx.errors import CheckpointError


def schemes(section: Mapping[str, Any]) -> list[Scheme]:
    """Return how the modules are stored."""
    second = str(section.get("checkpoint_format")).lower() == "gptq_v2"
    ordered = bool(section.get("desc_act"))

    def decode(weights: Weights, prefix: str) -> StoredRows:
        if ordered and f"{prefix}.g_idx" not in weights.stored:
            raise CheckpointError(f"{prefix}.g_idx is missing, and desc_act is true")
        return gptq_rows(weights, prefix, section["bits"], zeros_less_one=not second)

    return [Scheme("qweight", ("qzeros", "scales"), decode, ("g_idx",))]


def gptq_rows(weights: Weights, prefix: str, bits: int, *, zeros_less_one: bool) -> StoredRows:
    """Create the matrix of (q − zero) · scale, stored as words [inputs · bits / 32, outputs].

    The first version of the format stores each zero less one. Inputs that `g_idx` assigns to groups
    in another order have no codes for MLX, whose groups are of neighbours.
    """
    q_name, z_name, s_name = (f"{prefix}.{kind}" for kind in ("qweight", "qzeros", "scales"))
    (words, outputs), (groups, _) = (expect(weights, name, WORDS) for name in (q_name, z_name))
    shifts = list(range(0, 32, bits))
    inputs = words * len(shifts)
    expect(weights, z_name, WORDS, (groups, outputs // len(shifts)))
    expect(weights, s_name, FLOATS, (groups, outputs))

    def read_groups(start: int, stop: int) -> tuple[mx.array, mx.array, mx.array]:
        q = unpack(weights.rows(q_name, 0, words)[:, start:stop].T, shifts)
        stored = weights.rows(z_name, 0, groups).view(mx.uint32)
        if zeros_less_one:
            # Writers subtract 1 from all zeros of a word at once, so a zero of 0 borrows from its
            # neighbour. Adding to the word as a whole carries it back.
            stored = stored + sum(1 << shift for shift in shifts)
        zeros = unpack(stored, shifts)[:, start:stop].T.astype(mx.float32)
        scales = weights.rows(s_name, 0, groups)[:, start:stop].T.astype(mx.float32)
        return q, scales, -zeros * scales

    order = f"{prefix}.g_idx"
    if order not in weights.stored:
        group = group_size(prefix, inputs, groups)
        return affine_rows(outputs, inputs, bits, group, read_groups)
    expect(weights, order, ("I32",), (inputs,))

    def read(start: int, stop: int) -> mx.array:
        index = weights.rows(order, 0, 1).flatten()
        for stray in (index.min().item(), index.max().item()):
            if not 0 <= int(stray) < groups:  # type: ignore[arg-type]
                raise CheckpointError(f"{order} names group {stray} of {groups}")
        q, scales, offsets = read_groups(start, stop)
        return q.astype(mx.float32) * scales[:, index] + offsets[:, index]

    return StoredRows(outputs, inputs, read)
