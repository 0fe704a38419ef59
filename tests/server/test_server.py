"""The server: who may come in, how it answers what is wrong, and that it goes on."""

import asyncio
import importlib.util
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from qwen3_mlx import LLM, backend, load
from qwen3_mlx.api.stream import Reply
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.server.app import make_app
from qwen3_mlx.server.service import ModelService
from qwen3_mlx.server.settings import Settings
from qwen3_mlx.server.thinking import EFFORTS, ThinkingRequest
from qwen3_mlx.text.thinking import Thinking
from tests.api.harness import settle
from tests.cli.harness import piped
from tests.server.harness import Process, endless, message_of, until_idle
from tests.server.serving import Served, serving
from tests.text.harness import TOKENIZER

HYBRID = Thinking(True, True, False, 1, 2)
ALWAYS = Thinking(True, False, True, 1, 2)
NEVER = Thinking(False, True, False, None, None)
LONG = "Count from 1 to 40, then count from 1 to 40 again."
SHORT = "What is 1 + 2?"


@pytest.fixture(scope="module")
def served(demo: LLM) -> Iterator[Served]:
    """A server with the demo."""
    with serving(demo) as running:
        yield running


@pytest.fixture(scope="module")
def replies(demo: LLM) -> Callable[[bool, int | None], Reply]:
    """What the library replies, by whether it thinks and the budget; each is asked once."""

    @cache
    def reply(thinks: bool, most: int | None) -> Reply:
        if thinks and most is not None:
            return demo.chat(SHORT, seed=1, thinking_budget=most)
        return demo.chat(SHORT, seed=1, thinking=thinks)

    return reply


def data_of(line: str) -> Any:
    """Return the data of a line of a stream."""
    return json.loads(line.removeprefix("data: "))


# --- thinking by every spelling -----------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("fields", "thinks", "most"),
    [
        ({"enable_thinking": False}, False, 0),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False, 0),
        ({"thinking": {"type": "disabled"}}, False, 0),
        ({"reasoning": {"enabled": False}}, False, 0),
        ({"reasoning_effort": "none"}, False, 0),
        ({"reasoning": {"effort": "none"}}, False, 0),
        ({"enable_thinking": True, "reasoning_effort": "none"}, True, None),
        ({"enable_thinking": False, "reasoning_effort": "high"}, False, 0),
        (
            {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}},
            True,
            None,
        ),
        ({"thinking_budget": 5}, True, 5),
        ({"thinking_token_budget": 5}, True, 5),
        ({"thinking_budget_tokens": 5}, True, 5),
        ({"reasoning_budget_tokens": 5}, True, 5),
        ({"reasoning_max_tokens": 5}, True, 5),
        ({"reasoning": {"max_tokens": 5}}, True, 5),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, True, 5),
        ({"thinking_budget": 5, "reasoning_effort": "high"}, True, 5),
        ({"thinking_budget": 0}, True, 0),
        ({"thinking_budget": -1}, True, None),
        ({"reasoning_effort": "low"}, True, None),
        ({}, True, None),
    ],
)
def test_thinking_by_every_spelling(
    served: Served,
    replies: Callable[[bool, int | None], Reply],
    fields: dict[str, Any],
    thinks: bool,
    most: int | None,
) -> None:
    reply = served.chat(SHORT, seed=1, **fields).json()
    message, usage = reply["choices"][0]["message"], reply["usage"]
    expected = replies(thinks, most)
    assert message.get("reasoning_content", "") == expected.reasoning
    assert message["content"] == expected.text
    assert usage["completion_tokens_details"]["reasoning_tokens"] == (
        expected.usage.reasoning_tokens
    )
    closed = {"thinking_closed_by": "budget"} if most is not None and thinks else None
    assert reply["choices"][0].get("finish_details") == closed


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"reasoning_effort": "extreme"}, "'none', 'minimal', 'low', 'medium', 'high'"),
        ({"enable_thinking": "yes"}, "enable_thinking: Input should be a valid boolean"),
        ({"thinking_budget": -2}, "thinking_budget: Input should be greater than or equal to -1"),
        ({"thinking": {"type": "off"}}, "'enabled', 'disabled' or 'adaptive'"),
        ({"enable_thinking": False, "thinking_budget": 9}, "which enable_thinking switches off"),
        (
            {"thinking_budget": 5, "reasoning_max_tokens": 6},
            "thinking_budget=5 and reasoning_max_tokens=6 contradict each other",
        ),
        (
            {"thinking": {"type": "enabled"}, "reasoning": {"enabled": False}},
            "thinking.type=enabled and reasoning.enabled=false contradict",
        ),
        (
            {"reasoning_effort": "low", "reasoning": {"effort": "high"}},
            "reasoning_effort=low and reasoning.effort=high contradict",
        ),
        ({"thinking_budget": 9, "max_tokens": 20}, "leaves no room for an answer"),
    ],
)
def test_impossible_thinking_is_refused(
    served: Served, fields: dict[str, Any], complaint: str
) -> None:
    response = served.chat(**fields)
    assert response.status_code == 400 and complaint in message_of(response)


def test_efforts_are_budgets() -> None:
    for effort, budget in EFFORTS.items():
        thinking, found, bends, warnings = ThinkingRequest(effort=effort).resolve(
            HYBRID, None, None
        )
        assert bends and not warnings
        assert thinking is (effort != "none")
        assert found == (budget if budget > 0 else None)


def test_what_the_server_was_started_with_holds_where_nothing_is_said() -> None:
    assert ThinkingRequest().resolve(HYBRID, False, None)[:2] == (False, None)
    assert ThinkingRequest().resolve(HYBRID, True, 7)[:2] == (True, 7)
    assert ThinkingRequest().resolve(HYBRID, None, 7)[:2] == (None, 7)
    assert ThinkingRequest(([("on", False)],)).resolve(HYBRID, None, 7)[:2] == (False, None)
    assert ThinkingRequest(([("on", True)],)).resolve(HYBRID, False, None)[:2] == (True, None)
    assert ThinkingRequest(budgets=[("budget", -1)]).resolve(HYBRID, None, 7)[:2] == (True, None)
    assert ThinkingRequest(effort="low").resolve(HYBRID, False, 7)[:2] == (True, 512)
    assert ThinkingRequest().resolve(NEVER, None, 7)[:2] == (None, None)
    assert ThinkingRequest(budgets=[("budget", 0)]).resolve(NEVER, None, None)[:2] == (None, None)
    # These two are refused later.
    assert ThinkingRequest(budgets=[("budget", 9)]).resolve(NEVER, None, None)[:2] == (True, 9)
    assert ThinkingRequest(effort="none").resolve(ALWAYS, None, None)[:2] == (False, None)


def test_a_checkpoint_that_cannot_is_not_served_as_if_it_could() -> None:
    with load() as llm:
        llm._open().processor = replace(llm._open().processor, thinking=NEVER)
        llm.thinking = NEVER
        with serving(llm) as instruct:
            for fields in ({"enable_thinking": True}, {"thinking_budget": 5}):
                response = instruct.chat(**fields)
                assert response.status_code == 400
                assert "this checkpoint cannot think" in message_of(response)
            assert instruct.get("/v1/models").json()["data"][0]["thinking"] == "never"
            assert instruct.chat(enable_thinking=False).status_code == 200
        with pytest.raises(Qwen3Error, match="cannot think"):
            make_app(llm, Settings(model="demo", thinking=True))


@pytest.mark.parametrize(
    ("field", "found"),
    [
        ("both", {"reasoning_content", "reasoning"}),
        ("reasoning", {"reasoning"}),
        ("reasoning_content", {"reasoning_content"}),
        ("none", set()),
    ],
)
def test_where_the_thinking_is_found(demo: LLM, field: str, found: set[str]) -> None:
    with serving(demo, reasoning_field=field) as running:
        message = running.chat(SHORT, seed=1).json()["choices"][0]["message"]
        assert message.keys() - {"role", "content"} == found
        hidden = running.chat(SHORT, seed=1, reasoning={"exclude": True}).json()
        assert hidden["choices"][0]["message"].keys() == {"role", "content"}
        assert hidden["usage"]["completion_tokens_details"]["reasoning_tokens"]


# --- what is wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "complaint"),
    [
        ("/v1/chat/completions", {}, "messages: Field required"),
        ("/v1/chat/completions", {"messages": []}, "messages: List should have at least 1"),
        ("/v1/chat/completions", {"messages": [{"role": "pope", "content": ""}]}, "'system'"),
        ("/v1/chat/completions", [1], "send the request as a JSON object"),
        ("/v1/messages", {"messages": []}, "messages: List should have at least 1"),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}]}, "max_tokens: Field"),
        ("/api/chat", {"messages": [{}]}, "messages.role: Field required"),
        ("/v1/completions", {"prompt": []}, "prompt is empty"),
        ("/v1/completions", {"prompt": [1 << 40]}, "token ids are 0 to"),
        ("/v1/completions", {"prompt": "x", "suffix": "y"}, "suffix is not supported"),
        ("/v1/files", {}, "nothing at this address; there are /v1/chat/completions, /v1/comp"),
        (
            "/v1/chat/completion",
            {},
            "there are /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/models",
        ),
        ("/api/nothing", {}, "nothing at this address; there are /api/chat, /api/generate, /api/"),
    ],
)
def test_what_is_wrong_is_said_in_the_form_of_the_protocol(
    served: Served, path: str, body: Any, complaint: str
) -> None:
    response = served.post(path, body)
    assert response.status_code in (400, 404) and complaint in message_of(response)
    answer = response.json()
    if path.startswith("/v1/messages"):
        assert answer["type"] == "error" and answer["error"]["type"] == "invalid_request_error"
    elif path.startswith("/api/"):
        assert answer.keys() == {"error"}
    else:
        assert answer["error"].keys() == {"message", "type", "param", "code"}


def test_each_protocol_names_its_addresses(served: Served) -> None:
    response = served.post("/v1/messages/nothing", {})
    assert response.status_code == 404 and message_of(response) == (
        "there is nothing at this address; there are /v1/messages, /v1/messages/count_tokens"
    )


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"functions": [{}]}, "functions is not supported"),
        ({"modalities": ["audio"]}, "modalities is not supported; it may be ['text']"),
        ({"store": True}, "store is not supported"),
        ({"n": 0}, "n: Input should be greater than or equal to 1"),
        ({"n": 33}, "n: Input should be less than or equal to 32"),
        ({"max_tokens": 0}, "max_tokens: must be at least 1, or -1 for no limit, not 0"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "contradict each other"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs=true"),
        ({"stream_options": {"include_usage": True}}, "stream_options is for streams"),
        ({"logit_bias": {"x": 1}}, "'x' is not a token id"),
        ({"logit_bias": {"99999": 1}}, "logit_bias names 99999"),
        ({"response_format": {"type": "json_schema"}}, "needs json_schema"),
        ({"tool_choice": "required"}, "tool_choice='required' needs tools"),
        ({"structured_outputs": {"regex": "("}}, "regex: "),
        (
            {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            "an answer can have one form, not regex and choice",
        ),
    ],
)
def test_what_cannot_be_had_is_refused(
    served: Served, fields: dict[str, Any], complaint: str
) -> None:
    response = served.chat(**fields)
    assert response.status_code == 400 and complaint in message_of(response)


PROTOCOLS = ("/v1/chat/completions", "/v1/messages", "/api/chat")


def with_tool(path: str, parameters: Any, **fields: Any) -> dict[str, Any]:
    """Return a request of any protocol, with a calculator that has these parameters."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "What is 1234 + 4321?"}]}
    tool = {"name": "calculator", "description": "Evaluate an arithmetic expression"}
    if path == "/v1/messages":
        tools: list[Any] = [{**tool, "input_schema": parameters}]
        body |= {"max_tokens": 200, "temperature": 0, "thinking": {"type": "disabled"}}
    else:
        tools = [{"type": "function", "function": {**tool, "parameters": parameters}}]
        body |= {"stream": False}
    if path == "/v1/chat/completions":
        body |= {"max_tokens": 200, "temperature": 0, "enable_thinking": False}
    if path == "/api/chat":
        body |= {"think": False, "options": {"temperature": 0, "num_predict": 200}}
    return {**body, "tools": tools, **fields}


def call_of(body: Any) -> Any:
    """Return the arguments of the first call in a complete reply of any protocol."""
    if "content" in body:
        return next(block["input"] for block in body["content"] if block["type"] == "tool_use")
    message = body["message"] if "message" in body else body["choices"][0]["message"]
    arguments = message["tool_calls"][0]["function"]["arguments"]
    return json.loads(arguments) if isinstance(arguments, str) else arguments


EXPRESSION = {"type": "string", "description": "the expression"}


@pytest.mark.heavy
@pytest.mark.parametrize("path", PROTOCOLS)
@pytest.mark.parametrize(
    "more",
    [
        {"properties": {"expression": {"$ref": "#/$defs/Text"}}, "$defs": {"Text": EXPRESSION}},
        {
            "properties": {"expression": {"$ref": "#/definitions/a~1b"}},
            "definitions": {"a/b": EXPRESSION},
        },
        {"properties": {"expression": EXPRESSION, "next": {"$ref": "#"}}},
        {"properties": {"expression": EXPRESSION, "other": {"$ref": "#/properties/expression"}}},
    ],
)
def test_tools_whose_schemas_have_references_are_called(
    served: Served, path: str, more: dict[str, Any]
) -> None:
    parameters = {"type": "object", "required": ["expression"], **more}
    response = served.post(path, with_tool(path, parameters))
    assert response.status_code == 200 and "warnings" not in response.headers
    assert call_of(response.json())["expression"].split() == ["1234", "+", "4321"]


@pytest.mark.parametrize("path", PROTOCOLS)
def test_schemas_that_are_not_supported_are_warned_of(served: Served, path: str) -> None:
    odd = {**EXPRESSION, "pattern": "^(?!x)"}
    parameters = {"type": "object", "properties": {"expression": odd}, "required": ["expression"]}
    for stream in (False, True):
        response = served.post(path, with_tool(path, parameters, stream=stream))
        assert response.status_code == 200
        assert "the schema of the tool calculator is not enforced" in response.headers["warnings"]
        if not stream:
            assert isinstance(call_of(response.json()), dict)
    if path == "/v1/chat/completions":
        details = served.post(path, with_tool(path, parameters)).json()["choices"][0]
        assert "look-around" in details["finish_details"]["warning"]


@pytest.mark.parametrize("path", PROTOCOLS)
def test_a_form_that_fails_is_an_error(served: Served, path: str) -> None:
    bombs = [("^(a{800}){800}$", "too many expressions")]
    for pattern, words in (
        *(bombs if path == "/v1/chat/completions" else []),  # each takes half a second
        (r"[^\s\S]", "Regex is empty"),
    ):
        schema = {"type": "string", "pattern": pattern}
        form: dict[str, Any] = {"format": schema}
        if path == "/v1/messages":
            form = {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
        if path == "/v1/chat/completions":
            form = {"structured_outputs": {"json": schema}}
        body = {**with_tool(path, {}), "tools": None, **form}
        response = served.post(path, body)
        message = message_of(response)
        assert re.search(f"schema: .*{words}", message), message
        assert response.status_code == 400
        response = served.post(path, {**body, "stream": True})
        assert re.search(f"schema: .*{words}", response.text)
    assert served.chat("Who are you?", max_tokens=5).status_code == 200


@pytest.mark.parametrize("path", PROTOCOLS)
@pytest.mark.parametrize("parameters", [None, {}, {"type": "object", "properties": None}])
def test_tools_of_which_nothing_is_said_are_called(
    served: Served, path: str, parameters: Any
) -> None:
    if parameters is None and path == "/v1/messages":
        parameters = {"type": "object", "properties": {}, "required": None}  # there it must be one
    response = served.post(path, with_tool(path, parameters))
    assert response.status_code == 200 and "warnings" not in response.headers


CALCULATOR: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Calculate.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
CALL = "What is 12 + 34? Use the calculator."
DIRECT: dict[str, Any] = {"tools": [CALCULATOR], "enable_thinking": False, "temperature": 0}


def anthropic_request(most: int, **fields: Any) -> dict[str, Any]:
    """Ask for the same call by Anthropic's protocol."""
    function = CALCULATOR["function"]
    tool = {"name": function["name"], "input_schema": function["parameters"]}
    off = {"type": "disabled"}
    return {
        "messages": [{"role": "user", "content": CALL}],
        "max_tokens": most,
        "tools": [{**tool, "description": function["description"]}],
        "thinking": off,
        "temperature": 0,
        **fields,
    }


def ollama_request(most: int, **fields: Any) -> dict[str, Any]:
    """And by Ollama's."""
    return {
        "messages": [{"role": "user", "content": CALL}],
        "tools": [CALCULATOR],
        "think": False,
        "options": {"num_predict": most, "temperature": 0},
        **fields,
    }


def events_of(response: httpx.Response) -> list[Any]:
    """Return the data of the events of a stream."""
    lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
    return [data_of(line) for line in lines]


def is_json(text: str) -> bool:
    """Return whether text is JSON."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


# Of 24 tokens the twelfth begins the arguments, and the 22nd ends them.
@pytest.mark.parametrize("most", [5, 12, 17, 20, 21, 22, 24])
def test_a_call_that_is_cut_off_is_no_call_by_openai(served: Served, most: int) -> None:
    whole = most > 21
    reason = "tool_calls" if most == 24 else "length"
    choice = served.chat(CALL, max_tokens=most, **DIRECT).json()["choices"][0]
    assert choice["finish_reason"] == reason
    assert bool(choice["message"].get("tool_calls")) == whole
    assert ("cut off" in str(choice.get("finish_details"))) == (not whole)
    assert bool(choice["message"]["content"]) == (not whole)
    chunks = events_of(served.chat(CALL, max_tokens=most, stream=True, **DIRECT))
    choices = [one for chunk in chunks for one in chunk["choices"]]
    calls = [call for one in choices for call in one["delta"].get("tool_calls", [])]
    written = "".join(call["function"]["arguments"] for call in calls)
    content = "".join(one["delta"].get("content") or "" for one in choices)
    assert is_json(written) == whole and bool(calls) == (most >= 12) == (not content)
    assert choices[-1]["finish_reason"] == reason
    assert ("cut off" in str(choices[-1].get("finish_details"))) == (not whole)
    if calls:
        named = {"name": "calculator", "arguments": ""}
        first = {"index": 0, "id": calls[0]["id"], "type": "function", "function": named}
        assert calls[0] == first and '{"expression": "12 + 34"}'.startswith(written)
        assert all(call.keys() == {"index", "function"} for call in calls[1:])
        assert len(calls) > 8 or most < 20


@pytest.mark.parametrize("most", [5, 12, 17, 20, 21, 22, 24])
def test_a_call_that_is_cut_off_is_no_call_by_anthropic(served: Served, most: int) -> None:
    whole = most > 21
    reason = "tool_use" if most == 24 else "max_tokens"
    reply = served.post("/v1/messages", anthropic_request(most)).json()
    assert reply["stop_reason"] == reason
    assert [block["type"] for block in reply["content"]] == ["tool_use" if whole else "text"]
    events = events_of(served.post("/v1/messages", anthropic_request(most, stream=True)))
    blocks = [e["content_block"] for e in events if e["type"] == "content_block_start"]
    assert [block["type"] for block in blocks] == ["tool_use" if most >= 12 else "text"]
    deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
    written = "".join(delta.get("partial_json", "") for delta in deltas)
    assert is_json(written) == whole and (len(deltas) > 8 or most < 20)
    assert [e["type"] for e in events][-3:] == [
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[-2]["delta"]["stop_reason"] == reason


@pytest.mark.parametrize("most", [5, 12, 17, 20, 21, 22, 24])
def test_a_call_that_is_cut_off_is_no_call_by_ollama(served: Served, most: int) -> None:
    whole = most > 21
    reply = served.post("/api/chat", ollama_request(most, stream=False)).json()
    lines = served.post("/api/chat", ollama_request(most)).text.splitlines()
    parts = [json.loads(line) for line in lines]
    for messages, last in (([reply], reply), (parts, parts[-1])):
        called = [part for part in messages if part["message"].get("tool_calls")]
        assert len(called) == whole  # its protocol has whole calls only
        assert last["done_reason"] == ("stop" if most == 24 else "length")


def test_a_call_that_the_context_cuts_off_is_no_call(demo: LLM) -> None:
    question: Any = [{"role": "user", "content": CALL}]
    prompt = demo.render(question, thinking=False, tools=[CALCULATOR])
    context = len(demo.tokenizer.encode(prompt)) + 18
    with load(context=context, dequantize=False) as llm, serving(llm) as small:
        choice = small.chat(CALL, **DIRECT).json()["choices"][0]
        claude = small.post("/v1/messages", anthropic_request(20_000)).json()
        llama = small.post("/api/chat", ollama_request(-1, stream=False)).json()
    assert choice["finish_reason"] == llama["done_reason"] == "length"
    assert claude["stop_reason"] == "model_context_window_exceeded"
    assert "cut off" in choice["finish_details"]["warning"]
    assert [block["type"] for block in claude["content"]] == ["text"]
    assert "tool_calls" not in choice["message"] and "tool_calls" not in llama["message"]


def test_a_call_that_goes_in_circles_is_no_call(served: Served, short_circles: None) -> None:
    bias = {str(TOKENIZER.encode("x")[0]): 100}
    asked = {**DIRECT, "tool_choice": "required", "logit_bias": bias}
    choice = served.chat(CALL, **asked).json()["choices"][0]
    assert choice["finish_reason"] == "length" and "tool_calls" not in choice["message"]
    assert choice["finish_details"]["ended_by"] == "loop"
    chunks = events_of(served.chat(CALL, **asked, stream=True))
    choices = [one for chunk in chunks for one in chunk["choices"]]
    calls = [call for one in choices for call in one["delta"].get("tool_calls", [])]
    assert not is_json("".join(call["function"]["arguments"] for call in calls))
    assert choices[-1]["finish_reason"] == "length"


def test_calls_of_several_replies_stream_by_their_numbers(served: Served) -> None:
    asked: dict[str, Any] = {"seed": 1, "n": 3, **DIRECT, "temperature": 0.9}
    told: dict[int, dict[int, str]] = {}
    usage: dict[str, Any] = {}
    response = served.chat(CALL, stream=True, stream_options={"include_usage": True}, **asked)
    for chunk in events_of(response):
        usage = chunk["usage"] or usage
        for choice in chunk["choices"]:
            for call in choice["delta"].get("tool_calls", []):
                calls = told.setdefault(choice["index"], {})
                calls[call["index"]] = calls.get(call["index"], "") + call["function"]["arguments"]
    whole = served.chat(CALL, **asked).json()
    assert told == {
        choice["index"]: {
            place: call["function"]["arguments"]
            for place, call in enumerate(choice["message"]["tool_calls"])
        }
        for choice in whole["choices"]
    }
    assert usage["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_unknown_fields_are_warned_of(served: Served) -> None:
    response = served.chat(foo=1, store=False, user="me", model="gpt-4o", max_tokens=5)
    assert response.status_code == 200 and response.json()["model"] == "demo"
    assert response.headers["warnings"] == (
        "there is no model 'gpt-4o' here; demo answers; unknown field 'foo' was ignored"
    )
    assert "warnings" not in served.chat(max_tokens=5).headers
    asked: dict[str, Any] = {"max_tokens": 5, "ä\r\nSet-Cookie: x": 1}
    odd = served.chat(**asked)
    assert odd.status_code == 200 and "set-cookie" not in odd.headers


def test_bodies_that_are_no_json(served: Served) -> None:
    for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"messages": NaN}'):
        response = httpx.post(
            f"{served.url}/v1/chat/completions",
            content=content,
            headers={"Content-Type": "application/json"},
        )
        assert response.status_code == 400, content[:20]
    lone = '{"max_tokens": 5, "messages": [{"role": "user", "content": "\\ud800"}]}'
    for path in ("/v1/chat/completions", "/v1/messages", "/api/chat"):
        response = httpx.post(
            f"{served.url}{path}", content=lone, headers={"Content-Type": "application/json"}
        )
        assert response.status_code in (200, 400)
    assert served.get("/health").json()["status"] == "ok"


# --- who may come in ----------------------------------------------------------------------------


def test_only_names_of_ours(served: Served, demo: LLM) -> None:
    for good in ("localhost", "127.0.0.1:80", "[::1]:8080", "192.168.1.7", "x.localhost"):
        assert served.get("/health", Host=good).status_code == 200
    for bad in ("evil.com", "localhost.evil.com", "127.0.0.1.evil.com", "[x", ""):
        response = served.get("/health", Host=bad)
        assert response.status_code == 403 and "is not a name of this server" in response.text
    with serving(demo, allowed_hosts=["mac.local"]) as running:
        assert running.get("/health", Host="MAC.local:8080").status_code == 200


def test_only_pages_of_ours(served: Served, demo: LLM) -> None:
    host = urlsplit(served.url).netloc
    assert served.get("/v1/models", Origin=f"http://{host}").status_code == 200
    for bad in ("http://evil.com", "null", "http://localhost:1"):
        response = served.get("/v1/models", Origin=bad)
        assert response.status_code == 403 and "access-control-allow-origin" not in response.headers
    with serving(demo, cors_origins=["http://app.test"], api_key="k") as running:
        preflight = httpx.options(
            f"{running.url}/v1/chat/completions",
            headers={
                "Origin": "http://app.test",
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,content-type",
            },
        )
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "http://app.test"
        refused = running.get("/v1/models", Origin="http://app.test")
        assert refused.status_code == 401  # in words that the page may read
        assert refused.headers["access-control-allow-origin"] == "http://app.test"
        assert running.get("/v1/models", Origin="http://other.test").status_code == 403


def test_only_who_has_the_key(demo: LLM) -> None:
    with serving(demo, api_key="sésame"[:1] + "ecret") as running:
        for headers in ({}, {"Authorization": "Bearer x"}, {"x-api-key": "secre"}):
            for path in ("/v1/models", "/api/tags", "/openapi.json"):
                response = running.get(path, **headers)
                assert response.status_code == 401 and "--api-key" in message_of(response)
        assert running.get("/v1/models", Authorization="Bearer secret").status_code == 200
        assert running.get("/v1/models", **{"x-api-key": "secret"}).status_code == 200
        assert running.get("/health").status_code == running.get("/").status_code == 200


def test_requests_of_a_size(demo: LLM) -> None:
    with serving(demo, max_body=1000) as running:
        assert running.chat("x" * 2000).status_code == 413
        pieces = (b"x" * 300 for _ in range(10))  # of which the length is not told before
        response = httpx.post(
            f"{running.url}/v1/chat/completions",
            content=pieces,
            headers={"Content-Type": "application/json"},
        )
        assert response.status_code == 413 and "1,000 bytes" in message_of(response)
        assert running.chat(max_tokens=3).status_code == 200


def test_the_page_loads_nothing_from_elsewhere(served: Served) -> None:
    response = served.get("/")
    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert policy == (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    found = re.findall(r'(?:src|href)="([^"]+)"', response.text)
    scripts = [served.get(name).text for name in found if name.endswith(".js")]
    found += re.findall(r'from "([^"]+)"', "".join(scripts))
    assert len(found) > 3
    for name in found:
        assert name.startswith("/page/") or name == "data:,"
        if name == "data:,":  # no icon
            continue
        part = served.get(name)
        assert part.status_code == 200 and part.headers["content-security-policy"] == policy
    for name in ("..%2fapp.py", "../app.py", "nothing.js"):
        assert served.get(f"/page/{name}").status_code == 404


def test_the_libraries_of_the_page_are_those_that_were_published() -> None:
    script = Path(__file__).parents[2] / "scripts" / "vendor_page.py"
    command = [sys.executable, str(script), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    size = int(done.stdout.split()[0].replace(",", ""))
    assert size < 2_500_000


def test_the_page_loads_with_less_than_half_a_megabyte_of_libraries(served: Served) -> None:
    index = served.get("/").text
    found = set(re.findall(r'(?:src|href)="(/page/[^"]+)"', index))
    read: dict[str, str] = {}
    while left := found - set(read):
        for name in left:
            read[name] = served.get(name).text
            found |= set(re.findall(r'^import .* from "([^"]+)"', read[name], re.MULTILINE))
    assert "/page/vendor/highlight.js" in read and "/page/vendor/temml.css" in read
    libraries = [text for name, text in read.items() if "/vendor/" in name]
    assert sum(map(len, libraries)) < 500_000
    kind = served.get("/page/vendor/pdf.worker.js").headers["content-type"]
    assert kind.startswith("text/javascript")


def test_stylesheets_name_no_files(served: Served) -> None:
    for name in ("page.css", "vendor/temml.css"):
        urls = re.findall(r"url\(['\"]?([^)]*)", served.get(f"/page/{name}").text)
        assert [url for url in urls if not url.startswith("data:")] == []


# --- at work ------------------------------------------------------------------------------------


def test_a_client_that_goes_away_is_not_worked_for(served: Served) -> None:
    body = {**endless(), "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body) as response:
        lines = response.iter_lines()  # kept: its end closes the connection
        assert next(lines)
        assert served.server.service.active == 1
    until_idle(served)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/completions", json=endless(), timeout=0.3)
    until_idle(served)


def test_more_than_it_can_take_is_told_to_come_again(demo: LLM) -> None:
    with serving(demo, max_requests=2) as running, ThreadPoolExecutor() as pool:
        body = {**endless(), "stream": True}
        with (
            httpx.stream("POST", f"{running.url}/v1/completions", json=body) as one,
            httpx.stream("POST", f"{running.url}/v1/completions", json=body) as other,
        ):
            lines = one.iter_lines(), other.iter_lines()  # kept: their end closes the connection
            assert all(next(each) for each in lines)
            for path in ("/v1/chat/completions", "/v1/messages", "/api/chat"):
                asked = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
                response = pool.submit(running.post, path, asked).result()
                assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
                assert "2 of at most 2 replies" in message_of(response)
        until_idle(running)
        assert running.chat(max_tokens=3).status_code == 200
        assert "at most 2 are possible" in message_of(running.chat(n=3))


@pytest.mark.heavy
def test_many_at_once_are_each_told_their_own(served: Served, demo: LLM) -> None:
    questions = [f"What is {n} + {n + 7}?" for n in range(8)]
    expected = demo.batch(questions, seed=5, thinking_budget=8)

    def ask(question: str) -> tuple[str, str]:
        message = {"role": "user", "content": question}
        body = {"messages": [message], "stream": True, "seed": 5, "thinking_budget": 8}
        told = {"content": "", "reasoning_content": ""}
        with httpx.stream(
            "POST", f"{served.url}/v1/chat/completions", json=body, timeout=60, verify=False
        ) as response:
            lines = [line for line in response.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        for line in lines[:-1]:
            for name in told if line[0] != ":" else ():
                told[name] += data_of(line)["choices"][0]["delta"].get(name, "")
        return told["reasoning_content"], told["content"]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, questions))
    assert found == [(reply.reasoning, reply.text) for reply in expected]


@pytest.mark.heavy
def test_a_silent_stream_gives_signs_of_life(demo: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "prefill_chunk", lambda: 128)
    long = "What is 12 + 34? " * 60  # some chunks of prompt
    body = {"messages": [{"role": "user", "content": long}], "stream": True, "max_tokens": 3}
    demo.forget()
    with serving(demo, keep_alive=0.05) as running:
        with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=body) as response:
            lines = [line for line in response.iter_lines() if line]
        signs = [line for line in lines if line.startswith(": keepalive ")]
        read = [tuple(map(int, sign.split()[2].split("/"))) for sign in signs]
        assert read == sorted(read) and len({total for _, total in read}) == 1
        assert read[-1][0] <= read[-1][1] and lines[len(signs)].startswith("data: ")
        demo.forget()
        with httpx.stream("POST", f"{running.url}/v1/messages", json=body) as response:
            kinds = [line[7:] for line in response.iter_lines() if line.startswith("event: ")]
        assert kinds[0] == "message_start" and kinds[-1] == "message_stop"


def test_the_second_turn_reads_only_what_is_new() -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is 12 + 34?"}]
    with load() as demo, serving(demo) as served:
        first = served.post("/v1/chat/completions", {"messages": messages, "seed": 1}).json()
        settle(demo)  # it reads ahead
        messages += [first["choices"][0]["message"], {"role": "user", "content": "What is 5 + 6?"}]
        usage = served.post("/v1/chat/completions", {"messages": messages}).json()["usage"]
    unread = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
    own = 16  # the tokens of that message
    assert unread <= own


def test_nothing_that_was_said_is_logged_unless_asked(
    demo: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="qwen3_mlx.server")
    with serving(demo) as running:
        running.chat("What is 12 + 34?", foo="Geheimnis", seed=1)
    (line,) = [json.loads(record.message) for record in caplog.records]
    assert line["status"] == 200 and line["prompt_tokens"] == 18 and line["finish"] == ["stop"]
    assert line["reasoning_tokens"] < line["completion_tokens"]
    assert not re.search(r"What is|= 46|Geheimnis", caplog.text)
    caplog.clear()
    with serving(demo, log_content=True) as running:
        running.chat("What is 12 + 34?", seed=1)
    (line,) = [json.loads(record.message) for record in caplog.records]
    assert "What is 12 + 34?" in line["prompts"][0]
    assert line["replies"][0]["content"] == "12 + 34 = 46"


def test_what_fails_within_is_an_error_and_no_end(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patched:
        patched.setattr("qwen3_mlx.engine.step_builder.forward", fail)
        response = served.chat()
        assert response.status_code == 503 and "the device failed" in message_of(response)
        body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 9}
        for path in ("/v1/chat/completions", "/v1/messages", "/api/chat"):
            assert "the device failed" in served.post(path, body).text
    with monkeypatch.context() as patched:
        patched.setattr(ModelService, "run", fail)
        response = served.chat()
        assert response.status_code == 500 and "out of luck" in message_of(response)
    assert served.chat(max_tokens=3).status_code == 200


# --- beginning and end --------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_a_signal_lets_replies_end(number: int) -> None:
    server = Process()
    body = {"messages": [{"role": "user", "content": LONG}], "stream": True, "seed": 1}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        ends: list[tuple[int, str, str]] = []
        ending = threading.Thread(target=lambda: ends.append(server.end(number)))
        ending.start()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    ending.join()
    ((code, out, err),) = ends
    assert (code, out) == (0, "") and "Traceback" not in err
    assert json.loads(err.splitlines()[-1])["finish"] == ["stop"]


@pytest.mark.heavy
def test_what_does_not_end_in_time_is_ended() -> None:
    server = Process("--shutdown", "0.2")
    body = {**endless(), "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()
        next(lines)
        ends: list[tuple[int, str, str]] = []
        ending = threading.Thread(target=lambda: ends.append(server.end()))
        ending.start()
        assert "the server is shutting down" in [line for line in lines if line][-1]
    ending.join()
    assert ends[0][0] == 0 and "Traceback" not in ends[0][2]


@pytest.mark.heavy
def test_a_second_ctrl_c_does_not_wait() -> None:
    server = Process("--shutdown", "600")
    body = {**endless(), "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(httpx.TransportError):
            while True:  # until it listens no more
                httpx.get(f"{server.url}/health", timeout=120)
        assert server.process.poll() is None
        ending = threading.Thread(target=server.end)  # which waits for less than those 600 s
        ending.start()
        assert "the server is shutting down" in [line for line in lines if line][-1]
    ending.join()
    assert server.process.returncode == 0


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = piped(["serve", "--port", port])
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "ddress already in use; --port takes another" in result.stderr


@pytest.mark.parametrize("missing", ["fastapi", "prometheus_client", "uvicorn"])
def test_without_its_packages_it_says_so(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "qwen3_mlx.cli.serve.find_spec", lambda name: None if name == missing else find(name)
    )
    result = piped(["serve", "--model", "./nowhere"])
    assert result.returncode == 1
    assert result.stderr.startswith("qwen3: the server needs more packages: ")
    assert " 'prometheus-client>=0.22' 'uvicorn>=0.35'\n" in result.stderr


def test_settings_that_cannot_be_are_refused() -> None:
    wrong: list[dict[str, Any]] = [
        {"reasoning_field": "x"},
        {"max_requests": 0},
        {"thinking_budget": -1},
        {"thinking": False, "thinking_budget": 5},
        {"api_key": "schlüssel"},
    ]
    for settings in wrong:
        with pytest.raises(ValueError, match=next(reversed(settings))):
            Settings(model="demo", **settings)


def test_it_belongs_into_other_applications(demo: LLM) -> None:
    app, _ = make_app(demo, Settings(model="demo"))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/v1/models")

    assert asyncio.run(ask()).json()["data"][0]["id"] == "demo"
