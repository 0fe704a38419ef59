"""Malicious connections: bad framing and headers, half-open and slow ones; used by `hostile`.

Each function opens a bounded number of connections to a port and counts how they end: with the
status of the answer, `closed`, or `open` if the server still waits for more.
"""

import json
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from benchmarks.served import ENDS

_BODY = b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}'
_HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
)
_GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
_MEGABYTE = b"a" * 1_000_000
_CHUNK = b"%x\r\n%b\r\n" % (len(_MEGABYTE), _MEGABYTE)


@contextmanager
def connected(port: int, patience: float = 5.0) -> Iterator[socket.socket]:
    """Yield a connection, which is closed with the block."""
    with socket.create_connection(("127.0.0.1", port), timeout=patience) as connection:
        yield connection


def ended(connection: socket.socket, patience: float = 5.0) -> str:
    """Return the status of the answer, "closed", or "open" if there is none in time."""
    connection.settimeout(patience)
    try:
        answer = connection.recv(4096)
    except TimeoutError:
        return "open"
    except OSError:
        return "closed"
    return answer[9:12].decode(errors="replace") if answer[:5] == b"HTTP/" else "closed"


def _sent(connection: socket.socket, data: bytes, times: int = 1) -> None:
    with suppress(OSError):  # closed by the server, which the next read shows
        for _ in range(times):
            connection.sendall(data)


_READERS, _EACH = 3, 8  # replies that each reader asks for
SLOTS = _READERS * _EACH  # of the server, all of which the readers occupy
_SOON = 60.0  # seconds in which half-open connections must make room
_PATIENCE = 120.0  # seconds until slots must be free again
_LENGTH = b"Content-Length: %d\r\n" % len(_BODY)
_TWO = b"Content-Length: 5\r\n" + _LENGTH + b"\r\n" + _BODY
_BOTH = b"Transfer-Encoding: chunked\r\n" + _LENGTH + b"\r\n0\r\n\r\n" + _GET + b"\r\n"
FRAMES: dict[str, bytes] = {
    "two lengths": _HEAD + _TWO,
    "length and chunks": _HEAD + _BOTH,
    "a negative length": _HEAD + b"Content-Length: -5\r\n\r\n",
    "a length in words": _HEAD + b"Content-Length: five\r\n\r\n",
    "a huge length": _HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n",
    "a broken chunk": _HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n",
    "a huge chunk": _HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
    "chunks twice": _HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "a folded header": _GET + b"X: a\r\n b\r\n\r\n",
    "a bare newline": b"GET /health HTTP/1.1\nHost: localhost\n\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": _GET + b"Host: example.com\r\n\r\n",
    "a NUL in a header": _GET + b"X: a\x00b\r\n\r\n",
    "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/9.9": b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "an odd method": b"BREW /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "CONNECT": b"CONNECT example.com:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a whole address": b"GET http://example.com/health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "an upgrade": _GET + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    "expect": _HEAD + b"Expect: 100-continue\r\n" + _LENGTH + b"\r\n" + _BODY,
    "noise": bytes(range(256)) * 20,
    "one address of 1 MB": b"GET /" + _MEGABYTE + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


def frames(port: int) -> Counter[str]:
    """Send malformed and ambiguous HTTP; then 100 pipelined requests on one connection."""
    ends: Counter[str] = Counter()
    for data in FRAMES.values():
        with connected(port) as connection:
            _sent(connection, data)
            with suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
            ends[ended(connection)] += 1
    with connected(port) as connection:
        _sent(connection, (_GET + b"\r\n") * 100)
        answers = b""
        with suppress(TimeoutError):
            while answers.count(b"HTTP/1.1 200") < 100 and (more := connection.recv(65536)):
                answers += more
        ends["200"] += answers.count(b"HTTP/1.1 200")
    return ends


def headers(port: int) -> Counter[str]:
    """Send endless headers: 60 MB in one line, 60 MB in many lines, and 20,000 short ones."""
    ends: Counter[str] = Counter()
    for first, more, times in (
        (b"X: ", _MEGABYTE, 60),
        (b"", b"X: " + _MEGABYTE + b"\r\n", 60),
        (b"", b"X: a\r\n", 20_000),
    ):
        with connected(port) as connection:
            _sent(connection, _GET + first)
            _sent(connection, more, times)
            ends[ended(connection, 2.0)] += 1
    return ends


def bodies(port: int) -> Counter[str]:
    """Send 100 MB in endless chunks, 1M chunks of one byte, and bodies that stop short."""
    ends: Counter[str] = Counter()
    chunked = _HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    with connected(port) as connection:
        _sent(connection, chunked)
        _sent(connection, _CHUNK, 100)
        ends[ended(connection)] += 1
    with connected(port) as connection:  # may stay open: the body is not large
        _sent(connection, chunked)
        _sent(connection, b"1\r\na\r\n" * 100_000, 10)
        ends["left"] += 1
    for _ in range(50):
        with connected(port) as connection:
            _sent(connection, _HEAD + _LENGTH + b"\r\n" + _BODY[:9])
    ends["left"] += 50
    return ends


def half_open(port: int, count: int = 500) -> Counter[str]:
    """Hold connections open with no data or half a header; an ordinary one must be answered."""
    ends: Counter[str] = Counter()
    with ExitStack() as stack:
        kept = []
        for number in range(count):
            with suppress(OSError):  # the server's queue is full
                connection = stack.enter_context(connected(port, 0.5))
                kept.append(connection)
                _sent(connection, _GET if number % 2 else b"")
        started = time.perf_counter()
        status = "open"
        while status not in ("200", "503") and time.perf_counter() - started < _SOON:
            with suppress(OSError), connected(port) as connection:
                _sent(connection, _GET + b"Connection: close\r\n\r\n")
                status = ended(connection)
        ends[f"then {status}"] += 1
        ends["kept"] += len(kept)
    return ends


def slow_readers(port: int) -> Counter[str]:
    """Request more than the system buffers and read nothing; the slots must become free again."""
    asked: dict[str, Any] = {"prompt": "1 2 3", "n": _EACH, "max_tokens": 800, "stream": True}
    asked |= {"logprobs": 20, "temperature": 1.5, "logit_bias": dict.fromkeys(ENDS, -100)}
    body = json.dumps(asked).encode()
    head = _HEAD.replace(b"chat/", b"")
    ends: Counter[str] = Counter()
    with ExitStack() as stack:
        for _ in range(_READERS):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", port))
            _sent(connection, head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        started, status = time.perf_counter(), "429"
        time.sleep(1.0)
        while status not in ("200", "closed") and time.perf_counter() - started < _PATIENCE:
            with connected(port) as connection:
                _sent(connection, _HEAD + _LENGTH + b"Connection: close\r\n\r\n" + _BODY)
                status = ended(connection, 30.0)
                ends[status] += 1
            time.sleep(1.0)
        ends[f"at last {status}"] += 1
    return ends
