"""The folder of a training run: the adapter, the log, and the state that a run resumes from.

The adapter is in mlx-lm's format: adapter_config.json and adapters.safetensors. Every file takes
its name only when it is complete, so that a run that is killed can be resumed.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen3_mlx.checkpoint.hub import ADAPTER_CONFIG, MLX_ADAPTER
from qwen3_mlx.errors import CheckpointError, Qwen3Error
from qwen3_mlx.files import UNFINISHED, atomic_write, read_header_and_metadata

STATE, LOG, PICTURE = "state.safetensors", "log.jsonl", "losses.svg"
_NAMES = {STATE, LOG, PICTURE, ADAPTER_CONFIG, MLX_ADAPTER}
_PROGRESS = "progress"  # in the metadata of the state


class RunFolder:
    """The files of a run in one folder.

    Attributes:
        folder: the folder.
        resumes: whether a run is to be resumed.
        progress: what `save` wrote last; empty if there is nothing to resume.
        log: the entries so far, which are written by `save`.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Create the folder, or check that it belongs to a run with these settings.

        Raises:
            Qwen3Error: the folder has an adapter already, its run had other settings, or it has
                other files.
        """
        self.folder, self.resumes, self._settings = folder, resume, dict(settings)
        self.progress: dict[str, Any] = {}
        self.log: list[dict[str, Any]] = []
        state = folder / STATE
        taken = next((f for f in (state, folder / ADAPTER_CONFIG, folder) if f.exists()), None)
        if taken and not folder.is_dir():
            raise Qwen3Error(f"{folder} is a file; name a folder")
        if not resume and taken not in (None, folder):
            raise Qwen3Error(
                f"{folder} has a training already: continue it with resume=True, name another "
                "folder, or remove it"
            )
        self._created = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.iterdir()):
            if file.name not in _NAMES and not file.name.endswith(UNFINISHED):
                raise Qwen3Error(
                    f"{folder} has other files, such as {file.name}: name a new folder"
                )
        if resume and state.is_file():
            self._read(state)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._created:  # not one that nothing came of
            with suppress(OSError):
                self.folder.rmdir()

    def _read(self, state: Path) -> None:
        try:
            _, metadata = read_header_and_metadata(state)
            found = json.loads(metadata[_PROGRESS])
            before, self.progress = found["settings"], found["progress"]
            entries = map(json.loads, (self.folder / LOG).read_text("utf-8").splitlines())
            # What a killed run logged after the state was saved will be logged again.
            self.log = [entry for entry in entries if entry["step"] <= self.progress["step"]]
            if self.progress["best_step"]:
                read_header_and_metadata(self.folder / MLX_ADAPTER)
        except (KeyError, ValueError, OSError, CheckpointError) as error:
            raise CheckpointError(
                f"{self.folder} has no whole training to resume: its {STATE}, {LOG} or adapter is "
                "missing or damaged; begin anew in another folder"
            ) from error
        for name, value in self._settings.items():
            if before.get(name) != value:
                raise Qwen3Error(
                    f"{self.folder} was begun with {name} {before.get(name)!r}, not {value!r}: "
                    "resume it with the same, or begin anew in another folder"
                )

    def arrays(self) -> dict[str, mx.array]:
        """Read the arrays of the state, on the thread that computes with them."""
        return _read_arrays(self.folder / STATE)

    def adapter(self) -> dict[str, mx.array]:
        """Read the adapter that was saved last, on the thread that computes with it."""
        return _read_arrays(self.folder / MLX_ADAPTER)

    def save(self, arrays: Mapping[str, mx.array], progress: Mapping[str, Any]) -> None:
        """Save the log, and then the state that belongs to it."""
        with atomic_write(self.folder / LOG) as stream:
            stream.writelines(f"{json.dumps(entry)}\n".encode() for entry in self.log)
        text = json.dumps({"settings": self._settings, "progress": progress})
        _save_arrays(self.folder / STATE, arrays, {_PROGRESS: text})

    def save_adapter(self, arrays: Mapping[str, mx.array], config: Mapping[str, Any]) -> None:
        """Save an adapter in place of the one before."""
        _save_arrays(self.folder / MLX_ADAPTER, arrays, {"format": "mlx"})
        with atomic_write(self.folder / ADAPTER_CONFIG) as stream:
            stream.write(json.dumps(config, indent=2).encode())


def _read_arrays(file: Path) -> dict[str, mx.array]:
    loaded = mx.load(str(file))
    assert isinstance(loaded, dict)
    return loaded


def _save_arrays(file: Path, arrays: Mapping[str, mx.array], metadata: dict[str, str]) -> None:
    with atomic_write(file) as stream:
        mx.save_safetensors(stream, dict(arrays), metadata)
