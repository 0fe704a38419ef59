"""The source of a checkpoint: a folder, or a name on the Hugging Face hub to download from.

`HF_ENDPOINT`, `HF_HUB_OFFLINE` and the hub's other variables are honoured by its own library.
"""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path

from qwen3_mlx.arguments import Progress
from qwen3_mlx.checkpoint.download import (
    download,
    first_line,
    read_range,
    silent_progress_bar,
)
from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.model.sizes import DEMO, SIZES, closest_size, hub_name, is_demo

_log = logging.getLogger(__name__)
KIND_FILES = (
    "modules.json",
    "1_Pooling/config.json",
    "1_LogitScore/config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
)
"""Files of sentence-transformers, which describe embedding models and rerankers."""
DESCRIPTION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
    *KIND_FILES,
)
GGUF_SUFFIX = ".gguf"
ADAPTER_CONFIG = "adapter_config.json"
PEFT_ADAPTER, MLX_ADAPTER = "adapter_model.safetensors", "adapters.safetensors"
ADAPTER_FILES = (ADAPTER_CONFIG, PEFT_ADAPTER, MLX_ADAPTER)
"""File names of adapters, of peft and of mlx-lm."""
NO_WHOLE_MODEL = (
    "not a whole model; load that and give this as its adapter: --adapter (adapter=), or merge "
    "both: qwen3 convert MODEL OUTPUT --adapter ADAPTER"
)
"""End of the error messages for adapters."""
_UNAUTHORIZED = 401  # also of unknown names, for which the hub's library raises its own error
_PATIENCE = 3  # seconds
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_GGUF_PART = re.compile(r"-\d{5}-of-\d{5}$")
_HUB_ADDRESS = re.compile(
    rf"(?:https?://)?(?:www\.)?(?:huggingface|hf)\.co/({_HUB_NAME.pattern}).*"
)


def _choice(name: str) -> tuple[str, str]:
    """Return the place, and the GGUF file that is chosen there: after a colon, or by its path."""
    if os.path.exists(os.path.expanduser(name)):
        return name, ""
    place, colon, chosen = name.rpartition(":")
    if not colon and name.lower().endswith(GGUF_SUFFIX):
        place, _, chosen = name.rpartition("/")
    known = os.path.isdir(os.path.expanduser(place)) or _HUB_NAME.fullmatch(place)
    return (place, chosen) if known else (name, "")


def check_name(name: str) -> None:
    """Raise a ValueError if `name` is not a valid hub name."""
    if not _HUB_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no hub name such as somebody/Qwen3-8B-4bit")


def unreachable() -> str:
    """Return why the hub cannot be reached; "" if it answers."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception as error:  # noqa: BLE001 - the library passes on errors of its HTTP client
        return first_line(error)
    return ""


def gguf_groups(files: Iterable[str]) -> dict[str, list[str]]:
    """Return the GGUF files of models among some files: by name without its end, with all parts."""
    groups: dict[str, list[str]] = {}
    for file in sorted(files):
        if file.lower().endswith(GGUF_SUFFIX) and not Path(file).name.startswith("mmproj"):
            groups.setdefault(_GGUF_PART.sub("", file[: -len(GGUF_SUFFIX)]), []).append(file)
    return groups


def upload(folder: Path, name: str) -> str:
    """Upload a checkpoint's folder to the hub under `name`, as one commit; return its URL.

    Raises:
        CheckpointError: the hub refuses it or cannot be reached.
        ValueError: the name is not a valid hub name.
    """
    check_name(name)
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        hub.create_repo(name, exist_ok=True)
        return str(hub.upload_folder(repo_id=name, folder_path=folder).commit_url)
    except Exception as error:  # the hub's library passes on errors of its HTTP client
        raise CheckpointError(f"uploading to {name} failed: {first_line(error)}") from error


class Source:
    """The folder or hub name of a checkpoint; nothing is downloaded before `fetch`."""

    def __init__(
        self, name: str, revision: str | None = None, progress: Progress | None = None
    ) -> None:
        """Create the source of a folder's path or a hub name such as Qwen/Qwen3-8B.

        It may be a GGUF file, too. Of several in a folder or on the hub, one is chosen by its name
        or by an end of that, after a colon: someone/Qwen3-8B-GGUF:Q4_K_M.

        While files are downloaded, `progress` is called with (bytes present, total bytes).

        Raises:
            CheckpointError: `name` is neither.
            ValueError: a revision is given for a folder.
        """
        self.name = name
        self._chosen = ""
        place, chosen = _choice(name)
        if chosen:
            name, self._chosen = place, chosen
        self._place = name
        self._revision = revision
        self._progress = progress
        self._listed: list[str] | None = None
        self._commit: str | None = None
        folder = Path(os.path.expanduser(name))  # Path.expanduser raises for unknown users
        if folder.is_file() and folder.suffix.lower() == GGUF_SUFFIX:
            folder, self._chosen = folder.parent, folder.name
        self.folder = folder if name and folder.exists() else None
        if self.folder is None and (address := _HUB_ADDRESS.fullmatch(name)):
            raise CheckpointError(f"{name} is an address; give the name alone, {address[1]}")
        if self.folder is None and (name[:1] in "./~" or not _HUB_NAME.fullmatch(name)):
            meant = closest_size(name)
            raise CheckpointError(
                f"{name!r} is no folder here, nor a hub name such as Qwen/Qwen3-8B, "
                f"nor one of the sizes {', '.join(SIZES)}, nor {DEMO}"
                + (f"; did you mean {meant}?" if meant else "")
            )
        if self.folder and self.folder.name in ADAPTER_FILES:
            raise CheckpointError(f"{name} is of an adapter for another model, {NO_WHOLE_MODEL}")
        if self.folder and not self.folder.is_dir():
            raise CheckpointError(f"{name} is a file; give the checkpoint's folder")
        if self.folder and revision is not None:
            raise ValueError(f"revision belongs to hub names; {name} is a folder")

    @classmethod
    def to_download(
        cls, model: str, revision: str | None = None, progress: Progress | None = None
    ) -> "Source":
        """Create the source of a size or a hub name.

        Raises:
            CheckpointError: `model` is neither.
            ValueError: it is on this machine already, as the demo or a folder.
        """
        source = cls(hub_name(model), revision, progress)
        if source.folder:
            what = "part of this package" if is_demo(model) else "a folder here"
            raise ValueError(f"{model} is {what}; pull takes a size or a hub name")
        return source

    @property
    def revision(self) -> str | None:
        """The branch, tag or commit that was asked for."""
        return self._revision

    @property
    def names_file(self) -> bool:
        """True if one GGUF file is named."""
        return bool(self._chosen)

    def gguf_files(self) -> list[str]:
        """Return the GGUF file that is meant, or all of its parts; none if there are other weights.

        Raises:
            CheckpointError: there are several, and it is unclear which of them is meant; or the hub
                refuses it, or cannot be reached.
        """
        files = self.files()
        groups = gguf_groups(files)
        if not self._chosen and (
            not groups or any(file.endswith(".safetensors") for file in files)
        ):
            return []
        wanted = _GGUF_PART.sub("", self._chosen.lower().removesuffix(GGUF_SUFFIX))
        end = re.compile(rf"(^|.*[-._/]){re.escape(wanted)}" if wanted else ".*", re.IGNORECASE)
        meant = [stem for stem in groups if stem.lower() == wanted] or [
            stem for stem in groups if end.fullmatch(stem)
        ]
        if len(meant) == 1:
            return groups[meant[0]]
        names = ", ".join(f"{stem}{GGUF_SUFFIX}" for stem in meant or groups) or "no GGUF files"
        like = re.split(r"[-./]", next(iter(meant or groups), ""))[-1]
        hint = f"; name one of them, such as {self._place}:{like}" if like else ""
        raise CheckpointError(f"{self._place} has {names}{hint}")

    def list_files(self) -> list[str] | None:
        """Return the names of the checkpoint's files; None if the hub cannot be reached."""
        if self.folder:
            return sorted(file.name for file in self.folder.iterdir())
        if self._listed is None:
            from huggingface_hub import HfApi

            try:
                # If the hub cannot be reached, this call fails at once; others retry for long.
                found = HfApi().model_info(self._place, revision=self._revision)
                self._listed = sorted(file.rfilename for file in found.siblings or ())
                self._commit = found.sha
            except Exception:  # noqa: BLE001 - the library passes on errors of its HTTP client
                _log.debug("%s: its files could not be listed", self.name, exc_info=True)
        return self._listed

    def is_missing(self, file: str) -> bool:
        """Return whether a file is known to be missing; the hub is asked only if it is not cached.

        Fetching a missing file would make the hub's library print messages of its own.
        """
        if self.folder is None:
            from huggingface_hub import try_to_load_from_cache

            try:
                if isinstance(
                    try_to_load_from_cache(self._place, file, revision=self._revision), str
                ):
                    return False
            except ValueError:  # an invalid name: `fetch` raises the clear error
                return False
        files = self.list_files()
        return files is not None and file not in files

    def files(self) -> list[str]:
        """Return the names of the checkpoint's files; the cached ones if the hub is unreachable."""
        files = self.list_files()
        if files is None:
            files = sorted(file.name for file in self.fetch([]).iterdir())
        return files

    def fetch(self, files: Sequence[str]) -> Path:
        """Load those of `files` that the checkpoint has, if needed; return their folder.

        Raises:
            CheckpointError: the hub does not have it, refuses it, or cannot be reached.
        """
        if self.folder:
            return self.folder
        # Imported here because it takes 0.35 s, and most loads are from a folder.
        from huggingface_hub import snapshot_download

        with self._explained():
            if missing := self.missing(files):
                download(self._place, self._commit or "", missing, self._progress)
            return Path(  # nothing is left to download, but this call creates the cache's links
                snapshot_download(
                    self._place,
                    revision=self._revision,
                    allow_patterns=list(files),
                    tqdm_class=silent_progress_bar(),
                )
            )

    def read_range(self, file: str, start: int, stop: int) -> tuple[bytes, int]:
        """Return the bytes [start, stop) of a file that is `missing`, and its total bytes.

        They are not stored.

        Raises:
            CheckpointError: as `fetch` does.
        """
        with self._explained():
            return read_range(self._place, self._commit or "", file, start, stop)

    def path(self, file: str) -> Path:
        """Return the path that messages state for a file."""
        return Path(self._place) / file

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise a CheckpointError for what the hub refuses."""
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        try:
            yield
        except CheckpointError:
            raise
        except GatedRepoError as error:
            raise CheckpointError(
                f"{self.name} asks for its terms to be accepted: do so on its page, "
                "then run `hf auth login`"
            ) from error
        except RevisionNotFoundError as error:
            raise CheckpointError(f"{self.name} has no revision {self._revision!r}") from error
        except RepositoryNotFoundError as error:
            raise CheckpointError(
                f"the hub has no {self.name}, or it is private (then run `hf auth login`)"
            ) from error
        except LocalEntryNotFoundError as error:
            raise CheckpointError(
                f"{self.name} is not downloaded yet and the hub cannot be reached; "
                "check the network, HF_ENDPOINT and HF_HUB_OFFLINE; qwen3 list shows what is here"
            ) from error
        except HFValidationError as error:
            raise CheckpointError(f"{self.name!r} is not a valid hub name") from error
        except Exception as error:  # the hub's library passes on errors of its HTTP client
            raise CheckpointError(f"downloading {self.name} failed: {_reason(error)}") from error

    def missing(self, files: Sequence[str]) -> list[str]:
        """Return those of `files` that the hub is known to have and that are not in the cache."""
        if self.folder:
            return []
        from huggingface_hub import try_to_load_from_cache

        listed = self.list_files() or ()
        return [
            file
            for file in dict.fromkeys(files)
            if file in listed
            and not isinstance(
                try_to_load_from_cache(self._place, file, revision=self._commit), str
            )
        ]


def _reason(error: Exception) -> str:
    """Return why a download failed, with the way out if one is known."""
    if getattr(getattr(error, "response", None), "status_code", 0) == _UNAUTHORIZED:
        return "the hub refuses the token; `hf auth login` takes another, or unset HF_TOKEN"
    if isinstance(error, JSONDecodeError):
        return "the server that answers is not a hub; check HF_ENDPOINT, or sign in to the network"
    return first_line(error)
