"""Loads a checkpoint into a model, one module at a time.

The network is built from config.json first, unevaluated, and checked against the headers of the
weight files. Only then are tensors read. At most one module's source weights are in memory beside
the finished modules.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from qwen3_mlx import backend
from qwen3_mlx.arguments import Progress
from qwen3_mlx.checkpoint.adapters import EMBEDDING, HEAD, Adapter
from qwen3_mlx.checkpoint.stored import StoredFormats
from qwen3_mlx.checkpoint.weights import Tensor, TensorSource, mismatches, refuse_missing_layers
from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.model.adapted import Selection, adapted
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.linear import Embedding, Linear
from qwen3_mlx.model.moe import QuantizedSwitchLinear, SwitchLinear
from qwen3_mlx.model.quantization import Format
from qwen3_mlx.model.qwen3 import Qwen3

AUTO_DTYPE = "auto"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How the weights are held in memory.

    `quantize` is the format for weights that are not quantized on disk. `dequantize=True` holds
    quantized weights in `dtype` instead; None does so if the machine computes faster that way.
    `adapter_bytes` is what an adapter takes beside the weights, at most. `provisional` is True if
    the dtype float16 holds only for a network that stays within its range.
    """

    dtype: mx.Dtype
    quantize: Format | None = None
    dequantize: bool | None = None
    adapter_bytes: int = field(default=0, repr=False)
    provisional: bool = field(default=False, repr=False)

    @classmethod
    def of(
        cls, bits: int | None, dtype: str | None, dequantize: bool | None, group_size: int = 64
    ) -> "LoadOptions":
        """Create them from the arguments of the public `load`.

        Raises:
            ValueError: a value is out of its range.
        """
        quantize = Format(4 if bits is None else bits, group_size)  # checks it without bits, too
        provisional = dtype == AUTO_DTYPE and backend.emulates_bfloat16()
        if dtype == AUTO_DTYPE:
            dtype = "float16" if provisional else None
        return cls(
            backend.compute_dtype(dtype),
            None if bits is None else quantize,
            dequantize,
            provisional=provisional,
        )


def load_model(
    config: Mapping[str, Any],
    weights: TensorSource,
    options: LoadOptions,
    progress: Progress,
    adapter: Adapter | None = None,
    choices: Sequence[Adapter] = (),
    build: Callable[[ModelConfig], Qwen3] = Qwen3,
) -> Qwen3:
    """Create the network that `config` describes and load `weights` into it.

    `progress(done, total)` counts modules. The result is evaluated. `config` decides whether the
    head is tied; see `weights.with_stored_head`. An `adapter` is merged into float32 weights, and
    kept beside others, which would lose it in rounding. Of `choices` the network's `selection`
    chooses. `build` creates the network, which may be a part of one.

    Raises:
        CheckpointError: config and weights do not match, or the weights are quantized already and
            `options` state another quantization.
    """
    if adapter and adapter.unties:
        config, weights = adapter.config(config), _Untied(weights)
    geometry = ModelConfig.from_dict(config)
    refuse_missing_layers(geometry, weights.tensors)
    model = build(geometry)
    stored = StoredFormats.of(config)
    if stored:
        _quantize_layout(model, stored, weights)
    if stored and options.quantize:
        raise CheckpointError(
            "the checkpoint is quantized already; leave bits out, or load the original weights"
        )
    _check_tensors(model, weights)
    if fmt := options.quantize:
        kept = [
            path
            for path, module in quantizable(model)
            if not fmt.for_module(path).fits(module["weight"].shape)
        ]
        if kept:
            _log.warning("not quantized: rows that are no multiple of the group size: %s", kept)
    dequantize = options.dequantize
    if dequantize is None:
        dequantize = backend.worth_dequantizing(4 * _count_weights(model))
    paths = [path for path, module in _leaves(model) if module.parameters()]
    for done, path in enumerate(paths):
        progress(done, len(paths))
        filled = _fill(path, _take(model, path), weights, options, adapter, dequantize=dequantize)
        mx.eval(filled.parameters())
        deltas = [choice.delta(path) for choice in choices]
        if any(deltas):
            filled = adapted(filled, deltas, model.selection, options.dtype)
        _put(model, path, filled)
    for layer in model.layers:
        layer.fuse()
    progress(len(paths), len(paths))
    return model


def _leaves(model: nn.Module) -> list[tuple[str, nn.Module]]:
    tree = model.leaf_modules()
    leaves: list[tuple[str, Any]]
    leaves = tree_flatten(tree, is_leaf=nn.Module.is_module)  # type: ignore[assignment]
    return leaves


def quantizable(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules that can be quantized, with their paths."""
    return [(path, module) for path, module in _leaves(model) if hasattr(module, "to_quantized")]


def quantizable_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the weight shapes of the modules that can be quantized, by module path."""
    model = Qwen3(ModelConfig.from_dict(config))
    return {path: tuple(module["weight"].shape) for path, module in quantizable(model)}


def _quantize_layout(model: Qwen3, stored: StoredFormats, weights: TensorSource) -> None:
    """Replace the modules whose weights are quantized on disk; nothing is computed yet."""

    def format_of(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if f"{path}.scales" not in weights.tensors or not hasattr(module, "to_quantized"):
            return False
        return stored.format_of(path).as_config()

    try:
        nn.quantize(model, class_predicate=format_of)
    except ValueError as error:  # a row that is no multiple of the group size
        raise CheckpointError(f"config.json: its quantization does not fit: {error}") from error


def _check_tensors(model: Qwen3, weights: TensorSource) -> None:
    """Check that the checkpoint has the tensors that the network needs, and no others.

    Raises:
        CheckpointError: it has not; one message names all tensors at fault.
    """
    needed, present = model.tensors(), weights.tensors
    problems = mismatches(
        {name: tuple(array.shape) for name, array in needed.items()},
        {name: tensor.shape for name, tensor in present.items()},
        tied=model.config.tie_word_embeddings,
    )
    mistyped = [
        f"{name} is {present[name].dtype}"
        for name, array in needed.items()
        if name in present and present[name].dtype not in _stored_dtypes(array)
    ]
    if mistyped:
        problems.append(f"of a dtype that does not belong there: {', '.join(mistyped)}")
    if problems:
        raise CheckpointError(f"weights and config.json do not match; {'; '.join(problems)}")


def _stored_dtypes(array: mx.array) -> tuple[str, ...]:
    """Return the dtypes on disk that can be loaded into an array of the network."""
    if mx.issubdtype(array.dtype, mx.floating):
        return "BF16", "F16", "F32"
    return ("U32",) if array.dtype == mx.uint32 else ("U8",)  # packed weights; scales as codes


def _count_weights(model: Qwen3) -> int:
    """Return the number of weights of the network, quantized ones unpacked."""
    count = 0
    for _, module in _leaves(model):
        for name, array in module.parameters().items():
            if name in ("scales", "biases"):
                continue
            packed = array.dtype == mx.uint32
            count += array.size * 32 // module.bits if packed else array.size
    return count


class _Untied:
    """A checkpoint whose head is a copy of the embedding, which an adapter changes apart."""

    def __init__(self, weights: TensorSource) -> None:
        self._weights = weights
        self._kept: dict[str, mx.array] = {}
        self._copies = {
            name.replace(EMBEDDING, HEAD): name
            for name in weights.tensors
            if name.startswith(f"{EMBEDDING}.")
        }
        own = {name: tensor for name, tensor in weights.tensors.items() if HEAD not in name}
        copies = {head: weights.tensors[name] for head, name in self._copies.items()}
        self.tensors: Mapping[str, Tensor] = {**own, **copies}

    def take(self, name: str) -> mx.array:
        """Return a tensor; the embedding is kept until it has been taken twice."""
        source = self._copies.get(name, name)
        if source in self._kept:
            return self._kept.pop(source)
        array = self._weights.take(source)
        if source in self._copies.values():
            self._kept[source] = array
        return array


def _fill(
    path: str,
    module: nn.Module,
    weights: TensorSource,
    options: LoadOptions,
    adapter: Adapter | None,
    *,
    dequantize: bool,
) -> nn.Module:
    """Return the module at `path` with its weights loaded, and converted as `options` state."""
    if adapter and adapter.replaces(f"{path}.weight") and hasattr(module, "bits"):
        plain = _PLAIN[type(module)]()
        if "bias" in module:
            plain.bias = module["bias"]
        module = plain
    for name in module.parameters():
        whole = f"{path}.{name}"
        replaced = adapter and adapter.replaces(whole)
        module[name] = adapter.tensor(whole) if adapter and replaced else weights.take(whole)
    if options.quantize and hasattr(module, "to_quantized"):
        fmt = options.quantize.for_module(path)
        if fmt.fits(module["weight"].shape):
            module = module.to_quantized(**fmt.as_config())
            mx.eval(module.parameters())  # frees the source before anything else is computed
    if dequantize and hasattr(module, "bits"):
        module = _dequantized(module)
    delta = adapter.delta(path) if adapter else None
    merges = options.dtype == mx.float32 or (delta is not None and delta.magnitude is not None)
    if delta and merges and not hasattr(module, "bits"):
        module["weight"], delta = delta.merged(module["weight"]), None
    for name, array in module.parameters().items():
        if mx.issubdtype(array.dtype, mx.floating):
            module[name] = array.astype(options.dtype)
    return adapted(module, [delta], Selection(default=0), options.dtype) if delta else module


def _dequantized(module: nn.Module) -> nn.Module:
    """Return the unquantized counterpart of a quantized module, in float32."""
    fmt = Format(module.bits, module.group_size, module.mode)
    plain: nn.Module = _PLAIN[type(module)]()
    plain.weight = fmt.dequantize_float32(module["weight"], module["scales"], module.get("biases"))
    if "bias" in module:
        plain.bias = module["bias"]
    return plain


# The unquantized counterparts, of size 1 because their weights are replaced at once.
_PLAIN: dict[type, Callable[[], nn.Module]] = {
    nn.QuantizedLinear: lambda: Linear(1, 1, bias=False),
    nn.QuantizedEmbedding: lambda: Embedding(1, 1),
    QuantizedSwitchLinear: lambda: SwitchLinear(1, 1, 1),
}


def parent_of(model: nn.Module, path: str) -> tuple[Any, str]:
    """Return the module or list that holds the module at `path`, and its name there."""
    *parents, name = path.split(".")
    place: Any = model
    for parent in parents:
        place = place[int(parent)] if isinstance(place, list) else place[parent]
    return place, name


def _take(model: nn.Module, path: str) -> nn.Module:
    """Remove a module from the tree, so that nothing else keeps its source weights alive."""
    place, name = parent_of(model, path)
    module: nn.Module = place.pop(name)
    return module


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    place, name = parent_of(model, path)
    place[name] = module
