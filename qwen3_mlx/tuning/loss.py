"""The loss of a batch: the cross entropy of the learned tokens, and how far replies moved.

Logits are computed of the rows that are learned only. With `checkpointing` the layers keep only
their input, and the head computes some rows at a time; what the gradients need is computed again
(arXiv 1604.06174).

R rows, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qwen3_mlx.cache.attention import LayerCache, RopeFn
from qwen3_mlx.model.qwen3 import Block, Qwen3
from qwen3_mlx.tuning.batches import Batch

_BLOCK = 1 << 23  # logits held at once: 32 MiB in float32


def cross_entropy(model: Qwen3, batch: Batch, *, checkpointing: bool = False) -> mx.array:
    """Return the mean cross entropy of the learned tokens of a batch, in nats, float32."""
    states = learned_states(model, batch, checkpointing=checkpointing)

    def loss_of(x: mx.array, rows: slice) -> mx.array:
        losses: mx.array = nn.losses.cross_entropy(model.head(x), batch.targets[rows])
        return losses.astype(mx.float32).sum()

    return _mean_over_rows(loss_of, states, model.config.vocab_size, checkpointing)


def divergence(
    model: Qwen3, batch: Batch, base_states: mx.array, *, checkpointing: bool = False
) -> mx.array:
    """Return the mean KL divergence of a model from the base model on a batch, in nats, float32.

    `base_states` [R, D] are the base model's `learned_states`, without a gradient. Both share one
    head, which is never tuned.
    """
    states = learned_states(model, batch, checkpointing=checkpointing)

    def loss_of(x: mx.array, rows: slice) -> mx.array:
        log_q = _log_softmax(model.head(x))
        log_p = mx.stop_gradient(_log_softmax(model.head(base_states[rows])))
        return (mx.exp(log_p) * (log_p - log_q)).sum()

    return _mean_over_rows(loss_of, states, model.config.vocab_size, checkpointing)


def learned_states(model: Qwen3, batch: Batch, *, checkpointing: bool = False) -> mx.array:
    """Return the last hidden states [R, D] that the learned tokens are predicted from."""
    ids = batch.ids[:, :-1]
    if checkpointing:
        with _checkpointed_layers(model):
            states = model.hidden(ids)
    else:
        states = model.hidden(ids)
    return states.reshape(-1, states.shape[-1])[batch.rows]


def _mean_over_rows(
    loss_of: Callable[[mx.array, slice], mx.array],
    states: mx.array,
    vocabulary: int,
    checkpointing: bool,
) -> mx.array:
    count = states.shape[0]
    size = max(1, _BLOCK // vocabulary) if checkpointing else count
    total = mx.array(0.0)
    for start in range(0, count, size):
        rows = slice(start, start + size)

        # Targets are closed over: mx.checkpoint differentiates all arguments, and integers have
        # no gradient.
        def loss(x: mx.array, rows: slice = rows) -> mx.array:
            return loss_of(x, rows)

        total = total + (mx.checkpoint(loss) if checkpointing else loss)(states[rows])
    return total / count


def _log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


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
def _checkpointed_layers(model: Qwen3) -> Iterator[None]:
    """Create a context in which the layers of this model, and of no other, are checkpointed."""
    try:
        for layer in model.layers:
            layer.__class__ = _CheckpointedBlock
        yield
    finally:
        for layer in model.layers:
            layer.__class__ = Block
