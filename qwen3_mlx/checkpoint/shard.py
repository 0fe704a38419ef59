"""The share of a checkpoint that one machine of a cluster holds: some layers, or a part of each.

A share looks like a checkpoint of its own: it has a config.json and tensors by their names in the
network. Only its own bytes are read, and of a checkpoint in several files only its own files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen3_mlx.checkpoint.decoded import open_weights
from qwen3_mlx.checkpoint.names import network_name
from qwen3_mlx.checkpoint.stored_formats import is_foreign
from qwen3_mlx.checkpoint.weights import Tensor, TensorSource, Weights
from qwen3_mlx.model.config import LOGITS, ModelConfig

_LAYERS = "model.layers."
_EMBEDDING = "model.embed_tokens."
_BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_COLUMNS = ("o_proj", "down_proj")
_BLOCK = 1 << 24  # bytes that are read at once

Span = tuple[int, int]
"""A range of layers, heads or columns, its end excluded."""


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a network that is one rank's; all spans are those of the whole network.

    Attributes:
        rank: its number in the cluster, from 0.
        ranks: the number of ranks.
        layers: the transformer layers.
        count: the number of layers of the whole network.
        heads: the key/value heads of each layer, with their query heads.
        columns: the columns of the width of dense feed-forward blocks.
        expert_columns: those of the width of each expert.
    """

    rank: int
    ranks: int
    layers: Span
    count: int
    heads: Span
    columns: Span
    expert_columns: Span = (0, 0)

    @property
    def is_first(self) -> bool:
        """True if the share has the first layer, and so the embedding."""
        return self.layers[0] == 0

    @property
    def is_last(self) -> bool:
        """True if the share has the last layer, and so the final norm and the head."""
        return self.layers[1] == self.count

    @property
    def is_stage(self) -> bool:
        """True if the share has some layers as a whole (pipeline), not a part of each (tensor)."""
        return not (self.is_first and self.is_last)

    def network(self, network: ModelConfig) -> ModelConfig:
        """Return the geometry of this share of a network."""
        queries = network.num_attention_heads // network.num_key_value_heads
        first, stop = self.layers
        heads = self.heads[1] - self.heads[0]
        experts = network.experts and replace(
            network.experts,
            moe_intermediate_size=self.expert_columns[1] - self.expert_columns[0],
            decoder_sparse_step=1,
            mlp_only_layers=tuple(
                layer - first for layer in range(first, stop) if not network.experts.in_layer(layer)
            ),
        )
        return replace(
            network,
            num_hidden_layers=stop - first,
            num_attention_heads=heads * queries,
            num_key_value_heads=heads,
            intermediate_size=self.columns[1] - self.columns[0],
            experts=experts,
        )

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config.json of this share."""
        own = self.network(ModelConfig.from_dict(config))
        sizes = {
            name: getattr(own, name)
            for name in (
                *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
                *("head_dim", "intermediate_size"),
            )
        }
        if own.experts:
            sizes["moe_intermediate_size"] = own.experts.moe_intermediate_size
            sizes["decoder_sparse_step"] = 1
            sizes["mlp_only_layers"] = list(own.experts.mlp_only_layers)
        if isinstance(kinds := config.get("layer_types"), list):
            sizes["layer_types"] = kinds[slice(*self.layers)]
        sections = {
            key: {self.own_name(network_name(name)) or name: value for name, value in part.items()}
            for key in ("quantization", "quantization_config")
            if isinstance(part := config.get(key), Mapping)
        }
        return {**config, **sizes, **sections}

    def own_name(self, name: str) -> str | None:
        """Return the name, in this share, of a layer's tensor or module; None if it has others."""
        number, _, rest = name.removeprefix(_LAYERS).partition(".")
        if not name.startswith(_LAYERS) or not number.isdecimal():
            return None
        layer = int(number)
        return f"{_LAYERS}{layer - self.layers[0]}.{rest}" if layer in range(*self.layers) else None

    def has_tensor(self, network: ModelConfig) -> Callable[[str], bool]:
        """Return a predicate: whether a tensor of the whole `network` belongs to this share."""
        tied = network.output == LOGITS and network.tie_word_embeddings

        def has(name: str) -> bool:
            if name.startswith(_LAYERS):
                return self.own_name(name) is not None
            if name.startswith(_EMBEDDING):
                return self.is_first or (self.is_last and tied)
            return self.is_last

        return has


def open_share(
    folder: Path,
    config: Mapping[str, Any],
    dtype: mx.Dtype,
    share: Share,
    *,
    in_floats: bool | None,
) -> tuple[Mapping[str, Any], "SharedWeights"]:
    """Return the weights of a share of a checkpoint, and its config.json, as `open_weights` does.

    Of foreign formats all headers are read, and a matrix is decoded whole before it is cut.

    Raises:
        CheckpointError: a file is missing or broken, or the quantization is not supported.
    """
    network = ModelConfig.from_dict(config)
    if is_foreign(config):
        config, decoded = open_weights(folder, config, dtype, in_floats=in_floats)
        return share.config(config), SharedWeights(decoded, share, network, None)
    weights = Weights(folder, wanted=share.has_tensor(network))
    return share.config(config), SharedWeights(weights, share, network, weights.rows)


class SharedWeights:
    """The tensors of a share, by their names in its own network."""

    def __init__(
        self,
        weights: TensorSource,
        share: Share,
        network: ModelConfig,
        rows: Callable[[str, int, int], mx.array] | None,
    ) -> None:
        """Compute names and shapes; `rows` reads some rows of a stored tensor."""
        self._weights = weights
        self._share = share
        self._network = network
        self._rows = rows
        has = share.has_tensor(network)
        self._sources = {
            share.own_name(name) or name: name for name in weights.tensors if has(name)
        }
        self.tensors = {
            own: self._cut(weights.tensors[name], *self._cuts(name))
            for own, name in self._sources.items()
        }

    def _cuts(self, name: str) -> tuple[tuple[int, int, int] | None, int]:
        """Return the span and the whole of what is cut in a tensor, and the axis; None if none."""
        share, network = self._share, self._network
        _, _, path = name.partition(_LAYERS)
        *_, module, kind = path.split(".") if path else ("", "", "")
        if share.is_stage or module not in (*_BY_ROWS, *_BY_COLUMNS):
            return None, 0
        if module in ("gate_proj", "up_proj", "down_proj"):
            in_experts = ".switch_mlp." in name and network.experts
            span = share.expert_columns if in_experts else share.columns
            total = in_experts.moe_intermediate_size if in_experts else network.intermediate_size
        else:
            queries = network.num_attention_heads // network.num_key_value_heads
            size = network.head_dim * (queries if module in ("q_proj", "o_proj") else 1)
            span = (share.heads[0] * size, share.heads[1] * size)
            total = network.num_key_value_heads * size
        if module in _BY_COLUMNS:
            return (None, 0) if kind == "bias" else ((*span, total), -1)
        return (*span, total), -1 if kind == "bias" else -2

    def _cut(self, tensor: Tensor, cut: tuple[int, int, int] | None, axis: int) -> Tensor:
        if cut is None:
            return tensor
        shape = list(tensor.shape)
        # Packed words and scales are fewer than the columns that they stand for.
        shape[axis] = shape[axis] * (cut[1] - cut[0]) // cut[2]
        return Tensor(tuple(shape), tensor.dtype, tensor.parts)

    def take(self, name: str) -> mx.array:
        """Return a tensor, evaluated if it is a part of one; each can be taken once."""
        source = self._sources[name]
        cut, axis = self._cuts(source)
        if cut is None:
            array = self._weights.take(source)
            is_sum = source.endswith(".o_proj.bias") and not self._share.is_stage
            # It is added once, where the parts are summed.
            return mx.zeros_like(array) if is_sum and self._share.rank else array
        whole = self._weights.tensors[source]
        start, stop = (whole.shape[axis] * end // cut[2] for end in cut[:2])
        span = slice(start, stop)
        if self._rows is None or len(whole.shape) == 1:
            array = self._weights.take(source)
            array = mx.contiguous(array[..., span] if axis == -1 else array[..., span, :])
        elif axis == -1:
            array = self._read(whole, slice(0, whole.shape[-2]), span)
        else:
            array = self._read(whole, span, slice(None))
        mx.eval(array)
        return array.reshape(self.tensors[name].shape)

    def _read(self, tensor: Tensor, rows: slice, columns: slice) -> mx.array:
        """Read the same rows, and of these some columns, of each matrix of a tensor."""
        assert self._rows
        height = tensor.shape[-2]
        matrices = tensor.shape[0] // len(tensor.parts) if len(tensor.shape) > 2 else 1
        step = max(1, _BLOCK // (tensor.shape[-1] * 4))
        pieces = []
        for part in tensor.parts:
            for matrix in range(matrices):
                first = matrix * height
                for start in range(first + rows.start, first + rows.stop, step):
                    stop = min(start + step, first + rows.stop)
                    pieces.append(mx.contiguous(self._rows(part, start, stop)[:, columns]))
                    mx.eval(pieces[-1])
        return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)
