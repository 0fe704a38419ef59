"""A small model of the family that proposes what the large one may say next.

It draws each token as the large one will: with the same parameters and the same randomness of the
place. Its caches stand behind the large one's in `Sequence.layers`, and lag behind as they like.
"""

import time
from collections.abc import Mapping, Sequence

import mlx.core as mx

from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.engine.forward import BatchSlice, forward
from qwen3_mlx.engine.memory import count_weights, token_bytes
from qwen3_mlx.engine.sampling import choose
from qwen3_mlx.engine.sequence import SequenceState
from qwen3_mlx.model.qwen3 import Qwen3

_CHUNK = 512  # tokens that it reads in a step to catch up
_MEMORY = 0.8


class DraftModel:
    """Proposes tokens.

    `size` is its weights, `seconds` what a token takes, once it is known, and `token_bytes` what it
    keeps of one.
    """

    def __init__(self, model: Qwen3) -> None:
        """Propose with `model`, which has the large one's vocabulary."""
        self.model = model
        self.size = count_weights(model.config)
        self.seconds = 0.0
        self.token_bytes = token_bytes(
            model.config, model.cache_format, model.model.norm.weight.dtype.size
        )
        self._depth = len(model.layers)

    def make_cache(self) -> list[KVCache]:
        """Make one empty cache a layer."""
        return self.model.make_cache()

    def propose(self, counts: Mapping[SequenceState, int]) -> dict[SequenceState, list[int]]:
        """Give so many tokens for each sequence; none as long as it has a lot to catch up on."""
        drafts: dict[SequenceState, list[int]] = {}
        lagging = []
        for sequence in counts:
            unread = sequence.ids[self._caches(sequence)[0].offset :]
            if len(unread) > _CHUNK:
                lagging.append((sequence, unread[:_CHUNK]))
            else:
                drafts[sequence] = []
        for sequence, ids in lagging:
            self._read([sequence], [ids], wanted=0)
        new = [sequence.ids[self._caches(sequence)[0].offset :] for sequence in drafts]
        for place in range(max((counts[sequence] for sequence in drafts), default=0)):
            asked = [sequence for sequence in drafts if counts[sequence] > place]
            if place:
                new = [drafts[sequence][-1:] for sequence in asked]
            started = time.perf_counter()
            for sequence, token in zip(asked, self._read(asked, new, wanted=1), strict=True):
                drafts[sequence].append(token)
            if place:
                taken = time.perf_counter() - started
                self.seconds = _MEMORY * (self.seconds or taken) + (1 - _MEMORY) * taken
        for sequence, draft in drafts.items():
            sequence.sampler.rewind(mx.array(draft))
        return drafts

    def _caches(self, sequence: SequenceState) -> list[KVCache]:
        return sequence.layers[-self._depth :]

    def _read(
        self, sequences: Sequence[SequenceState], new: Sequence[list[int]], *, wanted: int
    ) -> list[int]:
        """Read new tokens of each, and choose what may come next where that is wanted.

        Each pass is waited for: one that is still running would have the next copy the caches.
        """
        caches = [self._caches(sequence) for sequence in sequences]
        parts = [BatchSlice(c, len(ids), wanted) for c, ids in zip(caches, new, strict=True)]
        ids = mx.array([token for tokens in new for token in tokens], dtype=mx.int32)
        logits = forward(self.model, ids, parts)
        if logits is None:
            mx.eval([array for layers in caches for layer in layers for array in layer.state])
            return []
        tokens = choose(logits, [sequence.sampler for sequence in sequences])
        found: list[int] = tokens.tolist()  # type: ignore[assignment]
        return found
