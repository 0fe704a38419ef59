"""A follower: takes part in the passes that the leader plans. It decides nothing.

It has no scheduler, no sampling, no text: it holds the caches of sequences by their numbers, builds
its part of each pass while the one before runs, and computes it when the leader says so.
"""

import logging
import os
import time
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import mlx.core as mx

from qwen3_mlx.cache.attention import LayerCache, NoCache
from qwen3_mlx.cache.batched import BatchedCaches
from qwen3_mlx.cache.disk import DiskPrefixes
from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.cache.quantized import CacheFormat
from qwen3_mlx.cache.ragged import ragged_layers
from qwen3_mlx.cluster.part import PartQwen3, Pass
from qwen3_mlx.cluster.plan import Plan
from qwen3_mlx.cluster.wire import END_SECONDS, Channel, WireError

_log = logging.getLogger(__name__)
_SHORTEST_WAIT = 1e-4  # seconds
_PEER_LOST_SECONDS = 2.0  # for the leader to hear first of the machine that is gone


class Inbox:
    """Receives the leader's messages on a thread of its own, which also answers pings.

    When the leader is gone, the process ends there and then: the thread that computes may wait for
    other machines without limit. When the leader ends in order, what it has sent is done before.
    """

    def __init__(self, channel: Channel) -> None:
        """Start the thread."""
        self._channel = channel
        self._messages: SimpleQueue[dict[str, Any]] = SimpleQueue()
        Thread(target=self._receive, name="qwen3-leader", daemon=True).start()

    def get(self, timeout: float | None = None) -> dict[str, Any]:
        """Return the next message.

        Raises:
            Empty: there is none within `timeout` seconds.
        """
        return self._messages.get(timeout=timeout)

    def _receive(self) -> None:
        try:
            while True:
                message = self._channel.receive()
                if "ping" in message:
                    self._channel.send({"pong": 1})
                    continue
                self._messages.put(message)
                if "end" in message:
                    break
        except (EOFError, OSError, WireError) as error:
            _log.warning("the leader is gone (%s)", error)
            os._exit(1)
        time.sleep(END_SECONDS)
        os._exit(1)


class Follower:
    """Executes the plans of the leader with the network of this rank."""

    def __init__(
        self,
        model: PartQwen3,
        channel: Channel,
        inbox: Inbox,
        *,
        cache_format: CacheFormat,
        dtype: mx.Dtype,
        disk: DiskPrefixes | None = None,
    ) -> None:
        """Begin without caches, on the thread that made `model`; `dtype` is of hidden states."""
        self._model = model
        self._channel = channel
        self._inbox = inbox
        self._format = cache_format
        self._dtype = dtype
        self._disk = disk
        self._caches: dict[int, list[KVCache]] = {}
        self._joint = BatchedCaches()
        self._built: tuple[Plan, Pass, Sequence[mx.array]] | None = None
        self._running: tuple[int, list[mx.array]] | None = None
        self._begun_at = self._seconds = 0.0

    def run(self) -> None:
        """Execute messages to the end; what fails is sent to the leader before it is raised."""
        try:
            while "end" not in (message := self._next()):
                self._execute(message)
            self._finish()
        except Exception as error:
            if isinstance(error, RuntimeError):  # of the device, or a connection of another rank
                time.sleep(_PEER_LOST_SECONDS)
            self._channel.send({"failed": str(error) or repr(error)})
            raise

    def _next(self) -> dict[str, Any]:
        """Return the next message; while a pass runs, at most half its time is spent waiting."""
        if self._running:
            try:
                return self._inbox.get(timeout=max(_SHORTEST_WAIT, self._seconds / 2))
            except Empty:
                self._finish()
        return self._inbox.get()

    def _execute(self, message: dict[str, Any]) -> None:
        for event in message.get("e", ()):
            self._apply(*event)
        if "plan" in message:
            self._build(Plan.of_message(message))
        elif "go" in message:
            self._submit()
        elif "drop" in message:
            self._drop()
        elif "read" in message:
            self._channel.send({"answer": self._read(message["read"], message["ids"])})
        elif "write" in message:
            self._write(message["write"], message["ids"])

    def _apply(self, key: int, parent: int | None = None, tokens: int = 0) -> None:
        """Drop the caches with a number, make them, or make them as a copy; see `plan.Event`."""
        if parent is None:
            self._caches.pop(key, None)
        elif parent == 0:
            self._caches[key] = self._model.make_cache()
        elif parent in self._caches:
            self._joint.split()
            self._caches[key] = [cache.copy(tokens) for cache in self._caches[parent]]

    # --- a pass ---------------------------------------------------------------------------

    def _build(self, plan: Plan) -> None:
        """Build a pass; nothing is computed."""
        rows: Sequence[int] | None = plan.wanted
        layers: Sequence[LayerCache] = [NoCache()] * len(self._model.layers)
        sequences = [self._sequence(part.key, part.offset, part.capacity) for part in plan.parts]
        if plan.columns:
            layers = self._joint.joined(sequences, plan.columns)
            sequences = []  # on joint caches the output depends anyway
        else:
            self._joint.split()
        if sequences:
            lengths = [part.length for part in plan.parts]
            layers, rows = ragged_layers(sequences, lengths, [part.wanted for part in plan.parts])
        built = self._model.run_part((plan.batch, plan.tokens), layers, rows, self._dtype)
        states = [array for caches in sequences for layer in caches for array in layer.state]
        self._built = plan, built, states

    def _sequence(self, key: int, offset: int, capacity: int) -> list[KVCache]:
        """Return the caches with a number, cut to what the leader has of them."""
        if key not in self._caches:
            self._caches[key] = self._model.make_cache(cache_format=self._format)
        for cache in (caches := self._caches[key]):
            cache.truncate(offset)
            cache.reserve(capacity)
            if cache.offset != offset:
                raise AssertionError(f"caches {key} hold {cache.offset} tokens, not {offset}")
        return caches

    def _submit(self) -> None:
        """Wait for the pass that runs, and begin to compute the one that is built."""
        self._finish()
        assert self._built
        plan, built, states = self._built
        self._built = None
        self._begun_at = time.perf_counter()
        built.submit(states)
        self._running = plan.step, [built.output, *states]

    def _finish(self) -> None:
        """Wait for the pass that runs, and acknowledge it."""
        if self._running:
            step, arrays = self._running
            self._running = None
            mx.eval(arrays)
            self._seconds = time.perf_counter() - self._begun_at
            self._channel.send({"ack": step})

    def _drop(self) -> None:
        """Forget the pass that is built, and the caches that it would have written."""
        if self._built:
            for part in self._built[0].parts:
                self._caches.pop(part.key, None)
            self._joint.abandon()
        self._built = None

    # --- prefixes on disk -----------------------------------------------------------------------

    def _read(self, key: int, ids: Sequence[int]) -> int:
        """Restore caches for these ids; return for how many."""
        self._finish()
        caches = self._model.make_cache(cache_format=self._format)
        self._caches[key] = caches
        return self._disk.read(ids, len(ids), caches) if self._disk else 0

    def _write(self, key: int, ids: Sequence[int]) -> None:
        self._finish()
        if not self._disk or key not in self._caches:
            return
        self._joint.split()
        try:
            self._disk.write(ids, self._caches[key], lambda: False)
        except OSError as error:
            _log.warning("prompts are no longer kept on disk: %s", error)
            self._disk = None
