"""Integers with a scale and an offset for each group of a row, which MLX's affine formats hold."""

from collections.abc import Callable

import mlx.core as mx

from qwen3_mlx.checkpoint.formats.matrix import Codes, StoredRows
from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.model.quantization import AFFINE_BITS, AFFINE_GROUP_SIZES, Format

ReadGroups = Callable[[int, int], tuple[mx.array, mx.array, mx.array]]
"""Returns codes [rows, width], uint32, and float32 scales and offsets [rows, groups] of rows."""


def affine_rows(
    rows: int, width: int, bits: int, group: int, read_groups: ReadGroups
) -> StoredRows:
    """Create the matrix of code · scale + offset, for codes of `bits` bits in groups of `group`."""

    def read(start: int, stop: int) -> mx.array:
        codes, scales, offsets = read_groups(start, stop)
        grouped = codes.astype(mx.float32).reshape(stop - start, -1, group)
        return (grouped * scales[..., None] + offsets[..., None]).flatten(1)

    size = mlx_group_size(group)
    if bits not in AFFINE_BITS or size is None:
        return StoredRows(rows, width, read)

    def read_codes(start: int, stop: int) -> tuple[mx.array, mx.array, mx.array]:
        codes, scales, offsets = read_groups(start, stop)
        scales, offsets = (mx.repeat(part, group // size, axis=1) for part in (scales, offsets))
        return pack(codes, bits), scales, offsets

    return StoredRows(rows, width, read, Codes(Format(bits, size), read_codes))


def mlx_group_size(group: object) -> int | None:
    """Return the largest groups of MLX that make up groups of `group` weights; None without any."""
    if not isinstance(group, int) or group < 0:
        return None
    return next((size for size in reversed(AFFINE_GROUP_SIZES) if group % size == 0), None)


def pack(codes: mx.array, bits: int) -> mx.array:
    """Pack codes [..., I], uint32, into words [..., I · bits / 32], as MLX's affine modes do.

    The codes follow one another bit by bit, least significant first, 32 of them in `bits` words.
    """
    runs = codes.reshape(*codes.shape[:-1], -1, 32)
    words: list[mx.array] = [mx.zeros(runs.shape[:-1], dtype=mx.uint32)] * bits
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        words[word] = words[word] | (runs[..., place] << shift)
        if shift + bits > 32:
            words[word + 1] = words[word + 1] | (runs[..., place] >> (32 - shift))
    return mx.stack(words, axis=-1).reshape(*codes.shape[:-1], -1)


def unpack(words: mx.array, shifts: list[int]) -> mx.array:
    """Return the values [rows, words · values a word], uint32, of words [rows, words]."""
    mask = (1 << 32 // len(shifts)) - 1
    return (words.view(mx.uint32)[..., None] >> mx.array(shifts, dtype=mx.uint32) & mask).flatten(1)


def unpack_stream(words: mx.array, bits: int) -> mx.array:
    """Return the values [rows, 32 · words / bits], uint32, of what `pack` packs, of 1 to 8 bits."""
    words = words.view(mx.uint32)
    runs = mx.pad(words, [(0, 0), (0, -words.shape[1] % bits)]).reshape(len(words), -1, bits)
    values = []
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        value = runs[..., word] >> shift
        if shift + bits > 32:
            value = value | (runs[..., word + 1] << (32 - shift))
        values.append(value & ((1 << bits) - 1))
    return mx.stack(values, axis=-1).flatten(1)


def group_size(prefix: str, inputs: int, groups: int) -> int:
    """Return the inputs of each group.

    Raises:
        CheckpointError: the groups are not of one size.
    """
    if not groups or inputs % groups:
        raise CheckpointError(
            f"{prefix} has {inputs} inputs, which cannot be split into {groups} groups"
        )
    return inputs // groups
