"""The caches of sequences: created or restored, batched, kept as prefixes, saved to disk."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx

from qwen3_mlx.cache.attention import LayerCache
from qwen3_mlx.cache.batched import BatchedCaches
from qwen3_mlx.cache.disk import DiskPrefixes
from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.cache.prefix import Prefix, PrefixStore
from qwen3_mlx.cache.quantized import PLAIN
from qwen3_mlx.engine.sequence import SequenceState
from qwen3_mlx.engine.speculation.speculator import Speculator
from qwen3_mlx.model.qwen3 import Qwen3

_log = logging.getLogger(__name__)
# Hidden size of the 1.7B model: above it the host is done before the device, so that batched caches
# save nothing.
_MAX_BATCHED_HIDDEN_SIZE = 2048
_PREFIX_CACHE_DIVISOR = 4  # the prefix cache may take a quarter of the room for caches


class CacheManager:
    """Creates the caches of sequences, and keeps those of ended ones for requests to come."""

    def __init__(
        self, model: Qwen3, speculator: Speculator | None, disk: DiskPrefixes | None, room: int
    ) -> None:
        """Begin with nothing kept; all caches together have `room` tokens."""
        self._model = model
        self._speculator = speculator
        self._disk = disk
        self._prefixes = PrefixStore(room // _PREFIX_CACHE_DIVISOR)
        # A sequence's first layers are those of `model`; those of a draft model stand behind them.
        self._num_layers = len(model.layers)
        small = model.config.hidden_size <= _MAX_BATCHED_HIDDEN_SIZE and model.cache_format == PLAIN
        self._batched = BatchedCaches() if small and not speculator else None

    @property
    def held_by_prefixes(self) -> int:
        """Tokens that the prefix cache has room for."""
        return self._prefixes.held

    def resize(self, room: int) -> None:
        """Adapt the limit of the prefix cache to the room that all caches have together."""
        self._prefixes.limit = room // _PREFIX_CACHE_DIVISOR

    def evict(self, tokens: int) -> None:
        """Evict kept prefixes with room for so many tokens, as far as there are any."""
        self._prefixes.evict(tokens)
        free_buffers()

    def clear(self) -> None:
        """Drop all kept prefixes."""
        self._prefixes.clear()
        free_buffers()

    # --- a sequence's caches --------------------------------------------------------------------

    def allocate(self, sequence: SequenceState) -> None:
        """Create a sequence's caches, filled from the longest kept prefix, in memory or on disk."""
        sequence.layers = self._make_cache()
        ids, limit = sequence.ids, sequence.max_prefix_hit
        disk, prefixes = self._disk, self._prefixes
        try:
            if disk and disk.match_length(ids, limit) > prefixes.match_length(ids, limit):
                sequence.num_computed = disk.read(ids, limit, self.of_model(sequence))
            if not sequence.num_computed and (kept := prefixes.acquire(ids, limit)):
                # Moved, not copied, where a request goes on from another's whole prompt.
                sequence.layers, sequence.room = kept.layers, kept.room
                sequence.num_computed = len(kept.ids)
        except Exception as error:  # noqa: BLE001 - the prompt can be read again
            _log.warning("a kept prompt cannot be restored: %s", str(error) or repr(error))
            sequence.reset()
            sequence.layers = self._make_cache()

    def _make_cache(self) -> list[KVCache]:
        layers = self._model.make_cache()
        return layers + self._speculator.make_cache() if self._speculator else layers

    def of_model(self, sequence: SequenceState) -> list[KVCache]:
        """Return the caches of the model's layers, without those of a draft model."""
        return sequence.layers[: self._num_layers]

    def keep(self, sequence: SequenceState, tokens: int) -> None:
        """Keep the first `tokens` of a sequence's caches as a prefix; it must drop them then."""
        self.split_batch()
        if tokens:
            prompt = len(sequence.request.ids)
            with best_effort("keeping a prompt"):
                prefix = Prefix(sequence.ids[:tokens], sequence.layers, prompt, sequence.room)
                self._prefixes.insert(prefix)

    # --- the caches of a batch ------------------------------------------------------------------

    def batched_layers(
        self, layers: Sequence[Sequence[KVCache]], room: int
    ) -> Sequence[LayerCache] | None:
        """Return joint caches for sequences that decode one token each, if they are faster."""
        return self._batched.layers(layers, room) if self._batched else None

    def split_batch(self) -> None:
        """Copy batched caches back to their sequences, before they are used in another way."""
        if self._batched:
            self._batched.split()

    def abandon_batch(self) -> None:
        """Drop batched caches without copying them back: a failed step may have touched them."""
        if self._batched:
            self._batched.abandon()

    # --- after a restart ------------------------------------------------------------------------

    def save(self, *, interrupted: Callable[[], bool]) -> bool:
        """Write the prompt of one kept prefix to disk; return False if none is left to write."""
        if not self._disk:
            return False
        try:
            if not (prefix := self._prefixes.unsaved()):
                return False
            ids = prefix.ids[: prefix.prompt]
            prefix.saved = not self._disk.is_worth_saving(ids) or self._disk.write(
                ids, prefix.layers[: self._num_layers], interrupted
            )
        except Exception as error:  # noqa: BLE001 - the engine goes on without the disk
            _log.warning("prompts are no longer kept on disk: %s", str(error) or repr(error))
            self._disk = None
        return True


@contextmanager
def best_effort(action: str) -> Iterator[None]:
    """Log an error of the block and go on: the action would only have saved time."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - see above
        _log.warning("%s failed, and is done without: %s", action, str(error) or repr(error))


def free_buffers() -> None:
    """Return the memory of freed arrays to the system."""
    with best_effort("freeing memory"):
        mx.clear_cache()
