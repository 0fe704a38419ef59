"""One forward pass for whatever there is to do, and how a prompt is cut for it."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from qwen3_mlx.cache.attention import LayerCache
from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.cache.ragged import ragged_layers
from qwen3_mlx.model.qwen3 import Qwen3

_CHUNK_MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class BatchSlice:
    """One sequence's share of a forward pass: `length` tokens for its caches, one a layer."""

    layers: Sequence[KVCache]
    length: int
    wanted: int  # of how many of them, the last ones, the logits or hidden states are asked for


def prefill_chunks(tokens: int, most: int) -> list[int]:
    """Cut a prompt into chunks of equal size, so that none is a slow remainder of a few tokens."""
    count = -(-tokens // most)
    size = -(-tokens // count)
    size = min(most, -(-size // _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE)
    return [min(size, tokens - start) for start in range(0, tokens, size)]


def forward(
    model: Qwen3,
    ids: mx.array,
    parts: Sequence[BatchSlice],
    together: Sequence[LayerCache] | None = None,
    *,
    head: bool = True,
) -> mx.array | None:
    """Give the logits [N, V] that the parts want, unevaluated; None if they want none.

    `ids` [T] are the parts' tokens, end to end. Where all caches are `together`, these answer.
    Without the `head` it is the last hidden states [N, D].
    """
    run = model if head else model.hidden
    if together:
        found = run(ids[None], together)
    elif len(parts) == 1:
        length, asked = parts[0].length, max(1, parts[0].wanted)
        found = run(ids[None], parts[0].layers, wanted=range(length - asked, length))
    else:
        lengths, wanted = [part.length for part in parts], [part.wanted for part in parts]
        if not any(wanted):  # there must be a row, as above
            wanted[-1] = 1
        layers, rows = ragged_layers([part.layers for part in parts], lengths, wanted)
        found = run(ids[None], layers, rows)
    # What nobody asks for is never evaluated, and so never computed.
    return found[0] if any(part.wanted for part in parts) else None


def warm_up(model: Qwen3) -> None:
    """Run a prompt of 64 tokens and one token more, so that no first request waits for kernels."""
    layers = model.make_cache()
    for length in (_CHUNK_MULTIPLE, 1):
        mx.eval(forward(model, mx.zeros(length, dtype=mx.int32), [BatchSlice(layers, length, 1)]))
    del layers
    mx.clear_cache()
