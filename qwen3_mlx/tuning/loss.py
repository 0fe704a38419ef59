"""The loss of a batch: the cross entropy of the learned tokens.

Logits are computed of the learned rows only. With `checkpointing` the layers keep only their input
and compute the rest again (arXiv 1604.06174).

R rows, D hidden.
"""

import mlx.core as mx
import mlx.nn as nn

from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.model.training import LossOf, checkpointed_layers
from qwen3_mlx.tuning.batches import Batch


def cross_entropy(model: Qwen3, batch: Batch) -> LossOf:
    """Return the cross entropy of the learned tokens of a batch, in nats, as a loss of rows."""

    def loss_of(x: mx.array, rows: slice) -> mx.array:
        losses: mx.array = nn.losses.cross_entropy(model.head(x), batch.targets[rows])
        return losses.astype(mx.float32).sum()

    return loss_of


def learned_states(model: Qwen3, batch: Batch, *, checkpointing: bool = False) -> mx.array:
    """Return the last hidden states [R, D] that the learned tokens are predicted from."""
    ids = batch.ids[:, :-1]
    if checkpointing:
        with checkpointed_layers(model):
            states = model.hidden(ids)
    else:
        states = model.hidden(ids)
    return states.reshape(-1, states.shape[-1])[batch.rows]
