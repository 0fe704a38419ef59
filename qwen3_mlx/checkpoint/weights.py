"""The tensors of a checkpoint: found and checked by their headers, read one by one.

MLX reads a tensor from the file when it is evaluated, so knowing a checkpoint costs no memory.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.files import Entry, read_header, read_json, read_rows
from qwen3_mlx.model.config import ModelConfig

INDEX = "model.safetensors.index.json"
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
        self.files = _weight_files(folder)
        self.stored: dict[str, Entry] = {}
        self._open: dict[Path, dict[str, mx.array]] = {}
        for file in self.files:
            for name, entry in read_header(file).items():
                if other := self.stored.get(name):
                    both = f"{other.file.name} and {file.name}"
                    raise CheckpointError(f"{folder} has {name} twice, in {both}")
                self.stored[name] = entry
        self.tensors = _stack_experts(
            {name: Tensor(entry.shape, entry.dtype, (name,)) for name, entry in self.stored.items()}
        )

    def take(self, name: str) -> mx.array:
        """Give a tensor, unevaluated; each can be taken once, so that nothing is kept alive."""
        parts = [self._take_stored(part) for part in self.tensors[name].parts]
        return parts[0] if len(parts) == 1 else mx.stack(parts)

    def rows(self, stored_name: str, start: int, stop: int) -> mx.array:
        """Give some rows of a stored tensor, all its axes but the last taken as one.

        They are read at once; 8-bit floats come as their bytes.
        """
        return read_rows(self.stored[stored_name], start, stop)

    def _take_stored(self, name: str) -> mx.array:
        file = self.stored[name].file
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


def refuse_missing_layers(config: ModelConfig, names: Iterable[str]) -> None:
    """Refuse a config.json that promises more layers than there are, before they are built.

    Raises:
        CheckpointError: the last layer has no tensor.
    """
    last = f"model.layers.{config.num_hidden_layers - 1}."
    if not any(name.startswith(last) for name in names):
        raise CheckpointError(f"weights and config.json do not match; missing: {last}*")


def mismatches(
    needed: Mapping[str, tuple[int, ...]], there: Mapping[str, tuple[int, ...]], *, tied: bool
) -> list[str]:
    """Name what is missing, unexpected or misshapen among the tensors that are `there`.

    The small published checkpoints carry a copy of the embedding that their tied heads do not use.
    """
    unused = {"lm_head.weight", "lm_head.scales", "lm_head.biases"} if tied else set()
    misshapen = [
        f"{name} is {list(there[name])} where {list(shape)} is needed"
        for name, shape in needed.items()
        if name in there and there[name] != shape
    ]
    return [
        f"{what} {', '.join(names)}"
        for what, names in (
            ("missing:", sorted(needed.keys() - there.keys())),
            ("unexpected:", sorted(there.keys() - needed.keys() - unused)),
            ("misshapen:", misshapen),
        )
        if names
    ]
