"""AWQ: 4-bit integers in AutoAWQ's "GEMM" layout, with a scale and a zero for each group."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from qwen3_mlx.checkpoint.formats.affine import affine_rows, group_size, unpack
from qwen3_mlx.checkpoint.formats.matrix import FLOATS, WORDS, Scheme, StoredRows, expect
from qwen3_mlx.checkpoint.weights import Weights

# The shifts of the eight values in a word: the layout has them in this order.
_SHIFTS = [4 * place for place in (0, 4, 1, 5, 2, 6, 3, 7)]


def schemes(_: Mapping[str, Any]) -> list[Scheme]:
    """Return how the modules are stored."""
    return [Scheme("qweight", ("qzeros", "scales"), awq_rows)]


def awq_rows(weights: Weights, prefix: str) -> StoredRows:
    """Create the matrix of (q − zero) · scale; words [inputs, outputs / 8] hold eight outputs."""
    q_name, z_name, s_name = (f"{prefix}.{kind}" for kind in ("qweight", "qzeros", "scales"))
    (inputs, words), (groups, _) = (expect(weights, name, WORDS) for name in (q_name, z_name))
    expect(weights, z_name, WORDS, (groups, words))
    expect(weights, s_name, FLOATS, (groups, 8 * words))

    def read_groups(start: int, stop: int) -> tuple[mx.array, mx.array, mx.array]:
        columns = slice(start // 8, -(-stop // 8))
        kept = slice(start - 8 * columns.start, stop - 8 * columns.start)
        q, zeros = (
            unpack(weights.rows(name, 0, rows)[:, columns], _SHIFTS)[:, kept].T
            for name, rows in ((q_name, inputs), (z_name, groups))
        )
        scales = weights.rows(s_name, 0, groups)[:, start:stop].T.astype(mx.float32)
        return q, scales, -zeros.astype(mx.float32) * scales

    return affine_rows(8 * words, inputs, 4, group_size(prefix, inputs, groups), read_groups)
