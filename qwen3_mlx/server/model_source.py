"""Models that can be served: their names, and what is known of them before they are loaded."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from qwen3_mlx import backend
from qwen3_mlx.api.checkpoints import Checkpoints
from qwen3_mlx.api.llm import LLM
from qwen3_mlx.api.load import load
from qwen3_mlx.arguments import Progress
from qwen3_mlx.checkpoint.load import LoadOptions
from qwen3_mlx.checkpoint.local import LocalModel
from qwen3_mlx.checkpoint.weights import weight_names
from qwen3_mlx.engine.memory import RESERVE
from qwen3_mlx.engine.memory_ledger import reserved, unallocated_guarantees
from qwen3_mlx.errors import CapacityError, CheckpointError, Qwen3Error
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.sizes import DEMO, hub_name
from qwen3_mlx.server.settings import model_name
from qwen3_mlx.text.kind import Kind

_log = logging.getLogger(__name__)
DEFAULT = "default"
_LATEST = ":latest"  # Ollama's clients may add it to any name


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model that can be served, loaded or not.

    Attributes:
        name: the name that clients see.
        aliases: other names that it answers to.
        config: the shape of the network.
        kind: "chat", "embedding" or "reranker"; conversions may show that only once loaded.
        nbytes: bytes of its files.
        planned: bytes that it takes in memory, with a short context.
        expected: whether other models leave room for it before it is loaded.
        load: loads it, with a callback for the modules loaded; None if it always stays loaded.
        adapters: the names of its adapters; one is used by the name model:adapter.
    """

    name: str
    aliases: frozenset[str] = frozenset()
    config: ModelConfig
    kind: str
    nbytes: int
    planned: int = 0
    expected: bool = False
    load: Callable[[Progress], LLM] | None = None
    adapters: tuple[str, ...] = ()

    @classmethod
    def of(cls, llm: LLM, name: str, aliases: frozenset[str] = frozenset()) -> "ModelSource":
        """Create the source of a model that its caller has loaded, and closes."""
        return cls(
            name=name,
            aliases=aliases,
            config=llm.config,
            kind=llm.kind,
            nbytes=llm.model.nbytes,
            adapters=llm.adapters,
        )

    @property
    def names(self) -> list[str]:
        """The names that clients see: the model alone, and with each adapter."""
        return [self.name, *(f"{self.name}:{adapter}" for adapter in self.adapters)]

    def answers_to(self, name: str) -> bool:
        """Return whether this is one of its names, in any case and perhaps with Ollama's tag.

        An adapter may follow after a colon.
        """
        return self._matches(name, "") or self.adapter_of(name) is not None

    def adapter_of(self, name: str | None) -> str | None:
        """Return the adapter that is a part of a name; None if there is none."""
        of = (adapter for adapter in self.adapters if name and self._matches(name, f":{adapter}"))
        return next(of, None)

    def shown_name(self, name: str | None) -> str:
        """Return the name that clients see for one of its names."""
        adapter = self.adapter_of(name)
        return self.name if adapter is None else f"{self.name}:{adapter}"

    def _matches(self, name: str, ending: str) -> bool:
        known = {f"{own}{ending}".casefold() for own in (self.name, *self.aliases)}
        return not known.isdisjoint((name.casefold(), name.casefold().removesuffix(_LATEST)))


def is_default(name: str | None) -> bool:
    """Return whether a name, or none, stands for the default model."""
    return not name or name.casefold().removesuffix(_LATEST) == DEFAULT


def aliases_of(model: str | None) -> frozenset[str]:
    """Return the names that a model as `load` takes it answers to."""
    stated = DEMO if model is None else model
    return frozenset((stated, hub_name(stated), hub_name(stated).rpartition("/")[2]))


def stated_sources(
    models: Sequence[str | None],
    options: Mapping[str, Any],
    name: str,
    progress: Progress | None = None,
) -> list[ModelSource]:
    """Return the sources of models as `load` takes them; what is missing of them is downloaded.

    All are loaded with the same `options`, adapters apart, which are those of the first. `name` is
    that of the first. A model whose name another one has takes its full path.

    Raises:
        CheckpointError: one cannot be found or read.
        CapacityError: one would not even fit alone.
    """
    found: list[ModelSource] = []
    for model in {_identity(model): model for model in models}.values():
        stated = DEMO if model is None else model
        checkpoints = _resolve(model, options, progress)
        with _fitting_alone():
            checkpoints.check_memory()
        with _fitting_alone():
            checkpoints = checkpoints.fetched()
        own = model_name(model) if found else name
        source = _source(
            _free_name(own, stated, found), aliases_of(model), model, checkpoints, options
        )
        found.append(replace(source, expected=True))
        options = {**options, "adapter": None}
    return found


def local_sources(
    models: Iterable[LocalModel], options: Mapping[str, Any], others: Sequence[ModelSource]
) -> list[ModelSource]:
    """Return the sources of models that are on this machine, without `others` of them.

    Models that are incomplete or cannot be loaded are left out, with a line of the log.
    """
    known, options = list(others), {**options, "adapter": None}
    for model in models:
        if any(model.name in source.aliases for source in known):
            continue
        folder = str(model.folder)
        aliases = {model.name, folder, Path(model.name).name}
        name = model.folder.name if model.name == folder else model.name
        try:
            if not model.complete:
                raise CheckpointError("its download is incomplete")
            checkpoints = _resolve(folder, options, None)
        except (Qwen3Error, ValueError) as error:
            _log.warning("%s is not served: %s", model.name, error)
            continue
        name = _free_name(name, model.name, known)
        known.append(_source(name, aliases, folder, checkpoints, options))
    return known[len(others) :]


def room_for(others: Iterable[ModelSource], *, beside: ModelSource) -> AbstractContextManager[None]:
    """Return a context, for the loading of `beside`, that leaves memory to the expected `others`.

    They count as far as they fit. Without that, the longest context of the first model could be
    promised all of the memory.
    """
    free = backend.available_memory() - unallocated_guarantees() - beside.planned
    room = 0
    for other in others:
        needed = other.planned - RESERVE
        if other.expected and room + needed <= free:
            room += needed
    return reserved(room)


def _resolve(
    model: str | None, options: Mapping[str, Any], progress: Progress | None
) -> Checkpoints:
    return Checkpoints.resolve(
        model,
        options["revision"],
        options["draft"],
        LoadOptions.of(options["bits"], options["dtype"], options["dequantize"]),
        options["kv_bits"],
        options["context"],
        options["adapter"],
        progress,
    )


@contextmanager
def _fitting_alone() -> Iterator[None]:
    """Accept that a model does not fit beside those that are loaded, if it would fit alone."""
    try:
        yield
    except CapacityError as error:
        if not error.fits_alone:
            raise


def _identity(model: str | None) -> str | None:
    """Return the same for all spellings of a folder."""
    return str(Path(model).resolve()) if model and Path(model).is_dir() else model


def _free_name(name: str, full: str, others: Sequence[ModelSource]) -> str:
    taken = is_default(name) or any(other.answers_to(name) for other in others)
    return full if taken else name


def _source(
    name: str,
    aliases: Set[str],
    model: str | None,
    checkpoints: Checkpoints,
    options: Mapping[str, Any],
) -> ModelSource:
    folder, network = checkpoints.target.folder, checkpoints.target.network
    files = {*folder.iterdir(), *(folder / file for file in weight_names(folder))}
    return ModelSource(
        name=name,
        aliases=frozenset(alias for alias in aliases if not is_default(alias)),
        config=network,
        kind=Kind.of(folder, None, None, network.output).name,
        nbytes=sum(file.stat().st_size for file in files if file.is_file()),
        planned=checkpoints.plan(),
        load=partial(_load, model, options),
        adapters=tuple(checkpoints.target.choices),
    )


def _load(model: str | None, options: Mapping[str, Any], progress: Progress) -> LLM:
    return load(model, **options, progress=progress)
