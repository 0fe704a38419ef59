"""Matrices, as every stored format is read: rows of floats, and codes where MLX has such a format.

A layer's weight is [outputs, inputs], experts' weights [experts, outputs, inputs]; rows are counted
over all axes but the last.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx

from qwen3_mlx.checkpoint.weights import Weights
from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.model.quantization import Format

Read = Callable[[int, int], mx.array]
FLOATS = ("BF16", "F16", "F32")
WORDS = ("I32", "U32")  # of packed integers; the sign of a word has no meaning


@dataclass(frozen=True, slots=True)
class Codes:
    """The same numbers in a format of MLX: `read(start, stop)` returns packed rows, scales, biases.

    Nothing is quantized again and nothing is lost: where they are computed, scales and biases are
    float32. A format without biases has none.
    """

    fmt: Format
    read: Callable[[int, int], tuple[mx.array, ...]]


@dataclass(frozen=True, slots=True)
class StoredRows:
    """One stored matrix: `read(start, stop)` returns rows of it as floats.

    `codes` are None where the numbers are plain, or quantized in a way that MLX has no format for.
    """

    rows: int
    width: int
    read: Read
    codes: Codes | None = None


@dataclass(frozen=True, slots=True)
class Matrix:
    """A tensor of the network, made of one stored matrix or of one for each expert."""

    shape: tuple[int, ...]
    parts: tuple[StoredRows, ...]
    quantized: bool

    @property
    def fmt(self) -> Format | None:
        """The format of MLX that holds the stored numbers; None if there is none."""
        formats = {part.codes.fmt if part.codes else None for part in self.parts}
        return formats.pop() if len(formats) == 1 else None

    def blocks(self, size: int) -> Iterator[mx.array]:
        """Yield all rows in order, as floats, in blocks of about `size` numbers."""
        for part, start, stop in self._pieces(size):
            yield part.read(start, stop)

    def code_blocks(self, size: int) -> Iterator[tuple[mx.array, ...]]:
        """Yield all rows in order, as `Codes` in the format `fmt`, which there must be."""
        for part, start, stop in self._pieces(size):
            assert part.codes
            yield part.codes.read(start, stop)

    def _pieces(self, size: int) -> Iterator[tuple[StoredRows, int, int]]:
        for part in self.parts:
            # A multiple of 128 rows, so that no block of FP8 or AWQ is cut.
            step = max(size // part.width // 128, 1) * 128
            for start in range(0, part.rows, step):
                yield part, start, min(start + step, part.rows)


Decoder = Callable[[Weights, str], StoredRows]
"""Creates the readable matrix of the stored tensors with a name prefix."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """Storage of quantized modules.

    A module is stored like that if it has the tensor `marker`, of one of the `dtypes` if they are
    given, and all tensors `beside` it; those in `also` belong to it if they are there.
    """

    marker: str
    beside: tuple[str, ...]
    decoder: Decoder
    also: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()


def expect(
    weights: Weights, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """Check dtype and shape of a stored tensor (by default two axes); return the shape."""
    if name not in weights.stored:
        raise CheckpointError(f"{name} is missing")
    entry = weights.stored[name]
    fits = entry.shape == shape if shape is not None else len(entry.shape) == 2
    fits = fits and 0 not in entry.shape
    if entry.dtype not in dtypes or not fits:
        needed = list(shape) if shape is not None else "[rows, columns]"
        raise CheckpointError(
            f"{name} is {entry.dtype} {list(entry.shape)} where {' or '.join(dtypes)} {needed} is "
            "needed"
        )
    return entry.shape


def as_floats(part: mx.array, dtype: mx.Dtype) -> mx.array:
    """Return floats of a format as `dtype`; codes stay as they are."""
    return part.astype(dtype) if mx.issubdtype(part.dtype, mx.floating) else part
