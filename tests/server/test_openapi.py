"""The API's own description, and requests made up from it and far from it: nothing brings it down.

The default tier takes some; `-m slow` takes 2,000 by the description, and 10,000 that are mutated.
"""

import json
import random
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import checks
from schemathesis.core.result import Ok

from benchmarks.payloads import VALID, mutated_request
from benchmarks.soak import state
from qwen3_mlx import LLM
from tests.server.serving import Served, serving

_FEW, _MANY = 2, 400  # requests of each operation
_TOKENS = 4  # of a reply: what is said is not what is tested here
_CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
_SETTINGS: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "database": None,
    "derandomize": True,
}


@pytest.fixture(scope="module")
def served(demo: LLM) -> Iterator[Served]:
    """A server with the demo."""
    with serving(demo) as running:
        yield running
        assert running.get("/health").json()["active"] == 0


def hold_to_it(case: Any) -> None:
    """Send a request; its response must be one that is described."""
    body = case.body
    if isinstance(body, dict):
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            most = body.get(name)
            if most in (None, -1) or (type(most) is int and most > _TOKENS):
                body[name] = _TOKENS
        if body.get("options") is None or isinstance(body["options"], dict):
            body["options"] = {**(body.get("options") or {}), "num_predict": _TOKENS}
    case.call_and_validate(checks=_CHECKS, timeout=60)


def hold_all_to_it(served: Served, count: int, paths: str = ".*") -> int:
    """Send `count` requests to each operation at such paths; return how many were sent."""
    made = 0
    description = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    for found in description.include(path_regex=paths).get_all_operations():
        assert isinstance(found, Ok)

        @settings(max_examples=count, **_SETTINGS)
        @given(found.ok().as_strategy())
        def hold(case: Any) -> None:
            nonlocal made
            made += 1
            hold_to_it(case)

        hold()
    return made


@pytest.mark.heavy
def test_answers_are_as_described(served: Served) -> None:
    assert hold_all_to_it(served, _FEW) > 5 * _FEW


@pytest.mark.heavy
def test_vectors_and_scores_are_as_described(embedder: Served, reranker: Served) -> None:
    assert hold_all_to_it(embedder, _FEW, "embed") > 2 * _FEW
    assert hold_all_to_it(reranker, _FEW, "rerank") > 2 * _FEW


@pytest.mark.slow
def test_2000_answers_are_as_described(served: Served) -> None:
    assert hold_all_to_it(served, _MANY) > 2000


@pytest.mark.slow
def test_2000_vectors_and_scores_are_as_described(embedder: Served, reranker: Served) -> None:
    sent = hold_all_to_it(embedder, _MANY, "embed") + hold_all_to_it(reranker, _MANY, "rerank")
    assert sent > 2000


# --- requests that were never meant ---------------------------------------------------------------


def attack(served: Served, count: int, seed: int) -> dict[int, int]:
    """Send mutated requests, some of which break off, and count the answers by status."""
    found: dict[int, int] = {}
    draw = random.Random(seed)
    address = urlsplit(served.url)
    with httpx.Client(base_url=served.url, timeout=60) as client:
        for _ in range(count):
            path, content = mutated_request(draw)
            if draw.random() < 0.3:
                content = json.dumps({**VALID[path], "stream": True, "max_tokens": 200}).encode()
                break_off(address.hostname or "", address.port or 0, path, content, draw)
                continue
            kind = {"Content-Type": "application/json"}
            status = client.post(path, content=content, headers=kind).status_code
            found[status] = found.get(status, 0) + 1
    return found


def break_off(host: str, port: int, path: str, content: bytes, draw: random.Random) -> None:
    """Send a request, or a part of it, read a little of the answer, or nothing, and go away."""
    request = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    ).encode() + content
    with socket.create_connection((host, port)) as connection:
        connection.sendall(request[: draw.choice((len(request), draw.randrange(len(request))))])
        connection.settimeout(draw.choice((0.001, 0.02)))
        try:
            connection.recv(draw.choice((1, 4096)))
        except TimeoutError:
            pass


def check_still_well(served: Served, found: dict[int, int]) -> None:
    """No answer may be a server's error, and the server must be well and idle soon."""
    some = sum(found.values()) / 30  # of each kind, or this tests little
    assert max(found) < 500 and found[200] > some and found[400] > some, found
    for _ in range(600):
        if not served.get("/health").json()["active"]:
            break
    assert served.get("/health").json()["active"] == 0
    assert served.chat(seed=1).json()["choices"][0]["message"]["content"] == "12 + 34 = 46"


@pytest.mark.heavy
def test_mutated_requests_bring_nothing_down(served: Served) -> None:
    check_still_well(served, attack(served, 60, seed=4))


@pytest.mark.slow
def test_10000_mutated_requests_leave_no_trace(demo: LLM) -> None:
    with serving(demo) as running:
        check_still_well(running, attack(running, 4_000, seed=1))
        before = state(demo)["resident, bytes"]
        check_still_well(running, attack(running, 6_000, seed=2))
        grown = state(demo)["resident, bytes"] - before
    assert grown < 30_000_000, f"the memory has grown by {grown / 1e6:.0f} MB"
