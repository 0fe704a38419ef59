"""Attention of a sequence's last forward pass: new tokens see what was kept, and are not kept."""

from collections.abc import Sequence

import mlx.core as mx

from qwen3_mlx.cache.kv import KVCache


class TransientCache(KVCache):
    """The rotated keys and values of the tokens before, perhaps none; nothing is written.

    So one object may serve several sequences of a pass that begin with the same tokens.
    """

    holds_floats = False  # it keeps none

    def __init__(self, state: Sequence[mx.array] = ()) -> None:
        """Create it from the `state` of another cache."""
        super().__init__()
        if state:
            self.restore(state)

    def append(self, k: mx.array, v: mx.array) -> Sequence[mx.array]:
        """Return the keys and values kept before, with k and v [1, K, L, E] behind them."""
        if not self.offset:
            return k, v
        keys, values = self.state
        return mx.concatenate([keys, k], axis=2), mx.concatenate([values, v], axis=2)
