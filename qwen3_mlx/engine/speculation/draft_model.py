"""The draft model: a small model of the family that proposes tokens for the large one to check.

It samples each token as the large one will: with the same parameters, and with the randomness of
the same position. Its caches may lag behind the large one's.
"""

import time
from collections.abc import Mapping, Sequence

import mlx.core as mx

from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.cache.quantized import PLAIN, CacheFormat
from qwen3_mlx.engine.forward import BatchSlice, forward
from qwen3_mlx.engine.memory import count_weights, kv_token_bytes
from qwen3_mlx.engine.moving_average import MovingAverage
from qwen3_mlx.engine.sampling import choose
from qwen3_mlx.engine.sequence import SequenceState
from qwen3_mlx.model.qwen3 import Qwen3

_CHUNK = 512  # tokens that it reads in a step to catch up
_SECONDS_DECAY = 0.8  # weight of the old value when a new measurement of `seconds` arrives


class DraftModel:
    """Proposes draft tokens.

    `size` is the number of its weights, `seconds` the measured time of a draft token, and
    `token_bytes` the size of a token in its KV cache.
    """

    def __init__(self, model: Qwen3, cache_format: CacheFormat = PLAIN) -> None:
        """Create a proposer of `model`, which has the large model's vocabulary."""
        self.model = model
        self.size = count_weights(model.config)
        self.seconds = MovingAverage(_SECONDS_DECAY)
        self.token_bytes = kv_token_bytes(
            model.config, cache_format, model.model.norm.weight.dtype.size
        )
        self._format = cache_format

    def make_cache(self) -> list[KVCache]:
        """Create one empty cache a layer."""
        return self.model.make_cache(cache_format=self._format)

    def propose(self, counts: Mapping[SequenceState, int]) -> dict[SequenceState, list[int]]:
        """Return so many draft tokens for each sequence; none while its caches lag far behind."""
        drafts: dict[SequenceState, list[int]] = {}
        lagging = []
        for sequence in counts:
            unread = sequence.ids[sequence.caches.draft_layers[0].offset :]
            if len(unread) > _CHUNK:
                lagging.append((sequence, unread[:_CHUNK]))
            else:
                drafts[sequence] = []
        for sequence, ids in lagging:
            self._run([sequence], [ids], wanted=0)
        new = [sequence.ids[sequence.caches.draft_layers[0].offset :] for sequence in drafts]
        for position in range(max((counts[sequence] for sequence in drafts), default=0)):
            drafting = [sequence for sequence in drafts if counts[sequence] > position]
            if position:
                new = [drafts[sequence][-1:] for sequence in drafting]
            started = time.perf_counter()
            for sequence, token in zip(drafting, self._run(drafting, new, wanted=1), strict=True):
                drafts[sequence].append(token)
            if position:  # the first pass also reads what the caches lack
                self.seconds.add(time.perf_counter() - started)
        # The large model samples the same positions, with the same randomness.
        for sequence, draft in drafts.items():
            sequence.sampler.rewind(mx.array(draft))
        return drafts

    def _run(
        self, sequences: Sequence[SequenceState], new: Sequence[list[int]], *, wanted: int
    ) -> list[int]:
        """Run a forward pass over new tokens of each sequence; return the next tokens if `wanted`.

        Waits for the pass: one that is still running would make the next copy the caches.
        """
        caches = [sequence.caches.draft_layers for sequence in sequences]
        parts = [BatchSlice(c, len(ids), wanted) for c, ids in zip(caches, new, strict=True)]
        ids = mx.array([token for tokens in new for token in tokens], dtype=mx.int32)
        logits = forward(self.model, ids, parts).outputs
        if logits is None:
            mx.eval([array for layers in caches for layer in layers for array in layer.state])
            return []
        tokens = choose(logits, [sequence.sampler for sequence in sequences])
        next_tokens: list[int] = tokens.tolist()  # type: ignore[assignment]
        return next_tokens
