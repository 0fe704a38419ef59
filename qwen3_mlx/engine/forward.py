"""The forward pass of a step over all its sequences, and the chunks of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from qwen3_mlx.cache.attention import LayerCache
from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.cache.quantized import PLAIN, CacheFormat
from qwen3_mlx.cache.ragged import ragged_layers
from qwen3_mlx.model.config import LOGITS
from qwen3_mlx.model.qwen3 import Qwen3

_CHUNK_MULTIPLE = 64  # tokens


@dataclass(frozen=True, slots=True)
class BatchSlice:
    """One sequence's part of a forward pass: `length` tokens for its caches, one cache a layer."""

    layers: Sequence[KVCache]
    length: int
    num_wanted: int  # the last of them whose logits or hidden states are needed
    adapter: int | None = None  # the number of the adapter to use


class ForwardPass(NamedTuple):
    """The results of a pass, unevaluated.

    `outputs` are the logits [N, V] or the last hidden states [N, D] of the wanted positions, None
    if there are none. `middle` are the hidden states [1, T, D] after half of the layers, None if
    the pass has no halves.
    """

    outputs: mx.array | None
    middle: mx.array | None


def prefill_chunks(tokens: int, most: int) -> list[int]:
    """Return the sizes of a prompt's chunks: equal, so that none is a slow remainder."""
    count = -(-tokens // most)
    size = -(-tokens // count)
    size = min(most, -(-size // _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE)
    return [min(size, tokens - start) for start in range(0, tokens, size)]


def forward(
    model: Qwen3,
    ids: mx.array,
    parts: Sequence[BatchSlice],
    batched: Sequence[LayerCache] | None = None,
    *,
    head: bool = True,
) -> ForwardPass:
    """Build the pass that computes the logits of the wanted positions.

    `ids` [T] are the tokens of all parts, end to end. `batched` are joint caches that hold all
    sequences, used instead of those of the parts. Without the `head` it ends with the last hidden
    states.
    """
    lengths, wanted = [part.length for part in parts], [part.num_wanted for part in parts]
    if not any(wanted):  # the network needs at least one row
        wanted[-1] = 1
    adapters = [part.adapter for part in parts]
    with model.selection.choosing(adapters, lengths, wanted):
        layers: Sequence[LayerCache] | None = batched
        rows: Sequence[int] | None = None
        if not layers:
            layers, rows = ragged_layers([part.layers for part in parts], lengths, wanted)
        if all(length == count == 1 for length, count in zip(lengths, wanted, strict=True)):
            middle, last = model.decode(ids[None], layers)
        else:
            middle, last = model.halves(ids[None], layers, rows)
        outputs = model.head(last) if head else last
    # Rows that are not wanted stay unevaluated, so they are never computed.
    return ForwardPass(outputs[0] if any(part.num_wanted for part in parts) else None, middle)


def warm_up(model: Qwen3, cache_format: CacheFormat = PLAIN) -> None:
    """Run a chunk of 64 tokens and one token, so that no first request waits for kernels."""
    layers = model.make_cache(cache_format=cache_format)
    for length in (_CHUNK_MULTIPLE, 1):
        part, head = BatchSlice(layers, length, 1), model.config.output == LOGITS
        mx.eval(forward(model, mx.zeros(length, dtype=mx.int32), [part], head=head).outputs)
    del layers
    mx.clear_cache()
