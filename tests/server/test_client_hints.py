"""Fields that clients send by habit: hints, limits and names of other local servers."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anthropic
import openai
import pytest

from qwen3_mlx import LLM, SamplingParams, load
from qwen3_mlx.api.prepared_request import PreparedRequest
from qwen3_mlx.engine import step_builder
from qwen3_mlx.server import response as replies
from qwen3_mlx.server.app import make_app
from qwen3_mlx.server.settings import Settings
from tests.server.harness import (
    CALCULATOR,
    NEVER,
    SCHEMA,
    SUM,
    TOOLS,
    of_template,
    short,
    warnings_of,
)
from tests.server.serving import Served, serving

LONG = "What is 123456 + 654321?"
ALWAYS = NEVER.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


@pytest.fixture(scope="module")
def served(demo: LLM) -> Iterator[Served]:
    """A server with the demo, which is hybrid."""
    with serving(demo) as running:
        yield running


# --- hints of thinking --------------------------------------------------------------------------


def test_hints_are_ignored_by_what_cannot_think(tmp_path: Path) -> None:
    unable = "was ignored: this checkpoint cannot think"
    hints: list[tuple[str, dict[str, Any], str]] = [
        ("/v1/chat/completions", {"reasoning_effort": "medium"}, "reasoning_effort=medium"),
        ("/v1/chat/completions", {"reasoning": {"effort": "low"}}, "reasoning.effort=low"),
        ("/v1/chat/completions", {"think": "high"}, "think=high"),
        ("/v1/chat/completions", {"thinking": {"type": "adaptive"}}, "thinking.type=adaptive"),
        ("/v1/messages", {"thinking": {"type": "adaptive"}}, "thinking.type=adaptive"),
        ("/v1/messages", {"output_config": {"effort": "high"}}, "output_config.effort=high"),
        ("/api/chat", {"think": "low"}, "think=low"),
    ]
    demands: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"enable_thinking": True}),
        ("/v1/chat/completions", {"think": True}),
        ("/v1/chat/completions", {"thinking_budget": 9}),
        ("/v1/messages", {"thinking": {"type": "enabled", "budget_tokens": 1024}}),
        ("/api/chat", {"think": True}),
    ]
    with load(of_template(tmp_path / "never", NEVER)) as llm, serving(llm) as instruct:
        for path, fields, name in hints:
            assert warnings_of(instruct.post(path, short(path, 2, **fields))) == f"{name} {unable}"
        both = {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            body = {**short("/v1/messages", 2), **both}
            if path.endswith("tokens"):
                del body["max_tokens"], body["stream"]
            assert warnings_of(instruct.post(path, body)).count(unable) == 2
        for path, fields in demands:
            response = instruct.post(path, short(path, 2, **fields))
            assert response.status_code == 400 and "this checkpoint cannot think" in response.text
        idle = {"enable_thinking": False}, {"think": False}, {"reasoning_budget_tokens": -1}
        for off in (*idle, {"reasoning_effort": "none"}, {"thinking_budget": 0}):
            body = short("/v1/chat/completions", 2, **off)
            assert not warnings_of(instruct.post("/v1/chat/completions", body))


def test_off_is_no_hint_for_what_always_thinks(tmp_path: Path) -> None:
    with load(of_template(tmp_path / "always", ALWAYS)) as llm, serving(llm) as thinker:
        for off in ({"enable_thinking": False}, {"think": False}, {"reasoning_effort": "none"}):
            response = thinker.chat(max_tokens=2, **off)
            assert response.status_code == 400 and "always thinks" in response.text
        assert not warnings_of(thinker.chat(max_tokens=2, reasoning_effort="low"))


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        (
            {"enable_thinking": False, "reasoning_effort": "high"},
            "reasoning_effort=high was ignored: enable_thinking=false comes first",
        ),
        (
            {"think": True, "reasoning_effort": "none"},
            "reasoning_effort=none was ignored: think=true comes first",
        ),
        (
            {"thinking_budget": 5, "think": "low"},
            "think=low was ignored: thinking_budget=5 comes first",
        ),
        (
            {"enable_thinking": False, "think": True},
            "think=true was ignored: enable_thinking=false comes first",
        ),
    ],
)
def test_what_is_overruled_is_warned_of(
    served: Served, fields: dict[str, Any], warning: str
) -> None:
    assert warnings_of(served.chat(max_tokens=60, **fields)) == warning


def test_an_effort_overrules_anthropics_budget(served: Served) -> None:
    asked = {
        "thinking": {"type": "enabled", "budget_tokens": 5},
        "output_config": {"effort": "max"},
    }
    response = served.post("/v1/messages", {**short("/v1/messages", 300), **asked})
    assert warnings_of(response) == (
        "thinking.budget_tokens=5 was ignored: output_config.effort=max comes first"
    )
    assert len(response.json()["content"][0]["thinking"]) > 40


# --- budgets and short limits -------------------------------------------------------------------


@pytest.mark.heavy
def test_a_budget_that_no_request_names_bends(demo: LLM) -> None:
    with serving(demo, thinking_budget=64) as running:
        for most in (1, 16, 30):
            for path in ("/v1/chat/completions", "/v1/messages", "/api/chat"):
                response = running.post(path, short(path, most))
                assert not warnings_of(response)
        for most in (16, 60):  # the tag alone closes the thinking, so that an answer finds room
            choice = running.chat(LONG, max_tokens=most, temperature=0).json()["choices"][0]
            assert choice["message"]["content"] and choice["message"]["reasoning_content"]
            assert choice["finish_details"] == {"thinking_closed_by": "budget"}
            assert "limited time" not in choice["message"]["reasoning_content"]
        assert running.chat(max_tokens=16, thinking_budget=64).status_code == 400


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/api/chat"])
def test_the_servers_sampling_holds_where_a_request_sets_none(
    path: str, demo: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, sampled, submit = [], list[SamplingParams](), LLM.submit

    def noted(llm: LLM, task: PreparedRequest, *rest: Any) -> Any:
        seen.append(task.options)
        sampled.append(task.sampling)
        return submit(llm, task, *rest)

    monkeypatch.setattr(LLM, "submit", noted)
    with serving(demo, seed=7, sampling=SamplingParams(temperature=0.5, min_p=0.1)) as running:
        running.post(path, short(path, 2))
        own = {"temperature": 1.25, "top_p": 0.5}
        running.post(path, short(path, 2) | own | {"options": own | {"num_predict": 2}})
    assert [options.sampling for options in seen] == [
        SamplingParams(temperature=0.5, min_p=0.1),
        SamplingParams(temperature=1.25, top_p=0.5, min_p=0.1),
    ]
    values = [(one.temperature, one.top_p, one.top_k, one.min_p) for one in sampled]
    assert values == [(0.5, 0.95, 20, 0.1), (1.25, 0.5, 20, 0.1)]
    assert [options.seed for options in seen] == [7, 7]


def test_a_bias_of_no_token_is_refused_at_the_start(demo: LLM) -> None:
    for token in (-1, len(demo.tokenizer)):
        with pytest.raises(ValueError, match=f"logit_bias names {token}; token ids are 0 to"):
            make_app(demo, Settings(model="demo", sampling=SamplingParams(logit_bias={token: 1})))


def test_choices_count_up_from_the_servers_seed(served: Served, demo: LLM) -> None:
    body = {"prompt": "1 2 3", "max_tokens": 8, "temperature": 1.5, "n": 2}
    with serving(demo, seed=7) as running:
        found = running.post("/v1/completions", body).json()["choices"]
    stated = served.post("/v1/completions", body | {"seed": 7}).json()["choices"]
    assert found == stated and found[0]["text"] != found[1]["text"]


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_effort": "low"},
        {"think": "low"},
        {"tools": TOOLS, "parallel_tool_calls": False},
        {"tools": TOOLS, "tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
    ],
)
@pytest.mark.parametrize("most", [1, 16, 20])
def test_what_names_no_budget_is_not_refused_for_it(
    served: Served, most: int, fields: dict[str, Any]
) -> None:
    response = served.chat(max_tokens=most, **fields)
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] <= most


def test_the_library_bends_only_where_it_may(demo: LLM) -> None:
    options: dict[str, Any] = {"max_tokens": 16, "thinking": True, "temperature": 0}
    assert demo.chat("What is 12 + 34?", tools=TOOLS, parallel_tool_calls=False, **options)
    with pytest.raises(ValueError, match="leaves no room"):
        demo.chat("What is 12 + 34?", thinking_budget=64, **options)
    bent = demo.chat("What is 12 + 34?", thinking_budget=64, thinking_budget_bends=True, **options)
    assert bent.text and bent.details == {"thinking_closed_by": "budget"}
    own: dict[str, Any] = {
        "thinking_budget": 3,
        "thinking_budget_message": "\nStop!",
        "thinking_budget_bends": True,
    }
    assert demo.chat("What is 12 + 34?", **own, **options).reasoning.endswith("Stop!")


def test_more_than_there_is_room_for_is_shortened_by_all(tiny_folder: Path) -> None:
    with load(tiny_folder, context=48) as llm, serving(llm) as small:
        bodies: dict[str, dict[str, Any]] = {
            path: short(path, 200_000)
            for path in ("/v1/chat/completions", "/v1/messages", "/api/chat")
        }
        bodies["/v1/completions"] = {"prompt": "Once", "max_tokens": 200_000}
        for path, body in bodies.items():
            told = warnings_of(small.post(path, body))
            name = "options.num_predict" if path == "/api/chat" else "max_tokens"
            assert told.startswith(f"{name}=200,000 was shortened to ")
        # Of several prompts each is read once, and has the room that it has.
        thrice = warnings_of(small.chat(max_tokens=200_000, n=3))
        assert thrice.count("was shortened") == 1
        several = {"prompt": ["Once", "upon a time " * 5], "max_tokens": 90, "logit_bias": END}
        assert "max_tokens=90 was shortened to" in warnings_of(
            small.post("/v1/completions", several)
        )
        response = small.chat("Why? " * 200, max_tokens=200_000)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "context_length_exceeded"


END = {"2": 100}


# --- the words of other servers -----------------------------------------------------------------


def test_minus_one_is_no_limit(tiny_folder: Path) -> None:
    with load(tiny_folder, context=64) as llm, serving(llm) as small:
        for name in ("max_tokens", "max_completion_tokens"):
            limit: dict[str, Any] = {name: -1}
            response = small.chat(top_k=-1, **limit)
            assert not warnings_of(response)
            usage = response.json()["usage"]
            assert usage["total_tokens"] == 64 or response.json()["choices"][0]["finish_reason"]
        for wrong in (0, -2):
            message = small.chat(max_tokens=wrong).json()["error"]["message"]
            assert message == f"max_tokens: must be at least 1, or -1 for no limit, not {wrong}"
        body = short("/v1/messages", 3, top_k=-1)
        assert not warnings_of(small.post("/v1/messages", body))


def test_minus_one_is_no_seed(served: Served) -> None:
    def said(seed: int) -> str:
        reply = served.chat(seed=seed, temperature=2, max_tokens=40, enable_thinking=False).json()
        return str(reply["choices"][0]["message"]["content"])

    assert said(7) == said(7)
    assert len({said(-1) for _ in range(4)}) > 1
    several = served.chat(seed=-1, n=4, temperature=2, max_tokens=40, enable_thinking=False).json()
    assert len({choice["message"]["content"] for choice in several["choices"]}) > 1


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"verbosity": "low"}, "verbosity has no effect here"),
        ({"service_tier": "flex"}, "service_tier has no effect here"),
        ({"prediction": {"type": "content", "content": "4"}}, "prediction has no effect here"),
        ({"verbosity": "medium", "service_tier": "auto", "prediction": None}, ""),
    ],
)
def test_wishes_of_length_and_speed_are_hints(
    served: Served, fields: dict[str, Any], warning: str
) -> None:
    assert warnings_of(served.chat(max_tokens=2, **fields)) == warning
    text = served.post("/v1/completions", {"prompt": "1", "max_tokens": 1, **fields})
    assert warnings_of(text) == warning


def test_empty_stop_strings_say_nothing(served: Served) -> None:
    asked: dict[str, Any] = {"enable_thinking": False, "temperature": 0}
    whole = served.chat(**asked).json()["choices"][0]["message"]["content"]
    for stop in ("", [""], [], ["", "never there"]):
        reply = served.chat(stop=stop, **asked).json()
        assert reply["choices"][0]["message"]["content"] == whole
    assert served.chat(stop=["", "+"], **asked).json()["choices"][0]["message"]["content"] == "12 "
    off = {"thinking": {"type": "disabled"}, "stop_sequences": [""]}
    reply = served.post("/v1/messages", short("/v1/messages", 99, **off)).json()
    assert reply["stop_reason"] == "end_turn" and reply["content"][0]["text"]


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"response_format": {"type": "json_schema", "schema": SCHEMA}},
        {"response_format": {"type": "json_object"}, "json_schema": SCHEMA},
        {"json_schema": SCHEMA},
        {"format": SCHEMA},
        {"format": SCHEMA, "structured_outputs": {"json": SCHEMA}},
    ],
)
def test_a_schema_holds_by_any_name(served: Served, fields: dict[str, Any]) -> None:
    response = served.chat(think=False, max_tokens=60, **fields)
    assert not warnings_of(response)
    message = response.json()["choices"][0]["message"]
    assert json.loads(message["content"]).keys() == {"sum"} and "reasoning" not in message


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        (
            {"json_schema": SCHEMA, "structured_outputs": {"regex": "a"}},
            "an answer can have one form, not regex and json_schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}
            | {"format": {"type": "object", "properties": {}}},
            "an answer can have one form, not response_format and format",
        ),
        (
            {"response_format": {"type": "text", "schema": SCHEMA}},
            "response_format of type text has no schema",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format of type json_schema needs json_schema",
        ),
        ({"think": True, "thinking": {"type": "disabled"}}, "contradict each other"),
        ({"think": "low", "reasoning_effort": "high"}, "contradict each other"),
        ({"logit_bias": {"9" * 5000: 1}}, "is not a token id"),
        ({"skip_special_tokens": False}, "skip_special_tokens is not supported"),
    ],
)
def test_contradictions_are_refused(served: Served, fields: dict[str, Any], complaint: str) -> None:
    response = served.chat(**fields)
    assert response.status_code == 400 and complaint in response.json()["error"]["message"]


def test_ollamas_words_on_chat_completions(served: Served) -> None:
    off = served.chat(think=False, max_tokens=60).json()["choices"][0]["message"]
    assert "reasoning" not in off
    answer = served.chat(think=False, format="json", max_tokens=60).json()["choices"][0]["message"]
    assert isinstance(json.loads(answer["content"]), dict)
    assert not warnings_of(served.chat(think=False, format="", max_tokens=60))


def test_parts_of_thinking_and_refusal_in_the_history(served: Served) -> None:
    def count(reply: dict[str, Any]) -> int:
        """Count the tokens of a prompt in which the assistant has called a tool with a reply."""
        called = [{"type": "function", "function": {"name": "calculator", "arguments": "{}"}}]
        messages = [
            *SUM,
            {"role": "assistant", "tool_calls": called, **reply},
            {"role": "tool", "content": "46"},
        ]
        body = {"messages": messages, "max_tokens": 1}
        response = served.post("/v1/chat/completions", body)
        assert not warnings_of(response)
        return int(response.json()["usage"]["prompt_tokens"])

    text = {"type": "text", "text": "One moment."}
    plain = {"content": "One moment.", "reasoning_content": "I shall calculate this."}
    thoughts: list[Any] = ["I shall calculate this.", [{"type": "text", "text": "I shall calculate "
                           "this."}]]  # fmt: skip
    for thought in thoughts:
        part = {"type": "thinking", "thinking": thought}
        assert count({"content": [part, text]}) == count(plain) > count({"content": [text]})
    refusal = {"type": "refusal", "refusal": "One moment."}
    for reply in ({"content": [refusal]}, {"content": None, "refusal": "One moment."}):
        assert count(reply) == count({"content": [text]}) > count({"content": ""})


def test_the_last_message_alone_is_continued(served: Served) -> None:
    for name in ("prefix", "partial"):
        messages = [*SUM, {"role": "assistant", "content": "12 + 34 =", name: True}]
        body = {"messages": messages, "temperature": 0, "enable_thinking": False}
        reply = served.post("/v1/chat/completions", body)
        assert not warnings_of(reply)
        assert reply.json()["choices"][0]["message"]["content"].strip().isdigit()
        response = served.post("/v1/chat/completions", {"messages": [*messages, *SUM]})
        assert response.status_code == 400
        assert "messages[1]: only the last message can be continued" in response.text


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a b", "größe", "x<|im_end|>", 'a"b', "a/b", ""])
def test_names_of_tools_that_are_none(served: Served, demo: LLM, name: str) -> None:
    tool = {**CALCULATOR, "name": name}
    claude = {"name": name, "input_schema": {"type": "object"}}
    for path in ("/v1/chat/completions", "/v1/messages", "/api/chat"):
        tools = [claude] if path == "/v1/messages" else [{"type": "function", "function": tool}]
        response = served.post(path, short(path, 5, tools=tools))
        assert response.status_code == 400 and "name" in response.text
    with pytest.raises(ValueError, match="a tool's name has letters"):
        demo.chat("Hello", tools=[tool])


def test_forced_text_never_becomes_control_tokens(served: Served) -> None:
    said = "a<|im_end|>b</think><tool_call>"
    schema = {"enum": [said]}
    reply = served.chat(think=False, max_tokens=60, json_schema=schema).json()["choices"][0]
    assert json.loads(reply["message"]["content"]) == said
    parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    tools = [{"type": "function", "function": {**CALCULATOR, "parameters": parameters}}]
    asked: dict[str, Any] = {"tools": tools, "tool_choice": "required", "think": False}
    call = served.chat(max_tokens=99, **asked).json()["choices"][0]["message"]["tool_calls"][0]
    assert json.loads(call["function"]["arguments"]) == {"x": said}


def test_models_by_both_protocols(served: Served) -> None:
    with anthropic.Anthropic(base_url=served.url, api_key="none") as claude:
        (listed,) = claude.models.list().data
        for model in (listed, claude.models.retrieve("default"), claude.models.retrieve("demo")):
            assert (model.id, model.display_name, model.type) == ("demo", "demo", "model")
            assert model.created_at.year > 2000 and model.max_input_tokens == 8192
        assert claude.models.list().has_more is False
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as gpt:
        assert gpt.models.retrieve("default").id == "demo"
        with pytest.raises(openai.NotFoundError):
            gpt.models.retrieve("gpt-4o")


def test_a_speed_is_counted_from_the_first_token(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that counts forward passes: a call that comes in one piece took them, too."""
    passes, forward = 0.0, vars(step_builder)["forward"]

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal passes
        passes += 1
        return forward(*arguments, **options)

    monkeypatch.setattr(step_builder, "forward", counted)
    monkeypatch.setattr(replies, "time", SimpleNamespace(perf_counter=lambda: passes))
    asked: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "temperature": 0}
    body = served.chat("What is 12 + 34? Use it.", enable_thinking=False, **asked).json()
    made, timings = body["usage"]["completion_tokens"], body["timings"]
    assert body["choices"][0]["finish_reason"] == "tool_calls" and made > 12
    assert 0 < timings["prompt_ms"] <= 3000 and timings["predicted_ms"] >= 5000
    assert 0 < timings["predicted_per_second"] <= made / 5
