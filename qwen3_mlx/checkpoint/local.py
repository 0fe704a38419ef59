"""The checkpoints on this machine: in the hub's cache, in LM Studio's folder, in QWEN3_MODELS.

The hub's cache is read and changed by the functions of its own library alone.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3_mlx.checkpoint.gguf_folder import gguf_folder
from qwen3_mlx.checkpoint.hub import GGUF_SUFFIX, check_name, gguf_groups
from qwen3_mlx.checkpoint.weights import has_all_weights
from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.files import read_json
from qwen3_mlx.model.config import MODEL_TYPES

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, CachedRevisionInfo, DeleteCacheStrategy, HFCacheInfo

HUB, LM_STUDIO, FOLDER = "hub", "LM Studio", "folder"
"""Where a checkpoint was found."""
_DEPTH = 2  # LM Studio's folders are PUBLISHER/MODEL
_READ_BY_LOAD = "tokenizer.json"  # and by no list of models


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A Qwen3 checkpoint on this machine.

    Attributes:
        name: what `load` and `--model` take: a hub name, or the path of a folder; of a GGUF file
            there, its name follows after a colon.
        place: `HUB`, `LM_STUDIO` or `FOLDER`.
        folder: the folder of its files, or the one that describes a GGUF file.
        nbytes: bytes on disk; for the hub's cache, of all revisions and of partial downloads, if it
            is the only model there.
        complete: whether all weights are there.
        used: when it was last loaded, in seconds since the epoch; None if that is not known.
        config: the contents of config.json.
    """

    name: str
    place: str
    folder: Path
    nbytes: int
    complete: bool
    used: float | None
    config: Mapping[str, Any]


def local_models() -> tuple[list[LocalModel], list[str]]:
    """Return the Qwen3 checkpoints on this machine, and a sentence for each place not readable."""
    info = _scan()
    found = [model for repo in _repos(info) for model in _cached_models(repo)]
    complaints = [f"not listed, because it is damaged: {reason}" for reason in _damage(info)]
    for place, root in _roots():
        if not root.is_dir():
            complaints.append(f"QWEN3_MODELS: {root} is no folder")
        found += _models_below(place, root)
    once = {model.folder.resolve(): model for model in reversed(found)}
    return sorted(once.values(), key=lambda model: (model.place != HUB, model.name)), complaints


def last_used(models: Iterable[LocalModel]) -> LocalModel | None:
    """Return the complete checkpoint that was loaded last; None if there is none."""
    complete = [model for model in models if model.complete]
    return max(complete, key=lambda model: model.used or 0.0, default=None)


def mark_used(folder: Path) -> None:
    """Record that a checkpoint is loaded now.

    The time of the last access is set because file systems record reading once a day, or never.
    """
    with suppress(OSError):  # a file of another user, or a disk that is read only
        file = folder / _READ_BY_LOAD
        os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns))


# --- the hub's cache ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Removal:
    """Revisions of a model that `execute` removes from the hub's cache.

    Attributes:
        name: the hub name.
        revisions: the commits.
        nbytes: bytes that are freed.
        whole: whether nothing of the model is left.
    """

    name: str
    revisions: tuple[str, ...]
    nbytes: int
    whole: bool
    _strategy: "DeleteCacheStrategy"

    @classmethod
    def of(cls, name: str, revision: str | None = None) -> "Removal":
        """Create the removal of a model, or of one revision: a commit, its beginning, or a branch.

        Raises:
            CheckpointError: the cache does not have it.
            ValueError: the name is not a hub name.
        """
        check_name(name)
        info = _scan()
        repo = next((repo for repo in _repos(info) if repo.repo_id == name), None)
        if info is None or repo is None:
            folder = f"/models--{name.replace('/', '--')}"
            for reason in _damage(info):
                if f"{folder}/" in reason or reason.endswith(folder):
                    raise CheckpointError(
                        f"{name} is damaged: {reason}; remove its folder yourself"
                    )
            raise CheckpointError(f"{name} is not in the hub's cache; qwen3 list shows what is")
        chosen = [found for found in repo.revisions if revision is None or _is(found, revision)]
        if len(chosen) != 1 and revision is not None:
            known = ", ".join(sorted(_described(found) for found in repo.revisions))
            raise CheckpointError(f"{name} is here with {known}, not with revision {revision!r}")
        # The scan is reduced to this model: nothing else can be removed by it.
        of_this = replace(info, repos=frozenset([repo]))
        commits = tuple(sorted(found.commit_hash for found in chosen))
        strategy = of_this.delete_revisions(*commits)
        whole = repo.repo_path in strategy.repos
        partial = _partial_bytes(repo) if whole else 0
        return cls(name, commits, strategy.expected_freed_size + partial, whole, strategy)

    def execute(self) -> None:
        """Remove the revisions.

        Raises:
            CheckpointError: some files could not be removed.
        """
        strategy = self._strategy
        strategy.execute()
        for path in (*strategy.repos, *strategy.snapshots, *strategy.blobs):
            if path.exists():  # the hub's library only logs it
                raise CheckpointError(f"{path} could not be removed; check its permissions")


def _scan() -> "HFCacheInfo | None":
    """Return the contents of the hub's cache; None if there is no cache yet."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the hub's cache cannot be read: {error}") from error


def _repos(info: "HFCacheInfo | None") -> "list[CachedRepoInfo]":
    """Return the models of the cache, which also holds data sets."""
    return [repo for repo in info.repos if repo.repo_type == "model"] if info else []


def _damage(info: "HFCacheInfo | None") -> list[str]:
    """Return why some models of the cache cannot be read."""
    reasons = [str(warning) for warning in info.warnings] if info else []
    return [reason for reason in reasons if "/models--" in reason]


def _cached_models(repo: "CachedRepoInfo") -> list[LocalModel]:
    """Return a model of the cache, as its main branch or else its latest revision has it.

    A repository of GGUF files has several.
    """
    revisions = sorted(
        repo.revisions, key=lambda found: ("main" in found.refs, found.last_modified), reverse=True
    )
    found = ([*_models_in(one.snapshot_path, HUB, repo.repo_id)] for one in revisions)
    models = next(filter(None, found), [])
    if len(models) == 1:
        models = [replace(models[0], nbytes=repo.size_on_disk + _partial_bytes(repo))]
    return models


def _partial_bytes(repo: "CachedRepoInfo") -> int:
    """Return the bytes of downloads that were interrupted, which the scan leaves out."""
    return sum(file.stat().st_size for file in repo.repo_path.glob("blobs/*.incomplete"))


def _is(found: "CachedRevisionInfo", revision: str) -> bool:
    return revision in found.refs or bool(revision) and found.commit_hash.startswith(revision)


def _described(found: "CachedRevisionInfo") -> str:
    return " ".join([found.commit_hash[:12], *(f"({ref})" for ref in sorted(found.refs))])


# --- other folders ------------------------------------------------------------------------------


def _roots() -> Iterator[tuple[str, Path]]:
    """Yield the folders that hold checkpoints beside the hub's cache."""
    home = Path(os.path.expanduser("~/.lmstudio"))
    with suppress(OSError, ValueError, IndexError):  # LM Studio's home may be elsewhere
        home = Path((home.parent / ".lmstudio-home-pointer").read_text("utf-8").splitlines()[0])
    models = home / "models"
    with suppress(CheckpointError):
        models = Path(str(read_json(home / "settings.json").get("downloadsFolder") or models))
    if models.is_dir():
        yield LM_STUDIO, models
    for stated in os.environ.get("QWEN3_MODELS", "").split(os.pathsep):
        if stated:
            yield FOLDER, Path(os.path.expanduser(stated)).absolute()


def _models_below(place: str, root: Path, depth: int = _DEPTH) -> Iterator[LocalModel]:
    """Yield the checkpoint in a folder, or those in the folders below it."""
    if models := [*_models_in(root, place, str(root))]:
        yield from models
        return
    below: list[Path] = []
    with suppress(OSError):
        below = [path for path in root.iterdir() if path.is_dir() and path.name[0] != "."]
    for folder in below if depth else ():
        yield from _models_below(place, folder, depth - 1)


def _model_in(folder: Path, place: str, name: str) -> LocalModel | None:
    """Return the checkpoint in a folder; None if it has none, or one of another network."""
    try:
        config = read_json(folder / "config.json")
        if config.get("model_type") not in MODEL_TYPES:
            return None
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        return LocalModel(name, place, folder, size, has_all_weights(folder), _used(folder), config)
    except (CheckpointError, OSError):
        return None


def _models_in(folder: Path, place: str, name: str) -> Iterator[LocalModel]:
    """Yield the checkpoint in a folder, or else those of its GGUF files."""
    if model := _model_in(folder, place, name):
        yield model
        return
    for stem, files in gguf_groups([file.name for file in folder.glob(f"*{GGUF_SUFFIX}")]).items():
        with suppress(CheckpointError):  # not whole, or of another network
            described = gguf_folder(folder / files[0])
            if model := _model_in(described, place, f"{name}:{stem}"):
                size = sum((folder / file).stat().st_size for file in files)
                yield replace(model, nbytes=size)


def _used(folder: Path) -> float | None:
    file = folder / _READ_BY_LOAD
    return file.stat().st_atime if file.is_file() else None
