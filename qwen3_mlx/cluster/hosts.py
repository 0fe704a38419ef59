"""The hosts of a cluster as the user states them: their names, and how they divide the model.

The first host is this machine.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

from qwen3_mlx.errors import Qwen3Error

PIPELINE, TENSOR = "pipeline", "tensor"
SPLITS = (PIPELINE, TENSOR)
LOOPBACK = "127.0.0.1"
BY_HAND = "join"
"""A host that is started by hand, with `qwen3 follow`."""
LAUNCHED = "env"
"""The hosts are those of mlx.launch, which starts all ranks."""
_MAX_HOSTS = 100  # the largest model has 94 layers
_LOCAL = re.compile(r"local:(\d+)")


def _check_names(hosts: object, hostfile: object) -> None:
    is_list = isinstance(hosts, list | tuple) and all(isinstance(name, str) for name in hosts)
    if not (hosts is None or isinstance(hosts, str) or is_list):
        raise TypeError(f"hosts must be a list of names, or a text such as local:2, not {hosts!r}")
    if not (hostfile is None or isinstance(hostfile, str | Path)):
        raise TypeError(f"hostfile must be the path of a file, not {hostfile!r}")


def check_split(split: str, layers: object) -> None:
    """Check a split, and that it is one of those that stated `layers` go with, if there are any.

    Raises:
        ValueError: it is not.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be {' or '.join(SPLITS)}, not {split!r}")
    if split == TENSOR and layers:
        raise ValueError("layers: they belong to a pipeline; split='tensor' divides each of them")


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """The arguments of `load` for several machines.

    Raises:
        TypeError, ValueError: one is wrong by itself.
    """

    hosts: str | Sequence[str] | None = None
    split: str = PIPELINE
    layers: str | Sequence[int] | None = None
    hostfile: str | Path | None = None

    def __post_init__(self) -> None:
        _check_names(self.hosts, self.hostfile)
        check_split(self.split, self.layers if self else None)
        if (self.layers or self.split != PIPELINE) and not self:
            name = "layers" if self.layers else "split"
            raise ValueError(f"{name}: it divides a model among hosts; name those as well")
        self.counts()

    def __bool__(self) -> bool:
        return bool(self.hosts or self.hostfile)

    def counts(self) -> list[int] | None:
        """Return the layers of each host as numbers."""
        if not self.layers:
            return None
        stated = self.layers.split(",") if isinstance(self.layers, str) else self.layers
        try:
            return [int(each) if isinstance(each, str) else index(each) for each in stated]
        except (TypeError, ValueError):
            raise ValueError(
                f"layers must be a number for each host, such as 18,18, not {self.layers!r}"
            ) from None


@dataclass(frozen=True, slots=True)
class HostName:
    """A machine as the user names it: for ssh, and by its addresses on the link, if they are known.

    `rdma` are its devices for each other rank, from a hostfile.
    """

    name: str
    addresses: Sequence[str] = ()
    rdma: Sequence[Any] = ()

    @property
    def is_local(self) -> bool:
        """True if it is another rank on this machine."""
        return self.name == "local"


def read_hosts(hosts: str | Sequence[str] | None, hostfile: str | Path | None) -> list[HostName]:
    """Return the hosts, rank 0 first: of a list, of "local:N", or of a hostfile of mlx.launch.

    Raises:
        ValueError: fewer than two are named, or too many, or one twice, or by no name.
        Qwen3Error: the hostfile cannot be read.
    """
    if hostfile is not None:
        if hosts:
            raise ValueError("hostfile: it names the machines, as hosts does; give one of them")
        named = _read_hostfile(Path(hostfile).expanduser())
    elif isinstance(hosts, str) and (match := _LOCAL.fullmatch(hosts)):
        named = [HostName("local", (LOOPBACK,))] * min(int(match[1]), _MAX_HOSTS + 1)
    else:
        names = hosts.split(",") if isinstance(hosts, str) else list(hosts or ())
        named = [HostName(name.strip()) for name in names]
        known = [host.name for host in named if host.name != BY_HAND]
        if not all(known) or len(set(known)) < len(known):
            raise ValueError(f"hosts must be different names, comma-separated, not {hosts!r}")
    what = "hosts" if hostfile is None else "hostfile"
    if len(named) < 2 or named[0].name == BY_HAND:
        raise ValueError(
            f"{what} must be this machine and at least another, such as mac1,mac2 or local:2, not "
            f"{hosts if hostfile is None else str(hostfile)!r}"
        )
    if len(named) > _MAX_HOSTS:
        raise ValueError(f"{what} must be at most {_MAX_HOSTS} machines")
    for host in named:
        if host.name.startswith("-"):  # an option of ssh
            raise ValueError(f"{what}: {host.name!r} is no name of a machine")
    return named


def _read_hostfile(file: Path) -> list[HostName]:
    """Read a hostfile in the format of mlx.launch and mlx.distributed_config."""
    try:
        content = json.loads(file.read_text())
        hosts = content["hosts"] if isinstance(content, dict) else content
        named = []
        for host in hosts:
            addresses, rdma = host.get("ips", []), host.get("rdma", [])
            are_lists = isinstance(addresses, list) and isinstance(rdma, list)
            are_texts = all(isinstance(each, str) for each in (host["ssh"], *addresses))
            if not (are_lists and are_texts):
                raise TypeError
            named.append(HostName(host["ssh"], tuple(addresses), tuple(rdma)))
        return named
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        wanted = "it must be a list of objects with ssh and ips"
        reason = getattr(error, "strerror", None) or wanted
        raise Qwen3Error(f"{file} is no hostfile of mlx.launch: {reason}") from error
