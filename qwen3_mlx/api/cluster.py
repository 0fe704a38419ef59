"""Loading a checkpoint on several machines: the leader's side. `api/follow.py` is the followers'.

The followers join, say what memory they have, and are sent their share. Each fetches and reads its
own part; then all connect for computing, and the engine starts here.
"""

import atexit
import hashlib
import logging
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from qwen3_mlx import backend
from qwen3_mlx.api.capacity import MIN_CONTEXT
from qwen3_mlx.api.checkpoints import Checkpoints, ResolvedCheckpoint
from qwen3_mlx.cache.disk import DiskPrefixes
from qwen3_mlx.checkpoint.fingerprint import different_files, weight_digests
from qwen3_mlx.checkpoint.hub import Source
from qwen3_mlx.checkpoint.shard import Share
from qwen3_mlx.checkpoint.weights import INDEX
from qwen3_mlx.cluster import ring
from qwen3_mlx.cluster.crew import LIMIT_SECONDS, Crew
from qwen3_mlx.cluster.hosts import LAUNCHED, TENSOR, ClusterOptions, read_hosts
from qwen3_mlx.cluster.joining import Followers
from qwen3_mlx.cluster.lead import LedDisk, LedQwen3
from qwen3_mlx.cluster.shares import Model, describe, divide
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
_SLICE_SECONDS = 0.05
_WAKE_SECONDS = 2.0  # for the device to notice that another machine is gone


class Cluster:
    """The machines that this process leads, from the hello to the end.

    Attributes:
        crew: the followers, once they compute.
        hosts: all machines, rank 0 first.
        sharing: the number of ranks that share this machine.
        shares: the part of each.
        network: the shape of the whole network.
    """

    crew: Crew
    network: ModelConfig
    shares: list[Share]

    def __init__(self, options: ClusterOptions, network: ModelConfig) -> None:
        """Start the followers and wait until they have joined to compute `network`.

        Raises:
            Qwen3Error: there are more hosts than parts, or one of them does not join.
        """
        if options.hosts != LAUNCHED:
            parts, what = network.num_hidden_layers, "layers"
            if options.split == TENSOR:
                parts, what = network.num_key_value_heads, "key/value heads"
            count = len(read_hosts(options.hosts, options.hostfile))
            if count > parts:  # before so many processes are started
                raise Qwen3Error(f"{parts} {what} are too few for {count} hosts; name fewer")
        self._options = options
        self._followers = Followers(options, LIMIT_SECONDS)
        self.hosts = self._followers.hosts
        self.sharing = self._followers.sharing

    # --- the shares -------------------------------------------------------------------------------

    def divide(
        self, checkpoints: Checkpoints, prompt_cache: str | Path | None, prompt_cache_gb: float
    ) -> Checkpoints:
        """Send each follower its share, and return the checkpoints with that of this machine.

        `prompt_cache` and `prompt_cache_gb` are those of `load`, on every machine.

        Raises:
            Qwen3Error: the model cannot be divided, or does not fit.
        """
        if checkpoints.target.options.provisional:  # ranks could decide otherwise
            checkpoints = checkpoints.in_bfloat16()
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
            "sharing": self.sharing,
        }
        for peer in self._followers.peers:
            peer.channel.send({"setup": {**setup, "share": asdict(self.shares[peer.rank])}})
        return replace(checkpoints, target=replace(target, share=self.shares[0]))

    def _warn_of_slow_link(self, network: ModelConfig) -> None:
        if self._options.split != TENSOR or self._followers.backend == ring.JACCL:
            return
        sums = 2 * network.num_hidden_layers
        if any(not host.is_local for host in self._followers.names):
            _log.warning(
                "split=tensor over TCP: %d sums a token, each of about 0.15 ms, take %.0f ms of "
                "every token; over Thunderbolt with RDMA (JACCL) they take a tenth, and "
                "split=pipeline has %d",
                *(sums, 0.15 * sums, len(self.hosts)),
            )

    # --- computing --------------------------------------------------------------------------------

    def connect(self, checkpoints: Checkpoints) -> Checkpoints:
        """Connect all ranks for computing, and return the checkpoints that build a led network.

        Waits until all followers have fetched their weights, and compares these with those here.
        """
        target = checkpoints.target
        own, commit = weight_digests(target.folder), commit_of(target)
        for peer in self._followers.peers:
            checked = self._followers.answer(peer, "checked")
            if checked["commit"] != commit:
                raise Qwen3Error(
                    f"{peer} has commit {checked['commit'][:12] or 'none'} of {target.place.name}, "
                    f"not {commit[:12] or 'a folder'}; state a --revision"
                )
            if other := different_files(checked["weights"], own):
                raise Qwen3Error(
                    f"{peer} has another {other[0]} of {target.place.name} than this machine; copy "
                    "the checkpoint anew"
                )
            peer.port = int(checked["port"])
        transport = self._followers.transport or self._followers.new_transport()
        for peer in self._followers.peers:
            peer.channel.send({"connect": transport})
        group = ring.join_group(0, transport)
        build = partial(LedQwen3, share=self.shares[0], group=group, dtype=target.options.dtype)
        return replace(checkpoints, target=replace(target, build=build))

    def start(self, model: Qwen3, disk: DiskPrefixes | None, worker: Worker) -> None:
        """Wait until all followers have read their weights, and begin to watch them.

        `model` and `disk` are those that this rank has made of its share, on the thread of
        `worker`. If the cluster fails, that is woken, or replaced if it does not wake.

        Raises:
            Qwen3Error: one of them has failed.
        """
        peers, answer = self._followers.peers, self._followers.answer
        self._available = {peer.rank: int(answer(peer, "ready")) for peer in peers}
        assert isinstance(model, LedQwen3)
        model.crew = self.crew = Crew(peers, LIMIT_SECONDS)
        self.crew.on_failure(partial(self._wake, worker, model))
        if isinstance(disk, LedDisk):
            disk.model = model

    # --- while it runs ----------------------------------------------------------------------------

    def limits(self, context: int | None) -> tuple[int, int]:
        """Return the bytes that the engine here may take, and the context, by the tightest host.

        `context` is what was asked for.
        """
        network, work = self.network, self._work
        shared = self.sharing
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

    def _wake(self, worker: Worker, model: LedQwen3, error: ClusterError) -> None:
        """Wake a thread that waits for machines which have failed, or replace it."""
        self._followers.started.end(at_once=True)  # a process that was stopped would stay
        ring.disconnect()
        deadline = time.monotonic() + _WAKE_SECONDS
        while model.is_computing and time.monotonic() < deadline:
            time.sleep(_SLICE_SECONDS)
        if model.is_computing:
            worker.replace(error)
            atexit.register(_exit)

    def guard(self, worker: Worker, engine: Engine) -> None:
        """End all requests with the reason if the cluster fails."""

        def end(error: ClusterError) -> None:
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
        self._followers.close(at_once=at_once)


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


def _format_of(target: ResolvedCheckpoint) -> FormatOf:
    """Return the formats in which the weights are held."""
    options = target.options
    if options.dequantize:
        return lambda path: None
    if target.stored:
        return target.stored
    return options.quantize.for_module if options.quantize else lambda path: None
