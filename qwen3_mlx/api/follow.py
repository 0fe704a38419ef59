"""The followers' side of loading on several machines; `api/cluster.py` is the leader's."""

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from threading import Event as Flag
from threading import Thread
from typing import Any

from qwen3_mlx import backend
from qwen3_mlx.api.checkpoints import ResolvedCheckpoint
from qwen3_mlx.api.cluster import commit_of, config_digest
from qwen3_mlx.api.preflight import find_checkpoint
from qwen3_mlx.api.prompt_cache import open_prompt_cache
from qwen3_mlx.cache.quantized import CacheFormat
from qwen3_mlx.checkpoint.description import read_config
from qwen3_mlx.checkpoint.fingerprint import weight_digests
from qwen3_mlx.checkpoint.hub import Source
from qwen3_mlx.checkpoint.load import LoadOptions
from qwen3_mlx.checkpoint.shard import Share
from qwen3_mlx.cluster import ring
from qwen3_mlx.cluster.follow import Follower, Inbox
from qwen3_mlx.cluster.joining import control_of
from qwen3_mlx.cluster.part import PartQwen3
from qwen3_mlx.cluster.wire import Channel, WireError, free_port, join
from qwen3_mlx.errors import CheckpointError, NoLeaderError, Qwen3Error
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.quantization import Format
from qwen3_mlx.model.sizes import hub_name

_JOIN_SECONDS = 1.0  # the leader listens before a follower is started
_LAUNCHED_SECONDS = 60.0  # or not, where mlx.launch starts all ranks
_ALIVE_SECONDS = 3.0


def follow(
    address: str, port: int, key: str, rank: int | None = None, patience: float = _JOIN_SECONDS
) -> None:
    """Join the leader at an address and compute a share of its model until the leader ends.

    If the leader is lost, the process ends at once. `rank` is None if any will do; `patience` are
    the seconds that the leader may take to appear.

    Raises:
        NoLeaderError: there is no leader, or it ends before it computes.
        Qwen3Error: it refuses this machine, or the model cannot be loaded.
    """
    hello = {"name": platform.node(), "rank": rank, "memory": backend.available_memory()}
    channel = join(address, port, key, hello, patience)
    if (setup := _await_setup(channel)) is None:
        return
    inbox = Inbox(channel)
    try:
        with _alive(channel):
            follower = _load(setup, channel, inbox)
        channel.send({"ready": backend.available_memory()})
        follower.run()
    except (Qwen3Error, ValueError) as error:
        with suppress(OSError):  # the leader may be gone
            channel.send({"failed": str(error)})
        raise


def follow_launched() -> bool:
    """Follow the leader of a cluster that mlx.launch has started; return False if this is rank 0.

    Raises:
        Qwen3Error: mlx.launch has not started this process.
    """
    rank, transport = ring.launched_transport()
    if rank:
        follow(*control_of(transport), rank, _LAUNCHED_SECONDS)
    return rank > 0


def _await_setup(channel: Channel) -> Mapping[str, Any] | None:
    """Return what the leader wants to be loaded; None if it only examines this machine.

    Raises:
        NoLeaderError: it is gone.
        Qwen3Error: it refuses this machine.
    """
    try:
        while "end" not in (message := channel.receive()):
            if "setup" in message:
                setup: Mapping[str, Any] = message["setup"]
                return setup
            if reason := message.get("refused"):
                raise Qwen3Error(f"the leader refuses this machine: {reason}")
            if "look" in message:
                channel.send({"found": find_checkpoint(**message["look"])})
            elif "listen" in message:
                with ring.listening(channel.address, message["listen"]):
                    channel.send({"listening": 1})
            else:
                channel.send({"pong": 1})
    except (EOFError, OSError, WireError) as error:
        raise NoLeaderError(f"the leader is gone ({error})") from error
    return None


@contextmanager
def _alive(channel: Channel) -> Iterator[None]:
    """Send the leader a sign of life now and then, while this machine loads."""
    done = Flag()

    def tell() -> None:
        while not done.wait(_ALIVE_SECONDS):
            with suppress(OSError):  # the inbox ends the process
                channel.send({"alive": 1})

    Thread(target=tell, name="qwen3-alive", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _load(setup: Mapping[str, Any], channel: Channel, inbox: Inbox) -> Follower:
    """Fetch and read this rank's share of the model, connected with the other ranks."""
    target = _resolve(setup)
    disk = open_prompt_cache(setup["prompt_cache"], float(setup["prompt_cache_gb"]), target)
    target = target.fetched()
    port = free_port(channel.address)
    channel.send(
        {
            "checked": {
                "weights": weight_digests(target.folder),
                "commit": commit_of(target),
                "port": port,
            }
        }
    )
    while "connect" not in (message := inbox.get()):
        if "end" in message:
            raise NoLeaderError("the leader has ended before all computed; it says why")
        with ring.listening(channel.address, message["listen"]):
            channel.send({"listening": 1})
    assert target.share
    group = ring.join_group(target.share.rank, message["connect"])
    backend.limit_buffer_cache()
    backend.tune_blas_threads(target.network.hidden_size, int(setup["sharing"]))
    build = partial(PartQwen3, share=target.share, group=group)
    model = replace(target, build=build).read(lambda *_: None)
    assert isinstance(model, PartQwen3)
    backend.wire(model.nbytes)
    return Follower(
        model,
        channel,
        inbox,
        cache_format=target.cache,
        dtype=target.options.dtype,
        disk=disk,
    )


def _resolve(setup: Mapping[str, Any]) -> ResolvedCheckpoint:
    """Return this rank's share of the checkpoint that the leader names.

    Raises:
        CheckpointError: it is not here, or is another one.
    """
    place = Source(hub_name(setup["model"]), setup["revision"])
    folder, _ = read_config(place)
    if config_digest(folder) != setup["digest"]:
        raise CheckpointError(
            f"{setup['model']} has another config.json or index here than on the leader; copy the "
            "checkpoint anew, or state a --revision"
        )
    quantize = setup["quantize"] and Format(**setup["quantize"])
    options = LoadOptions(backend.compute_dtype(setup["dtype"]), quantize, setup["dequantize"])
    share = {name: _span(value) for name, value in setup["share"].items()}
    return ResolvedCheckpoint(
        place,
        folder,
        setup["config"],
        ModelConfig.from_dict(setup["config"]),
        None,
        options,
        CacheFormat(*setup["kv_bits"]),
        share=Share(**share),
    )


def _span(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
