"""One pair of buffers a layer for all sequences that decode together.

With caches of their own (`Ragged`), each of B sequences costs the host two writes and a call in
every layer; here it is two writes and one call for all, at the price of a copy of all caches when
somebody joins or leaves, and of a mask. That pays where the host is what a step waits for: small
models, several sequences, in steps of nothing but decoding.

A step writes one column, every row its own token. Where a row is shorter than others, or has been
rewound, it has columns that are not its own: those are masked. The order of columns means nothing,
since keys are rotated by their own positions.

B sequences, C columns, H query heads, K key/value heads, E head size.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from qwen3_mlx.cache.attention import LayerCache, RopeFn, attend_batched
from qwen3_mlx.cache.kv import KVCache, next_capacity
from qwen3_mlx.cache.ragged import as_batch

_LEAST = 4  # sequences; with fewer the host is as fast without
_PATIENCE = 4  # steps that they must have been together for


class BatchedCaches:
    """Puts the caches of sequences together while they stay together, and apart again."""

    def __init__(self) -> None:
        self._slots: _Slots | None = None
        self._members: list[Sequence[KVCache]] = []
        self._steps = 0

    def layers(
        self, sequences: Sequence[Sequence[KVCache]], room: int
    ) -> "Sequence[LayerCache] | None":
        """Give what answers a step with one token of each of `sequences`, in their order.

        None where caches of their own do: there are few of them, they have only just met, or the
        copy does not fit `room` tokens. Whoever was together is apart then.
        """
        same = len(sequences) == len(self._members) and all(
            one[0] is other[0] for one, other in zip(sequences, self._members, strict=True)
        )
        if not same or (self._slots and self._slots.full):
            self.split()
            self._members = list(sequences)
        self._steps += 1
        if not self._slots and len(sequences) >= _LEAST and self._steps > _PATIENCE:
            columns = next_capacity(max(caches[0].offset for caches in sequences))
            if len(sequences) * columns <= room:
                self._slots = _Slots(sequences, columns)
        return self._slots.next_step() if self._slots else None

    def split(self) -> None:
        """Give every sequence its own caches again; to be done before anybody else uses them."""
        if self._slots:
            self._slots.split()
        self.abandon()

    def abandon(self) -> None:
        """Forget about them: their caches are lost."""
        self._slots, self._members, self._steps = None, [], 0


class _Slots:
    """The rows of a batch: whose they are, and which columns hold tokens of each."""

    def __init__(self, sequences: Sequence[Sequence[KVCache]], columns: int) -> None:
        self.column = max(caches[0].offset for caches in sequences)  # the next to be written
        self._mask: mx.array | None = None  # [B, H, 1, C] of the step that is built
        self._sequences = sequences
        self._counts = [caches[0].offset for caches in sequences]
        self._own = np.zeros((len(sequences), columns), dtype=np.bool_)
        for row, count in enumerate(self._counts):
            self._own[row, :count] = True
        self._even = min(self._counts) == self.column
        self._layers = [_Layer(caches, self, columns) for caches in zip(*sequences, strict=True)]

    @property
    def full(self) -> bool:
        """Whether there is no column left; the last one is never written, see `KVCache`."""
        return self.column + 1 >= self._own.shape[1]

    def next_step(self) -> "Sequence[_Layer]":
        """Begin a step: take note of who has forgotten tokens, and lay out its column."""
        for row, caches in enumerate(self._sequences):
            if (kept := caches[0].offset) < self._counts[row]:
                self._own[row, np.flatnonzero(self._own[row])[kept:]] = False
                self._counts[row], self._even = kept, False
            self._counts[row] += 1
        self._own[:, self.column] = True
        self.column += 1
        self._mask = None if self._even else mx.array(self._own[:, None, None, : self.column])
        return self._layers

    def mask(self, heads: int) -> mx.array | None:
        """Give the columns that each row may see, [B, H, 1, C]; None if that is all of them.

        It is laid out for every head once a step: Metal's kernel would copy it in every layer.
        """
        if self._mask is not None and self._mask.shape[1] != heads:
            rows, _, _, columns = self._mask.shape
            self._mask = mx.contiguous(mx.broadcast_to(self._mask, (rows, heads, 1, columns)))
        return self._mask

    def split(self) -> None:
        """Copy each row's columns into caches of their own, a layer at a time."""
        own = [np.flatnonzero(row) for row in self._own]
        for layer in self._layers:
            layer.split(own)


class _Layer:
    """The joint caches of one layer."""

    def __init__(self, caches: Sequence[KVCache], slots: _Slots, columns: int) -> None:
        self._caches = caches
        self._slots = slots
        states = [cache.release() for cache in caches]
        self._buffers = []
        for which in range(2):  # keys, values
            _, heads, _, size = states[0][which].shape
            joint = mx.zeros((len(caches), heads, columns, size), dtype=states[0][which].dtype)
            for row, state in enumerate(states):
                joint[row : row + 1, :, : state[which].shape[2]] = state[which]
            self._buffers.append(joint)

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, rope: RopeFn
    ) -> mx.array:
        """Answer for a token of each sequence: q, k, v are [1, ., B, E]."""
        q, k, v = as_batch(q, k, v, self._caches, rope)
        for cache in self._caches:
            cache.offset += 1
        keys, values = self._buffers
        stop = self._slots.column
        keys[:, :, stop - 1 : stop], values[:, :, stop - 1 : stop] = k, v
        seen = keys[:, :, :stop], values[:, :, :stop]
        answers = attend_batched(q, *seen, scale=scale, mask=self._slots.mask(q.shape[1]))
        return answers.transpose(2, 1, 0, 3)

    def split(self, own: Sequence[np.ndarray]) -> None:
        rows = []
        for row, (cache, columns) in enumerate(zip(self._caches, own, strict=True)):
            which = mx.array(columns[: cache.offset])
            rows.append([mx.take(joint[row : row + 1], which, axis=2) for joint in self._buffers])
        mx.eval(rows)
        for cache, state in zip(self._caches, rows, strict=True):
            cache.restore(state)
        self._buffers.clear()
