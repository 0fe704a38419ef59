"""What training shares: layers that keep only their input, and losses of the head in blocks.

Logits are computed a block of rows at a time, together with the gradient of these rows, so that
never all logits or their gradients are held. The head is not trained: the gradient ends at its
input.

R rows, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qwen3_mlx.cache.attention import LayerCache, RopeFn
from qwen3_mlx.model.block import Block
from qwen3_mlx.model.qwen3 import Qwen3

_BLOCK = 1 << 26  # logits held at once: 256 MiB in float32
_SMALL_BLOCK = 1 << 23  # with checkpointing

Head = Callable[[mx.array], mx.array]
"""The logits [n, V] of rows x [n, D]."""
LossOf = Callable[[mx.array, slice], mx.array]
"""The sum of the losses of some rows x [n, D], and which of the R rows these are."""


def divergence(head: Head, base_head: Head, base_states: mx.array) -> LossOf:
    """Return KL(base || model), in nats, as a loss of rows.

    `base_states` [R, D] are the last hidden states of the base model.
    """

    def loss_of(x: mx.array, rows: slice) -> mx.array:
        log_p, log_q = (
            nn.log_softmax(logits.astype(mx.float32), axis=-1)
            for logits in (base_head(base_states[rows]), head(x))
        )
        total: mx.array = (mx.exp(log_p) * (log_p - log_q)).sum()
        return total

    return loss_of


def rows_at_once(vocabulary: int, *, checkpointing: bool) -> int:
    """Return the number of rows whose logits are computed at once."""
    return max(1, (_SMALL_BLOCK if checkpointing else _BLOCK) // vocabulary)


@dataclass(frozen=True, slots=True)
class Objective:
    """A mean loss, not evaluated.

    Attributes:
        loss: the share of these rows in the mean over all, float32.
        proxy: a number with the gradient of the loss, and without its value.
        stages: what is evaluated in this order, before anything else, so that memory is bounded.
    """

    loss: mx.array
    proxy: mx.array
    stages: list[mx.array]

    @classmethod
    def of(cls, loss_of: LossOf, states: mx.array, size: int, count: int) -> "Objective":
        """Create the objective of the rows `states` [R, D], in blocks of `size` rows.

        The mean is over `count` rows, of which these are all or some.
        """
        fixed = mx.stop_gradient(states)
        loss, gradients, stages = mx.array(0.0), list[mx.array](), [states]

        def mean_of(x: mx.array, rows: slice) -> mx.array:
            return loss_of(x, rows) / count

        for start in range(0, states.shape[0], size):
            rows = slice(start, start + size)
            of_block, gradient = mx.value_and_grad(partial(mean_of, rows=rows))(fixed[rows])
            stages += [of_block, gradient]
            loss = loss + of_block
            gradients.append(gradient)
        proxy = (states * mx.stop_gradient(mx.concatenate(gradients))).sum()
        return cls(loss, proxy, stages)


def mean_loss(loss_of: LossOf, states: mx.array, size: int) -> float:
    """Compute the mean loss of the rows `states` [R, D], in blocks of `size` rows."""
    total = 0.0
    for start in range(0, states.shape[0], size):
        rows = slice(start, start + size)
        total += float(loss_of(states[rows], rows).item())  # type: ignore[arg-type]
    return total / states.shape[0]


class _CheckpointedBlock(Block):
    """A layer that keeps only its input, and computes the rest again for its gradients."""

    def __call__(
        self, x: mx.array, rows: mx.array | None, cache: LayerCache, rope: RopeFn
    ) -> mx.array:
        def compute(parameters: dict[str, Any], x: mx.array) -> mx.array:
            self.update(parameters)
            return Block.__call__(self, x, rows, cache, rope)

        output: mx.array = mx.checkpoint(compute)(self.trainable_parameters(), x)
        return output


@contextmanager
def checkpointed_layers(model: Qwen3) -> Iterator[None]:
    """Create a context in which the layers of this model, and of no other, are checkpointed."""
    try:
        for layer in model.layers:
            layer.__class__ = _CheckpointedBlock
        yield
    finally:
        for layer in model.layers:
            layer.__class__ = Block
