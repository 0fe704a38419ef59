"""Adapters: what a fine-tuning changed, as low-rank matrices beside weights or as new tensors.

The folders of mlx-lm and of PEFT are read (`adapter_formats`). All names and shapes are checked
against the network before any number is read.
"""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen3_mlx.checkpoint.adapter_formats import Contents, StoredArray, read_contents, refuse_other
from qwen3_mlx.checkpoint.formats.matrix import Matrix, StoredRows
from qwen3_mlx.checkpoint.hub import ADAPTER_CONFIG, ADAPTER_FILES, Source
from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.files import read_json, read_rows
from qwen3_mlx.model.adapted import Delta
from qwen3_mlx.model.config import LOGITS, ModelConfig
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.model.sizes import hub_name

_log = logging.getLogger(__name__)
_RELEASE = re.compile(
    r"qwen3-((embedding|reranker|coder)-)?[\d.]+b(-a[\d.]+b)?(-(base|instruct|thinking))?(-2507)?",
    re.IGNORECASE,
)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


class Adapter:
    """An adapter, checked against the network that it changes; its numbers are read when needed.

    Attributes:
        name: the folder or the hub name.
        files: its config and its tensors.
        unties: whether a head that was tied to the embedding no longer is.
        size: the count of all its numbers.
    """

    def __init__(self, name: str, folder: Path, network: ModelConfig) -> None:
        """Read the headers of an adapter for a `network`.

        Raises:
            CheckpointError: a file is missing or broken, or the adapter does not fit the network,
                or has a feature that is not supported; the message names it.
        """
        self.name = name
        self.files = [folder / file for file in ADAPTER_FILES if (folder / file).is_file()]
        try:
            self._contents = read_contents(folder, network)
            tied = network.output == LOGITS and network.tie_word_embeddings
            self.unties = tied and _unties(self._contents)
            _check(
                self._contents,
                replace(network, tie_word_embeddings=False) if self.unties else network,
            )
        except CheckpointError as error:
            made_for = f" (it was made for {base})" if (base := _base(folder)) else ""
            raise CheckpointError(f"adapter {name}: {error}{made_for}") from error
        stored = [array for pair in self._contents.pairs.values() for array in pair.arrays]
        stored += self._contents.whole.values()
        self.size = sum(math.prod(array.shape) for array in stored)

    @classmethod
    def at(cls, place: str | Path, network: ModelConfig, model: str) -> "Adapter":
        """Fetch an adapter from a folder or the hub, and check it; see `Adapter`.

        If it names another Qwen3 of the same shapes than `model` does, a warning is logged.

        Raises:
            TypeError: `place` is neither a string nor a path.
        """
        if not isinstance(place, str | Path):
            raise TypeError(f"adapter must be a folder or a hub name, not {place!r}")
        if Path(place).name in ADAPTER_FILES:
            place = Path(place).parent
        try:
            source = Source(str(place))
        except CheckpointError as error:
            raise CheckpointError(f"adapter: {error}") from error
        refuse_other(source)
        folder = source.fetch(ADAPTER_FILES)
        found = cls(source.name, folder, network)
        base = _base(folder)
        wanted, given = (_RELEASE.search(Path(hub_name(name)).name) for name in (base, model))
        if wanted and given and wanted[0].lower() != given[0].lower():
            _log.warning("adapter %s was made for %s, not for %s", source.name, base, model)
        return found

    def refuse_choosing(self) -> None:
        """Check that the adapter can be one of several, of which each request chooses.

        Raises:
            CheckpointError: it changes more than the matrices of layers.
        """
        others = [*self._contents.whole, *(self._contents.pairs.keys() & {EMBEDDING, HEAD})]
        if others:
            raise CheckpointError(
                f"adapter {self.name} changes {others[0]}, so that requests cannot choose it; load "
                "it as the only one, or merge it (qwen3 convert MODEL OUTPUT --adapter ADAPTER)"
            )

    def config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the config.json of the network with this adapter."""
        if not self.unties:
            return config
        formats = {  # the head begins as a copy of the embedding
            key: {**section, HEAD: section[EMBEDDING]}
            for key in ("quantization", "quantization_config")
            if isinstance(section := config.get(key), Mapping) and EMBEDDING in section
        }
        return {**config, **formats, "tie_word_embeddings": False}

    def changes(self, name: str) -> bool:
        """Return whether the adapter changes a tensor by low-rank matrices alone."""
        return name.removesuffix(".weight") in self._contents.pairs and not self.replaces(name)

    def replaces(self, name: str) -> bool:
        """Return whether the adapter has a tensor in place of that of the network."""
        return name in self._contents.whole

    def tensor(self, name: str) -> mx.array:
        """Read the tensor that replaces one of the network, float32."""
        return self._contents.whole[name].read()

    def delta(self, path: str) -> Delta | None:
        """Read the change of the weight of the module at `path`; None if there is none."""
        if not (pair := self._contents.pairs.get(path)):
            return None
        return Delta(*(array.read() for array in pair.arrays))

    def merged(self, matrices: Mapping[str, Matrix]) -> dict[str, Matrix]:
        """Return a checkpoint's tensors with this adapter, merged in float32 as they are read."""
        found = dict(matrices)
        if self.unties:
            found[f"{HEAD}.weight"] = found[f"{EMBEDDING}.weight"]
        for name, array in self._contents.whole.items():
            rows, width = math.prod(array.shape[:-1]), array.shape[-1]
            part = StoredRows(rows, width, partial(read_rows, array.entries[0]))
            found[name] = Matrix(array.shape, (part,), quantized=False)
        for path in self._contents.pairs:
            if matrix := found.get(f"{path}.weight"):
                found[f"{path}.weight"] = self._merged(path, matrix)
        return found

    def _merged(self, path: str, matrix: Matrix) -> Matrix:
        parts, first = list[StoredRows](), 0
        for part in matrix.parts:
            read = partial(self._read_merged, path, part, first)
            parts.append(StoredRows(part.rows, part.width, read))
            first += part.rows
        return Matrix(matrix.shape, tuple(parts), matrix.quantized)

    def _read_merged(
        self, path: str, part: StoredRows, first: int, start: int, stop: int
    ) -> mx.array:
        delta = self.delta(path)
        assert delta
        return delta.merged_rows(part.read(start, stop), first + start)


def _base(folder: Path) -> str:
    """Return the name of the model that an adapter was made for; "" if it has none."""
    try:
        stated = read_json(folder / ADAPTER_CONFIG)
    except CheckpointError:
        return ""
    # Of the two keys peft writes the first, mlx-lm the second.
    return str(stated.get("base_model_name_or_path") or stated.get("model") or "")[:100]


def _unties(contents: Contents) -> bool:
    """Return whether an adapter changes a tied head, or the embedding without the head."""
    changed = {name.removesuffix(".weight") for name in contents.whole} | contents.pairs.keys()
    return HEAD in changed or (contents.changes_apart and EMBEDDING in changed)


def _check(contents: Contents, network: ModelConfig) -> None:
    """Check all names and shapes.

    Raises:
        CheckpointError: a tensor does not fit the network.
    """
    shapes = {name: tuple(array.shape) for name, array in Qwen3(network).tensors().items()}
    for name, array in contents.whole.items():
        if name not in shapes:
            raise CheckpointError(f"{array.name} belongs to no tensor of this model")
        _expect(array, shapes[name])
    for path, pair in contents.pairs.items():
        weight = shapes.get(f"{path}.weight", ())
        if len(weight) < 2 or path == "score":
            raise CheckpointError(f"{pair.a.name} belongs to no matrix of this model")
        *outer, outputs, inputs = weight
        rank = pair.a.shape[-2] if len(pair.a.shape) > 1 else 1
        _expect(pair.a, (*outer, rank, inputs))
        _expect(pair.b, (*outer, outputs, rank))
        if pair.magnitude:
            _expect(pair.magnitude, (*outer, outputs))


def _expect(array: StoredArray, shape: tuple[int, ...]) -> None:
    if array.shape != shape or 0 in shape:
        stored = list(array.entries[0].shape)
        raise CheckpointError(
            f"{array.name} is {stored}, which does not fit this model: as {list(array.shape)} it "
            f"stands where {list(shape)} is needed"
        )
