"""Weights in a foreign format as those of an MLX checkpoint, decoded a module at a time.

Codes that MLX has a format for are taken over. What else is quantized is quantized to 8 bits, which
loses a tenth of what 4 bits have lost, or is held in floats.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.checkpoint.formats.matrix import Matrix, as_floats
from qwen3_mlx.checkpoint.output_config import with_formats
from qwen3_mlx.checkpoint.recipes import Formats
from qwen3_mlx.checkpoint.stored_formats import held, is_foreign, read_matrices
from qwen3_mlx.checkpoint.weights import Tensor, TensorSource, Weights
from qwen3_mlx.files import STORED_AS
from qwen3_mlx.model.quantization import Format

_BLOCK = 1 << 23  # numbers that are decoded at once


class DecodedWeights:
    """The tensors of a foreign checkpoint, by their names in the network.

    Modules in `formats` have quantized tensors, the others floats of `dtype`.
    """

    def __init__(self, matrices: Mapping[str, Matrix], formats: Formats, dtype: mx.Dtype) -> None:
        self._matrices = matrices
        self._formats = formats
        self._dtype = dtype
        self._ready: dict[str, mx.array] = {}
        self.tensors = {
            planned: Tensor(shape, STORED_AS[kind], (name,))
            for name, matrix in matrices.items()
            for planned, (shape, kind) in self._planned(name, matrix).items()
        }

    def _planned(self, name: str, matrix: Matrix) -> dict[str, tuple[Any, mx.Dtype]]:
        path, _, kind = name.rpartition(".")
        fmt = self._formats.get(path) if kind == "weight" else None
        if fmt is None:
            return {name: (matrix.shape, self._dtype)}
        tensors = fmt.tensors(matrix.shape, self._dtype)
        return {f"{path}.{part}": planned for part, planned in tensors.items()}

    def take(self, name: str) -> mx.array:
        """Return a tensor and drop it here; those of the same module are decoded with it."""
        if name not in self._ready:
            (source,) = self.tensors[name].parts
            matrix = self._matrices[source]
            fmt = self._formats.get(source.removesuffix(".weight"))
            pieces = []
            for block in _blocks(matrix, fmt):
                pieces.append([as_floats(part, self._dtype) for part in block])
                mx.eval(pieces[-1])
            planned = self._planned(source, matrix)
            for place, (target, (shape, _)) in enumerate(planned.items()):
                self._ready[target] = mx.concatenate([piece[place] for piece in pieces])
                self._ready[target] = self._ready[target].reshape(shape)
        return self._ready.pop(name)


def _blocks(matrix: Matrix, fmt: Format | None) -> Iterator[Sequence[mx.array]]:
    """Yield a matrix in the format, or as floats, some rows at a time."""
    if fmt and fmt == matrix.fmt:
        yield from matrix.code_blocks(_BLOCK)
        return
    for rows in matrix.blocks(_BLOCK):
        yield mx.quantize(rows, **fmt.as_config()) if fmt else [rows]


def open_weights(
    folder: Path, config: Mapping[str, Any], dtype: mx.Dtype, *, in_floats: bool | None
) -> tuple[Mapping[str, Any], TensorSource]:
    """Return the weights of a checkpoint, and its config.json, as MLX would have them.

    Foreign formats are decoded to floats of `dtype` if `in_floats`; None decodes them so if the
    machine computes faster that way.

    Raises:
        CheckpointError: a file is broken, or the quantization is not supported.
    """
    if not is_foreign(config):
        return config, Weights(folder)
    matrices = read_matrices(folder, config)
    if in_floats is None:
        weights = sum(math.prod(matrix.shape) for matrix in matrices.values())
        in_floats = backend.worth_dequantizing(4 * weights)
    formats = {} if in_floats else held(matrices)
    return with_formats(config, formats), DecodedWeights(matrices, formats, dtype)
