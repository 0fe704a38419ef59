"""The network of one rank: the modules of its share, and how its passes meet those of others.

B batch, L tokens, Q queries, D hidden.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from qwen3_mlx.cache.attention import LayerCache
from qwen3_mlx.checkpoint.shard import Share
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.qwen3 import Qwen3, rows_of


@dataclass(slots=True)
class Pass:
    """A pass that is built, and computed when all ranks have built it.

    Attributes:
        output: hidden states; what the other ranks do depends on it being computed.
        sends_first: what is sent before anything is received.
        received: what comes from another rank. It is computed, which waits for that rank, before
            anything that depends on it: a GPU must not wait for another machine.
    """

    output: mx.array
    sends_first: Sequence[mx.array] = ()
    received: Sequence[mx.array] = ()

    def submit(self, arrays: Sequence[mx.array]) -> float:
        """Begin to compute it, with `arrays` that depend on it.

        Return the seconds that were spent waiting for what is received.
        """
        begun_at = time.perf_counter()
        if self.sends_first:
            mx.async_eval(self.sends_first)
        if self.received:
            mx.eval(self.received)
        waited = time.perf_counter() - begun_at
        mx.async_eval(self.output, arrays)
        return waited


class PartQwen3(Qwen3):
    """A network with the modules of a share; its config is that of the share."""

    def __init__(self, config: ModelConfig, share: Share, group: mx.distributed.Group) -> None:
        """Create it unevaluated; the ranks of `group` are those of the shares."""
        super().__init__(config)
        self.share = share
        self._group = group
        if not share.is_stage:
            for layer in self.layers:
                layer.self_attn.reduce = layer.mlp.reduce = self._sum
            return
        if not share.has_tensor(config)("model.embed_tokens.weight"):
            del self.model["embed_tokens"]
        if not share.is_last:
            self.model["norm"] = nn.Identity()
            for head in ("lm_head", "score"):
                self.pop(head, None)

    def _sum(self, x: mx.array) -> mx.array:
        return mx.distributed.all_sum(x, group=self._group)

    def run_part(
        self,
        ids: mx.array | tuple[int, int],
        cache: Sequence[LayerCache],
        wanted: Sequence[int] | None,
        dtype: mx.Dtype,
    ) -> Pass:
        """Build the part of a pass that is this rank's.

        `ids` are [B, L] on rank 0, which alone knows them, and else their shape. The output on rank
        0 are hidden states [B, Q, D] of the positions `wanted`, as in `Qwen3.__call__`; `dtype` is
        that of hidden states.
        """
        _, tokens = ids if isinstance(ids, tuple) else ids.shape
        rows = rows_of(wanted, tokens)
        if self.share.is_stage:
            return self._run_stage(ids, cache, rows, dtype)
        return Pass(self.model(self._share_ids(ids), cache, rows))

    def _share_ids(self, ids: mx.array | tuple[int, int]) -> mx.array:
        """Return the ids [B, L] of rank 0."""
        known = mx.zeros(ids, mx.int32) if isinstance(ids, tuple) else ids.astype(mx.int32)
        # The ring takes some 5 ms, not 0.1, to sum fewer elements than it has ranks.
        padded = mx.pad(known, [(0, 0), (0, self.share.ranks - 1)])
        return self._sum(padded)[:, : known.shape[1]]

    def _run_stage(
        self,
        ids: mx.array | tuple[int, int],
        cache: Sequence[LayerCache],
        rows: mx.array | None,
        dtype: mx.Dtype,
    ) -> Pass:
        """Build a pass through this rank's layers.

        Rank 0 sends the ids to the last rank, which has the first layers; hidden states come back
        from rank to rank.
        """
        share, group = self.share, self._group
        send = partial(mx.distributed.send, group=group)
        sends_first: list[mx.array] = []
        if isinstance(ids, tuple):
            shape = ids
        else:
            shape = (ids.shape[0], ids.shape[1])
            sends_first.append(send(ids.astype(mx.int32), share.ranks - 1))
        if share.is_first:
            received = mx.distributed.recv(shape, mx.int32, 0, group=group)
            x = self.model.embed_tokens(received)
        else:
            width = self.config.hidden_size
            received = mx.distributed.recv((*shape, width), dtype, share.rank + 1, group=group)
            x = received
        # The next stage needs all rows, for its keys and values.
        _, x = self.model.after_embedding(x, cache, rows if share.is_last else None)
        output = x if share.is_last else send(x, share.rank - 1)
        return Pass(output, sends_first, [received])
