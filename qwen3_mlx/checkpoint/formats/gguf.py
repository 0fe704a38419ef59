"""GGUF's block formats: groups of 32 weights or blocks of 256, each with its scales.

Codes are taken over where MLX has a format for them. The layouts are those of ggml's block structs
(ggml-common.h); a row is a whole number of blocks.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx

from qwen3_mlx.checkpoint.formats.affine import affine_rows
from qwen3_mlx.checkpoint.formats.matrix import Scheme, StoredRows
from qwen3_mlx.checkpoint.weights import Weights
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.extras import install_command
from qwen3_mlx.files import PACKED

_GROUP = 32
# The values of IQ4_NL's and IQ4_XS's codes, in units of the scale.
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

Groups = tuple[mx.array, mx.array, mx.array]
"""Codes [blocks, weights], uint32; float32 scales and offsets [blocks, groups]."""


def schemes(_: Mapping[str, Any]) -> list[Scheme]:
    """Return how matrices are stored, by the type of each."""
    return [Scheme("weight", (), partial(_rows, kind), dtypes=(kind,)) for kind in PACKED]


def _rows(kind: str, weights: Weights, prefix: str) -> StoredRows:
    name = f"{prefix}.weight"
    shape = weights.stored[name].shape
    rows, width = math.prod(shape[:-1]), shape[-1]
    _, size = PACKED[kind]

    def blocks(start: int, stop: int) -> mx.array:
        return weights.rows(name, start, stop).reshape(-1, size)

    if kind not in _GROUPS:
        decode = _q6_k if kind == "Q6_K" else partial(_by_library, kind)
        return StoredRows(rows, width, lambda a, b: decode(blocks(a, b)).reshape(b - a, width))
    bits, groups_of = _GROUPS[kind]

    def read_groups(start: int, stop: int) -> Groups:
        codes, scales, offsets = groups_of(blocks(start, stop))
        by_row = (stop - start, -1)
        return codes.reshape(by_row), scales.reshape(by_row), offsets.reshape(by_row)

    return affine_rows(rows, width, bits, _GROUP, read_groups)


def _floats(blocks: mx.array, start: int, count: int = 1) -> mx.array:
    """Return `count` float16 numbers that begin at a byte of each block, as float32."""
    return blocks[:, start : start + 2 * count].view(mx.float16).astype(mx.float32)


def _nibbles(raw: mx.array) -> mx.array:
    """Return the low halves of 16 bytes, then the high halves: 32 codes [..., 32], uint32."""
    return mx.concatenate([raw & 15, raw >> 4], axis=-1).astype(mx.uint32)


def _bits(raw: mx.array) -> mx.array:
    """Return the bits of bytes [..., n], the lowest first, as [..., 8n], uint32."""
    shifts = mx.arange(8, dtype=mx.uint8)
    return (raw[..., None] >> shifts & 1).flatten(-2).astype(mx.uint32)


def _q8_0(blocks: mx.array) -> Groups:
    scale = _floats(blocks, 0)
    codes = blocks[:, 2:].view(mx.int8).astype(mx.int32) + 128
    return codes.astype(mx.uint32), scale, -128 * scale


def _q4_0(blocks: mx.array) -> Groups:
    scale = _floats(blocks, 0)
    return _nibbles(blocks[:, 2:]), scale, -8 * scale


def _q4_1(blocks: mx.array) -> Groups:
    return _nibbles(blocks[:, 4:]), _floats(blocks, 0), _floats(blocks, 2)


def _q5_0(blocks: mx.array) -> Groups:
    scale = _floats(blocks, 0)
    return _nibbles(blocks[:, 6:]) | _bits(blocks[:, 2:6]) << 4, scale, -16 * scale


def _q5_1(blocks: mx.array) -> Groups:
    codes = _nibbles(blocks[:, 8:]) | _bits(blocks[:, 4:8]) << 4
    return codes, _floats(blocks, 0), _floats(blocks, 2)


def _six_bits(raw: mx.array) -> tuple[mx.array, mx.array]:
    """Return the eight scales and the eight minima, of 6 bits each, that 12 bytes hold."""
    a, b, c = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scales = mx.concatenate([a & 63, (c & 15) | (a >> 6) << 4], axis=1)
    minima = mx.concatenate([b & 63, (c >> 4) | (b >> 6) << 4], axis=1)
    return scales.astype(mx.float32), minima.astype(mx.float32)


def _q4_k(blocks: mx.array) -> Groups:
    scales, minima = _six_bits(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 16:144].reshape(-1, 4, 32)).flatten(1)
    return codes, _floats(blocks, 0) * scales, -_floats(blocks, 2) * minima


def _q5_k(blocks: mx.array) -> Groups:
    scales, minima = _six_bits(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 48:176].reshape(-1, 4, 32)).flatten(1)
    # Bit g of a byte belongs to group g.
    high = (blocks[:, None, 16:48] >> mx.arange(8, dtype=mx.uint8)[:, None] & 1).flatten(1)
    codes = codes | high.astype(mx.uint32) << 4
    return codes, _floats(blocks, 0) * scales, -_floats(blocks, 2) * minima


def _iq4_nl(blocks: mx.array) -> Groups:
    return _iq4_codes(blocks[:, 2:]), _floats(blocks, 0), -128 * _floats(blocks, 0)


def _iq4_xs(blocks: mx.array) -> Groups:
    high = blocks[:, 2:4].view(mx.uint16).astype(mx.uint32) >> mx.arange(0, 16, 2, dtype=mx.uint32)
    low = mx.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=-1).flatten(1)
    scales = (low | (high & 3) << 4).astype(mx.float32) - 32
    scales = _floats(blocks, 0) * scales
    return _iq4_codes(blocks[:, 8:].reshape(-1, 8, 16)).flatten(1), scales, -128 * scales


def _iq4_codes(raw: mx.array) -> mx.array:
    """Return the table's values plus 128, as codes of 8 bits."""
    return (mx.array(_IQ4) + 128).astype(mx.uint32)[_nibbles(raw)]


def _q6_k(blocks: mx.array) -> mx.array:
    """Return the weights [blocks, 256]; MLX has no groups of 16."""
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = mx.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    shifts = mx.arange(0, 8, 2, dtype=mx.uint8)[:, None]
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3
    codes = (low | high << 4).astype(mx.float32).reshape(-1, 16, 16) - 32
    scales = _floats(blocks, 208) * blocks[:, 192:208].view(mx.int8).astype(mx.float32)
    return (codes * scales[..., None]).flatten(1)


def _by_library(kind: str, blocks: mx.array) -> mx.array:
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise Qwen3Error(f"{kind} weights need more packages: {install_command('gguf')}") from error
    import numpy as np

    return mx.array(dequantize(np.array(blocks), GGMLQuantizationType[kind]))


_GROUPS: Mapping[str, tuple[int, Callable[[mx.array], Groups]]] = {
    "Q8_0": (8, _q8_0),
    "Q4_0": (4, _q4_0),
    "Q4_1": (4, _q4_1),
    "Q5_0": (5, _q5_0),
    "Q5_1": (5, _q5_1),
    "Q4_K": (4, _q4_k),
    "Q5_K": (5, _q5_k),
    "IQ4_NL": (8, _iq4_nl),
    "IQ4_XS": (8, _iq4_xs),
}
