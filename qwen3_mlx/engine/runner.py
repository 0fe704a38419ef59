"""Prefill and decode: the two loops that drive the model."""

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.engine.sampling import Sampler
from qwen3_mlx.model.qwen3 import Qwen3

_CHUNK_MULTIPLE = 64


class Cancelled(Exception):
    """The caller no longer wants the result."""


def chunk_sizes(tokens: int, most: int) -> list[int]:
    """Cut a prompt into chunks of equal size, so that none is a slow remainder of a few tokens."""
    count = -(-tokens // most)
    size = -(-tokens // count)
    size = min(most, -(-size // _CHUNK_MULTIPLE) * _CHUNK_MULTIPLE)
    return [min(size, tokens - start) for start in range(0, tokens, size)]


def prefill(
    model: Qwen3,
    cache: Sequence[KVCache],
    ids: Sequence[int],
    *,
    chunk: int,
    checkpoint: Callable[[int], None],
) -> mx.array:
    """Read a prompt into the cache and give the logits [V] of its last token, unevaluated.

    `checkpoint(done)` is called before each chunk and may raise to end the work.
    """
    done = 0
    *before, last = chunk_sizes(len(ids), chunk)
    prompt = mx.array(list(ids), dtype=mx.int32)[None]
    for size in before:
        checkpoint(done)
        # Nobody asks for these logits, so they, and the last layer's output, are never computed.
        model(prompt[:, done : done + size], cache, wanted=[size - 1])
        mx.eval([layer.state for layer in cache])
        mx.clear_cache()
        done += size
    checkpoint(done)
    return model(prompt[:, done:], cache, wanted=[last - 1])[0, -1]


def decode(
    model: Qwen3, cache: Sequence[KVCache], logits: mx.array, sampler: Sampler, most: int
) -> Iterator[int]:
    """Give up to `most` tokens, each while the next one is being computed.

    `logits` [V] are those of the last token in the cache. Step n + 1 is built while step n runs but
    submitted only when n is done: while a running step holds the cache, a write would copy it.
    """
    token = sampler(logits)
    mx.async_eval(token)
    for count in range(1, most + 1):
        following = None
        if count < most:
            following = sampler(model(token[None], cache)[0, -1])
        value = token.item()
        assert isinstance(value, int)
        if following is not None:
            mx.async_eval(following)
            token = following
        yield value
