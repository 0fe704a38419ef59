"""The folders in which adapters are stored: mlx-lm's and PEFT's.

Both have an adapter_config.json; mlx-lm's tensors are in adapters.safetensors, PEFT's in
adapter_model.safetensors. The tensors in the file, not the config, say which modules are adapted.

r rank, D input size, O output size, X experts, V vocabulary.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen3_mlx.checkpoint.formats.matrix import FLOATS
from qwen3_mlx.checkpoint.hub import ADAPTER_CONFIG, MLX_ADAPTER, PEFT_ADAPTER, Source
from qwen3_mlx.checkpoint.names import network_name
from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.files import Entry, read_header, read_json, read_rows
from qwen3_mlx.model.config import ModelConfig

_MAX_NUMBER = 1e9  # no scale or rank comes near it
_MAX_PATTERN = 500  # characters
_REPEATED_GROUP = re.compile(r"\)[*+{]|(?:[*+].*){4}")


def _first(parts: Sequence[mx.array]) -> mx.array:
    return parts[0]


@dataclass(frozen=True, slots=True)
class StoredArray:
    """An array made of stored tensors, of which `name` is the first; `arrange` puts them together.

    `arrange` is also called with arrays that are never computed, for the shape of its result.
    """

    name: str
    entries: tuple[Entry, ...]
    arrange: Callable[[Sequence[mx.array]], mx.array] = _first

    def then(self, change: Callable[[mx.array], mx.array]) -> "StoredArray":
        """Return the array that `change` makes of this one."""
        return replace(self, arrange=lambda parts: change(self.arrange(parts)))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array.

        Raises:
            CheckpointError: the stored tensors have shapes of which it cannot be made.
        """
        try:
            return tuple(self.arrange([mx.zeros(entry.shape) for entry in self.entries]).shape)
        except ValueError as error:
            stored = list(self.entries[0].shape)
            raise CheckpointError(
                f"{self.name} is {stored}, which does not fit this model"
            ) from error

    def read(self) -> mx.array:
        """Read the array, float32."""
        parts = []
        for entry in self.entries:
            rows = read_rows(entry, 0, math.prod(entry.shape[:-1]))
            parts.append(rows.astype(mx.float32).reshape(entry.shape))
        return self.arrange(parts)


@dataclass(frozen=True, slots=True)
class Pair:
    """The low-rank matrices of a module, a [r, D] and b [O, r], with X in front for experts.

    A `magnitude` [O] is that of DoRA. What scales the product is part of `b`.
    """

    a: StoredArray
    b: StoredArray
    magnitude: StoredArray | None = None

    @property
    def arrays(self) -> list[StoredArray]:
        """The arrays that there are."""
        return [self.a, self.b, *([self.magnitude] if self.magnitude else [])]


@dataclass(frozen=True, slots=True)
class Contents:
    """An adapter's tensors: pairs by module path, and those that replace others, by their names.

    With `changes_apart` a change of the embedding does not change a head that is tied to it.
    """

    pairs: Mapping[str, Pair]
    whole: Mapping[str, StoredArray]
    changes_apart: bool


def read_contents(folder: Path, network: ModelConfig) -> Contents:
    """Read the config and the header of an adapter.

    Raises:
        CheckpointError: a file is missing or broken, or has something that is not supported.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    is_peft = "peft_type" in config
    file = folder / (PEFT_ADAPTER if is_peft else MLX_ADAPTER)
    if not file.is_file():
        older = sorted(other.name for other in folder.glob("adapter*.bin"))
        found = f"{older[0]}, but only safetensors are read" if older else f"no {file.name}"
        raise CheckpointError(f"{folder} has {found}")
    header = read_header(file)
    for name, entry in header.items():
        if entry.dtype not in FLOATS or not entry.shape:
            raise CheckpointError(f"{name} is {entry.dtype} {list(entry.shape)}; floats are needed")
    if not header:
        raise CheckpointError(f"{file} has no tensors")
    return (_Peft(config, network) if is_peft else _Mlx(config, network)).read(header)


_Kinds = dict[str, StoredArray]
"""The tensors of a module by kind, such as lora_a."""


def _grouped(
    header: Mapping[str, Entry], pattern: re.Pattern[str]
) -> tuple[dict[str, _Kinds], list[StoredArray]]:
    """Return the tensors whose names match, by module and kind, and those that are left."""
    modules: dict[str, _Kinds] = {}
    left: list[StoredArray] = []
    for name, entry in header.items():
        array = StoredArray(name, (entry,))
        if not (match := pattern.fullmatch(name)):
            left.append(array)
        elif modules.setdefault(match[1], {}).setdefault(match[2], array) is not array:
            raise CheckpointError(f"{name} stands there twice, spelt in two ways")
    return modules, left


def _take(module: str, kinds: _Kinds, *needed: str) -> Iterator[StoredArray]:
    """Yield the tensors of a module, which must have all that are needed and no others."""
    if unexpected := [array.name for kind, array in kinds.items() if kind not in needed]:
        raise CheckpointError(f"{unexpected[0]} has no place beside the module's other tensors")
    for kind in needed:
        if kind not in kinds:
            raise CheckpointError(f"{module}.{kind} is missing")
        yield kinds[kind]


def _number(value: object, name: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if -_MAX_NUMBER < value < _MAX_NUMBER:
            return float(value)
    raise CheckpointError(
        f"{ADAPTER_CONFIG}: {name} is {str(value)[:40]}, not a number within reason"
    )


def _refuse(key: str, value: object, way_out: str) -> None:
    raise CheckpointError(f"{ADAPTER_CONFIG}: {key} is {str(value)[:40]!r}; {way_out}")


def _transposed(x: mx.array) -> mx.array:
    return x.T


class _Mlx:
    """mlx-lm's format: modules have its names, and `scale` is not divided by the rank."""

    _PART = re.compile(r"(.+)\.(lora_a|lora_b|m)")

    def __init__(self, config: Mapping[str, Any], network: ModelConfig) -> None:
        self._config = config
        self._kind = config.get("fine_tune_type", "lora")
        self._experts = network.experts.num_experts if network.experts else 0
        if self._kind not in ("lora", "dora", "full"):
            _refuse("fine_tune_type", self._kind, "lora, dora and full are read")

    def read(self, header: Mapping[str, Entry]) -> Contents:
        modules, left = _grouped(header, self._PART)
        pairs = {network_name(path): self._pair(path, kinds) for path, kinds in modules.items()}
        whole = {network_name(array.name): array for array in left}
        return Contents(pairs, whole, changes_apart=False)

    def _pair(self, module: str, kinds: _Kinds) -> Pair:
        parameters = self._config.get("lora_parameters")
        stated = parameters.get("scale") if isinstance(parameters, Mapping) else None
        scale = _number(stated, "lora_parameters.scale")
        magnitudes = ["m"] if self._kind == "dora" else []
        a, b, *m = _take(module, kinds, "lora_a", "lora_b", *magnitudes)
        if ".switch_mlp." in module:  # [X, r, D] or, in older files, [X·r, D]; [X, O, r]
            a = a.then(lambda x: x.reshape(self._experts, -1, x.shape[-1]))
        elif network_name(module) == "model.embed_tokens":  # [V, r] and [r, D]
            a, b = b, a
        else:  # [D, r] and [r, O]
            a, b = a.then(_transposed), b.then(_transposed)
        return Pair(a, b.then(lambda x: scale * x), *m)


class _Peft:
    """PEFT's format: modules have the names of transformers."""

    _PART = re.compile(
        r"(?:base_model\.model\.)?(.+)\."
        r"(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.weight)?"
    )
    _WHOLE = re.compile(r"(?:base_model\.model\.)?(.+?)(?:\.modules_to_save|\.base_layer)?(\.\w+)")
    _EXPERT = re.compile(r"(.*\.mlp)\.experts\.(\d+)\.(\w+)")
    _STACK = re.compile(r"(.*\.mlp)\.experts(?:\.base_layer)?")
    # Features that change what the tensors mean, and that are not supported.
    _REFUSED = (
        *("lora_bias", "fan_in_fan_out", "trainable_token_indices", "layer_replication"),
        *("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config"),
        *("monteclora_config", "velora_config", "megatron_config", "ensure_weight_tying"),
    )
    # Other ways to begin also change the weights of the base.
    _BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")

    def __init__(self, config: Mapping[str, Any], network: ModelConfig) -> None:
        self._config = config
        self._hidden = network.hidden_size
        experts = network.experts
        self._experts = experts.num_experts if experts else 0
        self._width = experts.moe_intermediate_size if experts else 0
        if (kind := config.get("peft_type")) != "LORA":
            _refuse("peft_type", kind, "LORA is read")
        if (bias := config.get("bias")) not in (None, "none"):
            _refuse("bias", bias, "none is read")
        if (begun := config.get("init_lora_weights")) not in self._BEGINNINGS:
            _refuse("init_lora_weights", begun, "it must be converted to plain LoRA with PEFT")
        for key in self._REFUSED:
            if value := config.get(key):
                _refuse(key, value, "that is not supported")

    def read(self, header: Mapping[str, Entry]) -> Contents:
        modules, left = _grouped(header, self._PART)
        pairs: dict[str, Pair] = {}
        experts: dict[str, dict[int, Pair]] = {}
        for module, kinds in modules.items():
            if match := self._EXPERT.fullmatch(module):
                stack = experts.setdefault(f"{match[1]}.switch_mlp.{match[3]}", {})
                stack[int(match[2])] = self._pair(module, kinds)
            elif match := self._STACK.fullmatch(module):
                pairs |= self._stacked(network_name(match[1]), module, kinds)
            else:
                pairs[network_name(module)] = self._pair(module, kinds)
        pairs |= {network_name(path): self._joined(path, stack) for path, stack in experts.items()}
        whole: dict[str, StoredArray] = {}
        for array in left:
            match = self._WHOLE.fullmatch(array.name)
            name = network_name("".join(match.groups()) if match else array.name)
            if whole.setdefault(name, array) is not array:
                raise CheckpointError(f"{array.name} stands there twice, spelt in two ways")
        return Contents(pairs, whole, changes_apart=True)

    def _pair(self, module: str, kinds: _Kinds) -> Pair:
        if "lora_embedding_A" in kinds:  # A [r, V], B [D, r]
            b, a = _take(module, kinds, "lora_embedding_A", "lora_embedding_B")
            scale = self._scale(module, b, b.shape[0])
            return Pair(a.then(_transposed), b.then(lambda x: scale * x.T))
        magnitudes = ["lora_magnitude_vector"] if self._config.get("use_dora") else []
        a, b, *m = _take(module, kinds, "lora_A", "lora_B", *magnitudes)
        scale = self._scale(module, a, a.shape[0])
        return Pair(a, b.then(lambda x: scale * x), *m)

    def _joined(self, path: str, stack: Mapping[int, Pair]) -> Pair:
        """Return the pairs of single experts as one."""
        if sorted(stack) != list(range(self._experts)):
            raise CheckpointError(f"{path}: not all experts are adapted, or more than there are")

        def join(arrays: Sequence[StoredArray]) -> StoredArray:
            def arrange(parts: Sequence[mx.array]) -> mx.array:
                return mx.stack(
                    [array.arrange([part]) for array, part in zip(arrays, parts, strict=True)]
                )

            entries = [entry for array in arrays for entry in array.entries]
            return StoredArray(arrays[0].name, tuple(entries), arrange)

        columns = zip(*(stack[expert].arrays for expert in range(self._experts)), strict=True)
        return Pair(*map(join, columns))

    def _stacked(self, block: str, module: str, kinds: _Kinds) -> dict[str, Pair]:
        """Return the pairs of all experts' gate and up, or of down, from A [X·r, D], B [O, r·X].

        Their shapes tell them apart: gate and up have the rows of both.
        """
        a, b = _take(module, kinds, "lora_A", "lora_B")
        if not self._experts or len(b.shape) != 2:
            raise CheckpointError(f"{b.name} is {list(b.shape)}, which does not fit this model")
        joined = (a.shape[-1], b.shape[0]) == (self._hidden, 2 * self._width)
        if module.endswith(".base_layer") and not joined:  # inside: down_proj is the outer one
            raise CheckpointError(f"{b.name} is {list(b.shape)}, which does not fit this model")
        parameter = "gate_up_proj" if joined else "down_proj"
        scale = self._scale(f"{block}.experts.{parameter}", a, a.shape[0] // self._experts)
        a = a.then(lambda x: x.reshape(self._experts, -1, x.shape[-1]))
        b = b.then(lambda x: scale * x.reshape(x.shape[0], -1, self._experts).transpose(2, 0, 1))
        if not joined:
            return {f"{block}.switch_mlp.down_proj": Pair(a, b)}
        return {
            f"{block}.switch_mlp.gate_proj": Pair(a, b.then(lambda x: x[:, : self._width])),
            f"{block}.switch_mlp.up_proj": Pair(a, b.then(lambda x: x[:, self._width :])),
        }

    def _scale(self, module: str, array: StoredArray, rank: int) -> float:
        """Return what scales the product of a module's pair, whose `rank` must be as stated."""
        stated = self._stated(module, "r", "rank_pattern")
        if rank != stated or rank < 1:
            raise CheckpointError(
                f"{array.name} has rank {rank}, {ADAPTER_CONFIG} states {stated:g}"
            )
        alpha = self._stated(module, "lora_alpha", "alpha_pattern")
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _stated(self, module: str, key: str, patterns: str) -> float:
        """Return a value of the config, or that of the first pattern that fits the module."""
        own = self._config.get(patterns) or {}
        if not isinstance(own, Mapping):
            raise CheckpointError(f"{ADAPTER_CONFIG}: {patterns} is not an object")
        for pattern, value in own.items():
            whole = pattern if pattern.startswith("^") else rf"(.*\.)?({pattern})$"
            if len(pattern) > _MAX_PATTERN or _REPEATED_GROUP.search(pattern):
                raise CheckpointError(  # it could take for ever to match
                    f"{ADAPTER_CONFIG}: {patterns}: {pattern[:40]!r} is too complex"
                )
            try:
                if re.match(whole, module):
                    return _number(value, f"{patterns}.{pattern}")
            except re.error as error:
                raise CheckpointError(
                    f"{ADAPTER_CONFIG}: {patterns}: {pattern[:40]!r} is no regular expression"
                ) from error
        return _number(self._config.get(key), key)


def refuse_other(source: Source) -> None:
    """Check that a folder or a name of the hub is that of an adapter.

    Raises:
        CheckpointError: it is of something else.
    """
    if source.is_missing(ADAPTER_CONFIG):
        raise CheckpointError(f"{source.name} is no adapter: it has no {ADAPTER_CONFIG}")
