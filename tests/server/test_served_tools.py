"""Tools of MCP servers, as the page and other clients find them on a server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen3_mlx import LLM
from qwen3_mlx.mcp import connect
from tests.cli.harness import call as command
from tests.embedding_twins import write_twin
from tests.mcp.harness import by_hand
from tests.server.harness import until
from tests.server.serving import Served, serving

CALL, TOOLS = "/v1/mcp/call", "/v1/mcp/tools"


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a tool that hangs writes what it reads."""
    return tmp_path_factory.mktemp("trace") / "trace"


@pytest.fixture(scope="module")
def served(demo: LLM, trace: Path) -> Iterator[Served]:
    """A server with the tools of two MCP servers, which have one name in common."""
    first = by_hand("calculator", "fail", "crash", "self")
    entries = {"one": first, "two": by_hand("calculator", "hang", env={"TRACE": str(trace)})}
    origins = ["https://friend.example"]
    with connect({"mcpServers": entries}) as mcp:
        with serving(demo, tools=mcp.tools, cors_origins=origins) as running:
            yield running


def content_of(served: Served, name: str, **arguments: Any) -> str:
    """Call a tool, and return what the model would read."""
    response = served.post(CALL, {"name": name, "arguments": arguments})
    assert response.status_code == 200, response.text
    return str(response.json()["content"])


def test_the_tools_are_listed_as_requests_have_them(served: Served) -> None:
    listed = served.get(TOOLS).json()["data"]
    names = [(tool["server"], tool["function"]["name"]) for tool in listed]
    assert names == [
        ("one", "one__calculator"),
        *(("one", name) for name in ("fail", "crash", "self")),
        ("two", "two__calculator"),
        ("two", "hang"),
    ]
    tools = [{"type": tool["type"], "function": tool["function"]} for tool in listed]
    fields = {"tools": tools[:1], "tool_choice": "required", "temperature": 0}
    reply = served.chat("What is 345 + 678?", **fields).json()["choices"][0]["message"]
    (asked,) = reply["tool_calls"]
    assert asked["function"]["name"] == "one__calculator"
    assert content_of(served, "one__calculator", **json.loads(asked["function"]["arguments"]))


def test_calls_give_what_the_model_reads(served: Served) -> None:
    assert content_of(served, "two__calculator", expression="1+2") == "3"
    assert content_of(served, "self", a=[1, {"b": "ü"}]) == json.dumps({"a": [1, {"b": "ü"}]})
    assert content_of(served, "fail") == "Error: it went wrong"
    ended = "Error: the MCP server one: it has closed the connection: out of luck"
    assert content_of(served, "crash") == ended
    assert content_of(served, "fail") == ended
    assert content_of(served, "two__calculator", expression="2+2") == "4"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"name": "calculator"}, 404, "there is no tool 'calculator' here"),
        ({"name": "hang", "arguments": "{}"}, 400, "arguments"),
        ({}, 400, "name"),
        ([], 400, "JSON object"),
    ],
)
def test_wrong_calls_are_refused(served: Served, body: Any, status: int, words: str) -> None:
    response = served.post(CALL, body)
    assert response.status_code == status
    assert words in response.json()["error"]["message"]


def test_pages_of_other_sites_call_no_tools(served: Served) -> None:
    body = {"name": "two__calculator", "arguments": {"expression": "1+2"}}
    own = served.post(CALL, body, origin=served.url)
    assert own.status_code == 200
    friend = served.post(CALL, body, origin="https://friend.example")
    assert friend.status_code == 403
    assert "only the page of this server" in friend.json()["error"]["message"]
    assert served.post(CALL, body, origin="https://other.example").status_code == 403
    assert served.get(TOOLS, origin="https://friend.example").status_code == 403
    hidden = {"sec-fetch-site": "cross-site", "content-type": "text/plain"}
    assert served.post(CALL, body, **hidden).status_code == 403


def test_a_call_ends_with_its_client(served: Served, trace: Path) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}{CALL}", json={"name": "hang"}, timeout=0.5)
    until(lambda: trace.exists() and "cancelled" in trace.read_text())
    until(lambda: served.server.service.active == 0)
    assert served.chat(max_tokens=2).status_code == 200


def test_without_servers_there_are_no_tools(embedder: Served) -> None:
    assert embedder.get(TOOLS).json() == {"object": "list", "data": []}
    assert embedder.post(CALL, {"name": "any"}).status_code == 404


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "every client of the network could call the tools"),
        (["--model", "embedding"], "calls no tools"),
    ],
)
def test_the_command_refuses_servers_where_they_make_no_sense(
    options: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "mcp.json"
    file.write_text(json.dumps({"mcpServers": {"sums": by_hand("calculator")}}))
    write_twin("embedding", tmp_path / "embedding")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qwen3_mlx.cli.serve._log_to_stderr", lambda **_: None)  # outlives the test
    code, _, err = command(["serve", "--mcp", str(file), "--port", "0", *options], capsys)
    assert code and words in err
