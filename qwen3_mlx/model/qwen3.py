"""The Qwen3 network, dense and mixture-of-experts: token ids in, logits or hidden states out.

The parts come before the whole, `Qwen3`. Modules and parameters have the names of the published
checkpoints. Code that runs for every token accesses modules as items (`self["norm"]`): attribute
access takes MLX ten times as long.

B batch, L new tokens, Q queries (L, or in the last layer those whose logits are wanted),
H query heads, K key/value heads, E head size, D hidden, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from qwen3_mlx.cache.attention import LayerCache, NoCache, RopeFn
from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.cache.quantized import PLAIN, CacheFormat, new_cache
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.model.adapted import Selection, weight_rows
from qwen3_mlx.model.compiled import CompiledLayers, max_rows
from qwen3_mlx.model.config import LOGITS, SCORE, ModelConfig
from qwen3_mlx.model.fused import RowFused, can_fuse
from qwen3_mlx.model.linear import Embedding, Linear
from qwen3_mlx.model.moe import MoE, swiglu
from qwen3_mlx.model.rope import Rope


class Attention(nn.Module):
    """Grouped-query attention; each head of q and of k is normalised before RoPE."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.attention_bias
        self.head_dim = config.head_dim
        # H x E is not always D: of the published sizes only 8B and 14B have them equal.
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(hidden, query_size, bias=bias)
        self.k_proj = Linear(hidden, key_size, bias=bias)
        self.v_proj = Linear(hidden, key_size, bias=bias)
        self.o_proj = Linear(query_size, hidden, bias=bias)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.fused: RowFused | None = None

    def fuse(self) -> None:
        """Store the weights of q, k and v as one matrix, where their formats agree."""
        if can_fuse(self, names := ("q_proj", "k_proj", "v_proj")):
            self.fused = RowFused(self, names, head_dim=self.head_dim)

    def unfuse(self) -> None:
        """Drop the joint matrix; it is freed when the last weight that is a view of it is."""
        self.fused = None

    def project(
        self, x: mx.array, rows: mx.array | None
    ) -> tuple[mx.array, mx.array, mx.array]:  # x [B, L, D], rows [Q]
        """Compute q [B, H, Q, E], k and v [B, K, L, E]; the heads are not yet rotated."""
        fused = self.fused if x.size == x.shape[2] else None  # one token
        if fused and fused.holds(self):
            q, k, v = fused(x)  # heads in front already
            q, k = self["q_norm"](q), self["k_norm"](k)
        else:
            # Normalised before the transpose: the norm kernel needs dense rows.
            q = self.q_norm(self._by_head(self.q_proj(x if rows is None else x[:, rows])))
            k = self.k_norm(self._by_head(self.k_proj(x)))
            v = self._by_head(self.v_proj(x)).transpose(0, 2, 1, 3)
            q, k = q.transpose(0, 2, 1, 3), k.transpose(0, 2, 1, 3)
        return q, k, v

    def output(self, attended: mx.array) -> mx.array:  # [B, H, Q, E] -> [B, Q, D]
        """Project the attended values of all heads."""
        projected: mx.array = self["o_proj"](attended.transpose(0, 2, 1, 3).flatten(2))
        return projected

    def _by_head(self, projected: mx.array) -> mx.array:
        batch, length, _ = projected.shape
        return projected.reshape(batch, length, -1, self.head_dim)


class MLP(nn.Module):
    """The dense feed-forward block: SwiGLU."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)
        self.fused: RowFused | None = None

    def fuse(self) -> None:
        """Store the weights of gate and up as one matrix, where their formats agree."""
        if can_fuse(self, names := ("gate_proj", "up_proj")):
            self.fused = RowFused(self, names)

    def unfuse(self) -> None:
        """Drop the joint matrix; see `Attention.unfuse`."""
        self.fused = None

    def __call__(self, x: mx.array) -> mx.array:  # [B, Q, D] -> [B, Q, D]
        fused = self.fused if x.size == x.shape[2] else None  # one token
        if fused and fused.holds(self):
            gate, up = fused(x)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        projected: mx.array = self["down_proj"](swiglu(gate, up))
        return projected


class Block(nn.Module):
    """One transformer layer: attention and feed-forward, each with pre-norm and residual."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.scale = config.attention_scale
        self.mlp: MLP | MoE
        if config.experts and config.experts.in_layer(index):
            self.mlp = MoE(config.experts, config.hidden_size)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def fuse(self) -> None:
        """Fuse the projections of one input; called after the weights are loaded."""
        self.self_attn.fuse()
        self.mlp.fuse()

    def unfuse(self) -> None:
        """Drop the joint matrices, before the weights or layers are replaced."""
        self.self_attn.unfuse()
        self.mlp.unfuse()

    def __call__(
        self, x: mx.array, rows: mx.array | None, cache: LayerCache, rope: RopeFn
    ) -> mx.array:  # [B, L, D] -> [B, Q, D]
        q, k, v = self.before_attention(x, rows)
        attended = cache.attend(q, k, v, scale=self.scale, rope=rope)
        return self.after_attention(x if rows is None else x[:, rows], attended)

    def before_attention(
        self, x: mx.array, rows: mx.array | None = None
    ) -> tuple[mx.array, mx.array, mx.array]:  # [B, L, D] -> see `Attention.project`
        """Compute q, k and v."""
        return self.self_attn.project(self["input_layernorm"](x), rows)

    def after_attention(self, x: mx.array, attended: mx.array) -> mx.array:
        """Compute the output [B, Q, D] of inputs x and of what they attended to, [B, H, Q, E]."""
        x = x + self.self_attn.output(attended)
        fed_forward: mx.array = self["mlp"](self["post_attention_layernorm"](x))
        return x + fed_forward


class Decoder(nn.Module):
    """Embedding, transformer layers and final norm; named `model` in checkpoints."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(config, index) for index in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self._rope = Rope(config)
        self._compiled = CompiledLayers()

    def __call__(
        self, ids: mx.array, cache: Sequence[LayerCache], rows: mx.array | None
    ) -> mx.array:  # [B, L] -> [B, Q, D]
        return self.halves(ids, cache, rows)[1]

    def decode(
        self, ids: mx.array, cache: Sequence[LayerCache]
    ) -> tuple[mx.array, mx.array]:  # [1, T] -> [1, T, D] and [1, T, D]
        """Compute `halves` for one token of each of T sequences, by compiled functions on a GPU."""
        if ids.shape[1] <= max_rows():
            x, rope = self.embed_tokens(ids), self._rope.for_pass()
            if states := self._compiled.halves(self.layers, self.norm, x, cache, rope):
                return states
        return self.halves(ids, cache, None)

    def halves(
        self, ids: mx.array, cache: Sequence[LayerCache], rows: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        """Compute the hidden states [B, L, D] after half of the layers, and the last [B, Q, D]."""
        rope = self._rope.for_pass()
        x = middle = self.embed_tokens(ids)
        last, half = len(self.layers) - 1, len(self.layers) // 2
        for index, layer in enumerate(self.layers):
            if index == half:
                middle = x
            # Only the last layer can leave rows out: the next layer needs all rows of the others
            # for its keys and values.
            x = layer(x, rows if index == last else None, cache[index], rope)
        normed: mx.array = self.norm(x)
        return middle, normed


class Score(nn.Module):
    """The head of a reranker in the form of a sequence classifier; it is never quantized."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = mx.zeros((1, hidden_size))

    def __call__(self, x: mx.array) -> mx.array:  # [..., D] -> [...], the log-odds
        log_odds: mx.array = x.astype(mx.float32) @ self["weight"].astype(mx.float32).T
        return log_odds[..., 0]


class Qwen3(nn.Module):
    """The whole network. `source` names the checkpoint in messages.

    `adapters` are the names of the adapters of which `selection` chooses.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.adapters: tuple[str, ...] = ()
        self.selection = Selection()
        self.source = "this checkpoint"
        self.model = Decoder(config)
        if config.has_lm_head:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.output == SCORE:
            self.score = Score(config.hidden_size)

    def __call__(
        self,
        ids: mx.array,
        cache: Sequence[LayerCache] | None = None,
        wanted: Sequence[int] | None = None,
    ) -> mx.array:
        """Compute the logits [B, Q, V] of ids [B, L], int32.

        `cache` holds one cache a layer, to which the tokens are appended; without it, ids are whole
        sequences, as in training. `wanted` lists the positions, of the L, whose logits are needed
        (None: all); the last layer computes only those. With a plain cache they must be the last
        positions.
        """
        return self.head(self.hidden(ids, cache, wanted))

    def hidden(
        self,
        ids: mx.array,
        cache: Sequence[LayerCache] | None = None,
        wanted: Sequence[int] | None = None,
    ) -> mx.array:
        """Compute the last hidden states [B, Q, D], the input of `head`."""
        return self.halves(ids, cache, wanted)[1]

    def halves(
        self,
        ids: mx.array,
        cache: Sequence[LayerCache] | None = None,
        wanted: Sequence[int] | None = None,
    ) -> tuple[mx.array, mx.array]:
        """Compute the hidden states [B, L, D] after half of the layers, and `hidden` [B, Q, D].

        When the former are there, the caches of that half have been written and read.
        """
        rows = None
        if wanted is not None and len(wanted) < ids.shape[1]:
            rows = mx.array(list(wanted), dtype=mx.int32)
        return self.model.halves(ids, cache or [NoCache()] * len(self.layers), rows)

    def decode(self, ids: mx.array, cache: Sequence[LayerCache]) -> tuple[mx.array, mx.array]:
        """Compute `halves` of ids [1, T]: one token of each of the T sequences in `cache`."""
        return self.model.decode(ids, cache)

    def head(self, x: mx.array) -> mx.array:
        """Compute the logits [..., V] of any rows x [..., D] of the last hidden states.

        Raises:
            Qwen3Error: the network has no head for logits.
        """
        self._refuse_missing_head()
        tied = self.config.tie_word_embeddings
        logits: mx.array = self.model.embed_tokens.as_linear(x) if tied else self.lm_head(x)
        return logits

    def logits_of(self, tokens: Sequence[int], x: mx.array) -> mx.array:
        """Compute the logits of some tokens [..., n], float32, of last hidden states x [..., D].

        Raises:
            Qwen3Error: the network has no head for logits.
        """
        self._refuse_missing_head()
        tied = self.config.tie_word_embeddings
        module, rows = self.model.embed_tokens if tied else self.lm_head, mx.array(list(tokens))
        logits: mx.array = x.astype(mx.float32) @ weight_rows(module, rows).T
        return logits

    def _refuse_missing_head(self) -> None:
        if self.config.output != LOGITS:
            raise Qwen3Error(f"{self.source} has no head that computes the logits of a next token")

    @property
    def layers(self) -> list[Block]:
        """The transformer layers."""
        return self.model.layers

    def tensors(self) -> dict[str, mx.array]:
        """Return the parameters by their names in a checkpoint."""
        named: list[tuple[str, Any]] = tree_flatten(self.parameters())  # type: ignore[assignment]
        return dict(named)

    @property
    def nbytes(self) -> int:
        """The bytes of all parameters."""
        return sum(array.nbytes for array in self.tensors().values())

    def make_cache(self, capacity: int = 0, *, cache_format: CacheFormat = PLAIN) -> list[KVCache]:
        """Create one empty cache a layer; the first write allocates `capacity` tokens at once."""
        return [new_cache(cache_format, self.config.head_dim, capacity) for _ in self.layers]
