"""What can be known of the machines of a cluster before a model is loaded on them."""

import re
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any

import mlx.core as mx

from qwen3_mlx.api.cluster import config_digest
from qwen3_mlx.checkpoint.description import read_config
from qwen3_mlx.checkpoint.fingerprint import different_files, weight_digests
from qwen3_mlx.checkpoint.hub import Source
from qwen3_mlx.checkpoint.weights import has_all_weights
from qwen3_mlx.cluster.crew import LIMIT_SECONDS
from qwen3_mlx.cluster.hosts import ClusterOptions
from qwen3_mlx.cluster.joining import Followers
from qwen3_mlx.cluster.ring import JACCL
from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.model.sizes import hub_name

_PINGS = 20
_LISTS = (["/sbin/ifconfig"], ["ip", "-4", "addr"])  # commands that list the interfaces


@dataclass(frozen=True, slots=True)
class HostReport:
    """A machine of a cluster.

    Attributes:
        name: as it was named.
        address: on the link.
        memory: bytes that MLX can have there now.
        round_trip: seconds of a message there and back; None for this machine.
        checkpoint: whether the model is there, in words; "" if none was asked about.
        differs: True if the model there cannot be read, or is another one.
    """

    name: str
    address: str
    memory: int
    round_trip: float | None
    checkpoint: str
    differs: bool = False


def preflight(
    options: ClusterOptions, model: str | None = None, revision: str | None = None
) -> tuple[list[HostReport], str]:
    """Return a report of each host, rank 0 first, and of this machine's end of the link in words.

    All have the same versions, or joining fails; each can be reached at a port of its own.

    Raises:
        CheckpointError: the model cannot be read on this machine.
        Qwen3Error: a host does not join, or cannot be reached.
    """
    own = find_checkpoint(hub_name(model), revision) if model is not None else {}
    if "error" in own:
        raise CheckpointError(own["error"])
    followers = Followers(options, LIMIT_SECONDS)
    try:
        here = followers.hosts[0]
        reports = [
            HostReport(here.name, followers.address, here.available, None, *_compared(own, own))
        ]
        for peer, host in zip(followers.peers, followers.hosts[1:], strict=True):
            times = []
            for _ in range(_PINGS):
                started = time.perf_counter()
                followers.ask(peer, {"ping": 1}, "pong")
                times.append(time.perf_counter() - started)
            followers.try_port(peer)
            found: Mapping[str, Any] = {}
            if model is not None:
                look = {"model": hub_name(model), "revision": revision}
                found = followers.ask(peer, {"look": look}, "found")
            address, compared = peer.channel.peer, _compared(found, own)
            reports.append(HostReport(host.name, address, host.available, median(times), *compared))
        return reports, f"{_interface(followers.address)}, {_rdma()}"
    finally:
        followers.close()


def find_checkpoint(model: str, revision: str | None) -> dict[str, Any]:
    """Return hashes of a checkpoint as it is on this machine, or the error of looking for it."""
    try:
        folder, _ = read_config(Source(model, revision))
        weights = weight_digests(folder)
        complete = has_all_weights(folder)
    except CheckpointError as error:
        return {"error": str(error)}
    return {"digest": config_digest(folder), "weights": weights, "complete": complete}


def _compared(found: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[str, bool]:
    """Return in words how a checkpoint compares with that of this machine, and if it differs."""
    if not found:
        return "", False
    if "error" in found:
        return str(found["error"]), True
    if found["digest"] != own["digest"]:
        return "another config.json or index than here", True
    if other := different_files(found["weights"], own["weights"]):
        return f"another {other[0]} than here", True
    return "complete" if found["complete"] else f"{len(found['weights'])} weight files", False


def _interface(address: str) -> str:
    """Return which interface of this machine has an address."""
    for command in _LISTS:
        with suppress(OSError):
            listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            for block in re.split(r"\n(?=\S)", listed):
                name = re.match(r"(?:\d+: )?([\w.-]+)", block)
                if name and re.search(rf"inet {re.escape(address)}[ /]", block):
                    is_bridge = name[1].startswith("bridge")
                    return f"{name[1]} (Thunderbolt Bridge)" if is_bridge else name[1]
    return "an unknown interface"


def _rdma() -> str:
    has = mx.distributed.is_available(JACCL)
    return "RDMA (JACCL) is available" if has else "no RDMA (JACCL): TCP is used"
