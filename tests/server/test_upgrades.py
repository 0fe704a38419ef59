"""Requests that offer another protocol, as Java's and curl's clients do: HTTP/1.1 answers them."""

import json
import logging
from collections.abc import Iterator

import pytest

from qwen3_mlx import LLM
from tests.server.serving import Served, serving
from tests.server.test_connections import all_of, connected

BODY = json.dumps({"messages": [{"role": "user", "content": "What is 1 + 2?"}]}).encode()
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
COUNT = b"POST /v1/messages/count_tokens HTTP/1.1\r\nHost: localhost\r\n"
WITH_LENGTH = COUNT + OFFER + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
IN_CHUNKS = (
    COUNT
    + OFFER
    + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(BODY)
    + BODY
    + b"\r\n0\r\n\r\n"
)
PLAIN = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
LAST = PLAIN + b"Connection: close\r\n\r\n"


@pytest.fixture(scope="module")
def served(demo: LLM) -> Iterator[Served]:
    """A server."""
    with serving(demo) as running:
        yield running


@pytest.mark.parametrize("request_", [WITH_LENGTH, IN_CHUNKS], ids=["length", "chunks"])
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_an_offer_is_left_and_the_body_is_read(
    served: Served, request_: bytes, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    sent = request_ + PLAIN + OFFER + b"\r\n" + LAST
    with connected(served) as connection:
        for start in range(0, len(sent), size):
            connection.sendall(sent[start : start + size])
        answers = all_of(connection)
    assert answers.count(b"HTTP/1.1 200 OK") == 3
    assert b'{"input_tokens":16}' in answers
    assert not caplog.records


@pytest.mark.parametrize("kind", [b"websocket", b"TLS/1.0, HTTP/2.0"])
def test_no_other_protocol_is_spoken(served: Served, kind: bytes) -> None:
    offer = b"Connection: keep-alive, Upgrade\r\nUpgrade: " + kind + b"\r\n\r\n"
    with connected(served, PLAIN + offer + LAST) as connection:
        answers = all_of(connection)
    assert answers.count(b"HTTP/1.1 200 OK") == 2
    assert b"101" not in answers[:20]


def test_many_offers_at_once_are_answered_one_after_another(served: Served) -> None:
    with connected(served, 150 * (PLAIN + OFFER + b"\r\n") + LAST) as connection:
        assert all_of(connection).count(b"HTTP/1.1 200 OK") == 151


def test_no_tunnel_is_opened(served: Served) -> None:
    head = b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    for target in (b"localhost:80", b"/health"):
        with connected(served, b"CONNECT " + target + head) as connection:
            assert b"HTTP/1.1 4" in all_of(connection)
