"""Thinking as a user controls it: budgets, finishing now, soft switches; on real models."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from qwen3_mlx import LLM, Finish, Qwen3Error, Reasoning, SamplingParams, Text
from qwen3_mlx.api.stream import Reply
from qwen3_mlx.text import repetition
from qwen3_mlx.text.messages import normalise
from qwen3_mlx.text.thinking import Thinking, soft_switch
from qwen3_mlx.text.thinking_budget import HAND_OFF

QUESTIONS = ["What is 123 + 456?", "123 + 456 等于多少？"]
GREEDY = SamplingParams(temperature=0)
SAID = HAND_OFF.partition("</think>")[0].strip()


def chosen_thinking(llm: LLM, reply: Reply) -> int:
    """Count the tokens of thinking, without those of the hand-off."""
    forced = len(llm.tokenizer.encode(HAND_OFF.partition("</think>")[0]))
    return reply.usage.reasoning_tokens - (forced if SAID in reply.reasoning else 0)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("temperature", "budget"),
    [
        *((0.0, budget) for budget in (0, 1, 2, 7, 1024)),
        *((1.0, budget) for budget in (1, 7)),
        *(pytest.param(1.0, budget, marks=pytest.mark.slow) for budget in (0, 2, 64, 1024)),
        pytest.param(0.0, 64, marks=pytest.mark.slow),
    ],
)
def test_a_budget_holds_alone_and_in_a_batch(demo: LLM, budget: int, temperature: float) -> None:
    options: dict[str, Any] = {
        "thinking": True,
        "thinking_budget": budget,
        "temperature": temperature,
        "seed": 3,
        "max_tokens": 1500,
    }
    single = [demo.chat(question, **options) for question in QUESTIONS]
    for alone, together in zip(single, demo.batch(QUESTIONS, **options), strict=True):
        assert chosen_thinking(demo, alone) <= budget
        assert alone.text and alone.finish_reason == "stop"
        assert "think>" not in alone.text + alone.reasoning
        assert (together.text, together.reasoning) == (alone.text, alone.reasoning)
        assert (SAID in alone.reasoning) == (alone.details == {"thinking_closed_by": "budget"})
    if budget == 1024 and not temperature:
        assert all(reply.text.endswith("579") for reply in single)


@pytest.mark.parametrize("budget", [0, 1, 7, 64])
def test_a_budget_holds_with_a_model_that_knows_nothing(tiny: LLM, budget: int) -> None:
    """Its characters are broken, it never closes its thinking, and it may never open it."""
    words = [f"Think about {n}!" for n in range(8)]
    options: dict[str, Any] = {"thinking": True, "thinking_budget": budget}
    options["max_tokens"] = budget + 50
    bias = {tiny.thinking.open_id or 0: 8.0, tiny.thinking.close_id or 0: -50.0}
    sampling = SamplingParams(temperature=1.0, logit_bias=bias)
    for reply in tiny.batch(words, seed=5, sampling=sampling, **options):
        closings = reply.reasoning.count(SAID)
        assert closings <= 1
        if reply.usage.reasoning_tokens > budget:
            assert closings == 1 and reply.text


def test_an_answer_has_room(demo: LLM) -> None:
    reply = demo.chat("What is 123 + 456?", thinking_budget=1024, max_tokens=60, sampling=GREEDY)
    assert reply.text and reply.details == {"thinking_closed_by": "budget"}
    with pytest.raises(ValueError, match="max_tokens=20 leaves no room for an answer"):
        demo.chat("What is 123 + 456?", thinking_budget=1024, max_tokens=20)


def test_a_message_of_ones_own_closes_the_thinking(demo: LLM) -> None:
    options: dict[str, Any] = {"thinking_budget": 5, "sampling": GREEDY}
    own = demo.chat("What is 12 + 34?", thinking_budget_message="\nStop!", **options)
    assert own.reasoning.endswith("Stop!") and own.text
    bare = demo.chat("What is 12 + 34?", thinking_budget_message="", **options)
    assert bare.usage.reasoning_tokens == 6 and bare.text


def test_thinking_is_finished_on_request(demo: LLM) -> None:
    stream = demo.stream("What is 123456 + 654321?", thinking=True, sampling=GREEDY)
    reasoning = ""
    for event in stream:
        if isinstance(event, Reasoning):
            reasoning += event.text
            stream.finish_thinking()
    assert isinstance(event, Finish) and event.details == {"thinking_closed_by": "request"}
    assert reasoning.endswith(SAID) and len(reasoning) < len(SAID) + 40


def test_an_async_stream_is_finished_too(demo: LLM) -> None:
    async def ask() -> list[object]:
        stream = demo.astream("What is 123456 + 654321?", thinking=True, sampling=GREEDY)
        stream.finish_thinking()
        return [event async for event in stream]

    events = asyncio.run(ask())
    assert isinstance(events[-1], Finish)
    assert events[-1].details == {"thinking_closed_by": "request"}
    assert any(isinstance(event, Text) for event in events)


@pytest.mark.parametrize(
    ("messages", "switch"),
    [
        ("What is 1 + 2?", None),
        ("What is 1 + 2? /no_think", False),
        ("/think What is 1 + 2?", True),
        ("/no_think no: /think", True),
        ("see /no_think/ and a/no_think and /no_thinking", None),
        (
            [
                {"role": "system", "content": "Be brief. /no_think"},
                {"role": "user", "content": "Hi"},
            ],
            False,
        ),
        (
            [
                {"role": "user", "content": "/no_think"},
                {"role": "assistant", "content": "/think"},
                {"role": "user", "content": [{"type": "text", "text": "and now?"}]},
            ],
            False,
        ),
    ],
)
def test_the_last_soft_switch_counts(messages: Any, switch: bool | None) -> None:
    assert soft_switch(normalise(messages)) is switch


def test_soft_switches_are_the_models_to_obey(demo: LLM) -> None:
    assert "/no_think" in demo.render("What is 5 + 6? /no_think")
    reply = demo.chat("What is 5 + 6? /no_think", seed=1)
    assert (reply.text, reply.reasoning) == ("5 + 6 = 11", "")
    assert demo.chat("What is 5 + 6? /think", seed=1).reasoning


@pytest.mark.parametrize(
    ("options", "error", "complaint"),
    [
        ({"thinking_budget": -1}, ValueError, "thinking_budget must be at least 0, not -1"),
        ({"thinking_budget": "5"}, TypeError, "thinking_budget must be a whole number, not '5'"),
        (
            {"thinking_budget": 5, "thinking": False},
            ValueError,
            "thinking_budget is for thinking, which thinking=False switches off",
        ),
        ({"thinking_budget_message": 5}, TypeError, "thinking_budget_message must be a string"),
        (
            {"thinking_budget_message": "</think></think>"},
            ValueError,
            "thinking_budget_message must have at most one",
        ),
        ({"loop_guard": 1}, TypeError, "loop_guard must be True or False, not 1"),
        ({"budget": 1}, TypeError, "no option 'budget'; did you mean thinking_budget"),
    ],
)
def test_wrong_arguments(
    demo: LLM, options: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        demo.chat("Hello", **options)


def test_a_budget_is_refused_where_nothing_thinks(demo: LLM) -> None:
    with pytest.MonkeyPatch.context() as patch:
        never = replace(demo._open().processor, thinking=Thinking(False, True, False, None, None))
        patch.setattr(demo._open(), "processor", never)
        with pytest.raises(Qwen3Error, match="cannot think; leave thinking_budget out"):
            demo.chat("Hello", thinking_budget=5)


def test_a_loop_ends_a_reply_and_raw_text_goes_on(
    tiny: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tiny.tokenizer.encode(" a")
    loop = SamplingParams(temperature=0, logit_bias={ids[0]: 1000.0})
    reply = tiny.chat("Hello", max_tokens=1000, sampling=loop)
    assert reply.finish_reason == "stop" and reply.details == {"ended_by": "loop"}
    assert reply.usage.completion_tokens < 300
    monkeypatch.setattr(repetition, "_MIN_REPEATED", 20)
    assert tiny.chat("Hi", max_tokens=60, sampling=loop, loop_guard=False).details == {}
    assert tiny.complete("Hi", max_tokens=60, sampling=loop).finish_reason == "length"
    raw = tiny.complete("Hi", max_tokens=60, sampling=loop, loop_guard=True)
    assert raw.details == {"ended_by": "loop"}
