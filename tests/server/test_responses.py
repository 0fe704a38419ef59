"""OpenAI's Responses API: by its own client, and by the requests that agents send."""

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from qwen3_mlx import LLM
from qwen3_mlx.server import keys as keys_module
from qwen3_mlx.server.responses import store as store_module
from qwen3_mlx.server.responses.items import library_messages, with_system
from qwen3_mlx.server.responses.output import Output
from qwen3_mlx.server.responses.schema import ResponsesRequest
from qwen3_mlx.server.responses.store import ResponseStore, StoredResponse
from qwen3_mlx.text.events import (
    Event,
    Finish,
    Reasoning,
    Text,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from tests.server.harness import PARAMETERS, until_idle, warnings_of
from tests.server.serving import Served, serving

SUM = "What is 12 + 34?"
CALL = "What is 345 + 678?"
TOOL: Any = {
    "type": "function",
    "name": "calculator",
    "description": "Calculates.",
    "parameters": PARAMETERS,
    "strict": True,
}
ALLOWED = {
    "type": "allowed_tools",
    "mode": "required",
    "tools": [{"type": "function", "name": "calculator"}],
}
DIRECT = {"enable_thinking": False, "temperature": 0}
SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer"}},
    "required": ["sum"],
    "additionalProperties": False,
}
FORM = {"format": {"type": "json_schema", "name": "sum", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def served(demo: LLM) -> Iterator[Served]:
    """A server with the demo."""
    with serving(demo) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Any]:
    """OpenAI's client, which refuses what does not fit its types."""
    with openai.OpenAI(
        base_url=f"{served.url}/v1",
        api_key="none",
        max_retries=0,
        _strict_response_validation=True,
    ) as made:
        yield made


def respond(served: Served, given: Any = SUM, **fields: Any) -> Any:
    """Return the response to a request without thinking."""
    response = served.post("/v1/responses", {"input": given, **DIRECT, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """Return the events of a stream, whose types and numbers must be right."""
    found = []
    for block in response.text.split("\n\n"):
        if block.startswith("event: "):
            head, data = block.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert head == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == [*range(len(found))]
    return found


def folded(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the items that the deltas add up to; what the closing events repeat must agree."""
    items: list[dict[str, Any]] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            items.append(event["item"])
        elif "output_index" in event:
            item = items[event["output_index"]]
            assert event.get("item_id", item["id"]) == item["id"]
            fold(kind, event, item)
    return items


def fold(kind: str, event: dict[str, Any], item: dict[str, Any]) -> None:
    """Add an event to its item."""
    is_call = item["type"] == "function_call"
    if kind == "content_part.added":
        item["content"].append(event["part"])
    elif kind == "output_item.done":
        item["status"] = event["item"]["status"]
        assert event["item"] == item
    elif kind == "content_part.done":
        assert event["part"] == item["content"][event["content_index"]]
    else:
        part, name = (item, "arguments") if is_call else (item["content"][0], "text")
        if kind.endswith(".delta"):
            part[name] += event["delta"]
            if "logprobs" in event:
                part["logprobs"] += event["logprobs"]
        else:
            assert kind.endswith(".done") and event[name] == part[name]


def nameless(response: dict[str, Any]) -> dict[str, Any]:
    """Return a response without what differs each time: ids, the time, cached tokens."""
    kept = {
        **response,
        "output": [{**item, "id": "", "call_id": ""} for item in response["output"]],
    }
    for name in ("id", "created_at", "usage"):
        kept.pop(name)
    # A cached prefix changes the last digits of log probabilities.
    rounded: dict[str, Any] = json.loads(
        json.dumps(kept), parse_float=lambda digits: round(float(digits), 3)
    )
    return rounded


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("fields", "kinds", "status"),
    [
        ({"temperature": 0}, ["reasoning", "message"], "completed"),
        ({"temperature": 0, "thinking_budget": 4}, ["reasoning", "message"], "completed"),
        ({**DIRECT, "include": ["message.output_text.logprobs"]}, ["message"], "completed"),
        ({**DIRECT, "text": FORM, "top_logprobs": 2}, ["message"], "completed"),
        ({**DIRECT, "stop": "="}, ["message"], "completed"),
        ({"temperature": 0, "max_output_tokens": 5}, ["reasoning"], "incomplete"),
        ({**DIRECT, "max_output_tokens": 5}, ["message"], "incomplete"),
        ({"temperature": 0, "include_reasoning": False}, ["message"], "completed"),
        ({**DIRECT, "input": CALL, "tools": [TOOL]}, ["function_call"], "completed"),
        (
            {**DIRECT, "input": CALL, "tools": [TOOL], "max_output_tokens": 17},
            ["function_call"],
            "incomplete",
        ),
    ],
)
def test_the_events_of_a_stream_add_up_to_the_response_without_one(
    served: Served, fields: dict[str, Any], kinds: list[str], status: str
) -> None:
    body = {"input": SUM, "seed": 1, **fields}
    events = events_of(served.post("/v1/responses", {**body, "stream": True}))
    begun, last = events[0]["response"], events[-1]
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert begun["status"] == "in_progress" and begun["output"] == []
    assert last["type"] == f"response.{status}" and last["response"]["id"] == begun["id"]
    response = last["response"]
    assert [item["type"] for item in response["output"]] == kinds
    assert folded(events) == response["output"]
    assert response["status"] == status == response["output"][-1]["status"]
    cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
    assert response["incomplete_details"] == cut
    whole = served.post("/v1/responses", body).json()
    assert nameless(whole) == nameless(response)
    assert whole["usage"]["output_tokens"] == response["usage"]["output_tokens"]
    if kinds == ["function_call"] and status == "incomplete":
        with pytest.raises(ValueError):
            json.loads(whole["output"][0]["arguments"])
    if "stop" in fields:
        assert whole["finish_details"]["stop"] == "="


def test_calls_and_texts_are_items_in_the_order_in_which_they_begin() -> None:
    usage = Usage(1, 0, 9, 1)
    output = Output(reasoning=True, logprobs=False)
    reply: list[Event] = [
        Reasoning("Hm"),
        ToolCallDelta("c1", "f", '{"a": '),
        ToolCallDelta("c1", "f", "1}"),
        ToolCall("c1", "f", {"a": 1}, '{"a": 1}'),
        Text(""),
        ToolCallDelta("c2", "g", '{"b": '),  # cannot be read: no call follows
        Text("Oh"),
        Text("."),
        Finish("stop", usage),
    ]
    events = [
        {"type": kind, **deepcopy(data)} for event in reply for kind, data in output.add(event)
    ]
    assert folded(events) == output.items
    summary = [
        (item["type"], item["status"], item.get("arguments") or item["content"][0]["text"])
        for item in output.items
    ]
    assert summary == [
        ("reasoning", "completed", "Hm"),
        ("function_call", "completed", '{"a": 1}'),
        ("function_call", "incomplete", '{"b": '),
        ("message", "completed", "Oh."),
    ]


def test_a_stream_that_fails_says_so_and_has_what_there_is(served: Served) -> None:
    never = {"<|im_end|>": -100}
    tokenizer = served.llm.tokenizer
    bias = {str(tokenizer.id_of(name)): value for name, value in never.items()}
    body = {"input": "1 2 3", **DIRECT, "temperature": 1.5, "logit_bias": bias, "stream": True}
    url = f"{served.url}/v1/responses"
    text = ""
    with httpx.stream("POST", url, json=body, timeout=60, verify=False) as response:
        for piece in response.iter_text():
            if "output_text.delta" in piece and "delta" not in text:
                loop = served.server.loop
                loop.call_soon_threadsafe(served.server.service.admission.cancel_all)
            text += piece
    events = events_of(httpx.Response(200, text=text))
    failed = events[-1]["response"]
    assert events[-1]["type"] == "response.failed" and failed["status"] == "failed"
    assert failed["error"] == {"code": "server_error", "message": "the server is shutting down"}
    assert folded(events) == failed["output"] and failed["output"][0]["status"] == "incomplete"
    assert served.get(f"/v1/responses/{failed['id']}").status_code == 404


def test_a_client_that_leaves_ends_the_generation(served: Served, client: Any) -> None:
    stream = client.responses.create(model="demo", input=SUM, stream=True)
    assert next(iter(stream)).type == "response.created"
    stream.close()
    until_idle(served)


# --- the client -----------------------------------------------------------------------------------


def test_its_client_creates_retrieves_and_deletes(client: Any, demo: LLM) -> None:
    response = client.responses.create(
        model="demo",
        input=SUM,
        reasoning={"effort": "high", "summary": "auto"},
        metadata={"run": "1"},
        extra_body={"seed": 1},
    )
    expected = demo.chat(SUM, seed=1)
    thinking, message = response.output
    assert thinking.content[0].text == expected.reasoning and thinking.summary == []
    assert response.output_text == expected.text == message.content[0].text
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    assert (
        response.usage.total_tokens
        == response.usage.input_tokens + expected.usage.completion_tokens
    )
    assert response.metadata == {"run": "1"} and response.reasoning.effort == "high"
    assert client.responses.retrieve(response.id) == response
    with pytest.raises(openai.BadRequestError, match="not streamed again"):
        client.responses.retrieve(response.id, stream=True)
    client.responses.delete(response.id)
    for call in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError, match="not found"):
            call(response.id)


@pytest.mark.heavy
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("linked", [False, True])
def test_its_client_takes_a_call_there_and_back(client: Any, stream: bool, linked: bool) -> None:
    asked: Any = {"model": "demo", "input": CALL, "tools": [TOOL], "extra_body": {"seed": 1}}
    if stream:
        with client.responses.stream(**asked) as events:
            kinds = [event.type for event in events]
            first = events.get_final_response()
        assert kinds.count("response.function_call_arguments.delta") > 5
    else:
        first = client.responses.create(**asked)
    call = first.output[-1]
    assert json.loads(call.arguments) == {"expression": "345 + 678"} and call.call_id
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "1023"}
    if linked:
        asked |= {"input": [result], "previous_response_id": first.id}
    else:
        items = [item.model_dump(exclude_none=True) for item in first.output]
        asked["input"] = [{"role": "user", "content": CALL}, *items, result]
    final = client.responses.create(**asked)
    assert "1023" in final.output_text
    assert final.usage.input_tokens_details.cached_tokens > 0


class Verdict(BaseModel):
    """The schema of an answer."""

    is_sum: bool


def test_its_client_parses_answers(client: Any) -> None:
    response = client.responses.parse(
        model="demo", input=SUM, text_format=Verdict, extra_body=DIRECT
    )
    assert isinstance(response.output_parsed, Verdict)
    assert response.text.format.type == "json_schema"
    with client.responses.stream(
        model="demo", input=SUM, text_format=Verdict, extra_body=DIRECT
    ) as events:
        for _ in events:
            pass
        assert isinstance(events.get_final_response().output_parsed, Verdict)


def test_its_client_demands_a_call(client: Any) -> None:
    response = client.responses.create(
        model="demo",
        input="Hello!",
        tools=[TOOL],
        tool_choice={"type": "function", "name": "calculator"},
        parallel_tool_calls=False,
        reasoning={"effort": "none"},
    )
    assert [item.type for item in response.output] == ["function_call"]


def test_its_client_gets_log_probabilities(client: Any) -> None:
    response = client.responses.create(
        model="demo",
        input=SUM,
        top_logprobs=2,
        include=["message.output_text.logprobs", "reasoning.encrypted_content"],
        extra_body=DIRECT,
    )
    [message] = response.output
    tokens = message.content[0].logprobs
    assert "".join(token.token for token in tokens) == response.output_text
    assert all(len(token.top_logprobs) == 2 for token in tokens)


# --- conversations ------------------------------------------------------------------------------


def test_a_previous_response_is_the_history_that_its_items_are(served: Served, demo: LLM) -> None:
    first = respond(served, instructions="You are terse.", enable_thinking=True)
    assert [item["type"] for item in first["output"]] == ["reasoning", "message"]
    linked = respond(served, "And 1 + 2?", previous_response_id=first["id"])
    again = [{"role": "user", "content": SUM}, *first["output"]]
    whole = respond(served, [*again, {"role": "user", "content": "And 1 + 2?"}])
    assert linked["output"][0]["content"] == whole["output"][0]["content"]
    # The instructions of the previous response are not inherited.
    assert linked["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
    assert linked["previous_response_id"] == first["id"] and whole["previous_response_id"] is None
    third = respond(served, "And 2 + 2?", previous_response_id=linked["id"])
    history = [
        {"role": "user", "content": SUM},
        {"role": "assistant", "content": demo.chat(SUM, temperature=0).text},
        {"role": "user", "content": "And 1 + 2?"},
        {"role": "assistant", "content": linked["output"][0]["content"][0]["text"]},
        {"role": "user", "content": "And 2 + 2?"},
    ]
    counted = demo.count_tokens(history, thinking=False)
    assert third["usage"]["input_tokens"] == counted


def test_a_message_that_was_begun_is_one_message_afterwards(served: Served, demo: LLM) -> None:
    begun = [{"role": "user", "content": SUM}, {"role": "assistant", "content": "12 + 34"}]
    first = respond(served, begun)
    text = "12 + 34" + first["output"][0]["content"][0]["text"]
    linked = respond(served, "And 1 + 2?", previous_response_id=first["id"])
    history = [
        {"role": "user", "content": SUM},
        {"role": "assistant", "content": text},
        {"role": "user", "content": "And 1 + 2?"},
    ]
    assert linked["usage"]["input_tokens"] == demo.count_tokens(history, thinking=False)


def test_an_unknown_previous_response_is_404(served: Served) -> None:
    kept = respond(served, store=False, max_output_tokens=1)
    assert kept["store"] is False
    for unknown in ("resp_x", kept["id"]):
        body = {"input": SUM, "previous_response_id": unknown}
        response = served.post("/v1/responses", body)
        assert response.status_code == 404 and response.json() == {
            "error": {
                "message": f"Previous response with id '{unknown}' not found.",
                "type": "invalid_request_error",
                "param": "previous_response_id",
                "code": "previous_response_not_found",
            }
        }


def test_a_reference_stands_for_a_stored_item(served: Served) -> None:
    first = respond(served)
    items = [{"role": "user", "content": SUM}, *first["output"], {"role": "user", "content": "Hi"}]
    references = [
        {"type": "item_reference", "id": item["id"]} if "id" in item else item for item in items
    ]
    counts = [respond(served, given)["usage"]["input_tokens"] for given in (items, references)]
    assert counts[0] == counts[1]


def test_another_key_reads_no_stored_response(
    demo: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_module, "_POLL_SECONDS", 0)
    file = tmp_path / "keys"
    file.write_text("first\nsecond\n")
    file.chmod(0o600)
    with serving(demo, key_file=file) as running:

        def send(key: str, **fields: Any) -> httpx.Response:
            body = {"input": SUM, "max_output_tokens": 1, **DIRECT, **fields}
            return running.post("/v1/responses", body, **{"x-api-key": key})

        kept = send("first").json()
        address = f"/v1/responses/{kept['id']}"

        def refused(key: str) -> None:
            reference = {"type": "item_reference", "id": kept["output"][0]["id"]}
            assert send(key, previous_response_id=kept["id"]).status_code == 404
            assert send(key, input=[reference]).status_code == 400
            assert running.get(address, **{"x-api-key": key}).status_code == 404
            deleted = httpx.delete(running.url + address, headers={"x-api-key": key}, verify=False)
            assert deleted.status_code == 404

        refused("second")
        assert running.get(address, **{"x-api-key": "first"}).json() == kept
        file.write_text("second\n")  # now the first key of the file
        refused("second")


def stored(name: str, size: int = 0) -> StoredResponse:
    """Return a response of a size."""
    return StoredResponse({"id": name, "output": []}, [{"role": "user", "content": "x" * size}])


def test_the_store_is_bounded_and_one_client_displaces_only_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit = 1 << 20  # 16 of the least that a response counts as
    monkeypatch.setattr(store_module, "MAX_STORED_BYTES", limit)
    store = ResponseStore()
    store.put("a", stored("small"))
    for number in range(40):
        store.put("b", stored(f"b{number}"))
    kept = [number for number in range(40) if store.get("b", f"b{number}")]
    assert kept == [*range(25, 40)] and store.get("a", "small")
    store.put("b", stored("large", limit // 2))
    assert store.get("b", "large") and store.get("a", "small")
    assert not store.get("b", "b31") and store.get("b", "b39")
    store.put("a", stored("too large", limit))
    assert not store.get("a", "too large") and store.get("a", "small")
    assert store.delete("b", "large") and not store.delete("b", "large")
    assert not store.delete("b", "small")


# --- what is read, refused, warned of -------------------------------------------------------------


def messages_of(*items: dict[str, Any], instructions: str | None = None) -> list[dict[str, Any]]:
    """Return the messages of input items."""
    body = ResponsesRequest.model_validate({"input": list(items)})
    assert isinstance(body.input, list)
    return with_system(instructions, library_messages(body.input))


def call(number: int) -> dict[str, Any]:
    """Return the item of a call."""
    return {"type": "function_call", "call_id": f"c{number}", "name": "f", "arguments": "{}"}


def made_call(number: int) -> dict[str, Any]:
    """Return the same call in a message."""
    return {"id": f"c{number}", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_the_allowed_tools_alone_are_offered(served: Served, demo: LLM) -> None:
    other = {**TOOL, "name": "other"}
    found = respond(served, CALL, tools=[TOOL, other], tool_choice=ALLOWED, max_output_tokens=99)
    assert [item["name"] for item in found["output"]] == ["calculator"]
    assert found["tool_choice"] == ALLOWED and len(found["tools"]) == 2
    shown = {name: TOOL[name] for name in ("name", "description", "parameters")}
    counted = demo.count_tokens(CALL, tools=[{"type": "function", "function": shown}])
    assert abs(found["usage"]["input_tokens"] - counted) < 9  # the end of the prompt differs
    names = {"type": "function", "function": {"name": "calculator"}}
    chat = served.chat(
        CALL,
        tools=[{"type": "function", "function": {**shown, "name": n}} for n in ("calculator", "o")],
        tool_choice={
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": [names]},
        },
        **DIRECT,
    ).json()
    assert [call["function"]["name"] for call in chat["choices"][0]["message"]["tool_calls"]] == [
        "calculator"
    ]
    assert chat["usage"]["prompt_tokens"] == found["usage"]["input_tokens"]


def test_a_prompt_too_long_names_the_field_of_this_protocol(served: Served) -> None:
    error = served.post("/v1/responses", {"input": "word " * 9000}).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    error = served.post("/v1/completions", {"prompt": "word " * 9000}).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


THOUGHT = {
    "type": "reasoning",
    "summary": [],
    "content": [{"type": "reasoning_text", "text": "Hm"}],
}


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        (
            [
                THOUGHT,
                {"role": "assistant", "content": [{"type": "output_text", "text": "I call."}]},
                call(1),
                call(2),
                {"type": "function_call_output", "call_id": "c1", "output": "3"},
                {
                    "type": "function_call_output",
                    "call_id": "c2",
                    "output": [{"type": "input_text", "text": "4"}],
                },
            ],
            [
                {
                    "role": "assistant",
                    "content": "I call.",
                    "reasoning_content": "Hm",
                    "tool_calls": [made_call(1), made_call(2)],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "3"},
                {"role": "tool", "tool_call_id": "c2", "content": "4"},
            ],
        ),
        (
            [call(1), THOUGHT, {"type": "reasoning", "summary": [], "content": None}, call(2)],
            [
                {"role": "assistant", "content": "", "tool_calls": [made_call(1)]},
                {
                    "role": "assistant",
                    "content": "",
                    "reasoning_content": "Hm",
                    "tool_calls": [made_call(2)],
                },
            ],
        ),
        (
            [
                {"role": "developer", "content": "One."},
                {"type": "message", "role": "system", "content": "Two."},
                {"role": "user", "content": "a"},
                {"role": "user", "content": "b"},
                {"role": "developer", "content": "Three."},
            ],
            [
                {"role": "system", "content": "Zero.\n\nOne.\n\nTwo."},
                {"role": "user", "content": "a"},
                {"role": "user", "content": "b"},
                {"role": "system", "content": "Three."},
            ],
        ),
        (
            [{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}],
            [{"role": "assistant", "content": "No."}],
        ),
    ],
)
def test_items_are_the_parts_of_turns(
    items: list[dict[str, Any]], messages: list[dict[str, Any]]
) -> None:
    instructions = "Zero." if messages[0]["role"] == "system" else None
    assert messages_of(*items, instructions=instructions) == messages


IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,x"}


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"background": True}, "background is not supported"),
        ({"conversation": "conv_1"}, "conversation is not supported"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt is not supported"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "'input_image' has no text"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "'input_file' has no"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "no item with id 'msg_1'"),
        ({"input": [{"type": "web_search_call"}]}, "type 'web_search_call' is not supported"),
        ({"input": [{"id": "x"}]}, "an item of type None is not supported"),
        ({"input": [{"type": "function_call"}]}, "input[0] has no name"),
        ({"input": [{"type": "message", "role": "user"}]}, "input[0]: a message needs a role"),
        (
            {"input": [{"type": "function_call_output", "call_id": "c9", "output": "1"}]},
            "No tool call found for function call output with call_id c9.",
        ),
        ({"input": [{"type": "function_call_output", "output": "1"}]}, "input[0] has no call_id"),
        (
            {"tools": [TOOL], "tool_choice": {**ALLOWED, "tools": [{**TOOL, "name": "x"}]}},
            "tool_choice allows 'x', which is none of the tools",
        ),
        ({"tools": [TOOL], "tool_choice": {**ALLOWED, "mode": "all"}}, "tool_choice.mode: "),
        ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice.type: "),
        ({"input": []}, "input: List should have at least 1 item"),
        ({"tools": [{"type": "function"}]}, "one of the tools has no name"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "needs tools"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "needs a schema"),
        ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format has a schema"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata: "),
        ({"metadata": {"a": "b" * 513}}, "metadata"),
        ({"max_output_tokens": 0}, "must be at least 1"),
        ({"reasoning": {"effort": "some"}}, "reasoning.effort: "),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(
    served: Served, fields: dict[str, Any], complaint: str
) -> None:
    response = served.post("/v1/responses", {"input": SUM, **fields})
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert complaint in error["message"]


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"tools": [{"type": "web_search"}, TOOL]}, "tools of type web_search were left out"),
        ({"prompt_cache_key": "x"}, "prompt_cache_key has no effect here"),
        ({"user": "me"}, "user has no effect here"),
        ({"service_tier": "flex"}, "service_tier has no effect here"),
        ({"service_tier": "auto"}, None),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options has no effect"),
        ({"client_metadata": {"a": "b"}}, "client_metadata has no effect"),
        ({"include": ["file_search_call.results"]}, "include=file_search_call.results has no"),
        ({"include": ["reasoning.encrypted_content"]}, None),
        ({"truncation": "auto"}, "truncation was ignored"),
        ({"truncation": "disabled", "background": False, "conversation": None}, None),
        ({"text": {"verbosity": "low"}}, "text.verbosity=low has no effect"),
        ({"max_output_tokens": 9000}, "max_output_tokens=9,000 was shortened to"),
        ({"model": "gpt-5"}, "there is no model 'gpt-5' here"),
        ({"wings": 2}, "unknown field 'wings' was ignored"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort=high was ignored"),
    ],
)
def test_what_has_no_effect_is_warned_of(
    served: Served, fields: dict[str, Any], warning: str | None
) -> None:
    body = {"input": "Hello", "max_output_tokens": 1, **DIRECT, **fields}
    found = warnings_of(served.post("/v1/responses", body))
    assert not found if warning is None else warning in found


def test_thinking_that_is_not_shown_is_still_in_the_history(demo: LLM) -> None:
    with serving(demo, reasoning_field="none") as running:
        first = respond(running, CALL, tools=[TOOL], enable_thinking=True)
        assert [item["type"] for item in first["output"]] == ["function_call"]
        call_id = first["output"][0]["call_id"]
        result = {"type": "function_call_output", "call_id": call_id, "output": "1023"}
        linked = respond(running, [result], previous_response_id=first["id"], tools=[TOOL])
        apart = respond(
            running, [{"role": "user", "content": CALL}, *first["output"], result], tools=[TOOL]
        )
    assert linked["usage"]["input_tokens"] > apart["usage"]["input_tokens"]


# --- what agents send -----------------------------------------------------------------------------


def test_codex_is_answered(served: Served, demo: LLM) -> None:
    """Its request as codex 0.171.0 sends it: without instructions, with tools of several types."""

    def said(role: str, text: str) -> dict[str, Any]:
        kind = "output_text" if role == "assistant" else "input_text"
        content = [{"type": kind, "text": text}]
        return {"type": "message", "role": role, "content": content}

    shell = {**TOOL, "name": "shell_command", "strict": False}
    body = {
        "model": "default",
        "input": [
            said("developer", "You are a coding agent."),
            said("developer", "Be brief."),
            said("user", "<environment_context>\n</environment_context>"),
            said("user", CALL),
        ],
        "tools": [
            shell,
            {"type": "namespace", "name": "agents", "description": "x", "tools": [TOOL]},
            {"type": "web_search", "external_web_access": False},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "019a",
        "client_metadata": {"x-codex-installation-id": "1"},
        "temperature": 0,
    }
    response = served.post("/v1/responses", body)
    warnings = response.headers["warnings"]
    assert "tools of type namespace, web_search were left out" in warnings
    assert "prompt_cache_key" in warnings and "client_metadata" in warnings
    assert "unknown" not in warnings
    events = events_of(response)
    done = events[-1]["response"]
    assert events[-1]["type"] == "response.completed" and done["store"] is False
    system = {"role": "system", "content": "You are a coding agent.\n\nBe brief."}
    users = [item["content"][0]["text"] for item in body["input"][2:]]  # type: ignore[index]
    shown = {name: shell[name] for name in ("name", "description", "parameters")}
    counted = demo.count_tokens(
        [system, *({"role": "user", "content": text} for text in users)],
        tools=[{"type": "function", "function": shown}],
    )
    assert done["usage"]["input_tokens"] == counted
    # What came back is fed in again, its thinking and calls with the result.
    fed = [*done["output"]]
    assert fed[0]["type"] == "reasoning" and fed[0]["encrypted_content"] is None
    fed.append({"type": "function_call", "call_id": "c", "name": "shell", "arguments": "{}"})
    fed.append({"type": "function_call_output", "call_id": "c", "output": "1023"})
    more = {**body, "input": [*body["input"], *fed]}  # type: ignore[misc]
    again = events_of(served.post("/v1/responses", more))
    assert again[-1]["type"] == "response.completed"


def test_openai_agents_are_answered(client: Any) -> None:
    """Their request as openai-agents 0.24.0 sends it, most fields left out or null."""
    response = client.responses.create(
        model="demo",
        instructions="You calculate.",
        input=[{"role": "user", "content": CALL}],
        tools=[TOOL],
        tool_choice=openai.NOT_GIVEN,
        parallel_tool_calls=openai.NOT_GIVEN,
        include=[],
        metadata=None,
        previous_response_id=None,
        extra_body={"seed": 1, "conversation": None, "prompt": None},
    )
    calls = [item for item in response.output if item.type == "function_call"]
    assert [item.call_id[:5] for item in calls] == ["call_"]
