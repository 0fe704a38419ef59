"""Connections: what a client may cost before its request is looked at, and while it reads."""

import errno
import json
import logging
import resource
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import pytest

from qwen3_mlx import LLM
from qwen3_mlx.server.connections import Limits, raise_file_limit
from tests.server.serving import Served, serving
from tests.text.harness import TOKENIZER

HALF = b"GET /health HTTP/1.1\r\nHost: a"
WHOLE = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
SOON = Limits(patience=0.2, write_patience=0.2)
TIME = 20  # seconds for what takes one


@contextmanager
def connected(served: Served, sent: bytes = b"") -> Iterator[socket.socket]:
    """Open a connection, and send something."""
    place = urlsplit(served.url)
    with socket.create_connection((place.hostname, place.port), timeout=TIME) as connection:
        connection.sendall(sent)
        yield connection


def all_of(connection: socket.socket) -> bytes:
    """Read until the server closes."""
    parts = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def status_of(response: bytes) -> int:
    """Return the status of a response as it was sent."""
    return int(response.split(b" ", 2)[1])


def wait_until(true: Any, what: str) -> None:
    """Wait for something to be so."""
    end = time.monotonic() + TIME
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def process_memory() -> int:
    """Return the peak memory of the process, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def post(path: str, body: Any) -> bytes:
    """Write a request."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


# --- sizes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(demo: LLM) -> Iterator[Served]:
    """A server with ordinary limits."""
    with serving(demo) as running:
        yield running


@pytest.mark.parametrize(
    "start",
    [
        WHOLE[:-2] + b"X: ",  # a line that never ends
        b"GET /",
        b"GET /health HTTP/1.1\r\nH",
        WHOLE[:-2],
        CHUNKED + b"2\r\n[]\r\n0\r\nX: ",  # a trailer
        CHUNKED + b"1;",
    ],
)
def test_a_head_without_end_is_refused(served: Served, start: bytes) -> None:
    lines = start == WHOLE[:-2]
    more = b"X-Some: header\r\n" * 4096 if lines else b"a" * 65536
    with connected(served, start + 2 * more) as connection:
        assert status_of(all_of(connection)) == 431
        before = process_memory()
        with suppress(OSError):  # at some time it is closed
            for _ in range(160):
                connection.sendall(more)
        assert process_memory() - before < 8 << 20
    assert served.get("/health").status_code == 200


def test_a_large_head_is_answered_in_the_form_of_the_protocol(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="qwen3_mlx.server")
    for path, kind in (("/v1/messages", "type"), ("/api/chat", "error"), ("/v1/models", "error")):
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nX: ".encode()
        with connected(served, head + b"a" * 70_000) as connection:
            response = all_of(connection)
        assert status_of(response) == 431
        body = json.loads(response.partition(b"\r\n\r\n")[2])
        assert kind in body and "the head is larger than 65,536 bytes" in str(body)
        line = json.loads(caplog.messages[-1])
        assert (line["status"], line["client"]) == (431, "127.0.0.1") and line["error"]


def test_heads_up_to_the_limit_are_taken(served: Served) -> None:
    for size in (1000, 60_000):
        assert served.get("/health", Cookie="a" * size).status_code == 200
    with connected(served, WHOLE * 50) as connection:  # none of them is large
        assert connection.recv(12) == b"HTTP/1.1 200"


def test_requests_without_end_are_no_queue_without_end(served: Served) -> None:
    with connected(served, WHOLE * 3000) as connection:
        with suppress(OSError):
            for _ in range(20):
                connection.sendall(WHOLE * 3000)
        answered = all_of(connection).count(b"HTTP/1.1 200")
    assert answered < 60_000
    assert served.get("/health").status_code == 200


# --- times --------------------------------------------------------------------------------------


def test_what_does_not_come_in_time_is_closed(demo: LLM) -> None:
    body = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90\r\n\r\n{"
    with serving(demo, SOON) as served:
        with connected(served) as idle, connected(served, HALF) as half:
            with connected(served, body) as part, connected(served, WHOLE) as kept:
                assert all_of(idle) == b""
                assert status_of(all_of(half)) == 408
                assert status_of(all_of(part)) == 408
                assert status_of(all_of(kept)) == 200
        wait_until(lambda: len(served.server.connections) == 0, "a connection is left")


def test_a_client_that_goes_while_it_is_refused_is_its_own_loss(
    demo: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system says so in another exception than for one that has gone before."""

    def fail(transport: object) -> None:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    monkeypatch.setattr("asyncio.selector_events._SelectorSocketTransport.write_eof", fail)
    with serving(demo, SOON) as served:
        with connected(served, HALF) as half:
            assert status_of(all_of(half)) == 408
        assert served.get("/health").status_code == 200


def test_a_body_that_drips_is_closed(demo: LLM) -> None:
    body = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n\r\n"
    with serving(demo, Limits(patience=1.0, body_rate=1 << 20)) as served:
        with connected(served, body) as part:
            part.settimeout(0.05)
            end = time.monotonic() + TIME
            response = b""
            while not response:
                assert time.monotonic() < end
                try:
                    part.sendall(b" ")
                    response = part.recv(1 << 16)
                except TimeoutError:
                    pass
        assert status_of(response) == 408


def test_a_reply_that_takes_long_is_no_idle_connection(demo: LLM) -> None:
    body = {**endless(), "stream": False, "logprobs": None, "max_tokens": 200}
    with serving(demo) as served:
        loop, active = served.server.loop, list[int]()

        def look_in_an_hour() -> None:
            served.server.connections.sweep(loop.time() + 3600)
            active.append(served.server.service.active)

        with connected(served, post("/v1/completions", body)) as connection:
            wait_until(lambda: served.server.service.active, "it is not at work")
            loop.call_soon_threadsafe(look_in_an_hour)
            response = until(connection, b"completion_tokens")
        assert active == [1] and status_of(response) == 200


def test_half_a_body_does_not_hold_up_the_end(demo: LLM) -> None:
    body = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90\r\n\r\n{"
    with serving(demo, shutdown=600) as served:
        with connected(served, body) as part:
            wait_until(lambda: len(served.server.connections), "it has not come")
            wait_until(lambda: next(iter(served.server.connections.all)).cycle, "it has no head")
            served.server.should_exit = True
            assert status_of(all_of(part)) == 503


# --- readers that take their time -----------------------------------------------------------------


def endless(**fields: Any) -> dict[str, Any]:
    """A stream that a kernel's buffers do not hold."""
    never = {str(TOKENIZER.id_of(end)): -100 for end in ("<|im_end|>", "<|endoftext|>")}
    body = {"prompt": "1 2 3", "max_tokens": 4000, "logit_bias": never, "temperature": 1.5}
    return {**body, "stream": True, "logprobs": 5, **fields}


@contextmanager
def reading_nothing(served: Served, body: Any) -> Iterator[socket.socket]:
    """Ask for a stream, and read only that it has begun."""
    place = urlsplit(served.url)
    with closing(socket.socket()) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(TIME * 3)
        connection.connect((place.hostname, place.port))
        connection.sendall(post("/v1/completions", body))
        assert connection.recv(12) == b"HTTP/1.1 200"
        yield connection


def test_a_slot_is_free_when_the_engine_is_done(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_buffers(monkeypatch)
    with serving(tiny, max_requests=1) as served:
        with reading_nothing(served, endless(max_tokens=300)) as connection:
            wait_until(lambda: not served.server.service.active, "it keeps its slot")
            (unread,) = served.server.connections.all
            assert unread.at_work, "it has been sent, so that this says nothing"
            assert served.chat(max_tokens=3).status_code == 200
            assert b"data: [DONE]" in until(connection, b"data: [DONE]")


def test_a_client_that_takes_nothing_is_closed(
    tiny: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="qwen3_mlx.server")
    monkeypatch.setattr("qwen3_mlx.server.run._TICKS_PER_SWEEP", 1)  # or it generates for seconds
    shrink_buffers(monkeypatch)
    with serving(tiny, Limits(write_patience=0.2)) as served:
        with reading_nothing(served, endless(max_tokens=1900)) as connection:
            wait_until(lambda: not len(served.server.connections), "it is not closed")
            assert b"[DONE]" not in all_of(connection)
        wait_until(lambda: not served.server.service.active, "it goes on")
    assert "the client did not read the response" in caplog.text


def test_what_is_kept_for_a_client_is_bounded(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_buffers(monkeypatch)
    monkeypatch.setattr("qwen3_mlx.server.response._MAX_UNREAD", 150)
    with serving(tiny) as served:
        with reading_nothing(served, endless(max_tokens=1900)) as connection:
            wait_until(lambda: not served.server.service.active, "it goes on")
            assert b"the client read the reply too slowly" in until(connection, b"too slowly")
        assert served.chat(max_tokens=3).status_code == 200


def shrink_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the kernel buffer little of what was sent and not read."""
    accept = socket.socket.accept

    def accepted(listener: socket.socket) -> tuple[socket.socket, Any]:
        connection, address = accept(listener)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return connection, address

    monkeypatch.setattr(socket.socket, "accept", accepted)


def until(connection: socket.socket, end: bytes) -> bytes:
    """Read until something comes, or the server closes."""
    read = b""
    while end not in read and (part := connection.recv(1 << 16)):
        read += part
    return read


# --- numbers ------------------------------------------------------------------------------------


def test_new_clients_get_in_however_many_hold_idle_connections(
    demo: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(demo, Limits(connections=8)) as served:
        with reading_nothing(served, {"prompt": "1", "max_tokens": 5, "stream": True}):
            idle = [connected(served, HALF) for _ in range(40)]
            for one in idle:
                one.__enter__()
            for _ in range(3):
                assert served.get("/health").status_code == 200
            assert len(served.server.connections) <= 8
            for one in idle:
                one.__exit__(None, None, None)
    assert caplog.text.count("the limit of 8 connections is reached, so idle") == 1


def test_where_all_are_at_work_one_more_is_refused(demo: LLM) -> None:
    body = post("/v1/completions", {**endless(), "stream": False, "max_tokens": 8000})
    with serving(demo, Limits(connections=2)) as served:
        with connected(served, body), connected(served, body):
            wait_until(lambda: served.server.service.active == 2, "they are not at work")
            with connected(served) as third:
                assert b"503 Service Unavailable" in all_of(third)
        wait_until(lambda: not served.server.service.active, "they go on")
        assert served.get("/health").status_code == 200


def test_a_lack_of_descriptors_is_a_line_and_not_thousands(
    demo: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    accept, lacking = socket.socket.accept, 500

    def accepted(listener: socket.socket) -> tuple[socket.socket, Any]:
        nonlocal lacking
        if lacking:
            lacking -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", accepted)
    with serving(demo) as served:
        assert served.get("/health").status_code == 200
    assert not lacking
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and "no descriptor is left for a connection" in lines[0]


def test_limits_follow_the_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    for files, connections in ((256, 128), (64, 8), (20_000, 1024), (-1, 1024)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, n=files: (n, n))
        limits = Limits.of_process()
        assert limits.connections == connections
        assert files < 0 or limits.connections + 2 * limits.accepted < files


@pytest.mark.parametrize(
    ("soft", "hard", "most"),
    [
        (256, resource.RLIM_INFINITY, 10_240),
        (256, 4096, 4096),
        (20_000, 20_000, None),
        (256, 256, None),
    ],
)
def test_the_limit_of_descriptors_is_raised_as_far_as_may_be(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, most: int | None
) -> None:
    made = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: made.append(limits))
    raise_file_limit()
    assert made == ([(most, hard)] if most else [])


def test_what_is_no_request_is_told_so(served: Served) -> None:
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + 100 * b"a"  # of TLS
    for sent in (hello, b"GET /health HTTP/3.0\r\n\r\n", CHUNKED + b"-5\r\n"):
        with connected(served, sent) as connection:
            response = all_of(connection)
        assert status_of(response) == 400
        assert b"not an HTTP/1.1 request; for TLS put a proxy" in response


# --- half of a connection -------------------------------------------------------------------------


def test_a_client_that_has_ended_its_side_is_answered_where_that_is_quick(served: Served) -> None:
    with connected(served, WHOLE.replace(b"health", b"openapi.json")) as connection:
        connection.shutdown(socket.SHUT_WR)
        response = all_of(connection)
    assert status_of(response) == 200 and response.endswith(b"}")
