"""The tensors of a checkpoint: found and checked by their headers, read one by one.

Only safetensors files are opened: they hold numbers and cannot run code. MLX reads a tensor from
the file when it is evaluated, so knowing a checkpoint costs no memory.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen3_mlx.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
_ITEM_SIZE = {  # bytes of an element, by the format's name of its dtype
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")
_EXPERT = re.compile(r"(.*\.mlp)\.experts\.(\d+)\.(\w+)\.(\w+)")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as a model knows it, and the stored tensors it is made of.

    There is more than one part where a published checkpoint keeps each expert by itself.
    """

    shape: tuple[int, ...]
    dtype: str  # by its name in safetensors files: BF16, U32 and so on
    parts: tuple[str, ...]


class Weights:
    """All tensors of a checkpoint's folder, by the name that a model gives them."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of every weight file.

        Raises:
            CheckpointError: there is none, or one is missing, truncated or broken.
        """
        self._files: dict[str, Path] = {}
        self._open: dict[Path, dict[str, mx.array]] = {}
        stored: dict[str, Tensor] = {}
        for file in _weight_files(folder):
            for name, entry in read_header(file).items():
                if name in self._files:
                    both = f"{self._files[name].name} and {file.name}"
                    raise CheckpointError(f"{folder} has {name} twice, in {both}")
                self._files[name] = file
                stored[name] = Tensor(entry.shape, entry.dtype, (name,))
        self.tensors = _stack_experts(stored)

    def take(self, name: str) -> mx.array:
        """Give a tensor, unevaluated; each can be taken once, so that nothing is kept alive."""
        parts = [self._take_stored(part) for part in self.tensors[name].parts]
        return parts[0] if len(parts) == 1 else mx.stack(parts)

    def _take_stored(self, name: str) -> mx.array:
        file = self._files[name]
        if file not in self._open:
            arrays = mx.load(str(file), format="safetensors")
            assert isinstance(arrays, dict)  # as it is for safetensors
            self._open[file] = arrays
        return self._open[file].pop(name)


def weight_names(folder: Path) -> list[str]:
    """List the weight files that belong to the checkpoint: those its index names, or what is there.

    Raises:
        CheckpointError: the index is broken.
    """
    index = folder / INDEX
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise CheckpointError(f"{index} has no weight_map")
        files = set(map(str, names.values()))
        if any(Path(file).name != file for file in files):
            raise CheckpointError(f"{index} names files outside its folder")
        if others := sorted(file for file in files if not file.endswith(".safetensors")):
            raise CheckpointError(f"{index} names {others[0]}; only safetensors files are read")
        return sorted(files)
    names = sorted(file.name for file in folder.glob("model*.safetensors"))
    numbered = next((match for name in names if (match := _SHARD.fullmatch(name))), None)
    if not numbered:
        return names
    stem, number, count = numbered.groups()
    return [
        f"{stem}-{shard:0{len(number)}}-of-{count}.safetensors"
        for shard in range(1, int(count) + 1)
    ]


def _weight_files(folder: Path) -> list[Path]:
    names = weight_names(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}; download it again")
    if not names:
        raise CheckpointError(_why_no_weights(folder))
    return [folder / name for name in names]


def _why_no_weights(folder: Path) -> str:
    others = sorted(
        file.name
        for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf", "*.npz")
        for file in folder.glob(pattern)
    )
    if others:
        return f"{folder} has {', '.join(others)}, but only safetensors files are read"
    return f"{folder} has no model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: it is missing or not a JSON object.
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
    """What a file's header says of one tensor; `start` is the place of its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """The bytes of all its elements."""
        return math.prod(self.shape) * _ITEM_SIZE[self.dtype]


def read_header(file: Path) -> dict[str, Entry]:
    """Read what a safetensors file says it holds, and check that it holds just that.

    The format's own rules are kept: the tensors lie side by side in the file, without gaps and
    without overlaps, and each takes the bytes that its shape and dtype need.

    Raises:
        CheckpointError: the file cannot be read, is truncated or broken.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(_LONGEST_HEADER, size - 8):
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
        entries = {name: _entry(fields, 8 + length) for name, fields in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} has a broken header; download it again") from error
    place = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != place:
            raise CheckpointError(
                f"{file} has a broken header: {name} does not begin where the tensor before it "
                "ends; download it again"
            )
        place += entry.nbytes
    if place != size:
        raise CheckpointError(
            f"{file} has {size:,} bytes where its header promises {place:,}; download it again"
        )
    return entries


def _entry(fields: Mapping[str, Any], data: int) -> Entry:
    start, stop = fields["data_offsets"]
    shape = tuple(fields["shape"])
    if any(type(number) is not int or number < 0 for number in (start, stop, *shape)):
        raise ValueError("offsets and shapes are whole numbers from 0 on")
    entry = Entry(fields["dtype"], shape, data + start)
    if entry.nbytes != stop - start:
        raise ValueError("the bytes are not those of the shape")
    return entry


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if repeated := [
        name for name, count in Counter(name for name, _ in pairs).items() if count > 1
    ]:
        raise ValueError(f"{repeated[0]} stands twice")
    return dict(pairs)


def _stack_experts(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather `mlp.experts.N.up_proj.weight` and the like into `mlp.switch_mlp.up_proj.weight`."""
    tensors: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, str]] = {}
    for name, tensor in stored.items():
        if match := _EXPERT.fullmatch(name):
            block, expert, projection, kind = match.groups()
            stacks.setdefault(f"{block}.switch_mlp.{projection}.{kind}", {})[int(expert)] = name
        else:
            tensors[name] = tensor
    for name, experts in stacks.items():
        parts = tuple(experts[number] for number in sorted(experts))
        kinds = {(stored[part].shape, stored[part].dtype) for part in parts}
        if len(kinds) > 1 or sorted(experts) != list(range(len(experts))):
            raise CheckpointError(f"the experts of {name} are not complete or differ in shape")
        shape, dtype = kinds.pop()
        tensors[name] = Tensor((len(parts), *shape), dtype, parts)
    return tensors
