"""The group of MLX in which the ranks compute: a ring over TCP, or JACCL over Thunderbolt (RDMA).

MLX reads who takes part from environment variables, once in a process.
"""

import json
import os
import re
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen3_mlx.errors import Qwen3Error

RING, JACCL = "ring", "jaccl"
_HOSTFILE, _RANK = "MLX_HOSTFILE", "MLX_RANK"
_DEVICES, _COORDINATOR = "MLX_IBV_DEVICES", "MLX_JACCL_COORDINATOR"
_CONNECT_SECONDS = 20
_PROBE_SECONDS = 5.0
_ADDRESS = re.compile(r".+:\d{1,5}")  # with a port
_used = False
_connections: dict[int, object] = {}  # the addresses of the other ends, by file descriptor


def join_group(rank: int, transport: Mapping[str, Any]) -> mx.distributed.Group:
    """Connect this process to the others as `rank`; all do so at the same time.

    `transport` has the `backend`, and of a ring the `hosts`: each rank's address and port; of JACCL
    the `devices` between each two ranks, and the `coordinator`, an address and port of rank 0.

    Raises:
        Qwen3Error: the ranks cannot be connected, or this process was part of a cluster before.
    """
    refuse_second_group()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "hosts.json"
        if transport["backend"] == RING:
            file.write_text(json.dumps([[host] for host in transport["hosts"]]))
            variables = {_HOSTFILE: str(file)}
        else:
            file.write_text(json.dumps(transport["devices"]))
            variables = {_DEVICES: str(file), _COORDINATOR: transport["coordinator"]}
        os.environ.update({**variables, _RANK: str(rank)})
        return _connected(transport["backend"], rank)


def _connected(backend: str, rank: int) -> mx.distributed.Group:
    global _used
    _used = True
    before = _peers_of_sockets()
    try:
        with _ended_if_it_hangs(is_led=rank > 0):
            group = mx.distributed.init(strict=True, backend=backend)
        after = _peers_of_sockets()
        _connections.update({fd: peer for fd, peer in after.items() if before.get(fd) != peer})
        return group
    except (RuntimeError, ValueError) as error:
        raise Qwen3Error(
            f"the machines cannot be connected for computing ({error}); see whether a firewall is "
            "between them"
        ) from error


def disconnect() -> None:
    """Shut the connections of a ring down, so that what waits in them fails instead of hanging.

    There are none of JACCL, which is no TCP.
    """
    open_now = _peers_of_sockets()
    for fd, peer in _connections.items():
        if open_now.get(fd) == peer:
            with socket.socket(fileno=os.dup(fd)) as connection, suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _peers_of_sockets() -> dict[int, object]:
    """Return the addresses of the other ends of this process's connections, by file descriptor."""
    peers: dict[int, object] = {}
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):
            with socket.socket(fileno=os.dup(int(name))) as connection:
                peers[int(name)] = connection.getpeername()
    return peers


def refuse_second_group() -> None:
    """Check that this process has not been part of a cluster: MLX connects once in a process.

    Raises:
        Qwen3Error: it has.
    """
    if _used:
        raise Qwen3Error(
            "this process was part of a cluster already, and MLX cannot connect twice: start a "
            "new process"
        )


def launched_transport() -> tuple[int, dict[str, Any]]:
    """Return the rank and the transport that `mlx.launch` has set for this process.

    Raises:
        Qwen3Error: it has set none.
    """
    rank, place = os.environ.get(_RANK, ""), os.environ.get(_HOSTFILE) or os.environ.get(_DEVICES)
    if not rank.isdecimal() or not place:
        raise Qwen3Error(
            f"hosts 'env' needs the variables of mlx.launch, {_RANK} and {_HOSTFILE} (or "
            f"{_DEVICES} and {_COORDINATOR}); without it, name the hosts"
        )
    try:
        content = json.loads(Path(place).read_text())
        if _HOSTFILE in os.environ:
            addresses = [each[0] for each in content]
            transport = {"backend": RING, "hosts": addresses}
        else:
            addresses = [os.environ[_COORDINATOR]]
            transport = {"backend": JACCL, "devices": content, "coordinator": addresses[0]}
        if not all(map(_ADDRESS.fullmatch, addresses)):
            raise ValueError(f"addresses and ports are expected, not {addresses}")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Qwen3Error(f"{place} is no file of mlx.launch: {error}") from error
    if not max(int(rank), 1) < len(content):
        raise Qwen3Error(f"{_RANK} is {rank}, and {place} has {len(content)} hosts")
    return int(rank), transport


def probe(address: str, port: int) -> None:
    """Connect to a port of a follower that waits for it; a firewall is found out that way.

    Raises:
        Qwen3Error: it cannot be reached.
    """
    try:
        socket.create_connection((address, port), _PROBE_SECONDS).close()
    except OSError as error:
        raise Qwen3Error(
            f"{address} cannot be reached at port {port} ({error}); allow incoming connections "
            "there (on a Mac: System Settings, Network, Firewall)"
        ) from error


@contextmanager
def listening(address: str, port: int) -> Iterator[None]:
    """Listen at a port, in the block and then until the leader has tried it (see `probe`)."""
    with socket.create_server((address, port)) as listener, suppress(OSError):
        listener.settimeout(_PROBE_SECONDS)
        yield
        listener.accept()[0].close()


@contextmanager
def _ended_if_it_hangs(*, is_led: bool) -> Iterator[None]:
    """End this process and those that it has started if the block takes too long.

    MLX connects without releasing Python's lock, so no thread of this process could do it. The
    shell that does it ends when this process does: its parent is another one then. A process that
    `is_led` ends with its own parent, the leader or ssh.
    """
    line = "qwen3: the machines could not be connected for computing; is a firewall between them?"
    process = os.getpid()
    children = f'$(pgrep -P {process} | grep -vx "$$")'
    watch = f"[ $(ps -o ppid= -p $$) -eq {process} ] || exit"
    if is_led:
        watch += f"; [ $(ps -o ppid= -p {process}) -eq {os.getppid()} ] || kill -9 {process}"
    script = (
        "trap '' PIPE; "  # nobody may read the line any more
        f"for _ in $(seq {_CONNECT_SECONDS}); do sleep 1; {watch}; done; "
        f'echo "{line}" >&2; kill -9 {children} {process}'
    )
    guard = subprocess.Popen(["/bin/sh", "-c", script], start_new_session=True)
    try:
        yield
    finally:
        os.killpg(guard.pid, signal.SIGKILL)
        guard.wait()
