"""Connections: their number, and limits of size and time on what each client sends and reads.

A client must send the head and body of a request, and read the response, within these limits. The
time that the server takes to answer is not limited here. When there are too many connections, the
one that has been idle longest is closed, so that a new client is admitted however many others only
hold a connection open.
"""

import asyncio
import errno
import json
import logging
import resource
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from qwen3_mlx.server.access_log import address_of, write_record
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.registry import protocol_of

_log = logging.getLogger(__name__)
_MAX_FILES = 10_240  # macOS refuses a higher limit (OPEN_MAX)
_MAX_CONNECTIONS = 1024
_MAX_ACCEPTED = 128  # connections accepted at once, before any is read
_RESERVED_FILES = 32  # descriptors for weights, kept prefixes, pipes and the log
_PIECE = 1 << 14  # bytes parsed between two checks of the size of a head
_MAX_PIPELINED = 256  # requests waiting for the response to an earlier one
_MIN_PROGRESS = 1 << 15  # bytes of a response that a client must read to restart its timeout
_FAREWELL = 2.0  # seconds that a refused client has to read the error
_LOG_INTERVAL = 60.0  # seconds between two log lines of the same kind
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of connections; times in seconds, sizes in bytes.

    `patience` is the timeout for a complete head, for the next piece of a body, and for the next
    request. `body_rate`, in bytes a second, is the lowest average rate of a body after that time.
    `write_patience` is the timeout for a client to read more of a response that waits to be sent.
    """

    connections: int = _MAX_CONNECTIONS
    accepted: int = _MAX_ACCEPTED
    head: int = 1 << 16
    patience: float = 30.0
    body_rate: int = 500
    write_patience: float = 60.0

    @classmethod
    def of_process(cls) -> "Limits":
        """Return the limits that the file descriptors of this process allow."""
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        files = _MAX_FILES if soft == resource.RLIM_INFINITY else soft
        accepted = max(4, min(_MAX_ACCEPTED, files // 8))
        # The connections accepted last and those closed for them are open together for a moment.
        room = files - 3 * accepted - _RESERVED_FILES
        return cls(connections=max(4, min(_MAX_CONNECTIONS, room)), accepted=accepted)


def raise_file_limit() -> None:
    """Raise the soft limit of file descriptors as far as allowed: macOS starts with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft == resource.RLIM_INFINITY or soft >= target:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
    except (ValueError, OSError) as error:  # a system may allow less than its hard limit
        _log.debug("the limit of descriptors stays at %d: %s", soft, error)


@dataclass(slots=True)
class RateLimitedLog:
    """Logs a warning at most once a minute, with the number of its causes so far."""

    message: str
    _count: int = 0
    _last: float = field(default=float("-inf"))

    def warn(self, *details: object) -> None:
        """Log the warning, or only count it."""
        self._count += 1
        if time.monotonic() - self._last >= _LOG_INTERVAL:
            _log.warning(f"{self.message} (%d so far)", *details, self._count)
            self._last = time.monotonic()


class Connections:
    """The open connections of a server."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._open: set[Connection] = set()
        self._crowded = RateLimitedLog(
            "the limit of %d connections is reached, so idle ones are closed for new ones"
        )
        self._full = RateLimitedLog(
            "the limit of %d connections is reached, and none is idle; a client was refused"
        )
        self._exhausted = RateLimitedLog(
            "no descriptor is left for a connection (%s); ulimit -n allows more"
        )

    def __len__(self) -> int:
        return len(self._open)

    @property
    def all(self) -> "frozenset[Connection]":
        """The open connections."""
        return frozenset(self._open)

    def add(self, connection: "Connection") -> bool:
        """Add a connection, closing an idle one if needed; return False if there is no room."""
        if len(self._open) >= self.limits.connections:
            self._crowded.warn(self.limits.connections)
            if not self._close_idle():
                self._full.warn(self.limits.connections)
                return False
        self._open.add(connection)
        return True

    def remove(self, connection: "Connection") -> None:
        """Remove a connection."""
        self._open.discard(connection)

    def sweep(self, now: float) -> None:
        """Close the connections that have exceeded a timeout."""
        for connection in list(self._open):
            connection.check(now)

    def on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Handle an error of the event loop, which retries to accept when no descriptor is free."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in _EXHAUSTED:
            self._exhausted.warn(error.strerror)
            self._close_idle()
        else:
            loop.default_exception_handler(context)

    def _close_idle(self) -> bool:
        idle = [connection for connection in self._open if not connection.at_work]
        if not idle:
            return False
        oldest = min(idle, key=lambda connection: connection.since)
        self._open.discard(oldest)
        oldest.transport.abort()
        return True


class Connection(HttpToolsProtocol):
    """An HTTP connection held to the limits."""

    def __init__(self, *, connections: Connections, **options: Any) -> None:
        super().__init__(**options)
        self._all = connections
        self._limits = connections.limits
        self.since = self.loop.time()  # start of the present wait, for a head or a request
        self._head_size = 0  # bytes since the end of a head or message, or the last of a body
        self._body = 0  # bytes of the body, received since:
        self._body_begun = self._body_last = self.since
        self._refused = False
        # The request being answered. `cycle` is the latest received, which may have to wait.
        self._current: RequestResponseCycle | None = None
        self._piece = self._reparse = b""  # bytes being parsed, and bytes to parse again
        self._unsent = 0  # bytes that the client had not read at:
        self._read_at: float | None = None

    # --- events ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Register the connection, or refuse it if there is no room."""
        super().connection_made(transport)
        if not self._all.add(self):
            self.refuse(503, "the server is at its limit of connections; try again", 0)

    def connection_lost(self, exc: Exception | None) -> None:
        """Unregister the connection, and signal the disconnect to the application."""
        self._all.remove(self)
        if self._answering:
            self._disconnect()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what was received, unless a head is too large or too many requests wait."""
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            self._head_size += len(piece)
            while piece and not (self._refused or self.transport.is_closing()):
                self._piece, self._reparse = piece, b""
                super().data_received(piece)
                piece = self._reparse
                if self._head_size > self._limits.head:
                    self.refuse(431, f"the head is larger than {self._limits.head:,} bytes")
                elif len(self.pipeline) > _MAX_PIPELINED:
                    self.refuse(400, f"more than {_MAX_PIPELINED} requests wait for a response")

    def _unsupported_upgrade_warning(self) -> None:
        """Parse a request that offers an upgrade again, without the offer, which may be ignored.

        Clients of Java and curl make it with each request; the parser then skips the body.
        """
        error = sys.exception()
        if not self._offers_upgrade or not isinstance(error, HttpParserUpgrade):
            return
        start_line = b"%s %s HTTP/%s" % (
            self.parser.get_method(),
            self.url,
            self.parser.get_http_version().encode(),
        )
        fields = [b"%s: %s" % field for field in self.headers if field[0] != b"upgrade"]
        self._reparse = b"\r\n".join([start_line, *fields, b"", self._piece[error.args[0] :]])
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    @property
    def _offers_upgrade(self) -> bool:
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def eof_received(self) -> bool:  # type: ignore[override]
        """Return whether to answer a client that has closed its own side: only short requests are.

        A client that waits for a reply looks the same when it has disconnected.
        """
        cycles = [self._current, *(cycle for cycle, _ in self.pipeline)]
        methods = [cycle.scope["method"] for cycle in cycles if cycle]
        short = self.at_work and all(method in ("GET", "HEAD") for method in methods)
        if short:
            self.cycle.keep_alive = False
        return short

    def on_message_begin(self) -> None:
        """Start the timeout of a head."""
        super().on_message_begin()
        if not self._answering:
            self.since = self.loop.time()

    def on_headers_complete(self) -> None:
        """Start the timeouts of a body, and the answer."""
        if self._offers_upgrade:
            return
        self._head_size = self._body = 0
        self._body_begun = self._body_last = self.loop.time()
        super().on_headers_complete()
        if not self.pipeline:
            self._current = self.cycle

    def on_body(self, body: bytes) -> None:
        """Count a piece of a body, and pass it on."""
        self._head_size = 0
        self._body += len(body)
        self._body_last = self.loop.time()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Reset the size of the head for the next request."""
        if self._offers_upgrade:
            return
        self._head_size = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Start the timeouts of the next request, which may have been received already."""
        self.since = self._body_begun = self._body_last = self.loop.time()
        if self.pipeline:
            self._current = self.pipeline[-1][0]
        super().on_response_complete()

    def shutdown(self) -> None:
        """Close, after the response if its request is complete: the rest of one may never come."""
        if self._refused:
            self.transport.abort()
        elif not self._current or not self._answering:
            self.transport.close()
        elif self._current.more_body:
            self.refuse(503, "the server is shutting down", 0)
        else:
            self._current.keep_alive = False

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are not an HTTP request."""
        self.refuse(
            400, "this is not an HTTP/1.1 request; for TLS put a proxy in front of the server"
        )

    # --- checks ---------------------------------------------------------------------------------

    @property
    def at_work(self) -> bool:
        """True while a complete request is being answered."""
        return self._answering and not self._receiving

    @property
    def _answering(self) -> bool:
        return self._current is not None and not self._current.response_complete

    @property
    def _receiving(self) -> bool:
        return self._current is not None and self._current.more_body

    def check(self, now: float) -> None:
        """Close the connection if its client has exceeded a timeout."""
        limits = self._limits
        if self._write_timed_out(now):
            self._record_error("the client did not read the response")
            self.transport.abort()
        elif self._refused or self.transport.is_closing():
            pass
        elif not self._answering:
            if now - self.since > limits.patience:
                self._on_timeout()
        elif self._receiving:
            if self.flow.read_paused:  # the server is slow, not the client
                self._body_last = now
            allowed = limits.patience + self._body / limits.body_rate
            if now - self._body_last > limits.patience or now - self._body_begun > allowed:
                self._record_error("the body did not come in time")
                self.refuse(408, "the rest of the request did not come in time")

    def _write_timed_out(self, now: float) -> bool:
        unsent = self.transport.get_write_buffer_size()
        ended = not self._answering or self.transport.is_closing()
        if not unsent or not (self.flow.write_paused or ended):
            self._read_at = None
            return False
        if self._read_at is None or unsent <= self._unsent - _MIN_PROGRESS:
            self._read_at, self._unsent = now, unsent
        return now - self._read_at > self._limits.write_patience

    def _on_timeout(self) -> None:
        if self._head_size:
            self.refuse(408, "the head of the request did not come in time")
        else:
            self.transport.close()

    def _record_error(self, reason: str) -> None:
        if self._current and self._answering:
            record = self._current.scope.setdefault("record", {})  # type: ignore[typeddict-item]
            record["error"] = reason

    def _disconnect(self) -> None:
        """Signal a disconnect to the application, whose further output is dropped."""
        if self._current:
            self._current.disconnected = True
            self._current.message_event.set()

    def refuse(self, status: int, reason: str, farewell: float = _FAREWELL) -> None:
        """Send an error, and close after `farewell` seconds; ignore what else is received."""
        if self._refused:
            return
        self._refused = True
        if self._current and self._answering:
            if self._current.response_started:  # the error would be inside another response
                self.transport.abort()
                return
            self._disconnect()
        else:
            write_record({"client": address_of(self.client), "status": status, "error": reason})
        path = getattr(self, "url", b"").decode("latin1")
        body = json.dumps(protocol_of(path).error_body(ApiError(status, reason))).encode()
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        # Closing at once, with data unread, could keep the client from reading the error.
        with suppress(OSError):  # the client has gone meanwhile
            self.transport.write_eof()
        self.loop.call_later(farewell, self.transport.abort)
