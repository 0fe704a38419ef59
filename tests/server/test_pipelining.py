"""Requests that are sent before the response to another: that which is answered is what counts."""

import logging
import socket
from typing import Any

import pytest

from qwen3_mlx import LLM
from tests.server.serving import Served, serving
from tests.server.test_connections import WHOLE, all_of, connected, endless, post, wait_until

HALF_A_BODY = post("/api/chat", {"messages": []})[:-3]


def running(served: Served) -> bool:
    """Return whether the engine is generating a reply."""
    return served.llm.activity().running > 0


def stream(**fields: Any) -> bytes:
    """Write a request for a reply of a thousand tokens and more."""
    return post("/v1/completions", endless(max_tokens=1900, logprobs=None, **fields))


@pytest.mark.parametrize("behind", [WHOLE, HALF_A_BODY, stream()], ids=["get", "half", "stream"])
@pytest.mark.parametrize("streamed", [True, False])
def test_a_reply_ends_with_its_client_whatever_stands_behind_it(
    tiny: LLM, behind: bytes, streamed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="qwen3_mlx.server.access")
    with serving(tiny) as served:
        with connected(served, stream(stream=streamed) + behind):
            wait_until(lambda: running(served), "it does not run")
        wait_until(lambda: not served.server.service.active, "its place is not free")
    assert '"finish": ["cancelled"]' in caplog.records[0].getMessage()


def test_the_end_of_the_server_is_told_in_the_reply_that_runs(
    tiny: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tiny, shutdown=0.4) as served, connected(served, stream()) as connection:
        said = connection.recv(1)
        (inside,) = served.server.connections.all
        cycle = inside.cycle
        connection.sendall(HALF_A_BODY)
        wait_until(lambda: inside.cycle is not cycle, "it has no head")
        served.server.should_exit = True
        said += all_of(connection)
    assert b"the server is shutting down" in said and said.endswith(b"\r\n0\r\n\r\n")
    assert said.count(b"HTTP/1.1") == 1
    assert "write_eof" not in caplog.text


def test_what_is_no_request_is_not_answered_in_the_middle_of_a_reply(tiny: LLM) -> None:
    with serving(tiny) as served, connected(served, stream()) as connection:
        said = connection.recv(1 << 16)
        connection.sendall(b"nonsense\r\n\r\n")
        said += all_of(connection)
    assert said.count(b"HTTP/1.1") == 1


def test_a_client_that_has_ended_its_side_gets_all_quick_answers(tiny: LLM) -> None:
    with serving(tiny) as served, connected(served, 3 * WHOLE) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert all_of(connection).count(b"HTTP/1.1 200") == 3
