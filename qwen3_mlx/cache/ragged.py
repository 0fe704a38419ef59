"""Several sequences in one forward pass: their tokens end to end, each with its own cache.

There is no padding and no shared buffer, so a sequence joins or leaves without a copy. Each
sequence contributes one token or a chunk of its prompt.

T tokens of all sequences, H query heads, K key/value heads, E head size.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import mlx.core as mx

from qwen3_mlx.cache.attention import LayerCache, RopeFn, attend_per_sequence
from qwen3_mlx.cache.kv import KVCache


class Ragged:
    """The caches of several sequences in one layer, with the interface of a single cache."""

    def __init__(
        self, caches: Sequence[KVCache], lengths: Sequence[int], wanted: Sequence[int]
    ) -> None:
        """Create the joint view for a pass with `lengths[i]` new tokens for `caches[i]`.

        The last `wanted[i]` of them are queries. This matters in a model's last layer only, where
        the output of other queries is not used.
        """
        self.caches = caches
        self.lengths = lengths
        self.wanted = wanted
        self._one_token_each = all(length == 1 for length in lengths)

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, rope: RopeFn
    ) -> mx.array:
        """Compute attention of q, k, v [1, ., T, E]: each cache attends for its own sequence."""
        if self._one_token_each and q.shape[2] == k.shape[2]:
            return self._attend_single_tokens(q, k, v, scale=scale, rope=rope)
        queries = self.lengths if q.shape[2] == k.shape[2] else self.wanted
        attended = []
        spans = zip(self.caches, _spans(queries), _spans(self.lengths), strict=True)
        for cache, query, new in spans:
            k_new, v_new = k[:, :, new], v[:, :, new]
            if query.start == query.stop:
                cache.store(k_new, v_new, rope=rope)
            else:
                attended.append(cache.attend(q[:, :, query], k_new, v_new, scale=scale, rope=rope))
        return mx.concatenate(attended, axis=2)

    def _attend_single_tokens(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, rope: RopeFn
    ) -> mx.array:
        """Compute `attend` where each sequence has one token.

        q and k of all sequences are rotated in one call each, with a vector of offsets.
        """
        q, k, v = as_batch(q, k, v, self.caches, rope)
        count = len(self.caches)
        keys, values = mx.split(k, count), mx.split(v, count)
        if all(cache.holds_floats for cache in self.caches):
            new = zip(self.caches, keys, values, strict=True)
            answers = attend_per_sequence(q, [cache.append(*kv) for cache, *kv in new], scale=scale)
        else:
            each = zip(self.caches, mx.split(q, count), keys, values, strict=True)
            answers = mx.concatenate([c.attend_rotated(*qkv, scale=scale) for c, *qkv in each])
        return answers.transpose(2, 1, 0, 3)


def as_batch(
    q: mx.array, k: mx.array, v: mx.array, caches: Sequence[KVCache], rope: RopeFn
) -> tuple[mx.array, mx.array, mx.array]:
    """Convert q, k, v [1, ., T, E], one token a cache, to [T, ., 1, E], and rotate q and k."""
    offsets = tuple(cache.offset for cache in caches)
    q, k, v = (x.transpose(2, 1, 0, 3) for x in (q, k, v))
    return rope(q, offsets), rope(k, offsets), v


def _spans(lengths: Sequence[int]) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(accumulate(lengths, initial=0))]


def ragged_layers(
    sequences: Sequence[Sequence[KVCache]],
    lengths: Sequence[int],
    wanted: Sequence[int] | None = None,
) -> tuple[Sequence[LayerCache], Sequence[int] | None]:
    """Return the layers' caches for one forward pass of sequences, those of a single one as such.

    `sequences[i]` holds one cache a layer. The pass has `lengths[i]` of its tokens, and computes
    the logits of the last `wanted[i]` of them (None: of all). Return the layers' caches, and the
    rows of the T tokens whose logits are wanted (None: all), as `Qwen3.__call__` takes them.
    """
    layers: Sequence[LayerCache] = sequences[0]
    if len(sequences) > 1:
        per_layer = zip(*sequences, strict=True)
        layers = [Ragged(caches, lengths, wanted or lengths) for caches in per_layer]
    if wanted is None:
        return layers, None
    rows = [
        row
        for span, count in zip(_spans(lengths), wanted, strict=True)
        for row in range(span.stop - count, span.stop)
    ]
    return layers, rows
