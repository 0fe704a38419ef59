"""The form of errors of each protocol, wherever a request is refused."""

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from qwen3_mlx import LLM
from tests.server.serving import Served, serving

_MESSAGE: Any = object()


@pytest.fixture(scope="module")
def served(demo: LLM) -> Iterator[Served]:
    """A server."""
    with serving(demo) as running:
        yield running


def openai(kind: str, code: str | None = None) -> dict[str, Any]:
    """An error of OpenAI's protocol."""
    return {"error": {"message": _MESSAGE, "type": kind, "param": None, "code": code}}


def anthropic(kind: str) -> dict[str, Any]:
    """An error of Anthropic's protocol."""
    return {"type": "error", "error": {"type": kind, "message": _MESSAGE}}


def ollama(_: str) -> dict[str, Any]:
    """An error of Ollama's protocol."""
    return {"error": _MESSAGE}


def without_message(body: dict[str, Any]) -> dict[str, Any]:
    """Return a body with a mark in place of the message, which there must be."""
    error = body["error"]
    message = error if isinstance(error, str) else error["message"]
    assert isinstance(message, str) and message
    return body | {"error": _MESSAGE if error is message else error | {"message": _MESSAGE}}


_PATHS = [
    ("/v1/chat/completions", openai),
    ("/v1/nothing", openai),
    ("/nothing", openai),
    ("/api", openai),
    ("/v1/messages", anthropic),
    ("/v1/messages/nothing", anthropic),
    ("/api/chat", ollama),
    ("/api/nothing", ollama),
]


@pytest.mark.parametrize(("path", "form"), _PATHS)
def test_a_refusal_has_the_form_of_the_protocol_of_its_path(
    served: Served, path: str, form: Callable[[str], dict[str, Any]]
) -> None:
    url = served.url + path
    by_route = httpx.request("POST", url, content=b"{", verify=False)
    missing = by_route.status_code == 404 and form is anthropic
    kind = "not_found_error" if missing else "invalid_request_error"
    assert without_message(by_route.json()) == form(kind)
    by_guard = httpx.get(url, headers={"Host": "evil.com"}, verify=False)
    kind = "permission_error" if form is anthropic else "invalid_request_error"
    assert by_guard.status_code == 403 and without_message(by_guard.json()) == form(kind)
    for response in (by_route, by_guard):
        assert ("request-id" in response.headers) == (form is anthropic)


@pytest.mark.parametrize(("path", "form"), _PATHS)
def test_so_has_the_refusal_of_a_connection(
    served: Served, path: str, form: Callable[[str], dict[str, Any]]
) -> None:
    address = urlsplit(served.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nX: {'x' * 70_000}".encode())
        answer = b""
        while piece := connection.recv(1 << 16):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert without_message(json.loads(body)) == form("invalid_request_error")
