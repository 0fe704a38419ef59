"""The tensors of a checkpoint: finds its weight files, checks their headers, reads tensors.

MLX reads a tensor from its file when it is evaluated, so opening a checkpoint takes no memory.
"""

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from qwen3_mlx.checkpoint.gguf_file import gguf_tensors
from qwen3_mlx.checkpoint.hub import ADAPTER_FILES, GGUF_SUFFIX, NO_WHOLE_MODEL
from qwen3_mlx.checkpoint.names import network_name
from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.files import Entry, read_header, read_json, read_rows, same_numbers
from qwen3_mlx.model.config import LOGITS, ModelConfig, headless

_log = logging.getLogger(__name__)
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
GGUF_POINTER = "gguf.json"
"""File of the paths of GGUF files, in the folder that describes them: see `gguf_folder`."""
_UNSUPPORTED_SUFFIXES = (".bin", ".pt", ".pth", ".npz")
_MODEL_FILE = re.compile(r"model[^/]*\.safetensors")
_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")
_NUMBER = re.compile(r"\.\d+(?=\.)")  # of a layer or an expert
_EMBEDDING = "model.embed_tokens.weight"
_EXPERT = re.compile(r"(.*\.mlp)\.experts\.(\d+)\.(\w+)\.(\w+)")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the network, and the stored tensors that it consists of.

    It has more than one part if the checkpoint stores each expert by itself.
    """

    shape: tuple[int, ...]
    dtype: str  # by its name in safetensors files: BF16, U32 and so on
    parts: tuple[str, ...]


class TensorSource(Protocol):
    """The tensors of a checkpoint, by their names in the network; each can be taken once."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Shape and dtype of each tensor."""

    def take(self, name: str) -> mx.array:
        """Return a tensor and drop it here."""


class Weights:
    """All tensors of a checkpoint's folder, by their names in the network."""

    def __init__(
        self,
        folder: Path,
        headers: Mapping[Path, Mapping[str, Entry]] | None = None,
        wanted: Callable[[str], bool] | None = None,
    ) -> None:
        """Read the headers of all weight files, or take those of files that are not on disk.

        Only files with tensors that are `wanted` are read. It is asked with the names in the
        network; other tensors are left out.

        Raises:
            CheckpointError: there is no weight file, or one is missing, truncated or broken.
        """
        if headers is None:
            files = _weight_files(folder, wanted)
            headers = {
                file: gguf_tensors(file, files[0])
                if file.suffix.lower() == GGUF_SUFFIX
                else read_header(file)
                for file in files
            }
        self.files = list(headers)
        self.stored: dict[str, Entry] = {}
        self._open: dict[Path, dict[str, mx.array]] = {}
        for entries in headers.values():
            for name, entry in entries.items():
                if other := self.stored.get(name):
                    both = f"{other.file.name} and {entry.file.name}"
                    raise CheckpointError(f"{folder} has {name} twice, in {both}")
                self.stored[name] = entry
        tensors: dict[str, Tensor] = {}
        for stored, entry in self.stored.items():
            name = network_name(stored)
            if wanted and not wanted(name):
                continue
            if name in tensors:
                raise CheckpointError(f"{folder} has {name} twice, with and without the `model.`")
            tensors[name] = Tensor(entry.shape, entry.dtype, (stored,))
        self.tensors = _stack_experts(tensors)

    def take(self, name: str) -> mx.array:
        """Return a tensor, unevaluated, and drop it here, so that its memory can be freed.

        Each tensor can be taken once.
        """
        parts = [self._take_stored(part) for part in self.tensors[name].parts]
        return parts[0] if len(parts) == 1 else mx.stack(parts)

    def rows(self, stored_name: str, start: int, stop: int) -> mx.array:
        """Read some rows of a stored tensor; all axes but the last count as one.

        The rows are read at once; 8-bit floats are returned as bytes.
        """
        return read_rows(self.stored[stored_name], start, stop)

    def _take_stored(self, name: str) -> mx.array:
        file = self.stored[name].file
        if file not in self._open:
            arrays = mx.load(str(file), format="safetensors")
            assert isinstance(arrays, dict)  # always, for safetensors
            self._open[file] = arrays
        return self._open[file].pop(name)


def weight_names(
    folder: Path, files: Collection[str] | None = None, *, place: str = ""
) -> list[str]:
    """Return the weight files of the checkpoint: those that its index names, or those present.

    `files` are the files of the checkpoint at `place`, if not all are in `folder`. If the index is
    broken or names missing files, and the weights are in one file (`WHOLE`), that file is used.

    Raises:
        CheckpointError: the index is broken, or it is unclear which of the files are meant.
    """
    if (pointer := folder / GGUF_POINTER).is_file():
        return [str(name) for name in read_json(pointer).get("files", ())]
    present = {file.name for file in folder.iterdir()} if files is None else set(files)
    model_files = sorted(filter(_MODEL_FILE.fullmatch, present))
    place = place or str(folder)
    names, fault = _indexed(folder)
    if fault and WHOLE not in model_files:
        raise CheckpointError(f"{place}: {fault}")
    if names:
        if WHOLE in names or WHOLE not in model_files:
            return names
        if not set(names) <= present:
            return [WHOLE]
        _refuse_two_sets(place, [WHOLE, names[0]])
    numbered = [match for name in model_files if (match := _SHARD.fullmatch(name))]
    if not numbered:  # a variant such as model.fp16.safetensors is not fetched
        return [WHOLE] if files is not None and WHOLE in model_files else model_files
    sets: dict[tuple[str, str], str] = {}  # the first file of each, by stem and count
    for match in numbered:
        sets.setdefault((match[1], match[3]), match[0])
    _refuse_two_sets(place, [*([WHOLE] if WHOLE in model_files else []), *sets.values()])
    stem, number, count = numbered[0].groups()
    return [
        f"{stem}-{shard:0{len(number)}}-of-{count}.safetensors"
        for shard in range(1, int(count) + 1)
    ]


def files_with(names: list[str], folder: Path, wanted: Callable[[str], bool] | None) -> list[str]:
    """Return those of the weight files `names` that have a `wanted` tensor, by the index.

    `wanted` is asked with the names in the network. Without an index, or with None, it is all.
    """
    indexed, _ = _indexed(folder)
    if wanted is None or indexed != names:
        return names
    files = read_json(folder / INDEX)["weight_map"].items()
    own = {str(file) for tensor, file in files if wanted(network_name(tensor))}
    return [name for name in names if name in own]


def index_fault(folder: Path, files: Collection[str] | None = None) -> str:
    """Return why the index does not describe the weights that are used.

    The result is "" if it does, or if there is no index. `files` are the files of the checkpoint,
    if not all of them are in `folder`.
    """
    names, fault = _indexed(folder)
    if names and WHOLE not in names and weight_names(folder, files) == [WHOLE]:
        return f"{INDEX} names files that are not there"
    return fault


def _indexed(folder: Path) -> tuple[list[str], str]:
    """Return the files that the index names; or none, and the fault of an index that is broken."""
    if not (folder / INDEX).is_file():
        return [], ""
    try:
        names = read_json(folder / INDEX).get("weight_map")
    except CheckpointError:
        return [], f"{INDEX} cannot be read as JSON"
    if not isinstance(names, dict) or not names:
        return [], f"{INDEX} has no weight_map"
    files = set(map(str, names.values()))
    if any(Path(file).name != file for file in files):
        return [], f"{INDEX} names files outside its folder"
    if others := sorted(file for file in files if not file.endswith(".safetensors")):
        return [], f"{INDEX} names {others[0]}, and only safetensors files are read"
    return sorted(files), ""


def _refuse_two_sets(place: str, examples: Collection[str]) -> None:
    """Refuse weights that are present twice; `examples` has one file of each set."""
    if len(examples) > 1:
        raise CheckpointError(
            f"{place} has {' and '.join(examples)}, which are not parts of one set of weights; "
            "give a folder without the files that do not belong to this checkpoint"
        )


def has_all_weights(folder: Path) -> bool:
    """Return whether all weight files of a checkpoint are in its folder."""
    try:
        names = weight_names(folder)
    except CheckpointError:  # reading the weights raises the clear error
        return False
    return bool(names) and all((folder / name).is_file() for name in names)


def _weight_files(folder: Path, wanted: Callable[[str], bool] | None) -> list[Path]:
    names = files_with(weight_names(folder), folder, wanted)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}; download it again")
    if not names:
        raise CheckpointError(
            missing_message(str(folder), [file.name for file in folder.iterdir()])
        )
    return [folder / name for name in names]


def unsupported_weights(files: Collection[str]) -> list[str]:
    """Return the files with weights of an unsupported kind, or of an adapter."""
    return sorted(
        file for file in files if file.endswith(_UNSUPPORTED_SUFFIXES) or file in ADAPTER_FILES
    )


def missing_message(
    place: str, files: Collection[str], needed: str = WHOLE, base: str = "another model"
) -> str:
    """Return the message for a checkpoint without the file `needed`, from the files that it has.

    If the files are those of an adapter, `base` names its model.
    """
    others = sorted(file for file in files if file.endswith(_UNSUPPORTED_SUFFIXES))
    if not set(ADAPTER_FILES).isdisjoint(files):
        return f"{place} is an adapter for {base}, {NO_WHOLE_MODEL}"
    if others and needed == WHOLE:
        return f"{place} has {_first_names(others)}, but only safetensors and GGUF files are read"
    return f"{place} has no {needed}"


def _first_names(files: list[str]) -> str:
    return ", ".join(files[:3]) + (" and others" if len(files) > 3 else "")


# --- a head of its own --------------------------------------------------------------------------


def has_own_head(weights: Weights) -> bool:
    """Return whether `lm_head` is stored and is not a copy of the embedding."""
    return any(
        (copied := weights.tensors.get(name.replace("lm_head", "model.embed_tokens", 1))) is None
        or not same_numbers(entry, weights.stored[copied.parts[0]])
        for name, entry in weights.stored.items()
        if name.startswith("lm_head.") and name != "lm_head.bias"  # no Qwen3 has a bias there
    )


def with_stored_head(
    config: Mapping[str, Any], folder: Path, wanted: Callable[[str], bool] | None = None
) -> dict[str, Any]:
    """Return a config.json that describes the head in the folder's weights.

    Only the `wanted` tensors need to be there, those of head and embedding among them.

    Raises:
        CheckpointError: a weight file is broken, or the head's shape does not match config.json.
    """
    weights = Weights(folder, wanted=wanted)
    return without_missing_head(_untied_if_needed(config, weights), weights.tensors)


def with_described_head(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the same as `with_stored_head`, as far as it is known before the weights are read.

    They are opened only if config.json ties the head, and all are there. Otherwise the index, if
    there is one, tells whether there is a head.

    Raises:
        CheckpointError: a weight file is broken, or the head's shape does not match config.json.
    """
    if config.get("tie_word_embeddings") is True and has_all_weights(folder):
        return with_stored_head(config, folder)
    names, _ = _indexed(folder)
    return without_missing_head(config, index_names(folder) if names else None)


def index_names(folder: Path) -> set[str]:
    """Return the names, in the network, of the tensors in a valid index."""
    return set(map(network_name, read_json(folder / INDEX)["weight_map"]))


def without_missing_head(
    config: Mapping[str, Any], names: Collection[str] | None
) -> dict[str, Any]:
    """Return a config.json without a head, if none of the tensors' `names` is of one.

    The larger embedding checkpoints state an untied head and store none. `names` are those in the
    network; None if they are not known.
    """
    if names is None or not ModelConfig.from_dict(config).has_lm_head:
        return dict(config)
    has_head = any(name.startswith("lm_head.") for name in names)
    # Without an embedding the names are no network's: comparing them gives the clear error.
    return dict(config) if has_head or _EMBEDDING not in names else headless(config)


def _untied_if_needed(config: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    """Return a config.json with an untied head, if the weights have a head of their own.

    Merging adapters into a tied model, or extending its vocabulary, leaves such a head behind while
    the config still ties it to the embedding. As in transformers, the weights win, with a warning.
    A copy of the embedding, which some published checkpoints contain, stays unused.
    """
    network = ModelConfig.from_dict(config)
    if not network.tie_word_embeddings or network.output != LOGITS or not has_own_head(weights):
        return dict(config)
    _refuse_another_shape(weights, [config["vocab_size"], config["hidden_size"]])
    _log.warning(
        "config.json ties the head to the embedding, but lm_head holds other numbers; it is used, "
        "as if tie_word_embeddings were false"
    )
    return {**config, "tie_word_embeddings": False}


def _refuse_another_shape(weights: Weights, needed: list[int]) -> None:
    if head := weights.stored.get("lm_head.weight"):
        packed = "lm_head.scales" in weights.stored  # several numbers in a word
        shape = [*head.shape[:1], *needed[1:]] if packed else list(head.shape)
        if shape != needed:
            raise CheckpointError(
                "config.json ties the head to the embedding, but there is an lm_head.weight "
                f"{list(head.shape)} where {needed} is needed; look for a copy of this checkpoint "
                "whose weights and config.json match"
            )


def _stack_experts(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Combine `mlp.experts.N.up_proj.weight` and the like as `mlp.switch_mlp.up_proj.weight`."""
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
    """Refuse a config.json with more layers than the weights have, before the layers are built.

    Raises:
        CheckpointError: the last layer has no tensor.
    """
    last = f"layers.{config.num_hidden_layers - 1}."
    if not any(name.startswith(f"model.{last}") for name in names):
        like = min(names, key=lambda name: (last not in name, name), default="none")
        raise CheckpointError(
            f"weights and config.json do not match; missing: model.{last}*; among the names that "
            f"are there is {like}"
        )


def mismatches(
    needed: Mapping[str, tuple[int, ...]], there: Mapping[str, tuple[int, ...]], *, tied: bool
) -> list[str]:
    """Return descriptions of the missing, unexpected and misshapen tensors among those `there`.

    With `tied`, an `lm_head` is not unexpected: the small published checkpoints contain a copy of
    the embedding that their tied heads do not use.
    """
    unused = {"lm_head.weight", "lm_head.scales", "lm_head.biases"} if tied else set()
    misshapen = _shape_mismatches(
        {name: (there[name], shape) for name, shape in needed.items() if name in there}
    )
    return [
        f"{what} {', '.join(names)}"
        for what, names in (
            ("missing:", sorted(needed.keys() - there.keys())),
            ("unexpected:", sorted(there.keys() - needed.keys() - unused)),
            ("misshapen:", misshapen),
        )
        if names
    ]


def _shape_mismatches(shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> list[str]:
    """Return a description of each wrong shape, from (present, needed); layers are combined."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, (has, needs) in shapes.items():
        if has != needs:
            words = f"{list(has)} where {list(needs)} is needed"
            alike.setdefault((_NUMBER.sub(".*", name), words), []).append(name)
    return [
        f"{names[0] if len(names) == 1 else pattern} is {words}"
        for (pattern, words), names in alike.items()
    ]
