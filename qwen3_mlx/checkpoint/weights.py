"""The tensors of a checkpoint: found and checked by their headers, read one by one.

Only safetensors files are opened: they hold numbers and cannot run code. MLX reads a tensor from
the file when it is evaluated, so knowing a checkpoint costs no memory.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen3_mlx.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")
_EXPERT = re.compile(r"(.*\.mlp)\.experts\.(\d+)\.(\w+)\.(\w+)")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as a model knows it, and the stored tensors it is made of.

    There is more than one part where a published checkpoint keeps each expert by itself.
    """

    shape: tuple[int, ...]
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
        shapes: dict[str, tuple[int, ...]] = {}
        for file in _weight_files(folder):
            for name, entry in read_header(file).items():
                self._files[name] = file
                shapes[name] = tuple(entry["shape"])
        self.tensors = _stack_experts(shapes)

    def take(self, name: str) -> mx.array:
        """Give a tensor, unevaluated; each can be taken once, so that nothing is kept alive."""
        parts = [self._take_stored(part) for part in self.tensors[name].parts]
        return parts[0] if len(parts) == 1 else mx.stack(parts)

    def _take_stored(self, name: str) -> mx.array:
        file = self._files[name]
        if file not in self._open:
            arrays = mx.load(str(file))
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
        if any(Path(name).name != name for name in names.values()):
            raise CheckpointError(f"{index} names files outside its folder")
        return sorted(set(names.values()))
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
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return content


def read_header(file: Path) -> dict[str, Any]:
    """Read what a safetensors file says it holds, and check that it holds that much.

    Raises:
        CheckpointError: the file is truncated or broken.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_LONGEST_HEADER, size - 8):
            raise CheckpointError(f"{file} is truncated or no safetensors file; download it again")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values()]
        _ = [math.prod(entry["shape"]) for entry in header.values()]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file} has a broken header; download it again") from error
    if (expected := 8 + length + max(ends, default=0)) != size:
        raise CheckpointError(
            f"{file} has {size:,} bytes where its header promises {expected:,}; download it again"
        )
    return dict(header)


def _stack_experts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Gather `mlp.experts.N.up_proj.weight` and the like into `mlp.switch_mlp.up_proj.weight`."""
    tensors: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, str]] = {}
    for name, shape in shapes.items():
        if match := _EXPERT.fullmatch(name):
            block, expert, projection, kind = match.groups()
            stacks.setdefault(f"{block}.switch_mlp.{projection}.{kind}", {})[int(expert)] = name
        else:
            tensors[name] = Tensor(shape, (name,))
    for name, experts in stacks.items():
        parts = tuple(experts[number] for number in sorted(experts))
        kinds = {shapes[part] for part in parts}
        if len(kinds) > 1 or sorted(experts) != list(range(len(experts))):
            raise CheckpointError(f"the experts of {name} are not complete or differ in shape")
        tensors[name] = Tensor((len(parts), *kinds.pop()), parts)
    return tensors
