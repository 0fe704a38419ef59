"""The hosts of a cluster: how they are named, and how the followers on them are started.

The first host is this machine. The others are started by ssh, or by hand where there is none.
"""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from qwen3_mlx.cluster.shares import PIPELINE, check_split
from qwen3_mlx.cluster.wire import END_SECONDS
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.processes import module_command

LOOPBACK = "127.0.0.1"
BY_HAND = "join"
"""A host that is started by hand, with `qwen3 follow`."""
LAUNCHED = "env"
"""The hosts are those of mlx.launch, which starts all ranks."""
_LOCAL = re.compile(r"local:(\d+)")


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
            return [int(number) for number in stated]
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
        ValueError: fewer than two are named, or one twice.
        Qwen3Error: the hostfile cannot be read.
    """
    if hostfile is not None:
        if hosts:
            raise ValueError("hostfile: it names the machines, as hosts does; give one of them")
        named = _read_hostfile(Path(hostfile).expanduser())
    elif isinstance(hosts, str) and (match := _LOCAL.fullmatch(hosts)):
        named = [HostName("local", (LOOPBACK,))] * int(match[1])
    else:
        names = hosts.split(",") if isinstance(hosts, str) else list(hosts or ())
        named = [HostName(name.strip()) for name in names]
        known = [host.name for host in named if host.name != BY_HAND]
        if not all(known) or len(set(known)) < len(known):
            raise ValueError(f"hosts must be different names, comma-separated, not {hosts!r}")
    if len(named) < 2 or named[0].name == BY_HAND:
        raise ValueError(
            f"hosts must be this machine and at least another, such as mac1,mac2 or local:2, not "
            f"{hosts if hostfile is None else str(hostfile)!r}"
        )
    return named


def _read_hostfile(file: Path) -> list[HostName]:
    """Read a hostfile in the format of mlx.launch and mlx.distributed_config."""
    try:
        content = json.loads(file.read_text())
        hosts = content["hosts"] if isinstance(content, dict) else content
        return [
            HostName(str(host["ssh"]), tuple(host.get("ips", ())), tuple(host.get("rdma", ())))
            for host in hosts
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        wanted = "it must be a list of objects with ssh and ips"
        reason = getattr(error, "strerror", None) or wanted
        raise Qwen3Error(f"{file} is no hostfile of mlx.launch: {reason}") from error


def link_address(hosts: Sequence[HostName]) -> str:
    """Return this machine's address on the link to the others.

    Raises:
        Qwen3Error: no name leads there.
    """
    first, other = hosts[0], hosts[1]
    if first.addresses:
        return first.addresses[0]
    # A name of this machine often stands for its loopback address in its own /etc/hosts.
    if (own := _resolved(first.name)) and (own == first.name or not own.startswith("127.")):
        return own
    if (there := other.addresses[0] if other.addresses else _resolved(other.name)) is not None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect((there, 9))  # UDP: sends nothing, but chooses the local address
            return str(probe.getsockname()[0])
    raise Qwen3Error(
        f"no address is known for {first.name} and {other.name}; name this machine by its address "
        "on the link (System Settings, Network, Thunderbolt Bridge)"
    )


def _resolved(name: str) -> str | None:
    name = name.rpartition("@")[2]
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET)[0][4][0])
    except OSError:
        return None


@dataclass(slots=True)
class Started:
    """The processes of followers that this one has started: here, or ssh's to other machines."""

    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)  # by rank
    _ending: Lock = field(default_factory=Lock, repr=False)

    def start(self, hosts: Sequence[HostName], address: str, port: int, key: str) -> None:
        """Start the followers that join the leader at `address` and `port`."""
        for rank, host in enumerate(hosts):
            if rank == 0 or host.name == BY_HAND:
                continue
            arguments = ["follow", "--join", f"{address}:{port}", "--key", "-", "--rank", str(rank)]
            if host.is_local:
                command = module_command("qwen3_mlx", *arguments)
            else:
                command = ["ssh", "-T", "-o", "BatchMode=yes", host.name, _remote(arguments)]
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                process_group=None if host.is_local else 0,  # no Ctrl-C for ssh; see cli/follow.py
                stdout=sys.stderr.fileno() if _has_stderr() else subprocess.DEVNULL,
            )
            self.processes[rank] = process
            assert process.stdin
            with suppress(BrokenPipeError):
                process.stdin.write(f"{key}\n".encode())
                process.stdin.flush()

    def check(self, hosts: Sequence[HostName]) -> None:
        """Check that all processes run.

        Raises:
            Qwen3Error: one has ended.
        """
        for rank, process in self.processes.items():
            if (code := process.poll()) is not None:
                host = hosts[rank]
                if code < 0:
                    raise Qwen3Error(f"{host.name} (rank {rank}): signal {-code} ended it")
                way = (
                    "its message is above"
                    if host.is_local
                    else f"see whether `ssh {host.name} qwen3 doctor` works without a password; "
                    "qwen3-mlx must be installed there"
                )
                raise Qwen3Error(
                    f"{host.name} (rank {rank}): the follower ended with exit code {code}; {way}"
                )

    def end(self, *, at_once: bool = False) -> None:
        """Wait for the processes to end, or not if `at_once`, and kill those that have not."""
        with self._ending:  # a failure may end them while they are closed
            for process in self.processes.values():
                if not at_once:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(END_SECONDS)
                process.kill()  # a process that was stopped as well
                process.wait()
                if process.stdin:
                    with suppress(OSError):  # the key may be unread
                        process.stdin.close()
            self.processes.clear()


def _has_stderr() -> bool:
    try:
        os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):  # replaced, or closed
        return False
    return True


def _remote(arguments: Sequence[str]) -> str:
    """Return the line for a shell on another machine: with this Python if it is there, or qwen3."""
    python, here = shlex.quote(sys.executable), module_command("qwen3_mlx", *arguments)
    there = ["qwen3", *arguments]
    return f"if [ -x {python} ]; then exec {shlex.join(here)}; else exec {shlex.join(there)}; fi"
