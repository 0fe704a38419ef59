"""Reads a checkpoint as matrices of rows, whatever its stored format.

Each foreign format has a file in `formats/`; plain floats and MLX's own are read here.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen3_mlx.checkpoint.formats.matrix import (
    FLOATS,
    Codes,
    Decoder,
    Matrix,
    Scheme,
    StoredRows,
    expect,
)
from qwen3_mlx.checkpoint.formats.methods import METHODS
from qwen3_mlx.checkpoint.names import network_name
from qwen3_mlx.checkpoint.recipes import Formats
from qwen3_mlx.checkpoint.stored import MLX, StoredFormats, formats_stored, quantization_of
from qwen3_mlx.checkpoint.weights import Weights, has_all_weights
from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.files import STORED_AS
from qwen3_mlx.model.quantization import Format, FormatOf


def read_matrices(folder: Path, config: Mapping[str, Any]) -> dict[str, Matrix]:
    """Return the tensors of a checkpoint by their names in the network.

    Raises:
        CheckpointError: a file is broken, or the quantization is not supported.
    """
    return matrices_of(Weights(folder), config)


def matrices_of(weights: Weights, config: Mapping[str, Any]) -> dict[str, Matrix]:
    """Return the same of weights whose headers have been read."""
    schemes = _schemes_of(config)
    matrices: dict[str, Matrix] = {}
    used: set[str] = set()  # stored tensors
    for name, tensor in weights.tensors.items():
        module, _, kind = name.rpartition(".")
        prefixes = [part.removesuffix(f".{kind}") for part in tensor.parts]
        for scheme in schemes:
            needed = {f"{prefix}.{other}" for prefix in prefixes for other in scheme.beside}
            fits = kind == scheme.marker and needed <= weights.stored.keys()
            if not fits or (scheme.dtypes and tensor.dtype not in scheme.dtypes):
                continue
            parts = tuple(scheme.decoder(weights, prefix) for prefix in prefixes)
            stacked = len(prefixes) > 1 or len(tensor.shape) > 2
            experts = tensor.shape[0] if stacked else 1
            shape = (sum(part.rows for part in parts) // experts, parts[0].width)
            matrices[f"{module}.weight"] = Matrix(
                (experts, *shape) if stacked else shape, parts, quantized=True
            )
            used |= needed.union(tensor.parts)
            used |= {f"{prefix}.{other}" for prefix in prefixes for other in scheme.also}
            break
    for name, tensor in weights.tensors.items():
        if not used.issuperset(tensor.parts):
            parts = tuple(_plain(weights, part) for part in tensor.parts)
            matrices[name] = Matrix(tensor.shape, parts, quantized=False)
    return matrices


def _schemes_of(config: Mapping[str, Any]) -> list[Scheme]:
    """Return the ways in which quantized modules are stored, by config.json."""
    found = quantization_of(config)
    if found is None:
        return []
    if found.method == MLX:
        return [Scheme("weight", ("scales",), _mlx(StoredFormats(found.section)), ("biases",))]
    return METHODS[found.method].schemes(found.section)


def _plain(weights: Weights, name: str) -> StoredRows:
    entry = weights.stored[name]
    if entry.dtype not in FLOATS:
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
            dtypes = FLOATS if dtype == mx.float32 else (STORED_AS[dtype],)
            expect(weights, name, dtypes, shape)

        def read_codes(start: int, stop: int) -> tuple[mx.array, ...]:
            return tuple(weights.rows(name, start, stop) for name in names)

        def read(start: int, stop: int) -> mx.array:
            return fmt.dequantize_float32(*read_codes(start, stop))

        codes = Codes(fmt, read_codes)
        return StoredRows(math.prod(packed.shape[:-1]), width, read, codes)

    return decode


def _module_name(prefix: str) -> str:
    """Return a stored module's name in config.json: experts have the name of their stack."""
    before, found, after = prefix.partition(".experts.")
    return network_name(f"{before}.switch_mlp.{after.partition('.')[2]}" if found else prefix)


# --- how the matrices are held ---------------------------------------------------------------

_REQUANTIZED = Format(8, 64)  # loses a tenth of what 4 bits have lost


def is_foreign(config: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint is quantized in a format that is not MLX's."""
    found = quantization_of(config)
    return found is not None and found.method != MLX


def formats_held(config: Mapping[str, Any], folder: Path | None = None) -> FormatOf | None:
    """Return a function from module path to its format in memory; None if nothing is quantized.

    The formats of a foreign checkpoint are estimated until its weights are in `folder`.

    Raises:
        CheckpointError: the quantization is not supported, or a weight file is broken.
    """
    found = quantization_of(config)
    if found is None or found.method == MLX:
        return formats_stored(config, folder)
    if folder and has_all_weights(folder):
        return held(read_matrices(folder, config)).get
    usual = METHODS[found.method].usual(found.section)
    return lambda path: usual if ".layers." in path and not path.endswith("mlp.gate") else None


def held(matrices: Mapping[str, Matrix]) -> Formats:
    """Return the format, by module path, in which each quantized matrix is held."""
    return {
        name.removesuffix(".weight"): matrix.fmt or _requantized(matrix)
        for name, matrix in matrices.items()
        if matrix.quantized
    }


def _requantized(matrix: Matrix) -> Format | None:
    return _REQUANTIZED if _REQUANTIZED.fits(matrix.shape) else None


def kept_formats(config: Mapping[str, Any], folder: Path) -> Formats | None:
    """Return the formats that a conversion keeps if no others are asked for; None if it keeps none.

    Raises:
        CheckpointError: the quantization is not supported, or a weight file is broken.
    """
    found = quantization_of(config)
    if found is None or found.method == MLX or not METHODS[found.method].is_kept:
        return None
    return held(read_matrices(folder, config))
