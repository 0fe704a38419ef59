"""GGUF's block formats: groups of 32 weights or blocks of 256, each with its scales.

Codes are taken over where MLX has a format for them. The layouts are those of ggml's block structs
(ggml-common.h); a row is a whole number of blocks.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx

from qwen3_mlx.checkpoint.formats.affine import pack
from qwen3_mlx.checkpoint.formats.matrix import Codes, Scheme, StoredRows
from qwen3_mlx.checkpoint.weights import Weights
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.extras import install_command
from qwen3_mlx.files import PACKED
from qwen3_mlx.model.quantization import Format

_GROUP = 32
# The values of IQ4_NL's and IQ4_XS's codes, in units of the scale.
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

Packed = tuple[mx.array, mx.array, mx.array]
"""Codes as MLX packs them, bytes [blocks, n]; float32 scales and biases [blocks, groups]."""


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

    if kind not in _CODED:
        decode = _q6_k if kind == "Q6_K" else partial(_by_library, kind)
        return StoredRows(rows, width, lambda a, b: decode(blocks(a, b)).reshape(b - a, width))
    bits, codes_of = _CODED[kind]
    fmt = Format(bits, _GROUP)

    def read_codes(start: int, stop: int) -> Packed:
        packed, scales, biases = codes_of(blocks(start, stop))
        by_row = (stop - start, -1)
        words = packed.reshape(by_row).view(mx.uint32)
        return words, scales.reshape(by_row), biases.reshape(by_row)

    def read(start: int, stop: int) -> mx.array:
        return fmt.dequantize_float32(*read_codes(start, stop))

    return StoredRows(rows, width, read, Codes(fmt, read_codes))


def _floats(blocks: mx.array, start: int, count: int = 1) -> mx.array:
    """Return `count` float16 numbers that begin at a byte of each block, as float32."""
    return blocks[:, start : start + 2 * count].view(mx.float16).astype(mx.float32)


def _halves(raw: mx.array) -> mx.array:
    """Return the low halves of bytes [..., n], then the high halves, as MLX packs 4-bit codes."""
    pairs = raw.view(mx.uint16)  # the lower byte comes first
    low, high = (pairs & 15) | (pairs >> 4 & 240), (pairs >> 4 & 15) | (pairs >> 8 & 240)
    return mx.concatenate([low, high], axis=-1).astype(mx.uint8)


def _nibbles(raw: mx.array) -> mx.array:
    """Return the low halves of bytes [..., n], then the high halves, a byte each: [..., 2n]."""
    return mx.concatenate([raw & 15, raw >> 4], axis=-1)


def _five_bits(nibbles: mx.array, fifth: mx.array) -> mx.array:
    """Pack codes of 5 bits, given by their lower four bits and their fifth."""
    return pack((nibbles | fifth << 4).astype(mx.uint32), 5).view(mx.uint8)


def _bits(raw: mx.array) -> mx.array:
    """Return the bits of bytes [..., n], the lowest first, a byte each: [..., 8n]."""
    return (raw[..., None] >> mx.arange(8, dtype=mx.uint8) & 1).flatten(-2)


def _q8_0(blocks: mx.array) -> Packed:
    scale = _floats(blocks, 0)
    return blocks[:, 2:] ^ 128, scale, -128 * scale


def _q4_0(blocks: mx.array) -> Packed:
    scale = _floats(blocks, 0)
    return _halves(blocks[:, 2:]), scale, -8 * scale


def _q4_1(blocks: mx.array) -> Packed:
    return _halves(blocks[:, 4:]), _floats(blocks, 0), _floats(blocks, 2)


def _q5_0(blocks: mx.array) -> Packed:
    scale = _floats(blocks, 0)
    return _five_bits(_nibbles(blocks[:, 6:]), _bits(blocks[:, 2:6])), scale, -16 * scale


def _q5_1(blocks: mx.array) -> Packed:
    codes = _five_bits(_nibbles(blocks[:, 8:]), _bits(blocks[:, 4:8]))
    return codes, _floats(blocks, 0), _floats(blocks, 2)


def _six_bits(raw: mx.array) -> tuple[mx.array, mx.array]:
    """Return the eight scales and the eight minima, of 6 bits each, that 12 bytes hold."""
    a, b, c = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scales = mx.concatenate([a & 63, (c & 15) | (a >> 6) << 4], axis=1)
    minima = mx.concatenate([b & 63, (c >> 4) | (b >> 6) << 4], axis=1)
    return scales.astype(mx.float32), minima.astype(mx.float32)


def _q4_k(blocks: mx.array) -> Packed:
    scales, minima = _six_bits(blocks[:, 4:16])
    codes = _halves(blocks[:, 16:144].reshape(-1, 4, 32))
    return codes.flatten(1), _floats(blocks, 0) * scales, -_floats(blocks, 2) * minima


def _q5_k(blocks: mx.array) -> Packed:
    scales, minima = _six_bits(blocks[:, 4:16])
    nibbles = _nibbles(blocks[:, 48:176].reshape(-1, 4, 32)).flatten(1)
    # Bit g of a byte belongs to group g.
    fifth = (blocks[:, None, 16:48] >> mx.arange(8, dtype=mx.uint8)[:, None] & 1).flatten(1)
    codes = _five_bits(nibbles, fifth)
    return codes, _floats(blocks, 0) * scales, -_floats(blocks, 2) * minima


def _iq4_nl(blocks: mx.array) -> Packed:
    return _iq4_codes(blocks[:, 2:]), _floats(blocks, 0), -128 * _floats(blocks, 0)


def _iq4_xs(blocks: mx.array) -> Packed:
    high = blocks[:, 2:4].view(mx.uint16).astype(mx.uint32) >> mx.arange(0, 16, 2, dtype=mx.uint32)
    low = mx.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=-1).flatten(1)
    scales = (low | (high & 3) << 4).astype(mx.float32) - 32
    scales = _floats(blocks, 0) * scales
    return _iq4_codes(blocks[:, 8:].reshape(-1, 8, 16)).flatten(1), scales, -128 * scales


def _iq4_codes(raw: mx.array) -> mx.array:
    """Return the table's values plus 128, as codes of 8 bits."""
    return (mx.array(_IQ4) + 128).astype(mx.uint8)[_nibbles(raw)]


def _q6_k(blocks: mx.array) -> mx.array:
    """Return the weights [blocks, 256]; MLX has no groups of 16."""
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = mx.arange(0, 8, 2, dtype=mx.uint8)[:, None]
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3
    codes = ((low | high << 4).view(mx.int8) - 32).reshape(-1, 16, 16)
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


_CODED: Mapping[str, tuple[int, Callable[[mx.array], Packed]]] = {
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
