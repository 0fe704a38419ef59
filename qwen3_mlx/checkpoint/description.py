"""Reads and checks a checkpoint's description before its weights are fetched.

The description is its config.json, tokenizer files, weight index and list of files.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from qwen3_mlx.checkpoint.gguf_folder import gguf_folder
from qwen3_mlx.checkpoint.hub import ADAPTER_CONFIG, DESCRIPTION_FILES, Source
from qwen3_mlx.checkpoint.stored import (
    MODELOPT,
    quantization_of,
    refuse_modelopt,
)
from qwen3_mlx.checkpoint.weights import (
    GGUF_POINTER,
    INDEX,
    WHOLE,
    files_with,
    has_all_weights,
    index_fault,
    index_names,
    missing_message,
    unsupported_weights,
    weight_names,
)
from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.files import read_json
from qwen3_mlx.model.config import ModelConfig, unknown_rope_keys

_log = logging.getLogger(__name__)
MODEL_CARD = ("README.md",)
"""Files that are downloaded with a model but not needed to load it."""


def read_config(
    place: Source, files: Sequence[str] = DESCRIPTION_FILES
) -> tuple[Path, dict[str, Any]]:
    """Fetch the files that describe a checkpoint; return their folder and the checked config.json.

    Raises:
        CheckpointError: the checkpoint is not a supported Qwen3: it is another network, an adapter,
            or quantized by a method that is not supported.
    """
    if parts := place.gguf_files():
        described = gguf_folder(place.fetch(parts) / parts[0])
        config = read_json(described / "config.json")
        ModelConfig.from_dict(config)
        return described, config
    folder = None if place.is_missing("config.json") else place.fetch([*files, MODELOPT])
    if folder is None or not (folder / "config.json").is_file():
        raise CheckpointError(_missing_message(place, needed="config.json"))
    config = read_json(folder / "config.json")
    ModelConfig.from_dict(config)
    if quantization_of(config) is None and (folder / MODELOPT).is_file():
        refuse_modelopt(read_json(folder / MODELOPT))
    if unknown := unknown_rope_keys(config):
        _log.warning(
            "%s: config.json has keys for rope that are not known and change nothing: %s",
            place.name,
            ", ".join(unknown),
        )
    return folder, config


def fetch_weights(
    place: Source,
    folder: Path,
    also: Sequence[str] = (),
    wanted: Callable[[str], bool] | None = None,
) -> Path:
    """Fetch the weights of the checkpoint described in `folder`; return the folder that has them.

    Of weights with an index, only files with `wanted` tensors are fetched; None is all.

    Raises:
        CheckpointError: the checkpoint has no weights of a supported kind.
    """
    if (folder / GGUF_POINTER).is_file():
        return folder
    files = None if has_all_weights(folder) else place.list_files()
    names = files_with(weight_names(folder, files, place=place.name), folder, wanted)
    folder = place.fetch([*also, *(names or [WHOLE])]) if names or files is None else folder
    if not weight_names(folder):
        raise CheckpointError(_missing_message(place, needed=WHOLE))
    if fault := index_fault(folder):
        _log.warning("%s: %s; %s is read", place.name, fault, WHOLE)
    return folder


def checkpoint_folder(place: Source) -> Path:
    """Return the folder of a checkpoint that can be loaded; downloads what is not on disk.

    Raises:
        CheckpointError: it is not a supported Qwen3.
    """
    folder, _ = read_config(place)  # refuses unsupported weights before they are downloaded
    return fetch_weights(place, folder)


def indexed_tensor_names(place: Source, folder: Path) -> Collection[str] | None:
    """Return the names of a checkpoint's tensors from its index; None if there is no valid index.

    No weights are fetched. A checkpoint of a config.json alone is accepted.

    Raises:
        CheckpointError: the weights are of an unsupported kind, or present twice.
    """
    files = place.list_files()
    if files and INDEX in files:
        folder = place.fetch(["config.json", INDEX])
    names = weight_names(folder, files, place=place.name)
    if files and not names and unsupported_weights(files):
        raise CheckpointError(_missing_message(place, needed=WHOLE))
    if not (folder / INDEX).is_file() or index_fault(folder, files):
        return None
    return index_names(folder)


def _missing_message(place: Source, *, needed: str) -> str:
    """Return the message for a checkpoint that lacks the file `needed`, from the files it has."""
    files = place.files()
    base = None
    if ADAPTER_CONFIG in files:  # of the two keys peft writes the first, mlx-lm the second
        adapter = read_json(place.fetch([ADAPTER_CONFIG]) / ADAPTER_CONFIG)
        base = adapter.get("base_model_name_or_path") or adapter.get("model")
    return missing_message(place.name, files, needed, str(base or "another model"))
