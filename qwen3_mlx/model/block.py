"""One layer of the network: attention and feed-forward, with the names of published checkpoints.

Code that runs for every token accesses modules as items (`self["norm"]`): attribute access takes
MLX ten times as long.

B batch, L new tokens, Q queries (L, or in the last layer those whose logits are wanted),
H query heads, K key/value heads, E head size, D hidden.
"""

import mlx.core as mx
import mlx.nn as nn

from qwen3_mlx.cache.attention import LayerCache, RopeFn
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.fused import RowFused, can_fuse
from qwen3_mlx.model.linear import Linear, Reduce, whole
from qwen3_mlx.model.moe import MoE, swiglu


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
        self.reduce: Reduce = whole
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
        return self.reduce(self["o_proj"](attended.transpose(0, 2, 1, 3).flatten(2)))

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
        self.reduce: Reduce = whole
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
        return self.reduce(self["down_proj"](swiglu(gate, up)))


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
