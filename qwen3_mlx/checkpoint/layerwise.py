"""A network from its checkpoint, one layer in memory at a time, in float32.

N sequences, L tokens each, D hidden.
"""

from collections.abc import Generator, Iterator, Mapping

import mlx.core as mx
import mlx.nn as nn

from qwen3_mlx.cache.attention import NoCache
from qwen3_mlx.checkpoint.formats.matrix import Matrix
from qwen3_mlx.model.block import Block
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.rope import Rope

_BATCH_TOKENS = 512
_VOCABULARY_BLOCK = 1 << 22  # numbers of the embedding in memory at once


def layer_inputs(
    config: ModelConfig, matrices: Mapping[str, Matrix], ids: mx.array
) -> Generator[mx.array, None, None]:
    """Yield the input [N, L, D] of each layer for ids [N, L], and last the output of the last."""
    rope = Rope(config)
    x = rows_of(matrices["model.embed_tokens.weight"], ids)
    yield x
    for index in range(config.num_hidden_layers):
        block = load_block(config, matrices, index)
        parts = []
        for batch in batches(*ids.shape):
            parts.append(block(x[batch], None, NoCache(), rope.for_pass()))
            mx.eval(parts[-1])
        x = mx.concatenate(parts)
        yield x


def load_block(config: ModelConfig, matrices: Mapping[str, Matrix], index: int) -> Block:
    """Return a layer with its weights."""
    block = Block(config, index)
    prefix = f"model.layers.{index}."
    named = [(name.removeprefix(prefix), name) for name in matrices if name.startswith(prefix)]
    block.load_weights([(short, read_matrix(matrices[name])) for short, name in named])
    return block


def last_norm(config: ModelConfig, matrices: Mapping[str, Matrix]) -> nn.RMSNorm:
    """Return the norm of the last layer's output."""
    norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    norm.weight = read_matrix(matrices["model.norm.weight"])
    return norm


def head_path(config: ModelConfig) -> str:
    """Return the path of the module whose weight is the head's."""
    return "model.embed_tokens" if config.tie_word_embeddings else "lm_head"


def read_matrix(matrix: Matrix) -> mx.array:
    """Return a whole matrix."""
    array = mx.concatenate(list(matrix.blocks(1 << 26))).astype(mx.float32).reshape(matrix.shape)
    mx.eval(array)
    return array


def blocks_of(matrix: Matrix) -> Iterator[tuple[int, mx.array]]:
    """Yield the rows of the embedding in blocks, each with the number of its first row."""
    start = 0
    for rows in matrix.blocks(_VOCABULARY_BLOCK):
        yield start, rows.astype(mx.float32)
        start += rows.shape[0]


def rows_of(matrix: Matrix, ids: mx.array) -> mx.array:
    """Return rows [*ids, D] of a matrix that is never in memory as a whole."""
    found = mx.zeros((*ids.shape, matrix.shape[-1]))
    for start, rows in blocks_of(matrix):
        inside = (ids >= start) & (ids < start + rows.shape[0])
        picked = rows[mx.where(inside, ids - start, 0)]
        found = mx.where(inside[..., None], picked, found)
        mx.eval(found)
    return found


def batches(sequences: int, length: int) -> list[slice]:
    """Return the sequences that are computed at once."""
    step = max(1, _BATCH_TOKENS // length)
    return [slice(start, start + step) for start in range(0, sequences, step)]
