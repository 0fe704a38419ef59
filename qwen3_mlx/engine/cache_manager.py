"""The caches of sequences: created or restored, batched, kept as prefixes, saved to disk."""

import logging
from collections.abc import Callable, Sequence

from qwen3_mlx.cache.attention import LayerCache
from qwen3_mlx.cache.batched import BatchedCaches
from qwen3_mlx.cache.disk import DiskPrefixes
from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.cache.prefix import Prefix, PrefixStore
from qwen3_mlx.cache.quantized import PLAIN, CacheFormat
from qwen3_mlx.cache.sequence_caches import SequenceCaches
from qwen3_mlx.engine.best_effort import best_effort, free_buffers
from qwen3_mlx.engine.errors import engine_error
from qwen3_mlx.engine.memory import modules
from qwen3_mlx.engine.request import RequestResult
from qwen3_mlx.engine.sequence import SequenceState
from qwen3_mlx.engine.speculation.speculator import Speculator
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.qwen3 import Qwen3

_log = logging.getLogger(__name__)
# Weights of a layer, below which a step of several sequences waits for the host, so that batched
# caches pay. A separate cache costs the host 75 us a layer (benchmarks.host, AMD EPYC), about half
# of that on a Mac. In the 150 us of four, 400 GB/s read 75 million weights in 4 bits, for four rows
# (`chip_costs`). A layer of 1.7B has 50 million, one of 4B 101 million.
_MAX_BATCHED_LAYER = 75_000_000
_PREFIX_CACHE_DIVISOR = 4  # the prefix cache may take a quarter of the room for caches


class CacheManager:
    """Creates the caches of sequences, and keeps those of ended ones for requests to come."""

    def __init__(
        self,
        model: Qwen3,
        cache_format: CacheFormat,
        speculator: Speculator | None,
        disk: DiskPrefixes | None,
        commit_in_flight: Callable[[], None],
    ) -> None:
        """Begin with nothing kept; `commit_in_flight` commits the step that writes the caches."""
        self._model = model
        self._format = cache_format
        self._speculator = speculator
        self._disk = disk
        self._commit_in_flight = commit_in_flight
        self._prefixes = PrefixStore(0)
        joins = cache_format == PLAIN and not speculator and _waits_for_host(model.config)
        self._batched = BatchedCaches() if joins else None

    @property
    def prefix_room(self) -> int:
        """Tokens that the prefix cache has room for."""
        return self._prefixes.room

    def resize(self, room: int) -> None:
        """Adapt the limit of the prefix cache to the room that all caches have together."""
        self._prefixes.limit = room // _PREFIX_CACHE_DIVISOR

    def evict(self, tokens: int) -> None:
        """Evict kept prefixes with room for so many tokens, as far as there are any."""
        self._prefixes.evict(tokens)
        free_buffers()

    def drop(self) -> None:
        """Drop all kept prefixes."""
        self._prefixes.clear()

    def clear(self) -> None:
        """Drop all kept prefixes, and return their memory to the system."""
        self.drop()
        free_buffers()

    # --- a sequence's caches --------------------------------------------------------------------

    def admit(self, sequence: SequenceState) -> None:
        """Create a sequence's caches, filled from the longest kept prefix, in memory or on disk.

        The sequence may end here: by its forced tokens, or with an error.
        """
        try:
            # At the first admission only: after a preemption `ids` has the forced tokens already.
            if sequence.cached_tokens is None:
                sequence.force()
        except BaseException as error:  # noqa: BLE001 - ends this request only
            sequence.end(error)
        if sequence.ended:
            return
        try:
            # The last token is always computed: its logits are needed, and a request ends in a
            # step. With prompt logprobs, so are the positions that have not been scored.
            limit, scores = len(sequence.ids) - 1, sequence.request.on_prompt_logprobs is not None
            if scores:
                limit = min(limit, sequence.num_scored)
            # What is scored after a context is no turn that goes on: others share that context.
            adapter = sequence.request.adapter
            sequence.start(*self._allocate(sequence.ids, limit, adapter, always_copy=scores))
        except Exception as error:  # noqa: BLE001 - ends this request only
            sequence.end(engine_error(error))

    def _allocate(
        self, ids: Sequence[int], limit: int, adapter: int | None, *, always_copy: bool
    ) -> tuple[SequenceCaches, int]:
        """Return caches that hold up to `limit` of the `ids`, and how many they hold."""
        prefixes = self._prefixes
        disk = self._disk if adapter is None else None
        try:
            if disk and disk.match_length(ids, limit) > prefixes.match_length(ids, limit, adapter):
                caches = self._make_caches()
                if length := disk.read(ids, limit, caches.layers):
                    return caches, length
            if kept := prefixes.acquire(ids, limit, adapter, always_copy=always_copy):
                # Moved, not copied, where a request goes on from another's whole prompt.
                return kept.caches, len(kept.ids)
        except Exception as error:  # noqa: BLE001 - the prompt can be read again
            _log.warning("a kept prompt cannot be restored: %s", str(error) or repr(error))
        return self._make_caches(), 0

    def _make_caches(self) -> SequenceCaches:
        drafting = self._speculator.make_cache() if self._speculator else ()
        layers = self._model.make_cache(cache_format=self._format)
        return SequenceCaches(layers, draft_layers=drafting)

    def preempt(self, sequence: SequenceState) -> None:
        """Move a sequence's caches to the prefix cache; it starts again from there, or earlier."""
        # The step in flight writes these caches. Committing it may end the sequence.
        self._commit_in_flight()
        if not sequence.ended:
            self._keep(sequence, sequence.num_computed)
            sequence.drop_caches()

    def release(self, sequence: SequenceState) -> None:
        """Move the caches of an ended sequence to the prefix cache, unless it has failed."""
        outcome, keep = sequence.outcome, 0
        if isinstance(outcome, RequestResult):
            # `num_computed` may count tokens that the host does not know: without ids, no prefix.
            keep = min(sequence.num_computed, len(sequence.ids))
            if outcome.reason == "cancelled":  # only the prefix that it was given
                keep = min(keep, sequence.num_prefix_hit)
        self._keep(sequence, keep)
        sequence.drop_caches()
        free_buffers()

    def _keep(self, sequence: SequenceState, tokens: int) -> None:
        self.split_batch()
        if tokens:
            with best_effort("keeping a prompt"):
                request, ids = sequence.request, sequence.ids[:tokens]
                self._prefixes.insert(
                    Prefix(ids, sequence.caches, len(request.ids), adapter=request.adapter)
                )

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
                ids, prefix.caches.layers, interrupted
            )
        except Exception as error:  # noqa: BLE001 - the engine goes on without the disk
            _log.warning("prompts are no longer kept on disk: %s", str(error) or repr(error))
            self._disk = None
        return True


def _waits_for_host(config: ModelConfig) -> bool:
    """Return whether steps of several sequences take the host longer than the device.

    Not with experts: each sequence reads others. And of 30B-A3B, with 8 query heads a key head, a
    batch's mask would rule out Metal's kernel for long contexts.
    """
    layer = sum(one.size for one in modules(config) if one.path.startswith("model.layers.0."))
    return config.experts is None and layer <= _MAX_BATCHED_LAYER
