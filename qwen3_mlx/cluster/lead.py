"""The leader's network: each forward pass is planned for the followers, then its own part runs.

The engine does not know of it: it has a network that takes ids and caches. The followers know of
caches by numbers, which the cache of a sequence's first layer bears.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from threading import Event as Flag
from threading import current_thread
from typing import Self
from weakref import finalize

import mlx.core as mx

from qwen3_mlx.cache.attention import LayerCache, NoCache
from qwen3_mlx.cache.batched import JointCache
from qwen3_mlx.cache.disk import DiskPrefixes
from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.cache.quantized import PLAIN, CacheFormat, QuantizedKVCache
from qwen3_mlx.cache.ragged import Ragged
from qwen3_mlx.checkpoint.shard import Share
from qwen3_mlx.cluster.crew import Crew
from qwen3_mlx.cluster.part import PartQwen3, Pass
from qwen3_mlx.cluster.plan import Event, Plan, PlanPart
from qwen3_mlx.cluster.wire import Message
from qwen3_mlx.engine.worker import WorkerThread
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.model.config import ModelConfig

NOT_LED = "embedding and reranking run on one machine: load the model without hosts"
"""Why such a model is not loaded, nor such a pass planned."""


class CacheBook:
    """The numbers of the caches that followers have, and what happened to them since the last plan.

    Attributes:
        events: copies and drops that followers have not been sent.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._keys = count(1)

    def enter(self, cache: "_NamedCache") -> int:
        """Return a new number for a cache; that it is dropped becomes an event."""
        key = next(self._keys)
        finalize(cache, self.events.append, (key,)).atexit = False
        return key

    def take(self) -> list[Event]:
        """Return the events, and forget them."""
        # The collector may append while this runs: so no event is lost between two statements.
        events = self.events[: len(self.events)]
        del self.events[: len(events)]
        return events


class _NamedCache(KVCache):
    """The cache of a sequence's first layer: followers know the sequence by its `key`."""

    key = 0
    _book: CacheBook

    def named(self, book: CacheBook) -> Self:
        """Return the cache itself, with a number of its own."""
        self._book, self.key = book, book.enter(self)
        return self

    def copy(self, tokens: int) -> Self:
        other = super().copy(tokens).named(self._book)
        self._book.events.append((other.key, self.key, other.offset))
        return other


class _NamedQuantizedCache(_NamedCache, QuantizedKVCache):
    """The same, quantized."""


class LedQwen3(PartQwen3):
    """The network of rank 0, which the followers of its `crew` compute with.

    `passes` counts the passes, `waited` the seconds spent waiting for the stages before, in a
    pipeline; `is_computing` is True while it waits for the device, and so perhaps
    for other machines.
    """

    crew: Crew  # set when the followers are ready

    def __init__(
        self, config: ModelConfig, share: Share, group: mx.distributed.Group, dtype: mx.Dtype
    ) -> None:
        """Create it unevaluated; `dtype` is that of hidden states."""
        super().__init__(config, share, group)
        self.passes = 0
        self.waited = 0.0
        self.is_computing = False
        self._dtype = dtype
        self._book = CacheBook()
        self._pending: Pass | None = None
        self._is_deferred = self._is_announced = False

    def make_cache(self, capacity: int = 0, *, cache_format: CacheFormat = PLAIN) -> list[KVCache]:
        """Create one empty cache a layer, the first of which bears a number."""
        caches = super().make_cache(capacity, cache_format=cache_format)
        if cache_format.key_bits:
            size = self.config.head_dim
            caches[0] = _NamedQuantizedCache(cache_format, size, capacity).named(self._book)
        else:
            caches[0] = plain = _NamedCache(capacity).named(self._book)
            self._book.events.append((plain.key, 0))
        return caches

    def tell(self, message: Message) -> Message:
        """Return a message with the events that followers must know before it."""
        events = self._book.take()
        return {**message, "e": events} if events else message

    def decode(
        self, ids: mx.array, cache: Sequence[LayerCache]
    ) -> tuple[mx.array | None, mx.array]:
        """Compute `halves`; other ranks have no compiled functions."""
        return self.halves(ids, cache)

    def halves(
        self,
        ids: mx.array,
        cache: Sequence[LayerCache] | None = None,
        wanted: Sequence[int] | None = None,
    ) -> tuple[None, mx.array]:
        """Compute the last hidden states [B, Q, D] of ids [B, L], not in halves.

        All ranks take part. Unless it is deferred, it returns when they are computed.

        Raises:
            ClusterError: the cluster is down.
            Qwen3Error: the caches are of a kind that followers do not have.
        """
        if self._pending:  # it was built and not submitted, because something else failed
            self.crew.send({"drop": self.passes})
            self._pending = None
        plan = self._plan(ids, cache, wanted)
        self.crew.send(self.tell(plan.to_message()))
        self.passes = plan.step
        layers = cache or [NoCache()] * len(self.layers)
        self._pending = built = self.run_part(ids, layers, wanted, self._dtype)
        if not self._is_deferred:
            states = [array for layer in cache or () for array in _states(layer)]
            self.submit(states)
            self.wait([built.output, *states])
        return None, built.output

    def _plan(
        self, ids: mx.array, cache: Sequence[LayerCache] | None, wanted: Sequence[int] | None
    ) -> Plan:
        batch, tokens = ids.shape
        step = self.passes + 1
        if not cache:
            return Plan(step, batch, tokens, wanted=wanted)
        first, counts = cache[0], [tokens if wanted is None else len(wanted)]
        caches, lengths, columns = [first], [tokens], 0
        if isinstance(first, Ragged):
            caches, lengths, counts = list(first.caches), [*first.lengths], [*first.wanted]
        elif isinstance(first, JointCache):
            caches, columns = list(first.caches), first.columns
            lengths = counts = [1] * tokens
        parts = []
        for one, length, number in zip(caches, lengths, counts, strict=True):
            if not isinstance(one, _NamedCache):
                raise Qwen3Error(NOT_LED)
            parts.append(PlanPart(one.key, one.offset, length, number, one.capacity))
        return Plan(step, batch, tokens, parts, columns=columns)

    # --- when a pass is computed ------------------------------------------------------------------

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Create a context whose forward passes are computed only by `submit`, then `wait`."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def announce(self) -> None:
        """Start the pass that is built on the followers, after the one that runs.

        From here on it must be submitted: they wait for this rank.
        """
        if self._pending and not self._is_announced:
            self.crew.send({"go": self.passes})
            self._is_announced = True

    def submit(self, arrays: Sequence[mx.array]) -> None:
        """Start the pass that is built, on the followers and here."""
        self.announce()
        built, self._pending, self._is_announced = self._pending, None, False
        if built is None:  # it is submitted already
            mx.async_eval(arrays)
            return
        self.crew.begin(self.passes, built.output.shape[1])
        with self._peers_may_fail():
            self.waited += built.submit(arrays)

    def wait(self, arrays: Sequence[mx.array]) -> None:
        """Wait until arrays that were submitted are computed.

        Raises:
            ClusterError: a machine is gone.
        """
        with self._peers_may_fail():
            mx.eval(arrays)
        self.crew.done()

    @contextmanager
    def _peers_may_fail(self) -> Iterator[None]:
        """Raise the error of the device as that of the machine that caused it."""
        self.is_computing = True
        try:
            yield
        except RuntimeError as error:
            _park_if_replaced()
            self.is_computing = False
            raise self.crew.reason(error) from error
        _park_if_replaced()
        self.is_computing = False


def _park_if_replaced() -> None:
    """Never return on a thread that was given up: another does its work now."""
    thread = current_thread()
    if isinstance(thread, WorkerThread) and thread.is_replaced:
        Flag().wait()


def _states(layer: LayerCache) -> Sequence[mx.array]:
    if isinstance(layer, Ragged):
        return [array for cache in layer.caches for array in cache.state]
    return layer.state if isinstance(layer, KVCache) else ()


class LedDisk(DiskPrefixes):
    """Prefixes on disk, of which every rank has the part of its own caches."""

    model: LedQwen3  # set before it is used

    def read(self, ids: Sequence[int], max_tokens: int, caches: Sequence[KVCache]) -> int:
        """Restore the longest prefix that all ranks have; see `DiskPrefixes.read`."""
        own, first = super().read(ids, max_tokens, caches), caches[0]
        if not own or not isinstance(first, _NamedCache):
            return 0
        message = {"read": first.key, "ids": list(ids[:own])}
        tokens: int = min(own, *self.model.crew.ask(self.model.tell(message)))
        for cache in caches:
            cache.truncate(tokens)
        return tokens

    def write(
        self, ids: Sequence[int], caches: Sequence[KVCache], interrupted: Callable[[], bool]
    ) -> bool:
        """Write the prefix on every rank; see `DiskPrefixes.write`."""
        first = caches[0]
        assert isinstance(first, _NamedCache)
        if not super().write(ids, caches, interrupted):
            return False
        self.model.crew.send(self.model.tell({"write": first.key, "ids": list(ids)}))
        return True
