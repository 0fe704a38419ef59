"""The control connection between the leader and a follower: JSON messages over TCP.

Plans, acknowledgements and the hello are numbers and short strings; tensors never come this way.
A message is its length in four bytes, big-endian, and that many bytes of JSON. The leader listens
at the address of the link alone, and only until all followers have joined. It sends a nonce, and
the follower answers with its version and the nonce hashed with the key of the cluster, so that the
key itself is not sent.
"""

import errno
import hmac
import json
import logging
import os
import secrets
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from threading import Lock
from typing import Any

from qwen3_mlx.errors import NoLeaderError, Qwen3Error
from qwen3_mlx.extras import installed_version
from qwen3_mlx.version import __version__

_log = logging.getLogger(__name__)
_LENGTH = struct.Struct(">I")
_MAX_BYTES = 1 << 24  # of a message; that of a step has about a hundred
_HELLO_SECONDS = 5.0  # for a connection to say what it is
_RETRY_SECONDS = 0.2
_TRIES = 100
VERSIONS = (__version__, installed_version("mlx"))
"""Versions that all ranks must have: of this package, and of MLX."""
PORTS = range(20_000, 32_000)
"""Ports to listen on: below those that systems assign to outgoing connections."""
END_SECONDS = 30.0
"""Seconds that a follower may take for what is left to do at the end, such as writing prompts."""
Message = Mapping[str, Any]


class WireError(Exception):
    """The other end sent something that is no message."""


class Channel:
    """One end of a control connection; any thread may send, one at a time receives.

    Attributes:
        peer: the address of the other end.
        sent: the bytes sent so far.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine that loses its power closes no connection: after half a minute it counts as
        # gone.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, seconds in (
            *(("TCP_KEEPIDLE", 15), ("TCP_KEEPALIVE", 15)),  # Linux, macOS
            *(("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)),
        ):
            if number := getattr(socket, name, None):
                connection.setsockopt(socket.IPPROTO_TCP, number, seconds)
        self.peer = str(connection.getpeername()[0])
        self.address = str(connection.getsockname()[0])
        self.sent = 0
        self._connection = connection
        self._sending = Lock()

    def send(self, message: Message) -> None:
        """Send a message.

        Raises:
            OSError: the other end is gone.
        """
        body = json.dumps(message, separators=(",", ":")).encode()
        with self._sending:
            self._connection.sendall(_LENGTH.pack(len(body)) + body)
            self.sent += _LENGTH.size + len(body)

    def receive(self, timeout: float | None = None) -> dict[str, Any]:
        """Return the next message, whole within `timeout` seconds; None waits without limit.

        Raises:
            EOFError: the other end closed the connection.
            OSError: the connection was lost, or the time is over (TimeoutError).
            WireError: what came is no message.
        """
        self._connection.settimeout(timeout)
        end = None if timeout is None else time.monotonic() + timeout
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, end))
        if length > _MAX_BYTES:
            raise WireError("what it sends is no message of qwen3")
        try:
            message = json.loads(self._read(length, end))
        except (ValueError, RecursionError) as error:
            raise WireError("what it sends is no message of qwen3") from error
        if not isinstance(message, dict):
            raise WireError("what it sends is no message of qwen3")
        return message

    def _read(self, count: int, end: float | None) -> bytes:
        data = bytearray()
        while len(data) < count:
            if end is not None:
                if (left := end - time.monotonic()) <= 0:
                    raise TimeoutError("the time is over")
                self._connection.settimeout(left)
            if not (some := self._connection.recv(count - len(data))):
                raise EOFError("the connection was closed")
            data += some
        return bytes(data)

    def close(self) -> None:
        """Close the connection; a thread that receives from it gets an EOFError."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class Listener:
    """Accepts the followers of a cluster at one address, until it is closed."""

    def __init__(self, address: str, key: str, port: int = 0) -> None:
        """Listen at `address`; followers prove that they have `key`.

        Raises:
            Qwen3Error: the address is not this machine's, or the port is taken.
        """
        self.port = port or free_port(address)
        self._key = key
        try:
            self._socket = socket.create_server((address, self.port))
        except OSError as error:
            raise Qwen3Error(
                f"cannot listen at {address}, port {self.port}: {os.strerror(error.errno or 0)}"
            ) from error

    def accept(self, timeout: float) -> tuple[Channel, dict[str, Any]]:
        """Return the connection and the hello of the next follower; others are refused and logged.

        Raises:
            TimeoutError: none has joined within `timeout` seconds.
        """
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            self._socket.settimeout(left)
            connection, (peer, *_) = self._socket.accept()
            try:
                return self._greet(Channel(connection))
            except (WireError, EOFError, OSError) as error:
                connection.close()
                _log.warning("%s: a connection of a stranger was refused: %s", peer, error)
        raise TimeoutError

    def _greet(self, channel: Channel) -> tuple[Channel, dict[str, Any]]:
        nonce = secrets.token_hex()
        channel.send({"version": __version__, "nonce": nonce})
        hello = channel.receive(_HELLO_SECONDS)
        reason = ""
        proof = str(hello.get("proof")).encode(errors="replace")
        if not hmac.compare_digest(proof, _proof(self._key, nonce).encode()):
            reason = "its key is not that of this cluster"
        elif (theirs := (hello.get("version"), hello.get("mlx"))) != VERSIONS:
            named = "qwen3-mlx {} with MLX {}"
            reason = f"it has {named.format(*theirs)}, the leader {named.format(*VERSIONS)}"
        if reason:
            channel.send({"refused": reason})
            raise WireError(reason)
        return channel, hello

    def close(self) -> None:
        """Stop to listen."""
        self._socket.close()


def join(address: str, port: int, key: str, hello: Message, timeout: float) -> Channel:
    """Connect to the leader at an address, prove to have `key`, and send the rest of the hello.

    Raises:
        NoLeaderError: there is no leader within `timeout` seconds.
    """
    end = time.monotonic() + timeout
    while True:
        try:
            channel = Channel(socket.create_connection((address, port), _HELLO_SECONDS))
            greeting = channel.receive(_HELLO_SECONDS)
            break
        except (WireError, EOFError, OSError) as error:
            if time.monotonic() > end:
                raise NoLeaderError(
                    f"no leader answers at {address}, port {port} ({error}); start it first, and "
                    "see whether a firewall is in between"
                ) from error
            time.sleep(_RETRY_SECONDS)
    versions = dict(zip(("version", "mlx"), VERSIONS, strict=True))
    channel.send({**versions, "proof": _proof(key, str(greeting.get("nonce"))), **hello})
    return channel


def free_port(address: str) -> int:
    """Return a port of this machine's `address` that nothing listens on.

    Raises:
        Qwen3Error: the address is not this machine's.
    """
    for _ in range(_TRIES):
        port = secrets.choice(PORTS)
        try:
            socket.create_server((address, port)).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            raise Qwen3Error(
                f"{address} is no address of this machine; the first of the hosts is this "
                "machine, by its address on the link"
            ) from error
        return port
    raise Qwen3Error(f"no port is free at {address}")


def new_key() -> str:
    """Return a random key for a cluster."""
    return secrets.token_urlsafe(16)


def _proof(key: str, nonce: str) -> str:
    return hmac.new(key.encode(), nonce.encode(), "sha256").hexdigest()
