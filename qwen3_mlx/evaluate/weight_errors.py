"""Weight errors: the difference between the stored weights of two checkpoints, by module."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.arguments import Progress
from qwen3_mlx.checkpoint.decoded import open_weights
from qwen3_mlx.checkpoint.stored import StoredFormats
from qwen3_mlx.checkpoint.weights import Weights, has_own_head
from qwen3_mlx.engine.worker import Worker
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.files import read_json
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.quantization import AFFINE, Format

_BLOCK = 1 << 22  # weights in float32 at once: 16 MiB


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """One matrix of a checkpoint, or one stack of experts.

    Attributes:
        path: the module's path.
        format: the format as text, such as "4-bit g64".
        weights: the number of weights.
        bits_per_weight: bits on disk per weight, scales and biases included.
        error: root mean square of the differences from the reference's weights, divided by the
            root mean square of the reference's weights.
    """

    path: str
    format: str
    weights: int
    bits_per_weight: float
    error: float


def module_errors(
    reference: Path, candidate: Path, *, progress: Progress | None = None
) -> list[ModuleRow]:
    """Compute the error of each matrix of two checkpoint folders, dequantized in float32.

    Modules are read one at a time. `progress` is called with (done, total) modules.

    Raises:
        CheckpointError: a checkpoint cannot be read.
        Qwen3Error: the checkpoints are not of the same network.
    """
    first, second = _Stored(reference), _Stored(candidate)
    paths = sorted(first.paths, key=_natural)
    if first.paths != second.paths:
        odd = min(first.paths ^ second.paths, key=_natural)
        raise Qwen3Error(f"the checkpoints are not of one network: only one has {odd}")
    rows = []
    worker = Worker()
    try:
        for done, path in enumerate(paths):
            if progress:
                progress(done, len(paths))
            rows.append(worker.call(partial(_row, path, first, second)))
    finally:
        worker.stop()
    if progress:
        progress(len(paths), len(paths))
    return rows


def bits_per_weight(rows: Sequence[ModuleRow]) -> float:
    """Return the average bits per weight over all these modules."""
    return sum(row.weights * row.bits_per_weight for row in rows) / sum(row.weights for row in rows)


class _Stored:
    """The matrices of a checkpoint, as stored on disk."""

    def __init__(self, folder: Path) -> None:
        stated = read_json(folder / "config.json")
        config, self._weights = open_weights(folder, stated, mx.float32, in_floats=False)
        self._formats = StoredFormats.of(config)
        self.paths = {
            name.removesuffix(".weight")
            for name, tensor in self._weights.tensors.items()
            if name.endswith(".weight") and len(tensor.shape) > 1
        }
        if ModelConfig.from_dict(config).tie_word_embeddings and not has_own_head(Weights(folder)):
            self.paths.discard("lm_head")  # some files repeat the tied embedding as the head

    def take(self, path: str) -> "_Matrix":
        """Read and return a module's matrix; each can be taken once."""
        names = [f"{path}.{kind}" for kind in ("weight", "scales", "biases")]
        parts = [self._weights.take(name) for name in names if name in self._weights.tensors]
        mx.eval(parts)
        quantized = self._formats if len(parts) > 1 else None
        return _Matrix(parts, quantized.format_of(path) if quantized else None)


class _Matrix:
    """The rows of a matrix, with their scales and biases if they are quantized."""

    def __init__(self, parts: Sequence[mx.array], fmt: Format | None) -> None:
        self.bits = 8 * sum(part.nbytes for part in parts)
        self._parts = [part.reshape(-1, part.shape[-1]) for part in parts]
        self._fmt = fmt
        packed = self._parts[0].shape[1]
        self.shape = self._parts[0].shape[0], packed * 32 // fmt.bits if fmt else packed

    @property
    def format(self) -> str:
        fmt = self._fmt
        if fmt is None:
            return backend.dtype_name(self._parts[0].dtype)
        return f"{fmt.bits}-bit g{fmt.group_size}" if fmt.mode == AFFINE else fmt.mode

    def rows(self, start: int, stop: int) -> mx.array:
        """Return the rows from `start` to `stop` in float32, unevaluated."""
        parts = [part[start:stop] for part in self._parts]
        if self._fmt is None:
            return parts[0].astype(mx.float32)
        return self._fmt.dequantize_float32(*parts)


def _row(path: str, first: _Stored, second: _Stored) -> ModuleRow:
    mx.clear_cache()
    reference, candidate = first.take(path), second.take(path)
    (rows, columns), other = reference.shape, candidate.shape
    if (rows, columns) != other:
        raise Qwen3Error(
            f"the checkpoints are not of one network: {path} has {rows} x {columns} weights in one "
            f"and {other[0]} x {other[1]} in the other"
        )
    difference = total = 0.0
    step = max(1, _BLOCK // columns)
    for start in range(0, rows, step):
        expected = reference.rows(start, start + step)
        delta = candidate.rows(start, start + step) - expected
        difference += float((delta * delta).sum(axis=-1).sum())
        total += float((expected * expected).sum(axis=-1).sum())
    count = rows * columns
    # If all weights of the reference are zero, the error is absolute: nothing to divide by.
    error = math.sqrt(difference / (total or count))
    return ModuleRow(path, candidate.format, count, candidate.bits / count, error)


def _natural(path: str) -> list[tuple[int, str]]:
    """Return a sort key that orders layer 2 before layer 10 and puts the head last."""
    parts = re.split(r"(\d+)", path.replace("lm_head", "~"))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
