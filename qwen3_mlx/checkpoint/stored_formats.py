"""Decoders of stored weights: every supported format is read as rows of floats.

Plain floats, MLX's quantized formats, block-scaled 8-bit floats (FP8), AWQ and GPTQ are decoded
some rows at a time. A layer's weight is [outputs, inputs], experts' weights [experts, outputs,
inputs]; rows are counted over all axes but the last.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from qwen3_mlx.checkpoint.names import network_name
from qwen3_mlx.checkpoint.stored import MLX, StoredFormats, quantization_of
from qwen3_mlx.checkpoint.weights import Weights
from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.files import STORED_AS

Read = Callable[[int, int], mx.array]
_FLOATS = ("BF16", "F16", "F32")
_WORDS = ("I32", "U32")  # of packed integers; the sign of a word has no meaning


@dataclass(frozen=True, slots=True)
class StoredRows:
    """One stored matrix: `read(start, stop)` returns rows of it as floats."""

    rows: int
    width: int
    read: Read


@dataclass(frozen=True, slots=True)
class Matrix:
    """A tensor of the network, made of one stored matrix or of one for each expert."""

    shape: tuple[int, ...]
    parts: tuple[StoredRows, ...]

    def blocks(self, size: int) -> Iterator[mx.array]:
        """Yield all rows in order, in blocks of about `size` numbers."""
        for part in self.parts:
            # A multiple of 128 rows, so that no block of FP8 or AWQ is cut.
            step = max(size // part.width // 128, 1) * 128
            for start in range(0, part.rows, step):
                yield part.read(start, min(start + step, part.rows))


Decoder = Callable[[Weights, str], StoredRows]
"""Creates the readable matrix of the stored tensors with a name prefix."""


@dataclass(frozen=True, slots=True)
class _Scheme:
    """Storage of quantized modules: the tensor that marks one, its companions, the decoder."""

    marker: str
    beside: tuple[str, ...]
    decoder: Decoder


def read_matrices(folder: Path, config: Mapping[str, Any]) -> dict[str, Matrix]:
    """Return the tensors of a checkpoint by their names in the network.

    Raises:
        CheckpointError: a file is broken, or the quantization is not supported.
    """
    weights = Weights(folder)
    scheme = _scheme_of(config)
    matrices: dict[str, Matrix] = {}
    for name, tensor in weights.tensors.items():
        module, _, kind = name.rpartition(".")
        quantized = scheme and all(
            f"{module}.{other}" in weights.tensors for other in scheme.beside
        )
        if scheme and quantized and kind == scheme.marker:
            prefixes = [part.removesuffix(f".{kind}") for part in tensor.parts]
            parts = tuple(scheme.decoder(weights, prefix) for prefix in prefixes)
            stacked = len(prefixes) > 1 or len(tensor.shape) > 2
            rows = sum(part.rows for part in parts)
            experts = tensor.shape[0] if stacked else 1
            shape = (rows // experts, parts[0].width)
            matrices[f"{module}.weight"] = Matrix((experts, *shape) if stacked else shape, parts)
        elif not (quantized and kind in (*(scheme.beside if scheme else ()), "biases", "g_idx")):
            parts = tuple(_plain(weights, part) for part in tensor.parts)
            matrices[name] = Matrix(tensor.shape, parts)
    return matrices


def _scheme_of(config: Mapping[str, Any]) -> _Scheme | None:
    """Return the storage of quantized modules, by config.json; None if nothing is quantized."""
    found = quantization_of(config)
    if found is None:
        return None
    if found.method == MLX:
        return _Scheme("weight", ("scales",), _mlx(StoredFormats(found.section)))
    schemes = {"fp8": _fp8_scheme, "awq": _awq_scheme, "gptq": _gptq_scheme}
    return schemes[found.method](found.section)


def _expect(
    weights: Weights, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """Check dtype and shape of a stored tensor (by default two axes); return the shape."""
    if name not in weights.stored:
        raise CheckpointError(f"{name} is missing")
    entry = weights.stored[name]
    fits = entry.shape == shape if shape is not None else len(entry.shape) == 2
    if entry.dtype not in dtypes or not fits:
        needed = list(shape) if shape is not None else "[rows, columns]"
        raise CheckpointError(
            f"{name} is {entry.dtype} {list(entry.shape)} where {' or '.join(dtypes)} {needed} is "
            "needed"
        )
    return entry.shape


# --- plain floats and MLX's formats -------------------------------------------------------------


def _plain(weights: Weights, name: str) -> StoredRows:
    entry = weights.stored[name]
    if entry.dtype not in _FLOATS:
        raise CheckpointError(
            f"{name} is {entry.dtype}, and config.json does not state how to decode it"
        )
    width = entry.shape[-1] if entry.shape else 1
    return StoredRows(
        rows=math.prod(entry.shape[:-1]),
        width=width,
        read=lambda start, stop: weights.rows(name, start, stop),
    )


def _mlx(formats: StoredFormats) -> Decoder:
    def decode(weights: Weights, prefix: str) -> StoredRows:
        fmt = formats.format_of(_module_name(prefix))
        packed = weights.stored[f"{prefix}.weight"]
        width = packed.shape[-1] * 32 // fmt.bits if packed.shape else 0
        tensors = fmt.tensors((*packed.shape[:-1], width), mx.float32)
        names = [f"{prefix}.{kind}" for kind in tensors]
        for name, (shape, dtype) in zip(names, tensors.values(), strict=True):
            dtypes = _FLOATS if dtype == mx.float32 else (STORED_AS[dtype],)
            _expect(weights, name, dtypes, shape)

        def read(start: int, stop: int) -> mx.array:
            return fmt.dequantize_float32(*(weights.rows(name, start, stop) for name in names))

        return StoredRows(math.prod(packed.shape[:-1]), width, read)

    return decode


def _module_name(prefix: str) -> str:
    """Return a stored module's name in config.json: experts have the name of their stack."""
    before, found, after = prefix.partition(".experts.")
    return network_name(f"{before}.switch_mlp.{after.partition('.')[2]}" if found else prefix)


# --- FP8: 8-bit floats (e4m3) with a scale for each block ---------------------------------------


def _fp8_scheme(section: Mapping[str, Any]) -> _Scheme:
    block = section["weight_block_size"]
    return _Scheme("weight", ("weight_scale_inv",), lambda w, prefix: _fp8(w, prefix, *block))


def _fp8(weights: Weights, prefix: str, block_rows: int, block_columns: int) -> StoredRows:
    """Create the matrix of number · scale of its block (which the format calls inverse scale)."""
    codes, scales = f"{prefix}.weight", f"{prefix}.weight_scale_inv"
    rows, width = _expect(weights, codes, ("F8_E4M3",))
    _expect(weights, scales, _FLOATS, (-(-rows // block_rows), -(-width // block_columns)))

    def read(start: int, stop: int) -> mx.array:
        first, last = start // block_rows, -(-stop // block_rows)
        scale = weights.rows(scales, first, last).astype(mx.float32)
        by_row = mx.arange(start, stop) // block_rows - first
        by_column = mx.arange(width) // block_columns
        return mx.array(_E4M3)[weights.rows(codes, start, stop)] * scale[by_row][:, by_column]

    return StoredRows(rows, width, read)


def _e4m3_values() -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
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


_E4M3 = _e4m3_values()


# --- AWQ and GPTQ: integers with a scale and a zero for each group of inputs --------------------

# The shifts of the eight values in a word: AutoAWQ's "GEMM" layout has them in this order.
_AWQ_SHIFTS = [4 * place for place in (0, 4, 1, 5, 2, 6, 3, 7)]


def _awq_scheme(_: Mapping[str, Any]) -> _Scheme:
    return _Scheme("qweight", ("qzeros", "scales"), _awq)


def _awq(weights: Weights, prefix: str) -> StoredRows:
    """Create the matrix of (q − zero) · scale; words [inputs, outputs / 8] hold eight outputs."""
    names = [f"{prefix}.{kind}" for kind in ("qweight", "qzeros", "scales")]
    (inputs, words), (groups, _) = (_expect(weights, name, _WORDS) for name in names[:2])
    _expect(weights, names[1], _WORDS, (groups, words))
    _expect(weights, names[2], _FLOATS, (groups, 8 * words))
    group = _group_size(prefix, inputs, groups)

    def read(start: int, stop: int) -> mx.array:
        columns = slice(start // 8, -(-stop // 8))
        q, zeros = (
            _unpack(weights.rows(name, 0, rows)[:, columns], _AWQ_SHIFTS)
            for name, rows in zip(names[:2], (inputs, groups), strict=True)
        )
        scales = weights.rows(names[2], 0, groups)[:, 8 * columns.start : 8 * columns.stop]
        return _dequantize(q, zeros, scales, mx.arange(inputs) // group)[: stop - start]

    return StoredRows(8 * words, inputs, read)


def _gptq_scheme(section: Mapping[str, Any]) -> _Scheme:
    bits, second = section["bits"], str(section.get("checkpoint_format")).lower() == "gptq_v2"
    ordered = bool(section.get("desc_act"))

    def decode(weights: Weights, prefix: str) -> StoredRows:
        if ordered and f"{prefix}.g_idx" not in weights.stored:
            raise CheckpointError(f"{prefix}.g_idx is missing, and desc_act is true")
        return _gptq(weights, prefix, bits, zeros_less_one=not second)

    return _Scheme("qweight", ("qzeros", "scales"), decode)


def _gptq(weights: Weights, prefix: str, bits: int, *, zeros_less_one: bool) -> StoredRows:
    """Create the matrix of (q − zero) · scale, stored as words [inputs · bits / 32, outputs].

    The first version of the format stores each zero less one.
    """
    q_name, z_name, s_name = (f"{prefix}.{kind}" for kind in ("qweight", "qzeros", "scales"))
    (words, outputs), (groups, _) = (_expect(weights, name, _WORDS) for name in (q_name, z_name))
    shifts = list(range(0, 32, bits))
    inputs = words * len(shifts)
    _expect(weights, z_name, _WORDS, (groups, outputs // len(shifts)))
    _expect(weights, s_name, _FLOATS, (groups, outputs))
    order = f"{prefix}.g_idx"
    if ordered := order in weights.stored:
        _expect(weights, order, ("I32",), (inputs,))
    else:
        group = _group_size(prefix, inputs, groups)

    def read(start: int, stop: int) -> mx.array:
        packed = weights.rows(q_name, 0, words)[:, start:stop]
        q = _unpack(packed.T, shifts).T
        stored = weights.rows(z_name, 0, groups).view(mx.uint32)
        if zeros_less_one:
            # Writers subtract 1 from all zeros of a word at once, so a zero of 0 borrows from its
            # neighbour. Adding to the word as a whole carries it back.
            stored = stored + sum(1 << shift for shift in shifts)
        zeros = _unpack(stored, shifts)[:, start:stop]
        scales = weights.rows(s_name, 0, groups)[:, start:stop]
        if ordered:
            index = weights.rows(order, 0, 1).flatten()
            if stray := set(np.array(index).tolist()) - set(range(groups)):
                raise CheckpointError(f"{order} names group {min(stray)} of {groups}")
        else:
            index = mx.arange(inputs) // group
        return _dequantize(q, zeros, scales, index)

    return StoredRows(outputs, inputs, read)


def _group_size(prefix: str, inputs: int, groups: int) -> int:
    if not groups or inputs % groups:
        raise CheckpointError(
            f"{prefix} has {inputs} inputs, which cannot be split into {groups} groups"
        )
    return inputs // groups


def _unpack(words: mx.array, shifts: list[int]) -> mx.array:
    """Return the values [rows, words · values a word] of words [rows, words], float32."""
    mask = (1 << 32 // len(shifts)) - 1
    values = words.view(mx.uint32)[..., None] >> mx.array(shifts, dtype=mx.uint32) & mask
    return values.flatten(1).astype(mx.float32)


def _dequantize(q: mx.array, zeros: mx.array, scales: mx.array, group: mx.array) -> mx.array:
    """Compute the weight [outputs, inputs] of q [inputs, outputs], zeros and scales by group."""
    return ((q - zeros[group]) * scales.astype(mx.float32)[group]).T
