"""Fields without effect are warned of or refused, by the names that the client used."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen3_mlx import LLM, load
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.server.app import make_app
from qwen3_mlx.server.settings import Settings
from tests.server.harness import NEVER, SCHEMA, SUM, TOOLS, of_template, short, warnings_of
from tests.server.serving import Served, serving

JSON: dict[str, Any] = {"response_format": {"type": "json_object"}}


@pytest.fixture(scope="module")
def served(demo: LLM) -> Iterator[Served]:
    """A server with the demo, which is hybrid."""
    with serving(demo) as running:
        yield running


def complaint(response: Any) -> str:
    """Return the message of an error 400."""
    assert response.status_code == 400, response.text
    return str(response.json()["error"]["message"])


def test_a_warning_has_the_words_of_the_client(served: Served) -> None:
    fields: dict[str, Any] = {"thinking": {"type": "disabled"}}
    body = short("/v1/messages", 9, **fields, output_config={"effort": "high"})
    assert warnings_of(served.post("/v1/messages", body)) == (
        "output_config.effort=high was ignored: thinking.type=disabled comes first"
    )
    assert warnings_of(served.chat(max_tokens=9, **fields, enable_thinking=True)) == (
        "thinking.type=disabled was ignored: enable_thinking=true comes first"
    )


def test_what_agrees_is_not_warned_of(served: Served, tmp_path: Path) -> None:
    agreed: list[dict[str, Any]] = [
        {"reasoning_effort": "none", "thinking_budget": -1, "enable_thinking": False},
        {"reasoning_effort": "low", "thinking_budget": 512},
        {"reasoning_effort": "max", "thinking_budget": -1},
    ]
    for fields in agreed:
        assert not warnings_of(served.chat(max_tokens=60, **fields))
    with load(of_template(tmp_path / "never", NEVER)) as llm, serving(llm) as instruct:
        idle: dict[str, Any] = {"reasoning_effort": "none", "thinking_budget": -1}
        assert not warnings_of(instruct.chat(max_tokens=2, **idle))
        hint = warnings_of(instruct.chat(max_tokens=2, reasoning_effort="low", thinking_budget=-1))
        assert hint == "reasoning_effort=low was ignored: this checkpoint cannot think"


def test_a_message_for_the_end_of_thinking_needs_thinking(served: Served) -> None:
    asked: dict[str, Any] = {"max_tokens": 9, "thinking_budget_message": "Enough."}
    assert not warnings_of(served.chat(**asked))
    told = warnings_of(served.chat(**asked, enable_thinking=False))
    assert told == "thinking_budget_message was ignored: the reply does not think"


def test_that_it_is_json_does_not_go_without_saying(served: Served) -> None:
    other: dict[str, Any] = {"structured_outputs": {"regex": "a"}}
    assert complaint(served.chat(**JSON, **other)) == (
        "an answer can have one form, not response_format and regex"
    )
    assert "one form" in complaint(served.chat(**JSON, **other, json_schema=SCHEMA))
    reply = served.chat(think=False, format={}, temperature=0, max_tokens=9).json()
    json.loads(reply["choices"][0]["message"]["content"])  # which "12 + 34 = 46" is not


def test_a_call_has_no_form(served: Served) -> None:
    asked: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "enable_thinking": False}
    response = served.chat(max_tokens=60, **asked, **JSON)
    assert "so the form of the answer was ignored" in warnings_of(response)
    assert response.json()["choices"][0]["message"]["tool_calls"]
    assert not warnings_of(served.chat(max_tokens=60, **asked))


def test_a_message_without_parts_is_a_message(served: Served) -> None:
    said = {"role": "assistant", "content": "46"}
    nothing: dict[str, Any] = {"role": "user", "content": []}
    counts = []
    for turns in ([*SUM, said, nothing], [*SUM, said, {"role": "user", "content": ""}]):
        response = served.post("/v1/messages/count_tokens", {"messages": turns})
        counts.append(response.json()["input_tokens"])
    assert counts[0] == counts[1]


def test_errors_advise_what_a_client_can_do(served: Served) -> None:
    empty = {"messages": [{"role": "assistant", "content": ""}], "max_tokens": 5}
    for path in ("/v1/chat/completions", "/v1/messages"):
        assert complaint(served.post(path, empty)) == (
            "the last message is the assistant's and says nothing: add a message to reply to"
        )


def test_no_least_number_of_tokens_is_none(served: Served) -> None:
    assert not warnings_of(served.chat(max_tokens=3, min_tokens=0))
    assert "min_tokens is not supported" in complaint(served.chat(min_tokens=5))


def test_null_asks_for_nothing(served: Served) -> None:
    sent_back = {"role": "assistant", "content": "46", "audio": None, "annotations": None}
    body = {"messages": [*SUM, sent_back, *SUM], "max_tokens": 1, "frobnicate": None}
    assert not warnings_of(served.post("/v1/chat/completions", body))
    body |= {"frobnicate": 1}
    told = warnings_of(served.post("/v1/chat/completions", body))
    assert told == "unknown field 'frobnicate' was ignored"


def test_no_number_is_no_json(served: Served) -> None:
    sent = b'{"messages": [{"role": "user", "content": "x"}], "json_schema": {"minimum": NaN}}'
    response = httpx.post(f"{served.url}/v1/chat/completions", content=sent, verify=False)
    assert complaint(response) == (
        "the request cannot be read as JSON: expected value at line 1 column 77"
    )


def test_a_tool_of_the_providers_is_named(served: Served) -> None:
    for tool, named in (
        (
            {"name": "search", "type": "web_search_20250305"},
            "'search' of type 'web_search_20250305'",
        ),
        ({"name": "search"}, "'search'"),
    ):
        response = served.post("/v1/messages", short("/v1/messages", 5, tools=[tool]))
        assert complaint(response) == (
            f"the tool {named} is not supported: it needs an input_schema, and to be run by the "
            "client"
        )


def test_a_budget_bends_where_the_context_ends() -> None:
    """A limit that the client has not set is no reason to refuse its request."""
    with load(context=64) as llm, serving(llm) as small:
        words = "hi " * 12 + "What is 12 + 34?"
        for most in ({}, {"max_tokens": 32_000}):
            choice = small.chat(words, thinking_budget=16_000, **most).json()["choices"][0]
            assert choice["finish_reason"] in ("stop", "length")
        assert "leaves no room" in complaint(small.chat(words, thinking_budget=9, max_tokens=5))


def test_a_server_of_what_cannot_think_has_no_budget(tmp_path: Path) -> None:
    with (
        load(of_template(tmp_path / "never", NEVER)) as llm,
        pytest.raises(Qwen3Error, match="cannot think; leave thinking_budget out"),
    ):
        make_app(llm, Settings(model="instruct", thinking_budget=64))


def test_errors_name_no_class(served: Served) -> None:
    for name, value in (
        ("reasoning", "on"),
        ("thinking", "on"),
        ("tools", ["x"]),
        ("messages", [1]),
    ):
        wrong: dict[str, Any] = {"messages": SUM, name: value}
        said = complaint(served.post("/v1/chat/completions", wrong))
        assert said == f"{name}: Input should be an object"


def test_the_advice_for_pages_can_be_taken(served: Served) -> None:
    for headers, named, value in (
        ({"Origin": "http://evil.com"}, "http://evil.com", "http://evil.com"),
        ({"Origin": "null"}, "null", "*"),
        ({"Sec-Fetch-Site": "cross-site"}, "another site", "*"),
    ):
        response = served.post("/v1/chat/completions", short("", 1), **headers)
        assert response.status_code == 403
        said = response.json()["error"]["message"]
        assert said.startswith(f"pages of {named} may not use this server; --cors-origin")
        assert value in said.partition("--cors-origin ")[2]
        Settings(model="demo", cors_origins=[value])
