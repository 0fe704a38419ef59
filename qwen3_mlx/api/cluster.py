"""Loading a checkpoint on several machines: the leader's side. `api/follow.py` is the followers'.

The followers join, say what memory they have, and are sent their share. Each fetches and reads its
own part; then all connect for computing, and the engine starts here.
"""

import atexit
import hashlib
import logging
import os
import random
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.api.capacity import MIN_CONTEXT
from qwen3_mlx.api.checkpoints import Checkpoints, ResolvedCheckpoint
from qwen3_mlx.cache.disk import DiskPrefixes
from qwen3_mlx.checkpoint.fingerprint import weight_digests
from qwen3_mlx.checkpoint.hub import Source
from qwen3_mlx.checkpoint.shard import Share
from qwen3_mlx.checkpoint.weights import INDEX
from qwen3_mlx.cluster import ring
from qwen3_mlx.cluster.crew import LIMIT_SECONDS, Crew, Peer
from qwen3_mlx.cluster.launch import (
    BY_HAND,
    LAUNCHED,
    ClusterOptions,
    HostName,
    Started,
    link_address,
    read_hosts,
)
from qwen3_mlx.cluster.lead import LedDisk, LedQwen3
from qwen3_mlx.cluster.shares import TENSOR, Host, Model, describe, divide
from qwen3_mlx.cluster.wire import PORTS, Listener, Message, WireError, free_port, new_key
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.memory import (
    MIN_CHUNK,
    RESERVE,
    Budget,
    Workload,
    activation_bytes,
    count_weights,
)
from qwen3_mlx.engine.worker import Worker
from qwen3_mlx.errors import ClusterError, Qwen3Error
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.quantization import FormatOf
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.model.sizes import DEMO, demo_folder

_log = logging.getLogger(__name__)
_JOIN_SECONDS = 60.0  # for followers that this process has started
_SLICE_SECONDS = 0.5
_WAKE_SECONDS = 2.0  # for the device to notice that another machine is gone
LAUNCHED_PORT = 500  # the control port lies so far above the first port of mlx.launch's ring


class Cluster:
    """The machines that this process leads, from the hello to the end.

    Attributes:
        crew: the followers, once they compute.
        peers: the followers.
        address: that of this machine on the link.
        hosts: the names of all, rank 0 first.
        shares: the part of each.
        network: the shape of the whole network.
    """

    crew: Crew
    network: ModelConfig
    hosts: list[Host]
    shares: list[Share]

    def __init__(self, options: ClusterOptions) -> None:
        """Start the followers and wait until they have joined.

        Raises:
            Qwen3Error: one of them does not join.
        """
        ring.refuse_second_group()
        self._options = options
        self._started = Started()
        self._transport: dict[str, Any] | None = None
        self.peers: list[Peer] = []
        self._ports: dict[int, int] = {}
        self._limit = LIMIT_SECONDS
        if options.hosts == LAUNCHED:
            names, address, key, port = self._launched()
        else:
            names = read_hosts(options.hosts, options.hostfile)
            address, key, port = link_address(names), new_key(), 0
        self._names, self.address = names, address
        listener = Listener(address, key, port)
        try:
            if options.hosts != LAUNCHED:
                self._started.start(names, address, listener.port, key)
            self._assemble(listener, key)
        except BaseException:
            self.close(at_once=True)
            raise
        finally:
            listener.close()

    def _launched(self) -> tuple[list[HostName], str, str, int]:
        """Return names, address, key and port of a cluster that mlx.launch has started."""
        _, self._transport = ring.launched_transport()
        address, port, key = control_of(self._transport)
        count = len(self._transport.get("hosts") or self._transport["devices"])
        return [HostName(f"rank {rank}") for rank in range(count)], address, key, port

    def _assemble(self, listener: Listener, key: str) -> None:
        """Wait until all followers have joined."""
        memory: dict[int, int] = {}
        by_hand = [rank for rank, host in enumerate(self._names) if host.name == BY_HAND]
        for _ in by_hand:
            _log.warning(
                "waiting for a follower; on it, run: qwen3 follow --join %s:%d --key %s",
                *(self.address, listener.port, key),
            )
        end = time.monotonic() + _JOIN_SECONDS
        while len(memory) < len(self._names) - 1:
            self._started.check(self._names)
            try:
                channel, hello = listener.accept(_SLICE_SECONDS)
            except TimeoutError:
                if time.monotonic() > end and not by_hand:
                    raise Qwen3Error(
                        f"not all followers have joined within {_JOIN_SECONDS:.0f} s"
                    ) from None
                continue
            rank = hello.get("rank")
            if rank is None and by_hand:
                rank = by_hand.pop(0)
            if not isinstance(rank, int) or rank in memory or not 0 < rank < len(self._names):
                channel.send({"refused": f"this cluster has no rank {rank} left"})
                channel.close()
                continue
            memory[rank] = int(hello["memory"])
            stated = self._names[rank].name
            name = str(hello.get("name")) if stated == BY_HAND else stated
            self.peers.append(Peer(name, rank, channel))
        self.peers.sort(key=lambda peer: peer.rank)
        memory[0] = backend.available_memory()
        # Ranks of one machine have its memory together.
        shared = len(self._names) if self._names[0].is_local else 1
        names = [self._names[0].name, *(peer.name for peer in self.peers)]
        self.hosts = [Host(name, memory[rank] // shared) for rank, name in enumerate(names)]

    # --- the shares -------------------------------------------------------------------------------

    def divide(
        self, checkpoints: Checkpoints, prompt_cache: str | Path | None, prompt_cache_gb: float
    ) -> Checkpoints:
        """Send each follower its share, and return the checkpoints with that of this machine.

        `prompt_cache` and `prompt_cache_gb` are those of `load`, on every machine.

        Raises:
            Qwen3Error: the model cannot be divided, or does not fit.
        """
        target, options = checkpoints.target, self._options
        if target.options.dequantize is None:  # once for all ranks
            worth = backend.worth_dequantizing(4 * count_weights(target.network))
            target = replace(target, options=replace(target.options, dequantize=worth))
        work = Workload(
            context=min(checkpoints.context or MIN_CONTEXT, target.network.context_window),
            itemsize=target.options.dtype.size,
            cache=target.cache,
            chunk=backend.prefill_chunk(),
            fused=backend.on_gpu(),
        )
        model = Model(target.place.name, target.network, _format_of(target), work)
        if small := checkpoints.draft:  # it runs here
            room = max(0, self.hosts[0].available - small.plan(checkpoints.context).held)
            self.hosts[0] = replace(self.hosts[0], available=room)
        self.network, self._work = target.network, work
        self.shares = divide(model, self.hosts, options.split, options.counts())
        for host, share in zip(self.hosts, self.shares, strict=True):
            _log.info("%s (rank %d): %s", host.name, share.rank, describe(share))
        self._warn_of_slow_link(target.network)
        setup = {
            "model": _same_everywhere(target.place),
            "revision": target.place.revision,
            "digest": config_digest(target.folder),
            "config": dict(target.config),
            "dtype": backend.dtype_name(target.options.dtype),
            "quantize": target.options.quantize and asdict(target.options.quantize),
            "dequantize": target.options.dequantize,
            "kv_bits": [target.cache.key_bits, target.cache.value_bits],
            "prompt_cache": prompt_cache and str(Path(prompt_cache).absolute()),
            "prompt_cache_gb": prompt_cache_gb,
        }
        for peer in self.peers:
            peer.channel.send({"setup": {**setup, "share": asdict(self.shares[peer.rank])}})
        return replace(checkpoints, target=replace(target, share=self.shares[0]))

    def _warn_of_slow_link(self, network: ModelConfig) -> None:
        if self._options.split != TENSOR or self._backend() == ring.JACCL:
            return
        sums = 2 * network.num_hidden_layers
        if any(not host.is_local for host in self._names):
            _log.warning(
                "split=tensor over TCP: %d sums a token, each of about 0.15 ms, take %.0f ms of "
                "every token; over Thunderbolt with RDMA (JACCL) they take a tenth, and "
                "split=pipeline has %d",
                *(sums, 0.15 * sums, len(self._names)),
            )

    def _backend(self) -> str:
        if self._transport:
            return str(self._transport["backend"])
        has_rdma = all(host.rdma for host in self._names)
        return ring.JACCL if has_rdma and mx.distributed.is_available(ring.JACCL) else ring.RING

    # --- computing --------------------------------------------------------------------------------

    def connect(self, checkpoints: Checkpoints) -> Checkpoints:
        """Connect all ranks for computing, and return the checkpoints that build a led network.

        Waits until all followers have fetched their weights, and compares these with those here.
        """
        target = checkpoints.target
        own, commit = weight_digests(target.folder), commit_of(target)
        for peer in self.peers:
            checked = self._await(peer, "checked")
            if checked["commit"] != commit:
                raise Qwen3Error(
                    f"{peer} has commit {checked['commit'][:12] or 'none'} of {target.place.name}, "
                    f"not {commit[:12] or 'a folder'}; state a --revision"
                )
            for name, digest in checked["weights"].items():
                if own.get(name, digest) != digest:
                    raise Qwen3Error(
                        f"{peer} has another {name} of {target.place.name} than this machine; copy "
                        "the checkpoint anew"
                    )
            self._ports[peer.rank] = int(checked["port"])
        transport = self._transport or self._new_transport()
        for peer in self.peers:
            peer.channel.send({"connect": transport})
        group = ring.join_group(0, transport)
        build = partial(LedQwen3, share=self.shares[0], group=group, dtype=target.options.dtype)
        return replace(checkpoints, target=replace(target, build=build))

    def _new_transport(self) -> dict[str, Any]:
        """Return how the ranks connect; each follower's port is tried first."""
        hosts = [f"{self.address}:{free_port(self.address)}"]
        for peer in self.peers:
            port = self._ports[peer.rank]
            self.try_port(peer, port)
            hosts.append(f"{peer.channel.peer}:{port}")
        if self._backend() == ring.RING:
            return {"backend": ring.RING, "hosts": hosts}
        devices = [list(host.rdma) for host in self._names]
        return {"backend": ring.JACCL, "devices": devices, "coordinator": hosts[0]}

    def try_port(self, peer: Peer, port: int | None = None) -> None:
        """Connect to a port of a follower; None is any.

        Raises:
            Qwen3Error: it cannot be reached.
        """
        port = port or random.choice(PORTS)
        self.ask(peer, {"listen": port}, "listening")
        ring.probe(peer.channel.peer, port)

    def ask(self, peer: Peer, message: Message, answer: str) -> Any:
        """Send a message to a follower that has not begun to compute, and return its answer.

        Raises:
            Qwen3Error: it fails, is gone, or is silent.
        """
        peer.channel.send(message)
        return self._await(peer, answer)

    def start(self, model: Qwen3, disk: DiskPrefixes | None) -> None:
        """Wait until all followers have read their weights, and begin to watch them.

        `model` and `disk` are those that this rank has made of its share.

        Raises:
            Qwen3Error: one of them has failed.
        """
        self._available = {peer.rank: int(self._await(peer, "ready")) for peer in self.peers}
        assert isinstance(model, LedQwen3)
        model.crew = self.crew = Crew(self.peers, self._limit)
        if isinstance(disk, LedDisk):
            disk.model = model

    def _await(self, peer: Peer, what: str) -> Any:
        """Return what a follower answers while it loads; it says that it is alive meanwhile.

        Raises:
            Qwen3Error: it fails, is gone, or is silent.
        """
        try:
            while what not in (message := peer.channel.receive(self._limit)):
                if "failed" in message:
                    raise Qwen3Error(f"{peer}: {message['failed']}")
            return message[what]
        except TimeoutError as error:
            reason = f"{peer} has not answered for {self._limit:.0f} s"
            raise ClusterError(reason) from error
        except (EOFError, OSError, WireError) as error:
            raise ClusterError(f"{peer} is gone ({error})") from error

    # --- while it runs ----------------------------------------------------------------------------

    def limits(self, context: int | None) -> tuple[int, int]:
        """Return the bytes that the engine here may take, and the context, by the tightest host.

        `context` is what was asked for.
        """
        network, work = self.network, self._work
        shared = len(self._names) if self._names[0].is_local else 1
        own = backend.available_memory() // shared - RESERVE
        rooms = {0: own} | {r: free // shared - RESERVE for r, free in self._available.items()}
        budgets = [
            Budget(self.shares[rank].network(network), work, max(0, room))
            for rank, room in rooms.items()
        ]
        tokens = min(budget.tokens for budget in budgets)
        longest = min(budget.context for budget in budgets)
        least = replace(work, context=longest, chunk=MIN_CHUNK)
        beside = activation_bytes(budgets[0].config, least) + RESERVE
        return budgets[0].bytes_of(tokens) + beside, min(longest, context or longest)

    def guard(self, worker: Worker, engine: Engine) -> None:
        """End all requests with the reason if the cluster fails."""
        model = engine.model
        assert isinstance(model, LedQwen3)

        def end(error: ClusterError) -> None:
            self._started.end(at_once=True)  # a process that was stopped would stay
            ring.disconnect()
            deadline = time.monotonic() + _WAKE_SECONDS
            while model.is_computing and time.monotonic() < deadline:
                time.sleep(_SLICE_SECONDS / 10)
            if model.is_computing:
                worker.replace(error)
                atexit.register(_exit)
            with suppress(Qwen3Error):  # it was closed meanwhile
                worker.post(partial(engine.end, error))

        self.crew.on_failure(end)

    @property
    def failure(self) -> ClusterError | None:
        """Why the cluster is down; None while it is up."""
        return self.crew.failure

    def close(self, *, at_once: bool = False) -> None:
        """End the followers; those that this process has started are waited for."""
        if hasattr(self, "crew"):
            self.crew.close()
        for peer in self.peers:
            with suppress(OSError):
                peer.channel.send({"end": 1})
            peer.channel.close()
        self._started.end(at_once=at_once)


def _same_everywhere(place: Source) -> str:
    """Return the name of a checkpoint for other machines, which have folders at the same paths."""
    if place.folder == demo_folder():  # each machine has its own
        return DEMO
    return os.path.abspath(os.path.expanduser(place.name)) if place.folder else place.name


def _exit() -> None:
    """End the process: an ordinary exit would wait for a thread that hangs in the device."""
    for file in (sys.stdout, sys.stderr):
        file.flush()
    os._exit(1)


def config_digest(folder: Path) -> str:
    """Return a hash of a checkpoint's config.json and of the index of its weights."""
    digest = hashlib.sha256()
    for name in ("config.json", INDEX):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def commit_of(target: ResolvedCheckpoint) -> str:
    """Return the commit of a checkpoint of the hub; "" of a folder."""
    return "" if target.place.folder else target.folder.name


def control_of(transport: dict[str, Any]) -> tuple[str, int, str]:
    """Return address, port and key of the leader of a cluster that mlx.launch has started.

    All ranks know the same hosts. QWEN3_CLUSTER_KEY is the key if it is set.
    """
    first = transport["hosts"][0] if "hosts" in transport else transport["coordinator"]
    address, _, port = first.rpartition(":")
    known = os.environ.get("QWEN3_CLUSTER_KEY") or repr(sorted(transport.items()))
    key = hashlib.sha256(known.encode()).hexdigest()
    return address, int(port) + LAUNCHED_PORT, key


def _format_of(target: ResolvedCheckpoint) -> FormatOf:
    """Return the formats in which the weights are held."""
    options = target.options
    if options.dequantize:
        return lambda path: None
    if target.stored:
        return target.stored
    return options.quantize.for_module if options.quantize else lambda path: None
