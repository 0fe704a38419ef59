"""The Qwen3 network, dense and mixture-of-experts: token ids in, logits or hidden states out.

The parts come before the whole, `Qwen3`. Modules and parameters have the names of the published
checkpoints.

B batch, L new tokens, Q queries (L, or in the last layer those whose logits are wanted),
D hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from qwen3_mlx.cache.attention import LayerCache, NoCache
from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.cache.quantized import PLAIN, CacheFormat, new_cache
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.model.adapted import Selection, weight_rows
from qwen3_mlx.model.block import Block
from qwen3_mlx.model.compiled import CompiledLayers, max_rows
from qwen3_mlx.model.config import LOGITS, SCORE, ModelConfig
from qwen3_mlx.model.linear import Embedding, Linear
from qwen3_mlx.model.rope import Rope


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
        return self.after_embedding(self.embed_tokens(ids), cache, rows)

    def after_embedding(
        self, x: mx.array, cache: Sequence[LayerCache], rows: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        """Compute `halves` of embeddings [B, L, D], or of the output of layers before these."""
        rope, middle = self._rope.for_pass(), x
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


def rows_of(wanted: Sequence[int] | None, tokens: int) -> mx.array | None:
    """Return the positions `wanted` of so many tokens as an array; None if they are all."""
    if wanted is None or len(wanted) == tokens:
        return None
    return mx.array(list(wanted), dtype=mx.int32)


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
    ) -> tuple[mx.array | None, mx.array]:
        """Compute the hidden states [B, L, D] after half of the layers, and `hidden` [B, Q, D].

        When the former are there, the caches of that half have been written and read. They are None
        if the pass cannot be computed in two halves.
        """
        rows = rows_of(wanted, ids.shape[1])
        return self.model.halves(ids, cache or [NoCache()] * len(self.layers), rows)

    def decode(
        self, ids: mx.array, cache: Sequence[LayerCache]
    ) -> tuple[mx.array | None, mx.array]:
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

    # --- when a pass is computed ----------------------------------------------------------------

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Create a context whose forward passes are computed only by `submit`, then `wait`."""
        yield

    def announce(self) -> None:
        """Note that the deferred pass will be submitted, for other machines that compute it."""

    def submit(self, arrays: Sequence[mx.array]) -> None:
        """Begin to compute arrays of a deferred pass."""
        mx.async_eval(arrays)

    def wait(self, arrays: Sequence[mx.array]) -> None:
        """Wait until arrays that were submitted are computed."""
        mx.eval(arrays)

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
