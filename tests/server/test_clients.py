"""The published clients of each protocol, as their users use them.

They are `Any` here: their types change with every release.
"""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import ollama
import openai
import pytest
from pydantic import BaseModel

from qwen3_mlx import LLM
from tests.server.harness import PARAMETERS, TOOL
from tests.server.serving import Served, serving

SUM: Any = [{"role": "user", "content": "What is 12 + 34?"}]
CALL: Any = [{"role": "user", "content": "What is 345 + 678?"}]


@pytest.fixture(scope="module")
def served(demo: LLM) -> Iterator[Served]:
    """A server with the demo."""
    with serving(demo) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Any]:
    """OpenAI's client."""
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def claude(served: Served) -> Iterator[Any]:
    """Anthropic's client."""
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def llama(served: Served) -> Iterator[Any]:
    """Ollama's client."""
    with ollama.Client(host=served.url) as made:
        yield made


# --- OpenAI -------------------------------------------------------------------------------------


def test_openai_chat(client: Any) -> None:
    reply = client.chat.completions.create(model="demo", messages=SUM, seed=1)
    message: Any = reply.choices[0].message
    assert message.content == "12 + 34 = 46" and reply.choices[0].finish_reason == "stop"
    assert message.reasoning_content == message.reasoning and "ones: 2 + 4" in message.reasoning
    assert reply.usage and reply.usage.completion_tokens_details
    assert 0 < (reply.usage.completion_tokens_details.reasoning_tokens or 0)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_openai_stream(client: Any, demo: LLM) -> None:
    chunks = list(
        client.chat.completions.create(
            model="demo",
            messages=SUM,
            seed=1,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    deltas: list[Any] = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert deltas[0].role == "assistant"
    reasons = [i for i, delta in enumerate(deltas) if getattr(delta, "reasoning_content", None)]
    texts = [i for i, delta in enumerate(deltas) if delta.content]
    assert max(reasons) < min(texts)
    expected = demo.chat(SUM, seed=1)
    assert "".join(deltas[i].reasoning_content for i in reasons) == expected.reasoning
    assert "".join(deltas[i].content for i in texts) == expected.text
    assert chunks[-1].usage and not chunks[-1].choices and chunks[-2].usage is None
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_openai_tools_there_and_back(client: Any, stream: bool) -> None:
    asked: Any = {"model": "demo", "messages": CALL, "tools": [TOOL], "seed": 1}
    if stream:
        with client.chat.completions.stream(**asked) as events:
            for _ in events:
                pass
            message = events.get_final_completion().choices[0].message
    else:
        reply = client.chat.completions.create(**asked)
        assert reply.choices[0].finish_reason == "tool_calls"
        message = reply.choices[0].message
    assert message.tool_calls and not message.content
    call: Any = message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"expression": "345 + 678"}
    answer = {"role": "tool", "tool_call_id": call.id, "content": "1023"}
    asked["messages"] = [*CALL, message, answer]
    final = client.chat.completions.create(**asked)
    assert "1023" in str(final.choices[0].message.content)


def test_openai_streams_arguments(client: Any) -> None:
    asked: Any = {"model": "demo", "messages": CALL, "tools": [TOOL], "temperature": 0}
    asked["extra_body"] = {"enable_thinking": False}
    with client.chat.completions.stream(**asked) as events:
        pieces = [
            event.arguments_delta
            for event in events
            if event.type == "tool_calls.function.arguments.delta"
        ]
    assert len(pieces) > 5 and json.loads("".join(pieces)) == {"expression": "345 + 678"}
    cut = list(client.chat.completions.create(**asked, stream=True, max_tokens=17))
    choices = [choice for chunk in cut for choice in chunk.choices]
    calls = [call for choice in choices for call in choice.delta.tool_calls or ()]
    written = "".join(call.function.arguments for call in calls)
    assert calls[0].function.name == "calculator" and choices[-1].finish_reason == "length"
    with pytest.raises(ValueError):
        json.loads(written)


def test_openai_demands_a_call(client: Any) -> None:
    reply = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Hello!"}],
        tools=[TOOL],
        tool_choice={"type": "function", "function": {"name": "calculator"}},
        parallel_tool_calls=False,
        extra_body={"enable_thinking": False},
    )
    assert len(reply.choices[0].message.tool_calls or ()) == 1


class Sum(BaseModel):
    """The schema of an answer."""

    a: int
    b: int
    sum: int


@pytest.mark.parametrize("thinking", [True, False])
def test_openai_parses(client: Any, thinking: bool) -> None:
    reply = client.chat.completions.parse(
        model="demo",
        messages=SUM,
        response_format=Sum,
        extra_body={"chat_template_kwargs": {"enable_thinking": thinking}},
        max_tokens=100,
        seed=3,
    )
    message: Any = reply.choices[0].message
    assert (
        isinstance(message.parsed, Sum)
        and bool(message.reasoning_content if thinking else 0) == thinking
    )


def test_openai_choices_and_logprobs(client: Any) -> None:
    reply = client.chat.completions.create(
        model="demo",
        messages=SUM,
        n=3,
        seed=1,
        logprobs=True,
        top_logprobs=2,
        reasoning_effort="none",
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    for choice in reply.choices:
        assert choice.logprobs and choice.logprobs.content
        assert "".join(t.token for t in choice.logprobs.content) == choice.message.content
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)


def test_openai_text(client: Any) -> None:
    reply = client.completions.create(
        model="demo",
        prompt=["What is", "Count"],
        max_tokens=4,
        logprobs=2,
        temperature=0,
        echo=False,
    )
    assert [choice.index for choice in reply.choices] == [0, 1]
    first = reply.choices[0]
    assert first.finish_reason == "length" and first.logprobs
    assert "".join(first.logprobs.tokens or ()) == first.text
    stream = client.completions.create(
        model="demo", prompt="What is", max_tokens=4, temperature=0, stream=True, echo=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == f"What is{first.text}"


def test_openai_models(client: Any, demo: LLM) -> None:
    (model,) = client.models.list().data
    assert model.id == "demo" == client.models.retrieve("demo").id
    assert getattr(model, "context_length") == demo.context  # noqa: B009 - not in its type
    with pytest.raises(openai.NotFoundError, match="there is demo"):
        client.models.retrieve("gpt-4o")


def test_openai_errors(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as told:
        client.chat.completions.create(model="demo", messages=SUM, temperature=-1)
    assert told.value.param == "temperature"
    long = [{"role": "user", "content": "What is 12 + 34? " * 2000}]
    with pytest.raises(openai.BadRequestError, match=r"context window is 8,192") as told:
        client.chat.completions.create(model="demo", messages=long)
    assert told.value.code == "context_length_exceeded"


async def _async_sums(url: str) -> list[str]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        stream = await client.chat.completions.create(model="demo", messages=SUM, stream=True)
        return [chunk.choices[0].delta.content or "" async for chunk in stream]


def test_openai_async(served: Served) -> None:
    assert "12 + 34 =" in "".join(asyncio.run(_async_sums(served.url)))


# --- Anthropic ----------------------------------------------------------------------------------


def test_anthropic_message(claude: Any) -> None:
    reply = claude.messages.create(
        model="demo",
        max_tokens=400,
        messages=SUM,
        thinking={"type": "enabled", "budget_tokens": 1024},
    )
    assert [block.type for block in reply.content] == ["thinking", "text"]
    assert reply.stop_reason == "end_turn" and reply.usage.output_tokens > 10
    off = claude.messages.create(
        model="demo",
        max_tokens=400,
        messages=SUM,
        thinking={"type": "disabled"},
    )
    assert [block.type for block in off.content] == ["text"]


def test_anthropic_stream_with_thinking(claude: Any) -> None:
    with claude.messages.stream(
        model="demo",
        max_tokens=400,
        messages=SUM,
        thinking={"type": "enabled", "budget_tokens": 200},
        extra_body={"temperature": 0.0},
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    thinking, text = final.content
    assert thinking.type == "thinking" and "ones: 2 + 4 = 6" in thinking.thinking
    assert thinking.signature
    assert text.type == "text" and text.text.startswith("12 + 34 =")
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0) == 18
    # What came back goes in again, with a turn after it.
    again = [*SUM, {"role": "assistant", "content": final.content}]
    again.append({"role": "user", "content": "What is 2 + 2?"})
    reply = claude.messages.create(model="demo", max_tokens=300, messages=again)
    assert reply.content[-1].type == "text"


@pytest.mark.parametrize("stream", [False, True])
def test_anthropic_tools_there_and_back(claude: Any, stream: bool) -> None:
    tool = {"name": "calculator", "description": "Calculates.", "input_schema": PARAMETERS}
    asked: Any = {"model": "demo", "max_tokens": 300, "messages": CALL, "tools": [tool]}
    asked |= {"thinking": {"type": "disabled"}, "extra_body": {"temperature": 0.0}}
    if stream:
        with claude.messages.stream(**asked) as events:
            reply: Any = events.get_final_message()
    else:
        reply = claude.messages.create(**asked)
    assert reply.stop_reason == "tool_use"
    call = reply.content[-1]
    assert call.type == "tool_use" and call.input == {"expression": "345 + 678"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "1023"}
    asked["messages"] = [
        *CALL,
        {"role": "assistant", "content": reply.content},
        {"role": "user", "content": [result]},
    ]
    final = claude.messages.create(**asked)
    assert "1023" in final.content[-1].text
    forced = claude.messages.create(
        **{**asked, "messages": SUM, "tool_choice": {"type": "tool", "name": "calculator"}}
    )
    assert forced.content[0].name == "calculator"


def test_anthropic_streams_arguments(claude: Any) -> None:
    tool = {"name": "calculator", "description": "Calculates.", "input_schema": PARAMETERS}
    asked: Any = {"model": "demo", "messages": CALL, "tools": [tool]}
    asked |= {"thinking": {"type": "disabled"}, "extra_body": {"temperature": 0.0}}
    for most, reason in ((300, "tool_use"), (17, "max_tokens")):
        with claude.messages.stream(**asked, max_tokens=most) as events:
            pieces = [event.partial_json for event in events if event.type == "input_json"]
            final = events.get_final_message()
        (block,) = final.content
        assert (block.type, final.stop_reason) == ("tool_use", reason) and len(pieces) > 2
        if reason == "tool_use":
            assert json.loads("".join(pieces)) == block.input == {"expression": "345 + 678"}
        else:  # its client reads what is whole of an input: half a text is not
            assert block.input == {}
            with pytest.raises(ValueError):
                json.loads("".join(pieces))


def test_anthropic_counts_stops_and_errors(claude: Any) -> None:
    counted = claude.messages.count_tokens(model="demo", messages=SUM)
    assert counted.input_tokens == 18
    off: Any = {"type": "disabled"}
    stopped = claude.messages.create(
        model="demo",
        max_tokens=99,
        messages=SUM,
        stop_sequences=["="],
        thinking=off,
    )
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == "="
    cut = claude.messages.create(model="demo", max_tokens=2, messages=SUM, thinking=off)
    assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 2
    with pytest.raises(anthropic.BadRequestError, match="image"):
        claude.messages.create(
            model="demo",
            max_tokens=9,
            messages=[{"role": "user", "content": [{"type": "image", "source": {}}]}],
        )
    # More than there is room for is as much as there is, as their newer models have it.
    roomy = claude.messages.create(model="demo", max_tokens=20_000, messages=SUM, thinking=off)
    assert roomy.stop_reason == "end_turn"


# --- Ollama -------------------------------------------------------------------------------------


def test_ollama_chat(llama: Any) -> None:
    reply = llama.chat(model="demo", messages=SUM, think=True, options={"temperature": 0})
    assert reply.message.thinking and str(reply.message.content).startswith("12 + 34 =")
    assert reply.done and reply.done_reason == "stop" and reply.eval_count
    off = llama.chat(model="demo", messages=SUM, think=False, options={"num_predict": 3})
    assert off.message.thinking is None and off.done_reason == "length" and off.eval_count == 3


def test_ollama_stream(llama: Any) -> None:
    parts = list(llama.chat(model="demo", messages=SUM, stream=True, think="low"))
    thinking = [i for i, part in enumerate(parts) if part.message.thinking]
    texts = [i for i, part in enumerate(parts) if part.message.content]
    assert max(thinking) < min(texts) and parts[-1].done and not parts[-2].done
    assert "".join(str(parts[i].message.content) for i in texts).startswith("12 + 34 =")


def test_ollama_tools_and_forms(llama: Any) -> None:
    reply = llama.chat(
        model="demo", messages=CALL, tools=[TOOL], think=False, options={"temperature": 0}
    )
    assert reply.message.tool_calls
    call = reply.message.tool_calls[0].function
    assert (call.name, call.arguments) == ("calculator", {"expression": "345 + 678"})
    answer = {"role": "tool", "tool_name": "calculator", "content": "1023"}
    final = llama.chat(model="demo", messages=[*CALL, reply.message, answer], tools=[TOOL])
    assert "1023" in str(final.message.content)
    options = {"num_predict": 100}
    formed = llama.chat(model="demo", messages=SUM, format=Sum.model_json_schema(), options=options)
    Sum.model_validate_json(str(formed.message.content))


def test_ollama_knows_the_model(llama: Any) -> None:
    assert [model.model for model in llama.list().models] == ["demo", "default"]
    assert "thinking" in (llama.show("demo").capabilities or ())
    with pytest.raises(ollama.ResponseError, match="model 'llama3' not found"):
        llama.chat(model="llama3", messages=SUM)
