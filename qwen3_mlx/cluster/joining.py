"""The followers of a cluster from the hello on, until they compute."""

import hashlib
import logging
import os
import random
import time
from contextlib import suppress
from typing import Any

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.cluster import ring
from qwen3_mlx.cluster.crew import Peer
from qwen3_mlx.cluster.hosts import BY_HAND, LAUNCHED, ClusterOptions, HostName, read_hosts
from qwen3_mlx.cluster.launch import Started, link_address
from qwen3_mlx.cluster.shares import Host
from qwen3_mlx.cluster.wire import PORTS, Listener, Message, WireError, free_port, new_key
from qwen3_mlx.errors import ClusterError, Qwen3Error

_log = logging.getLogger(__name__)
_JOIN_SECONDS = 60.0  # for followers that this process has started
_SLICE_SECONDS = 0.5
_LAUNCHED_PORT = 500  # the control port lies so far above the first port of mlx.launch's ring,
_LAST_PORT = 65_535  # or below it, where there are no more


class Followers:
    """The machines that have joined this one.

    Attributes:
        names: all machines as the user names them, rank 0 first.
        address: that of this machine on the link.
        peers: the followers, by rank.
        hosts: all machines, with the memory that they can give.
        started: the processes that this one has started for them.
        transport: how the ranks connect for computing, if mlx.launch has decided that.
    """

    hosts: list[Host]

    def __init__(self, options: ClusterOptions, limit: float) -> None:
        """Start the followers and wait until they have joined; none is silent for `limit` seconds.

        Raises:
            Qwen3Error: one of them does not join.
        """
        ring.refuse_second_group()
        self.started, self.peers = Started(), list[Peer]()
        self.transport: dict[str, Any] | None = None
        self._limit = limit
        if options.hosts == LAUNCHED:
            self.names, self.address, key, port = self._launched()
        else:
            self.names = read_hosts(options.hosts, options.hostfile)
            self.address, key, port = link_address(self.names), new_key(), 0
        listener = Listener(self.address, key, port)
        try:
            if options.hosts != LAUNCHED:
                self.started.start(self.names, self.address, listener.port, key)
            self._assemble(listener, key)
        except BaseException:
            self.close(at_once=True)
            raise
        finally:
            listener.close()

    def _launched(self) -> tuple[list[HostName], str, str, int]:
        """Return names, address, key and port of a cluster that mlx.launch has started."""
        _, self.transport = ring.launched_transport()
        address, port, key = control_of(self.transport)
        count = len(self.transport.get("hosts") or self.transport["devices"])
        return [HostName(f"rank {rank}") for rank in range(count)], address, key, port

    def _assemble(self, listener: Listener, key: str) -> None:
        """Wait until all followers have joined."""
        memory: dict[int, int] = {}
        by_hand = [rank for rank, host in enumerate(self.names) if host.name == BY_HAND]
        for _ in by_hand:
            _log.warning(
                "waiting for a follower; on it, run: qwen3 follow --join %s:%d --key %s",
                *(self.address, listener.port, key),
            )
        end = time.monotonic() + _JOIN_SECONDS
        while len(memory) < len(self.names) - 1:
            self.started.check(self.names)
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
            if not isinstance(rank, int) or rank in memory or not 0 < rank < len(self.names):
                channel.send({"refused": f"this cluster has no rank {rank} left"})
                channel.close()
                continue
            memory[rank] = int(hello["memory"])
            stated = self.names[rank].name
            name = str(hello.get("name")) if stated == BY_HAND else stated
            self.peers.append(Peer(name, rank, channel))
        self.peers.sort(key=lambda peer: peer.rank)
        memory[0] = backend.available_memory()
        names = [self.names[0].name, *(peer.name for peer in self.peers)]
        self.hosts = [Host(name, memory[rank] // self.sharing) for rank, name in enumerate(names)]

    @property
    def sharing(self) -> int:
        """The number of ranks that have the memory of one machine together."""
        return len(self.names) if self.names[0].is_local else 1

    @property
    def backend(self) -> str:
        """The backend of MLX that the ranks compute with."""
        if self.transport:
            return str(self.transport["backend"])
        has_rdma = all(host.rdma for host in self.names)
        return ring.JACCL if has_rdma and mx.distributed.is_available(ring.JACCL) else ring.RING

    def new_transport(self) -> dict[str, Any]:
        """Return how the ranks connect; each follower's port is tried first."""
        hosts = [f"{self.address}:{free_port(self.address)}"]
        for peer in self.peers:
            self.try_port(peer, peer.port)
            hosts.append(f"{peer.channel.peer}:{peer.port}")
        if self.backend == ring.RING:
            return {"backend": ring.RING, "hosts": hosts}
        devices = [list(host.rdma) for host in self.names]
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
        return self.answer(peer, answer)

    def answer(self, peer: Peer, what: str) -> Any:
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

    def close(self, *, at_once: bool = False) -> None:
        """End the followers; those that this process has started are waited for."""
        for peer in self.peers:
            with suppress(OSError):
                peer.channel.send({"end": 1})
            peer.channel.close()
        self.started.end(at_once=at_once)


def control_of(transport: dict[str, Any]) -> tuple[str, int, str]:
    """Return address, port and key of the leader of a cluster that mlx.launch has started.

    All ranks know the same hosts. QWEN3_CLUSTER_KEY is the key if it is set.
    """
    first = transport["hosts"][0] if "hosts" in transport else transport["coordinator"]
    address, _, port = first.rpartition(":")
    known = os.environ.get("QWEN3_CLUSTER_KEY") or repr(sorted(transport.items()))
    key = hashlib.sha256(known.encode()).hexdigest()
    control = int(port) + _LAUNCHED_PORT
    return address, control if control <= _LAST_PORT else int(port) - _LAUNCHED_PORT, key
