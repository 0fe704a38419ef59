"""Reads and writes safetensors and JSON files; headers are validated before they are used.

Weights are read from safetensors files only: they hold numbers and cannot run code.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import mlx.core as mx

from qwen3_mlx.errors import CheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray

UNFINISHED = ".unfinished"
"""End of the names of files that are being written."""
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_COMPARED_ELEMENTS = 1 << 20  # of a tensor, compared at once
_MAX_AXES = 8  # a checkpoint has three at most; the product of a million sizes would take too long
_ITEM_SIZE = {  # bytes of an element, by the format's name of its dtype
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
STORED_AS = {
    mx.bfloat16: "BF16",
    mx.float16: "F16",
    mx.float32: "F32",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.uint8: "U8",
}
"""Names that the format has for the dtypes that are written."""
_READ_AS = {name: dtype for dtype, name in STORED_AS.items()}
PACKED = {
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
}
"""Types of GGUF files whose numbers are packed in blocks: the numbers and the bytes of a block."""
_FLOATS = {"BF16", "F16", "F32"}
_READ_AS |= {"F8_E4M3": mx.uint8}  # MLX has no 8-bit floats: they are read as bytes
_READ_AS |= {"I8": mx.int8, "I64": mx.int64}
_MLX_METADATA = {"format": "mlx"}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: the file is missing or does not hold a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return content


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor as the header of a file describes it.

    `start` is the offset of its first byte in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.bytes_of(math.prod(self.shape))

    def bytes_of(self, count: int) -> int:
        """Return the bytes of so many elements."""
        numbers, size = PACKED.get(self.dtype) or (1, _ITEM_SIZE[self.dtype])
        return count // numbers * size


def read_header(file: Path) -> dict[str, Entry]:
    """Read the tensors' entries in a safetensors file; see `read_header_and_metadata`."""
    return read_header_and_metadata(file)[0]


def read_header_and_metadata(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Read and check the header of a safetensors file: the tensors' entries, and the metadata.

    The rules of the format are enforced: the tensors lie side by side in the file, without gaps
    and without overlaps, and each takes the bytes that its shape and dtype need.

    Raises:
        CheckpointError: the file cannot be read, is truncated or broken.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{file} is truncated or no safetensors file; download it again"
                )
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    try:
        header = json.loads(raw, object_pairs_hook=_without_repeats)
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not text")
        entries = {name: _entry(file, fields, 8 + length) for name, fields in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} has a broken header; download it again") from error
    place = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != place:
            raise CheckpointError(
                f"{file} has a broken header: {name[:60]!r} does not begin where the tensor before "
                "it ends; download it again"
            )
        place += entry.nbytes
    if place != size:
        raise CheckpointError(
            f"{file} has {size:,} bytes where its header promises {place:,}; download it again"
        )
    return entries, metadata


def _entry(file: Path, fields: Mapping[str, Any], data: int) -> Entry:
    start, stop = fields["data_offsets"]
    shape = tuple(fields["shape"])
    if len(shape) > _MAX_AXES:
        raise ValueError("a tensor has too many axes")
    if any(type(number) is not int or number < 0 for number in (start, stop, *shape)):
        raise ValueError("offsets and shapes are whole numbers from 0 on")
    entry = Entry(file, fields["dtype"], shape, data + start)
    if entry.nbytes != stop - start:
        raise ValueError("the bytes are not those of the shape")
    return entry


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if repeated := [
        name for name, count in Counter(name for name, _ in pairs).items() if count > 1
    ]:
        raise ValueError(f"{repeated[0]} stands twice")
    return dict(pairs)


def read_rows(entry: Entry, start: int, stop: int) -> mx.array:
    """Read rows [stop - start, last axis] of a tensor; all axes but the last count as one.

    Rows that are packed in blocks are read as bytes.

    Raises:
        CheckpointError: the dtype occurs in no checkpoint, or the file cannot be read.
    """
    if entry.dtype not in _READ_AS and entry.dtype not in PACKED:
        raise CheckpointError(f"{entry.file} has a tensor of dtype {entry.dtype}, which none needs")
    width = entry.shape[-1] if entry.shape else 1
    if not 0 <= start <= stop <= math.prod(entry.shape[:-1]):
        raise CheckpointError(f"{entry.file} has a tensor with fewer rows than are needed")
    raw = _read_elements(entry, start * width, stop * width)
    numbers = mx.array(memoryview(raw))  # type: ignore[arg-type]  # takes buffers, too
    return numbers.view(_READ_AS.get(entry.dtype, mx.uint8)).reshape(stop - start, -1)


def _read_elements(entry: Entry, start: int, stop: int) -> bytes:
    count = entry.bytes_of(stop - start)
    try:
        with entry.file.open("rb", buffering=0) as stream:
            stream.seek(entry.start + entry.bytes_of(start))
            raw = stream.read(count)
    except OSError as error:
        raise CheckpointError(f"{entry.file} cannot be read: {error.strerror}") from error
    if len(raw) != count:
        raise CheckpointError(f"{entry.file} has become shorter while it was read")
    return raw


def same_numbers(one: Entry, other: Entry) -> bool:
    """Return whether two tensors have the same shape and numbers; float dtypes may differ.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if one.shape != other.shape:
        return False
    import numpy as np  # rarely needed, and importing it would delay the start

    count = math.prod(one.shape)
    for start in range(0, count, _COMPARED_ELEMENTS):
        stop = min(start + _COMPARED_ELEMENTS, count)
        first, second = (_read_elements(entry, start, stop) for entry in (one, other))
        if one.dtype == other.dtype and first == second:
            continue
        if not {one.dtype, other.dtype} <= _FLOATS or not np.array_equal(
            _as_floats(first, one.dtype), _as_floats(second, other.dtype), equal_nan=True
        ):
            return False
    return True


def _as_floats(raw: bytes, dtype: str) -> "NDArray[Any]":
    import numpy as np

    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, np.float16 if dtype == "F16" else np.float32)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of a tensor to be written."""

    name: str
    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.size


class ShardWriter:
    """Writes a safetensors file whose tensors are known beforehand; each is appended by rows."""

    def __init__(
        self,
        stream: Any,
        tensors: Sequence[TensorSpec],
        metadata: Mapping[str, str] = _MLX_METADATA,
    ) -> None:
        """Write the header for `tensors` to an open binary file."""
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        place = 0
        for tensor in tensors:
            header[tensor.name] = {
                "dtype": STORED_AS[tensor.dtype],
                "shape": tensor.shape,
                "data_offsets": [place, place + tensor.nbytes],
            }
            place += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # aligns the data to 8 bytes
        stream.write(len(text).to_bytes(8, "little") + text)
        self._stream = stream
        self._next = {
            tensor.name: 8 + len(text) + header[tensor.name]["data_offsets"][0]
            for tensor in tensors
        }

    def append(self, name: str, rows: mx.array) -> None:
        """Write the next rows of a tensor."""
        raw = as_memoryview(mx.contiguous(rows).view(mx.uint8)).cast("B")
        self._stream.seek(self._next[name])
        self._stream.write(raw)
        self._next[name] += len(raw)


def as_memoryview(array: mx.array) -> memoryview:
    """Return a view of an array's bytes in memory."""
    buffer: Any = array  # MLX's type stubs declare a buffer from Python 3.12 on only
    return memoryview(buffer)


@contextmanager
def atomic_write(
    path: Path, *, suffix: str = UNFINISHED, private: bool = False
) -> Iterator[BinaryIO]:
    """Open a file for writing; it takes its name only when it is complete and on the disk.

    Until then its name ends in `suffix`, which must differ where several write the same file. With
    `private` only its owner may read it. After an error nothing is left of it.

    Raises:
        OSError: the file cannot be written; `filename` is `path`.
    """
    unfinished = path.with_name(path.name + suffix)
    mode = 0o600 if private else 0o666
    try:
        with open(
            unfinished, "wb", opener=lambda name, flags: os.open(name, flags, mode)
        ) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(path)
    except OSError as error:
        if error.filename in (None, str(unfinished)) and error.strerror:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
