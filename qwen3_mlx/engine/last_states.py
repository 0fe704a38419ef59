"""The last hidden state of each of many texts, computed between the steps of an engine.

The texts go through the network end to end, the longest first: each pass takes as many as its chunk
has room for, without padding. A text longer than that is read chunk by chunk, through a plain cache
of its own. What all texts begin with is read once. No prefix is taken from, or left to, the engine.

N texts, T tokens of a pass, D hidden, F numbers of a text's result.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx

from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.cache.quantized import PLAIN
from qwen3_mlx.cache.transient import TransientCache
from qwen3_mlx.engine.forward import BatchSlice, forward
from qwen3_mlx.engine.memory import Workload, in_gb, kv_token_bytes, with_fitting_chunk
from qwen3_mlx.errors import CheckpointError, Qwen3Error
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.qwen3 import Qwen3

Finish = Callable[[mx.array], mx.array]
"""Computes the results [N, F], float32, of last hidden states [N, D]."""
_MAX_TEXTS = 64  # of a pass; each holds a copy of one layer's shared keys and values
_LAYERS_IN_FLIGHT = 3


def plan_last_states(
    config: ModelConfig, work: Workload, shared: int, lengths: Sequence[int], free: int
) -> tuple[int, int]:
    """Return the bytes that texts of these lengths take, and the chunk size in tokens.

    They begin with `shared` common tokens, which `lengths` do not count.

    Raises:
        Qwen3Error: they take more than `free` bytes; the message shows the sum.
    """
    longest = shared + max(lengths)
    work = replace(work, context=longest, cache=PLAIN, draft_token_bytes=0)
    results = len(lengths) * config.hidden_size * 4
    token_bytes = kv_token_bytes(config, PLAIN, work.itemsize)
    # The shared tokens have caches of their own, and in some layers copies for each text of a pass.
    copies = _MAX_TEXTS * _LAYERS_IN_FLIGHT // config.num_hidden_layers
    fixed = results + token_bytes * shared * (1 + copies)
    work, total = with_fitting_chunk(config, work, fixed, free)
    if total > free:
        raise Qwen3Error(
            f"the longest text, of {longest:,} tokens, does not fit: it takes {in_gb(total)}, and "
            f"{in_gb(free)} are free; give shorter texts"
        )
    return total, work.chunk


class LastStates:
    """The results [N, F], float32, of N texts, as far as they are computed.

    `nbytes` is the memory that their computation takes, with `chunk` tokens at a time; `num_done`
    counts the tokens of finished passes.
    """

    def __init__(
        self,
        model: Qwen3,
        shared: Sequence[int],
        texts: Sequence[Sequence[int]],
        finish: Finish,
        nbytes: int,
        chunk: int,
        adapter: int | None = None,
    ) -> None:
        """Create the job, with nothing computed, on the thread that owns `model`.

        Each text is `shared` and its own ids, one at least. `plan_last_states` returns `nbytes` and
        `chunk`.
        """
        self.nbytes = nbytes
        self.chunk = chunk
        self.num_done = 0
        self._adapter = adapter
        self._model = model
        self._finish = finish
        self._texts = texts
        self._order = sorted(range(len(texts)), key=lambda text: -len(texts[text]))
        self._waiting = deque(self._order)
        self._results: list[mx.array] = []
        self._shared_unread = list(shared)
        self._shared = [KVCache(len(shared) + 1) for _ in model.layers]
        # Of the first that waits, if it is read in chunks: its caches, and the tokens in them.
        self._long: list[KVCache] = []
        self._num_read = 0

    def advance(self, chunk: int) -> bool:
        """Compute one pass of at most `chunk` tokens; return whether texts are left."""
        if self._shared_unread:
            self._read(self._shared_unread[:chunk], self._shared)
            del self._shared_unread[:chunk]
            return True
        longest = self._texts[self._waiting[0]]
        if len(longest) - self._num_read > chunk:
            self._long = self._long or [cache.copy(cache.offset) for cache in self._shared]
            self._read(longest[self._num_read : self._num_read + chunk], self._long)
            self._num_read += chunk
            return True
        self._read_ends(chunk)
        return bool(self._waiting)

    def _read(self, ids: Sequence[int], layers: Sequence[KVCache]) -> None:
        """Read tokens that are not a text's last ones."""
        with self._model.selection.choosing([self._adapter]):
            self._model.hidden(mx.array([ids], dtype=mx.int32), layers, [len(ids) - 1])
        mx.eval([layer.state for layer in layers])
        self._count(len(ids))

    def _read_ends(self, chunk: int) -> None:
        """Read the ends of as many texts as fit a pass, and compute their results."""
        before = [TransientCache(layer.state) for layer in self._shared]
        own = [TransientCache(layer.state) for layer in self._long] or before
        ids, parts = list[int](), list[BatchSlice]()
        while self._waiting and len(parts) < _MAX_TEXTS:
            end = self._texts[self._waiting[0]][self._num_read :]
            if parts and len(ids) + len(end) > chunk:
                break
            self._waiting.popleft()
            ids += end
            parts.append(BatchSlice(own, len(end), 1, self._adapter))
            own, self._long, self._num_read = before, [], 0
        hidden = forward(self._model, mx.array(ids, dtype=mx.int32), parts, head=False).outputs
        assert hidden is not None  # a row of each text is wanted
        self._results.append(self._finish(hidden))
        mx.eval(self._results[-1])
        self._count(len(ids))

    def _count(self, tokens: int) -> None:
        self.num_done += tokens
        mx.clear_cache()

    def values(self) -> mx.array:
        """Return the results in the order of the texts, evaluated, once none is left.

        Raises:
            CheckpointError: there is NaN or infinity among them.
        """
        places = mx.array(sorted(range(len(self._order)), key=self._order.__getitem__))
        values = mx.concatenate(self._results)[places]
        if not mx.isfinite(values).all():
            raise CheckpointError(
                f"the hidden states of {self._model.source} have NaN or infinity among them: its "
                "weights are damaged, or computing exceeds the range of its dtype; download or "
                'convert it again, or load it with --dtype float32 (dtype="float32")'
            )
        return values
