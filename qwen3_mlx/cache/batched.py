"""Joint KV caches: one pair of buffers a layer for all sequences that decode together.

With separate caches (`Ragged`), each of B sequences costs the host two writes and a call in every
layer. Joint caches cost two writes and one call for all, plus a mask, and a copy of all caches
when a sequence joins or leaves. They pay where the step waits for the host: with small models and
several sequences, in steps that only decode.

Each step writes one column, which holds one token of every row. A row that is shorter than others,
or was rolled back, has columns that hold none of its tokens: those are masked. The order of columns
has no meaning, since keys are rotated by their own positions.

B sequences, C columns, H query heads, K key/value heads, E head size.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from qwen3_mlx.cache.attention import RopeFn, attend_batched
from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.cache.ragged import as_batch

_MIN_SEQUENCES = 2
_MIN_SHARED_STEPS = 4  # steps with the same sequences before the copy is worth it


class BatchedCaches:
    """Moves the caches of sequences that keep decoding together into joint buffers, and back."""

    def __init__(self) -> None:
        self._slots: _Slots | None = None
        self._layers: Sequence[JointCache] = ()
        self._members: list[Sequence[KVCache]] = []
        self._steps = 0

    def layers(
        self, sequences: Sequence[Sequence[KVCache]], room: int
    ) -> "Sequence[JointCache] | None":
        """Return the layers' joint caches for a step with one token of each of `sequences`.

        The rows are in the order of `sequences`. None if their separate caches serve the step:
        there are few sequences, they have shared too few steps or soon grow, or the copy does not
        fit `room` tokens. An existing batch of other sequences is split first.
        """
        if not self._has(sequences) or (self._slots and self._slots.full):
            # Separate caches come back before a changed or full batch is laid out anew: rows and
            # columns are fixed when the joint buffers are made.
            self.split()
            self._members = list(sequences)
        self._steps += 1
        if not self._slots and len(sequences) >= _MIN_SEQUENCES and self._steps > _MIN_SHARED_STEPS:
            # As many columns as the separate caches have at most. All rows are as long as the
            # longest: a batch of very uneven lengths may not fit.
            columns = max(caches[0].capacity for caches in sequences)
            longest = max(caches[0].offset for caches in sequences)
            if columns > longest + _MIN_SHARED_STEPS and len(sequences) * columns <= room:
                self._join(columns)
        return self._next_step() if self._slots else None

    def joined(
        self, sequences: Sequence[Sequence[KVCache]], columns: int
    ) -> "Sequence[JointCache]":
        """Return the layers' joint caches as `layers` does, of so many columns, whatever it costs.

        A batch of other sequences or columns must have been split before.
        """
        if not self._slots:
            self._members = list(sequences)
            self._join(columns)
        assert self._has(sequences) and self._layers[0].columns == columns
        return self._next_step()

    def _join(self, columns: int) -> None:
        self._slots = slots = _Slots(self._members, columns)
        # The slots do not know of the layers: in a circle both would stay, with their buffers,
        # until a garbage collection.
        self._layers = [JointCache(caches, slots) for caches in zip(*self._members, strict=True)]

    def _next_step(self) -> "Sequence[JointCache]":
        assert self._slots
        self._slots.next_step()
        return self._layers

    def _has(self, sequences: Sequence[Sequence[KVCache]]) -> bool:
        """Return whether these are the members, in their order, which is that of the rows."""
        # The cache object of the first layer identifies a sequence.
        return len(sequences) == len(self._members) and all(
            one[0] is other[0] for one, other in zip(sequences, self._members, strict=True)
        )

    def split(self) -> None:
        """Restore the separate caches of every sequence; required before any other use of them."""
        if self._slots:
            own = self._slots.own()
            for layer in self._layers:  # one at a time
                layer.split(own)
        self.abandon()

    def abandon(self) -> None:
        """Drop the batch without copying anything back: the contents of its caches are lost.

        After an error of the device nothing in the buffers can be relied on.
        """
        self._slots, self._layers, self._members, self._steps = None, (), [], 0


class _Slots:
    """The rows of a batch: the sequence of each, and the columns that hold its tokens."""

    def __init__(self, sequences: Sequence[Sequence[KVCache]], columns: int) -> None:
        self.column = max(caches[0].offset for caches in sequences)  # the next to be written
        self._mask: mx.array | None = None  # [B, H, 1, C] of the step that is built
        self._sequences = sequences
        self._counts = [caches[0].offset for caches in sequences]
        self._own = np.zeros((len(sequences), columns), dtype=np.bool_)  # [B, C]
        for row, count in enumerate(self._counts):
            self._own[row, :count] = True
        # While every column holds a token of every row, no mask is needed. A mask costs a
        # transfer from the host in every step, and rules out faster kernels.
        self._even = min(self._counts) == self.column

    @property
    def columns(self) -> int:
        """The tokens that a row has room for."""
        return int(self._own.shape[1])

    @property
    def full(self) -> bool:
        """True if no column is left."""
        # As in `KVCache`, the capacity stays beyond what is written: the last column is never used.
        return self.column + 1 >= self.columns

    def next_step(self) -> None:
        """Start a step: apply rollbacks, and assign the next column to it."""
        for row, caches in enumerate(self._sequences):
            # A rollback (`truncate`) changes the offsets of a sequence's caches only, the same in
            # all layers. Its columns are masked here and stay unused: the next column is shared
            # by all rows, so no row can go back alone.
            if (kept := caches[0].offset) < self._counts[row]:
                self._own[row, np.flatnonzero(self._own[row])[kept:]] = False
                self._counts[row], self._even = kept, False
            self._counts[row] += 1
        self._own[:, self.column] = True
        self.column += 1
        self._mask = None if self._even else mx.array(self._own[:, None, None, : self.column])

    def mask(self, heads: int) -> mx.array | None:
        """Return the columns that each row may see, [B, H, 1, C]; None if it may see all."""
        # Expanded to all heads once a step and shared by the layers: Metal's kernel would copy a
        # broadcast mask in every layer.
        if self._mask is not None and self._mask.shape[1] != heads:
            rows, _, _, columns = self._mask.shape
            self._mask = mx.contiguous(mx.broadcast_to(self._mask, (rows, heads, 1, columns)))
        return self._mask

    def own(self) -> list[np.ndarray]:
        """Return the columns that hold the tokens of each row."""
        return [np.flatnonzero(row) for row in self._own]


class JointCache:
    """The joint cache of one layer.

    Attributes:
        caches: the separate caches of the sequences, by row; what they hold stands here.
        columns: the tokens that a row has room for.
    """

    def __init__(self, caches: Sequence[KVCache], slots: _Slots) -> None:
        self.caches = caches
        self.columns = slots.columns
        self._slots = slots
        # The joint buffers become the only owner of the tokens: a separate buffer that stayed
        # alive would hold its memory twice.
        states = [cache.release() for cache in caches]
        self._buffers = []
        for which in range(2):  # keys, values
            _, heads, _, size = states[0][which].shape
            joint = mx.zeros((len(caches), heads, self.columns, size), dtype=states[0][which].dtype)
            for row, state in enumerate(states):
                joint[row : row + 1, :, : state[which].shape[2]] = state[which]
            self._buffers.append(joint)

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, rope: RopeFn
    ) -> mx.array:
        """Compute attention for one token of each sequence: q, k, v are [1, ., B, E]."""
        # The order matters: `as_batch` reads the offsets as the positions of the new tokens. The
        # separate caches keep counting, because rollbacks truncate them during a batch, too.
        q, k, v = as_batch(q, k, v, self.caches, rope)
        for cache in self.caches:
            cache.count_released()
        keys, values = self._buffers
        stop = self._slots.column  # `next_step` has counted this step's column already
        # Keys and values have a buffer each: a write to a slice of a larger array would copy all
        # of that array (see `KVCache`).
        keys[:, :, stop - 1 : stop], values[:, :, stop - 1 : stop] = k, v
        seen = keys[:, :, :stop], values[:, :, :stop]
        answers = attend_batched(q, *seen, scale=scale, mask=self._slots.mask(q.shape[1]))
        return answers.transpose(2, 1, 0, 3)

    def split(self, own: Sequence[np.ndarray]) -> None:
        """Copy the columns `own[row]` of each row back into the cache of its sequence."""
        rows = []
        for row, (cache, columns) in enumerate(zip(self.caches, own, strict=True)):
            # At most `offset` columns: a rollback since the last `next_step` is not in `own` yet.
            which = mx.array(columns[: cache.offset])
            rows.append([mx.take(joint[row : row + 1], which, axis=2) for joint in self._buffers])
        # Evaluated now, so that the joint buffers can be freed: no more than one layer is held
        # twice at any time.
        mx.eval(rows)
        for cache, state in zip(self.caches, rows, strict=True):
            cache.restore(state)
        self._buffers.clear()
