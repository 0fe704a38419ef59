"""What callers may ask about the choice of tokens and of tools: logprobs, tool_choice."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from qwen3_mlx import LLM, SamplingParams
from tests.support import assert_close
from tests.text.harness import calculator

GREEDY = SamplingParams(temperature=0.0)


def weather(city: str) -> str:
    """Tell the weather in a city."""
    return f"sunny in {city}"


TOOLS = [calculator, weather]


@pytest.mark.heavy
@pytest.mark.parametrize("thinking", [True, False])
def test_logprobs_are_those_of_the_model(demo: LLM, thinking: bool) -> None:
    question = "What is 12 + 34?"
    reply = demo.chat(question, thinking=thinking, logprobs=3, seed=1)
    assert b"".join(token.token for token in reply.logprobs).decode() == reply.text
    prompt = demo.tokenizer.encode(demo.render(question, thinking=thinking))
    thought = f"<think>\n{reply.reasoning}\n</think>\n\n" if thinking else ""
    before = prompt + demo.tokenizer.encode(thought)
    answer = demo.tokenizer.encode(reply.text)
    rows = demo.logits(before + answer)[len(before) - 1 : -1, : len(demo.tokenizer)]
    expected = nn.log_softmax(rows, axis=-1)
    found = mx.array([token.logprob for token in reply.logprobs])
    assert_close(found, mx.take_along_axis(expected, mx.array(answer)[:, None], axis=1)[:, 0], 1e-3)
    for token, row in zip(reply.logprobs, expected, strict=True):
        likeliest = np.argsort(-np.array(row))[:3].tolist()
        assert [text for text, _ in token.top] == [demo.tokenizer.token_bytes(i) for i in likeliest]
        assert [chance for _, chance in token.top] == sorted(
            (chance for _, chance in token.top), reverse=True
        )


def test_logprobs_change_no_reply_and_come_with_the_text_they_belong_to(demo: LLM) -> None:
    questions = ["What is 12 + 34?", "Count from 3 to 9.", "What is 7 + 8?"]
    plain = demo.batch(questions, seed=3)
    asked = demo.batch(questions, seed=3, logprobs=0)
    assert [(r.reasoning, r.text) for r in plain] == [(r.reasoning, r.text) for r in asked]
    events = list(demo.stream(questions[0], seed=3, logprobs=0))
    for event in events[:-1]:
        tokens = getattr(event, "tokens", ())
        assert (
            b"".join(token.token for token in tokens).strip()
            == getattr(event, "text", "").strip().encode()
        )


def test_what_is_forced_had_no_choice(demo: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer"}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    reply = demo.chat("What is 1 + 2?", schema=schema, thinking=False, logprobs=2, seed=1)
    assert b"".join(token.token for token in reply.logprobs).decode() == reply.text
    assert reply.logprobs[0].logprob == 0.0 and not reply.logprobs[0].top
    assert any(token.top for token in reply.logprobs)


def test_raw_text_has_logprobs_too(demo: LLM) -> None:
    reply = demo.complete("What is", max_tokens=4, sampling=GREEDY, logprobs=1)
    assert len(reply.logprobs) == 4
    assert all(token.token == token.top[0][0] for token in reply.logprobs)


@pytest.mark.parametrize("wrong", [-1, 21, True, 1.5])
def test_impossible_logprobs_are_refused(demo: LLM, wrong: object) -> None:
    with pytest.raises((ValueError, TypeError), match="logprobs"):
        demo.chat("Hello", logprobs=wrong)  # type: ignore[arg-type]


@pytest.mark.heavy
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("choice", ["required", "weather", "calculator"])
def test_a_call_that_is_demanded_is_made(demo: LLM, choice: str, thinking: bool) -> None:
    made = 0
    for seed in range(5):
        reply = demo.chat(
            "Hello, who are you?",
            tools=TOOLS,
            tool_choice=choice,
            thinking=thinking,
            seed=seed,
            sampling=SamplingParams(temperature=1.3),
            max_tokens=200,
        )
        assert bool(reply.reasoning) <= thinking
        if not reply.tool_calls:  # its arguments went on and on
            assert reply.finish_reason == "length" and "cut off" in reply.details["warning"]
            continue
        made += 1
        first = reply.tool_calls[0]
        assert first.name in (("weather", "calculator") if choice == "required" else (choice,))
        assert first.arguments.keys() == {"city" if first.name == "weather" else "expression"}
        assert "<tool_call>" not in reply.text
    assert made >= 3


def test_a_call_that_is_demanded_waits_for_the_thinking_to_end(demo: LLM) -> None:
    reply = demo.chat(
        "What is 12 + 34?", tools=TOOLS, tool_choice="required", thinking_budget=5, seed=1
    )
    assert reply.reasoning.endswith("directly now.") and reply.usage.reasoning_tokens > 5
    assert reply.finish_reason == "tool_calls" and not reply.text


def test_none_is_called_where_none_may_be(demo: LLM) -> None:
    question = "What is 345 + 678?"
    assert demo.chat(question, tools=TOOLS, seed=1, thinking=False).tool_calls
    reply = demo.chat(question, tools=TOOLS, tool_choice="none", seed=1, thinking=False)
    assert reply.text == demo.chat(question, seed=1, thinking=False).text


def test_one_call_ends_the_reply_where_only_one_may_be(demo: LLM) -> None:
    question = "What is 12 + 34, and what is 56 + 78?"
    wild = SamplingParams(temperature=1.0)
    calls = [
        demo.chat(
            question, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=seed,
            sampling=wild,
        ).tool_calls
        for seed in range(5)
    ]  # fmt: skip
    assert {len(called) for called in calls} == {1}


def test_running_tools_demands_a_call_only_at_first(demo: LLM) -> None:
    reply = demo.run("What is 345 + 678?", tools=[calculator], tool_choice="required", seed=1)
    assert "1023" in reply.text


def test_a_choice_that_cannot_be_is_refused(demo: LLM) -> None:
    with pytest.raises(ValueError, match="tool_choice='required' needs tools"):
        demo.chat("Hello", tool_choice="required")
    with pytest.raises(ValueError, match=r"a tool's name \(calculator, weather\), not 'sing'"):
        demo.chat("Hello", tools=TOOLS, tool_choice="sing")
