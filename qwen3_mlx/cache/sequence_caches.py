"""The caches of one sequence: one a layer of the model, and one a layer of its draft model."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from qwen3_mlx.cache.kv import KVCache


@dataclass(slots=True)
class SequenceCaches:
    """The caches of one sequence, which grow, shrink and move together.

    `room` is their capacity in tokens, now or after their next write.
    """

    layers: Sequence[KVCache] = ()
    draft_layers: Sequence[KVCache] = field(default=(), kw_only=True)  # may lag behind `layers`
    room: int = 0

    def reserve(self, room: int) -> None:
        """Grow to `room` tokens at the next write, if there is less."""
        if room > self.room:
            self.room = room
            for layer in (*self.layers, *self.draft_layers):
                layer.reserve(room)

    def truncate(self, tokens: int) -> None:
        """Remove all but the first `tokens`, those of a step in flight included."""
        for layer in (*self.layers, *self.draft_layers):
            layer.truncate(tokens)

    def copy(self, tokens: int) -> "SequenceCaches":
        """Return separate caches of the first `tokens`; no room is allocated for them yet."""
        return SequenceCaches(
            [layer.copy(tokens) for layer in self.layers],
            draft_layers=[layer.copy(tokens) for layer in self.draft_layers],
        )
