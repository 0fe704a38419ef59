"""The options of a reply as callers write them: fields of sampling, numpy scalars, misspellings."""

import asyncio
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen3_mlx import LLM, Conversation, Finish, Options, SamplingParams, Text, convert, load
from tests.support import assert_close

FIELDS: dict[str, Any] = {
    "temperature": 0.9,
    "top_p": 0.8,
    "top_k": 30,
    "min_p": 0.01,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.2,
    "repetition_penalty": 1.2,
    "logit_bias": {40: 2.0, 41: -3.0},
}
REST: dict[str, Any] = {"max_tokens": 12, "seed": 5}


def add(a: int, b: int) -> int:
    """Add numbers."""
    return a + b


async def _astreamed(llm: LLM, options: dict[str, Any]) -> str:
    stream = llm.astream("Hello", thinking=False, **options)
    return "".join([event.text async for event in stream if isinstance(event, Text)])


def _streamed(llm: LLM, options: dict[str, Any]) -> str:
    stream = llm.stream("Hello", thinking=False, **options)
    return "".join(event.text for event in stream if isinstance(event, Text))


WAYS: dict[str, Callable[[LLM, dict[str, Any]], str]] = {
    "chat": lambda llm, options: llm.chat("Hello", thinking=False, **options).text,
    "stream": _streamed,
    "astream": lambda llm, options: asyncio.run(_astreamed(llm, options)),
    "batch": lambda llm, options: llm.batch(["Hello"], thinking=False, **options)[0].text,
    "run": lambda llm, options: llm.run("Hello", tools=[add], thinking=False, **options).text,
    "complete": lambda llm, options: llm.complete("Hello", **options).text,
    "conversation": lambda llm, options: (
        llm.conversation(thinking=False, **options).chat("Hello").text
    ),
    "conversation.chat": lambda llm, options: (
        llm.conversation(thinking=False).chat("Hello", **options).text
    ),
    "prepare": lambda llm, options: repr(llm.prepare("Hello", **options).options),
    "prepare_text": lambda llm, options: repr(llm.prepare_text("Hello", **options).options),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_fields_of_sampling_are_options(way: str, tiny: LLM) -> None:
    reply = WAYS[way]
    stated = reply(tiny, FIELDS | REST)
    assert stated == reply(tiny, REST | {"sampling": SamplingParams(**FIELDS)})
    some = {name: FIELDS[name] for name in ("temperature", "logit_bias", "top_k")}
    others = {name: value for name, value in FIELDS.items() if name not in some}
    assert stated == reply(tiny, REST | some | {"sampling": SamplingParams(**others)})
    # What is stated twice, alike, is stated once.
    assert stated == reply(tiny, REST | FIELDS | {"sampling": SamplingParams(**some)})
    assert stated != reply(tiny, REST)


@pytest.mark.parametrize("way", WAYS)
def test_a_contradiction_is_refused(way: str, tiny: LLM) -> None:
    options = {"temperature": 0.3, "sampling": SamplingParams(temperature=0.5)}
    with pytest.raises(ValueError, match=r"temperature is 0\.3 and, in sampling, 0\.5; state it"):
        WAYS[way](tiny, options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("temprature", "temperature"),
        ("max_new_tokens", "max_tokens"),
        ("maxtokens", "max_tokens"),
        ("stops", "stop"),
        ("frequency_penality", "frequency_penalty"),
    ],
)
def test_an_unknown_option_names_the_closest(way: str, name: str, closest: str, tiny: LLM) -> None:
    with pytest.raises(TypeError) as caught:
        WAYS[way](tiny, {name: 1})
    assert str(caught.value) == f"there is no option {name!r}; did you mean {closest}?"


def test_an_unknown_option_like_no_other_lists_those_that_exist(tiny: LLM) -> None:
    with pytest.raises(
        TypeError, match="no option 'x'; there are max_tokens, temperature, .*tools"
    ):
        tiny.chat("Hello", x=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="no option 'thinking'; there are max_tokens"):
        tiny.complete("Hello", thinking=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="did you mean drop_oldest"):
        tiny.conversation(drop_odest=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="did you mean max_steps"):
        tiny.run("Hello", max_step=3)  # type: ignore[call-arg]


def test_help_lists_the_keywords() -> None:
    for method in (LLM.stream, LLM.chat, LLM.astream, LLM.batch, LLM.run, LLM.conversation):
        shown = inspect.signature(method).parameters
        assert shown.keys() >= Options.__annotations__.keys() and "options" not in shown
        assert shown["temperature"].default is None and shown["tool_choice"].default == "auto"
    assert not inspect.signature(LLM.complete).parameters["loop_guard"].default
    assert "tools" not in inspect.signature(LLM.complete).parameters
    assert inspect.signature(LLM.conversation).parameters["prefetch_next_turn"].default is True
    assert inspect.signature(Conversation.retry).parameters["thinking"].default is ...
    assert "thinking_budget" in str(Options.__doc__)


def test_an_option_of_a_conversation_gives_way_to_that_of_a_reply(tiny: LLM) -> None:
    def said(defaults: dict[str, Any], **options: Any) -> str:
        return tiny.conversation(thinking=False, **REST, **defaults).chat("Hello", **options).text

    expected = said({}, temperature=1.5, top_k=40)
    assert said({"temperature": 0.1, "top_k": 40}, temperature=1.5) == expected
    sampling = SamplingParams(temperature=0.1, top_k=40)
    assert said({"sampling": sampling}, temperature=1.5) == expected
    assert said({"sampling": sampling}, sampling=SamplingParams(temperature=1.5)) == expected
    # None is the default of the mode, whichever way it was stated.
    assert said({"temperature": 1.5, "top_k": 40}, sampling=None) == said({})
    assert said({"sampling": sampling}, temperature=None, top_k=None) == said({})
    assert said({}, temperature=1.5) != expected != said({})


def as_numpy(value: Any) -> Any:
    """Return a value with numpy's scalars in place of Python's."""
    if isinstance(value, dict):
        return {np.int32(key): np.float32(number) for key, number in value.items()}
    kinds: dict[type, Any] = {bool: np.bool_, int: np.int64, float: np.float64, str: np.str_}
    return kinds[type(value)](value) if type(value) in kinds else value


NUMBERS: dict[str, Any] = FIELDS | {
    "max_tokens": 40,
    "seed": 7,
    "thinking": True,
    "thinking_budget": 5,
    "thinking_budget_message": " so.",
    "loop_guard": True,
    "logprobs": 2,
    "stop": "zzz",
    "parallel_tool_calls": True,
    "prefetch_next_turn": False,
}


@pytest.mark.parametrize("way", ["chat", "stream", "batch", "conversation", "prepare"])
def test_numpy_scalars_are_options(way: str, tiny: LLM) -> None:
    options = NUMBERS | {"thinking": True}
    replies: dict[str, Callable[[dict[str, Any]], Any]] = {
        "chat": lambda options: tiny.chat("Hello", **options),
        "stream": lambda options: list(tiny.stream("Hello", **options)),
        "batch": lambda options: tiny.batch(["Hello"], **options),
        "conversation": lambda options: tiny.conversation(**options).chat("Hello"),
        "prepare": lambda options: tiny.prepare("Hello", **options),
    }
    tiny.forget()
    plain = replies[way](options)
    tiny.forget()
    assert replies[way]({name: as_numpy(value) for name, value in options.items()}) == plain


def test_numpy_scalars_are_fields_of_sampling() -> None:
    found = SamplingParams(**{name: as_numpy(value) for name, value in FIELDS.items()})
    assert found == SamplingParams(**FIELDS)
    assert type(found.top_k) is int and type(found.temperature) is float
    assert {type(token) for token in found.logit_bias or ()} == {int}
    half: dict[str, Any] = {"temperature": np.float32(0.5), "top_k": np.uint8(3)}
    assert SamplingParams(**half) == SamplingParams(temperature=0.5, top_k=3)
    for wrong in (np.True_, np.str_("hot"), np.array([1.0])):
        with pytest.raises(TypeError, match="temperature must be a number"):
            SamplingParams(temperature=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top_p must be from 0 to 1, not nan"):
        SamplingParams(top_p=np.float64("nan"))
    with pytest.raises(TypeError, match=r"logit_bias maps token ids to numbers; \[5\] does not"):
        SamplingParams(logit_bias=[5])  # type: ignore[arg-type]


def test_stop_strings_may_be_an_array(tiny: LLM) -> None:
    whole = tiny.complete("a", max_tokens=40, seed=5).text
    middle = whole[len(whole) // 2 : len(whole) // 2 + 2]
    stop: Any = np.array(["never there", middle])
    assert tiny.complete("a", max_tokens=40, seed=5, stop=stop).text == whole.split(middle)[0]


@pytest.mark.parametrize("stop", [5, True, {"a": 1}, [None], ["a", ""], b"a"])
def test_what_cannot_end_a_reply(stop: Any, tiny: LLM) -> None:
    with pytest.raises(ValueError, match="stop must be one or more non-empty strings, not "):
        tiny.complete("a", stop=stop)


def test_ids_may_be_an_array(tiny: LLM) -> None:
    expected = tiny.logits([5, 6, 7])
    for ids in (np.array([5, 6, 7]), (np.int64(5), 6, np.uint8(7)), mx.array([5, 6, 7])):
        assert_close(tiny.logits(ids), expected, 0)  # type: ignore[arg-type]
    task = tiny.prepare_text(np.array([5, 6, 7]))  # type: ignore[arg-type]
    assert task.prompt == [5, 6, 7]
    for wrong in (
        [1.5],
        np.array([1.0]),
        "abc",
        b"ab",
        None,
        3,
        [True],
        np.array([[1, 2]]),
        [None],
    ):
        with pytest.raises(TypeError, match="token ids must be whole numbers, not"):
            tiny.logits(wrong)  # type: ignore[arg-type]


def test_numpy_scalars_are_arguments_of_load_and_convert(tiny_folder: Path, tmp_path: Path) -> None:
    numbers: dict[str, Any] = {
        "bits": np.int64(4),
        "group_size": np.int32(64),
        "dequantize": np.False_,
        "context": np.int64(256),
        "kv_bits": np.int8(8),
        "prompt_cache": tmp_path / "kept",
        "prompt_cache_gb": np.float32(0.5),
    }
    with load(tiny_folder, **numbers) as llm:
        assert llm.context == 256
        assert isinstance(list(llm.stream("Hello", max_tokens=2))[-1], Finish)
    form: dict[str, Any] = {"bits": np.int64(8), "group_size": np.int64(32)}
    made = convert(tiny_folder, tmp_path / "made", **form)
    assert {form.bits for form in made.formats.values()} == {8}
    with pytest.raises(ValueError, match="context must be a number of tokens from 1 up, not True"):
        load(tiny_folder, context=np.True_)  # type: ignore[arg-type]
