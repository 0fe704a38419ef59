"""How the followers of a cluster are started: by ssh, or by hand where there is none."""

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Lock

from qwen3_mlx.cluster.hosts import BY_HAND, HostName
from qwen3_mlx.cluster.wire import END_SECONDS
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.processes import module_command


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
            with _without_ctrl_c():
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    process_group=None if host.is_local else 0,  # ssh may unblock the signal
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


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Create a context in which processes are started that Ctrl-C does not reach: it is for us."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
