"""Connections: how many there may be, and what a client may cost before its request is looked at.

A client must send a request's head and body, and take its response, within limits of size and time.
What the server itself takes to answer is not limited here. Where there are too many connections,
those go first that have waited longest without asking for anything, so that a new client gets in
however many others do nothing but hold theirs.
"""

import asyncio
import errno
import json
import logging
import resource
import sys
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.guard import address_of, write_record

_log = logging.getLogger(__name__)
_MOST_FILES = 10_240  # more than this macOS refuses to set (OPEN_MAX)
_MOST_CONNECTIONS = 1024
_MOST_ACCEPTED = 128  # at once, before any of them is looked at
_OWN_FILES = 32  # descriptors for the rest: weights, kept prompts, pipes, the log
_PIECE = 1 << 14  # bytes looked at between two counts of what a head has
_MOST_PIPELINED = 256  # requests that are sent before the response to another
_FARE = 1 << 15  # bytes that a client must take of a response for it to count as progress
_FAREWELL = 2.0  # seconds that a refused client has to read why
_SELDOM = 60.0  # seconds between two lines of the log on the same matter
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass(frozen=True, slots=True)
class Limits:
    """What connections may take; times in seconds, sizes in bytes.

    `patience` is for a head in all, for the next piece of a body, and for the next request.
    `body_rate` a body must come by on average, after that time. `write_patience` is for a client to
    take some of a response that is waiting to be sent.
    """

    connections: int = _MOST_CONNECTIONS
    accepted: int = _MOST_ACCEPTED
    head: int = 1 << 16
    patience: float = 30.0
    body_rate: int = 500
    write_patience: float = 60.0

    @classmethod
    def of_process(cls) -> "Limits":
        """Return the limits that the descriptors of this process allow."""
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        files = _MOST_FILES if soft == resource.RLIM_INFINITY else soft
        accepted = max(4, min(_MOST_ACCEPTED, files // 8))
        # Those accepted last and those closed for them are both open for a moment.
        room = files - 3 * accepted - _OWN_FILES
        return cls(connections=max(4, min(_MOST_CONNECTIONS, room)), accepted=accepted)


def raise_file_limit() -> None:
    """Raise the soft limit of descriptors as far as it may be: macOS begins with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (ValueError, OSError) as error:  # a system may allow less than it says
        _log.debug("the limit of descriptors stays at %d: %s", soft, error)


@dataclass(slots=True)
class RateLimitedLog:
    """Writes warnings of one kind at most once a minute, with how often there was cause."""

    words: str
    _count: int = 0
    _last: float = field(default=float("-inf"))

    def warn(self, *details: object) -> None:
        """Write the warning, or count it for the next."""
        self._count += 1
        if time.monotonic() - self._last >= _SELDOM:
            _log.warning(f"{self.words} (%d so far)", *details, self._count)
            self._last = time.monotonic()


class Connections:
    """All connections of a server."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._open: set[Connection] = set()
        self._crowded = RateLimitedLog(
            "%d connections are as many as there may be, so idle ones are closed for new ones"
        )
        self._full = RateLimitedLog(
            "%d connections are at work, and no more may be; a client was refused"
        )
        self._exhausted = RateLimitedLog(
            "no descriptor is left for a connection (%s); ulimit -n allows more"
        )

    def __len__(self) -> int:
        return len(self._open)

    @property
    def all(self) -> "frozenset[Connection]":
        """Those that are open."""
        return frozenset(self._open)

    def add(self, connection: "Connection") -> bool:
        """Count a connection, at the cost of an idle one if need be; False if there is no room."""
        if len(self._open) >= self.limits.connections:
            self._crowded.warn(self.limits.connections)
            if not self._close_idle():
                self._full.warn(self.limits.connections)
                return False
        self._open.add(connection)
        return True

    def remove(self, connection: "Connection") -> None:
        """Count a connection no more."""
        self._open.discard(connection)

    def sweep(self, now: float) -> None:
        """Close what has taken too long."""
        for connection in list(self._open):
            connection.check(now)

    def on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Handle what the event loop could not: it tries again and again to accept a connection."""
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
    """A connection that keeps to the limits."""

    def __init__(self, *, connections: Connections, **how: Any) -> None:
        super().__init__(**how)
        self._all = connections
        self._limits = connections.limits
        self.since = self.loop.time()  # when it began to wait for what it waits for
        self._beside = 0  # bytes since the last of a body, or the end of a head or of a message
        self._body = 0  # bytes of the body, which began to come at:
        self._body_begun = self._body_last = self.since
        self._refused = False
        # The request that is answered; `cycle` is the last that came, and may have to wait.
        self._current: RequestResponseCycle | None = None
        self._piece = self._again = b""  # what is read, and what is to be read again
        self._unsent = 0  # bytes that the client had not taken at:
        self._taken: float | None = None

    # --- what happens ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, if there is room."""
        super().connection_made(transport)
        if not self._all.add(self):
            self.refuse(503, "the server has as many connections as it may have; try again", 0)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._all.remove(self)
        if self._answering:
            self._disconnect()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what was sent, as long as it is not too much beside a body."""
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            self._beside += len(piece)
            while piece and not (self._refused or self.transport.is_closing()):
                self._piece, self._again = piece, b""
                super().data_received(piece)
                piece = self._again
                if self._beside > self._limits.head:
                    self.refuse(431, f"the head is larger than {self._limits.head:,} bytes")
                elif len(self.pipeline) > _MOST_PIPELINED:
                    self.refuse(400, f"more than {_MOST_PIPELINED} requests wait for a response")

    def _unsupported_upgrade_warning(self) -> None:
        """Have a request read again without its wish for another protocol, which is an offer only.

        Java's and curl's clients make it with each request; the parser leaves out the body then.
        """
        error = sys.exception()
        if not self._offers_upgrade or not isinstance(error, HttpParserUpgrade):
            return
        begun = b"%s %s HTTP/%s" % (
            self.parser.get_method(),
            self.url,
            self.parser.get_http_version().encode(),
        )
        fields = [b"%s: %s" % field for field in self.headers if field[0] != b"upgrade"]
        self._again = b"\r\n".join([begun, *fields, b"", self._piece[error.args[0] :]])
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    @property
    def _offers_upgrade(self) -> bool:
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def eof_received(self) -> bool:  # type: ignore[override]
        """Answer a client that has only ended its own side, if that is done at once.

        One that waits for a reply looks the same when it has gone away.
        """
        asked = [self._current, *(cycle for cycle, _ in self.pipeline)]
        quick = self.at_work and all(one.scope["method"] in ("GET", "HEAD") for one in asked if one)
        if quick:
            self.cycle.keep_alive = False
        return quick

    def on_message_begin(self) -> None:
        """Begin to wait for a head."""
        super().on_message_begin()
        if not self._answering:
            self.since = self.loop.time()

    def on_headers_complete(self) -> None:
        """Begin to wait for a body, and answer."""
        if self._offers_upgrade:
            return
        self._beside = self._body = 0
        self._body_begun = self._body_last = self.loop.time()
        super().on_headers_complete()
        if not self.pipeline:
            self._current = self.cycle

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        self._beside = 0
        self._body += len(body)
        self._body_last = self.loop.time()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Begin to wait for the next request."""
        if self._offers_upgrade:
            return
        self._beside = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request, which may have come already."""
        self.since = self._body_begun = self._body_last = self.loop.time()
        if self.pipeline:
            self._current = self.pipeline[-1][0]
        super().on_response_complete()

    def shutdown(self) -> None:
        """End, after the response if the request is whole: the rest of another may never come."""
        if self._refused:
            self.transport.abort()
        elif not self._current or not self._answering:
            self.transport.close()
        elif self._current.more_body:
            self.refuse(503, "the server is shutting down", 0)
        else:
            self._current.keep_alive = False

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request."""
        self.refuse(
            400, "this is no request of HTTP/1.1; for TLS put a proxy in front of the server"
        )

    # --- what is checked ------------------------------------------------------------------------

    @property
    def at_work(self) -> bool:
        """Whether a whole request is being answered."""
        return self._answering and not self._receiving

    @property
    def _answering(self) -> bool:
        return self._current is not None and not self._current.response_complete

    @property
    def _receiving(self) -> bool:
        return self._current is not None and self._current.more_body

    def check(self, now: float) -> None:
        """Close the connection if its client has taken too long over something."""
        limits = self._limits
        if self._is_stuck(now):
            self._note("the client did not take the response")
            self.transport.abort()
        elif self._refused or self.transport.is_closing():
            pass
        elif not self._answering:
            if now - self.since > limits.patience:
                self._end_of_patience()
        elif self._receiving:
            if self.flow.read_paused:  # it is the server that takes its time
                self._body_last = now
            earned = limits.patience + self._body / limits.body_rate
            if now - self._body_last > limits.patience or now - self._body_begun > earned:
                self._note("the body did not come in time")
                self.refuse(408, "the rest of the request did not come in time")

    def _is_stuck(self, now: float) -> bool:
        unsent = self.transport.get_write_buffer_size()
        ended = not self._answering or self.transport.is_closing()
        if not unsent or not (self.flow.write_paused or ended):
            self._taken = None
            return False
        if self._taken is None or unsent <= self._unsent - _FARE:
            self._taken, self._unsent = now, unsent
        return now - self._taken > self._limits.write_patience

    def _end_of_patience(self) -> None:
        if self._beside:
            self.refuse(408, "the head of the request did not come in time")
        else:
            self.transport.close()

    def _note(self, reason: str) -> None:
        if self._current and self._answering:
            record = self._current.scope.setdefault("record", {})  # type: ignore[typeddict-item]
            record["error"] = reason

    def _disconnect(self) -> None:
        """Have the application hear that the client is gone, and write no more."""
        if self._current:
            self._current.disconnected = True
            self._current.message_event.set()

    def refuse(self, status: int, reason: str, farewell: float = _FAREWELL) -> None:
        """Answer, and close after the `farewell`, without a look at what else is sent."""
        if self._refused:
            return
        self._refused = True
        if self._current and self._answering:
            if self._current.response_started:  # an answer would stand in the middle of another
                self.transport.abort()
                return
            self._disconnect()
        else:
            write_record({"client": address_of(self.client), "status": status, "error": reason})
        path = getattr(self, "url", b"").decode("latin1")
        body = json.dumps(ApiError(status, reason).body(path)).encode()
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        # Closed at once, with data unread, the client might never see the answer.
        self.transport.write_eof()
        self.loop.call_later(farewell, self.transport.abort)
