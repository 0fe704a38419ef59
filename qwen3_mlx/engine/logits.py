"""The logits of every position of a text, computed between the steps of an engine.

The text goes through a cache of its own, a chunk at a time. That cache is plain, whatever those of
the engine are, so a quantized cache does not affect the logits.

N tokens, L of a chunk, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from qwen3_mlx.cache.quantized import PLAIN
from qwen3_mlx.engine.memory import (
    Workload,
    activation_bytes,
    cache_bytes,
    in_gb,
    with_fitting_chunk,
)
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.qwen3 import Qwen3

_BLOCK = 1 << 23  # logits computed at once: 32 MiB in float32
_ITEMSIZE = 4  # of the result, float32


def plan_logits(config: ModelConfig, work: Workload, tokens: int, free: int) -> tuple[int, int]:
    """Return the bytes that the logits of so many tokens take, and the chunk size in tokens.

    Raises:
        Qwen3Error: they take more than `free` bytes; the message shows the sum.
    """
    block = min(tokens * config.vocab_size, max(config.vocab_size, _BLOCK)) * 2 * _ITEMSIZE
    logits = tokens * config.vocab_size * _ITEMSIZE + block
    work = replace(work, context=tokens, cache=PLAIN, draft_token_bytes=0)
    work, total = with_fitting_chunk(config, work, logits, free)
    if total > free:
        raise Qwen3Error(
            f"the logits of {tokens:,} tokens do not fit: logits {in_gb(logits)} + cache "
            f"{in_gb(cache_bytes(config, work))} + activations "
            f"{in_gb(activation_bytes(config, work))} = {in_gb(total)}, and {in_gb(free)} are "
            "free; ask for those of fewer ids at a time"
        )
    return total, work.chunk


class Logits:
    """The logits [N, V], float32, of ids [N], as far as they are computed.

    `nbytes` is the memory that they and their computation take, with `chunk` ids at a time.
    """

    def __init__(
        self, model: Qwen3, ids: Sequence[int], nbytes: int, chunk: int, adapter: int | None = None
    ) -> None:
        """Create the job, with nothing computed, on the thread that owns `model`.

        `plan_logits` returns `nbytes` and `chunk`.
        """
        self._adapter = adapter
        self.nbytes = nbytes
        self.chunk = chunk
        self._model = model
        self._ids = ids
        # A write never fills a buffer.
        self._cache = model.make_cache(len(ids) + 1, cache_format=PLAIN)
        self._num_computed = 0
        self.values = mx.zeros((len(ids), model.config.vocab_size))

    def advance(self, chunk: int) -> bool:
        """Compute the logits of the next `chunk` ids; return whether ids are left."""
        ids = self._ids[self._num_computed : self._num_computed + chunk]
        with self._model.selection.choosing([self._adapter]):
            hidden = self._model.hidden(mx.array([ids], dtype=mx.int32), self._cache)[0]  # [L, D]
        mx.eval(hidden, [layer.state for layer in self._cache])
        rows = max(1, _BLOCK // self._model.config.vocab_size)
        for start in range(0, len(ids), rows):
            block = self._model.head(hidden[start : start + rows]).astype(mx.float32)
            first = self._num_computed + start
            # Written in place: nothing else holds the array.
            self.values[first : first + block.shape[0]] = block
            mx.eval(self.values)
        self._num_computed += len(ids)
        mx.clear_cache()
        return self._num_computed < len(self._ids)
