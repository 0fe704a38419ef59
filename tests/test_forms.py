"""Answers in a form: always valid, whatever the model would rather say."""

import json
import os
import re
import time
from pathlib import Path
from typing import Any, Literal

import jsonschema  # type: ignore[import-untyped]
import pytest
from pydantic import BaseModel, ConfigDict

from qwen3_mlx import LLM, SamplingParams, load
from qwen3_mlx.text.grammar import Grammars, allows
from qwen3_mlx.text.template import ChatTemplate
from qwen3_mlx.text.tokenizer import Tokenizer
from qwen3_mlx.text.tools import Calls, describe
from tests.test_steering import END
from tests.test_text import TEMPLATE, TOKENIZER
from tests.test_tools import calculator

GRAMMARS = Grammars(TOKENIZER, frozenset([END]))
WILD = SamplingParams(temperature=1.5)
SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "kind": {"enum": ["cat", "dog", None, 5]},
            "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "age", "kind", "tags"],
        "additionalProperties": False,
    },
    {
        "type": "array",
        "items": {"anyOf": [{"type": "number"}, {"type": "boolean"}, {"type": "null"}]},
        "maxItems": 5,
    },
    {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "string", "pattern": "^[a-f]{2,4}$"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "string"},
    {},
]


class Answer(BaseModel):
    """What is asked for."""

    model_config = ConfigDict(extra="forbid")
    sum: int
    sure: bool
    words: Literal["even", "odd"]


def generate_valid(llm: LLM, count: int, **options: Any) -> None:
    """Have `count` replies for each of the schemas, some with little room, and hold them to it."""
    for number, schema in enumerate(SCHEMAS):
        for most in (40, 120):
            replies = llm.batch(
                [f"Say something, {n}!" for n in range(count)],
                schema=schema,
                max_tokens=most,
                sampling=WILD,
                seed=number,
                **options,
            )
            for reply in replies:
                data = json.loads(reply.text)
                jsonschema.validate(data, schema)
                assert reply.parsed == data
                assert reply.finish_reason in ("stop", "length")


def test_json_is_always_valid(tiny: LLM) -> None:
    generate_valid(tiny, 4, thinking=False)


def test_json_is_valid_after_thinking_that_takes_all_it_can(tiny: LLM) -> None:
    bias = {tiny.thinking.open_id or 0: 50.0}
    for budget in (None, 5):
        replies = tiny.batch(
            ["What is 1 + 2?", "Who are you?"],
            schema=SCHEMAS[0],
            thinking=True,
            thinking_budget=budget,
            max_tokens=120,
            seed=1,
            sampling=SamplingParams(temperature=1.0, logit_bias=bias),
        )
        for reply in replies:
            assert reply.reasoning and "think>" not in reply.text
            jsonschema.validate(json.loads(reply.text), SCHEMAS[0])


@pytest.mark.slow
def test_a_thousand_are_valid(tiny: LLM) -> None:
    generate_valid(tiny, 84, thinking=False)  # 6 schemas, 2 lengths: 1,008


def test_a_pydantic_model_comes_back(demo: LLM) -> None:
    reply = demo.chat("What is 5 + 6?", thinking=False, schema=Answer, seed=1)
    assert isinstance(reply.parsed, Answer)
    assert json.loads(reply.text) == reply.parsed.model_dump()
    cut = demo.chat("What is 5 + 6?", thinking=False, schema=Answer, seed=1, max_tokens=3)
    assert (cut.parsed, cut.finish_reason) == (None, "length")


def test_patterns_choices_and_grammars(tiny: LLM) -> None:
    options: dict[str, Any] = {"thinking": False, "sampling": WILD, "max_tokens": 60}
    for seed in range(5):
        options["seed"] = seed
        assert re.fullmatch("[0-9]{2,4}x?", tiny.chat("?", regex="[0-9]{2,4}x?", **options).text)
        assert tiny.chat("?", choice=["ja", "nein", "a\nb"], **options).text in (
            "ja",
            "nein",
            "a\nb",
        )
        said = tiny.chat("?", grammar='start: "a" b+ "c"\nb: "b" | "\\""', **options).text
        assert re.fullmatch('a[b"]+c', said)


def test_a_form_may_wait_for_thinking(demo: LLM) -> None:
    reply = demo.chat("What is 5 + 6?", thinking=True, regex="[0-9]+", seed=1)
    assert reply.text.isdigit() and "carry" in reply.reasoning
    assert demo.chat("What is 5 + 6? /no_think", regex="[0-9]+", seed=1).text.isdigit()


def test_calls_fit_the_tools_whatever_the_temperature(demo: LLM) -> None:
    for seed in range(5):
        reply = demo.chat(
            "What is 1234 + 4321?", tools=[calculator], thinking=False, seed=seed, sampling=WILD
        )
        for call in reply.tool_calls:
            assert call.name == "calculator" and set(call.arguments) == {"expression"}


def test_little_room_changes_nothing_that_fits_it(demo: LLM) -> None:
    description = {"name": "add", "description": "Add two numbers.", "parameters": NUMBERS}
    replies = [
        demo.chat(
            "What is 4195 + 5884?",
            tools=[description],
            thinking=False,
            max_tokens=most,
            sampling=SamplingParams(temperature=0),
        )
        for most in (1000, 200, 60)
    ]
    for reply in replies:
        assert [call.arguments for call in reply.tool_calls] == [{"a": 4195, "b": 5884}]


def test_a_call_is_held_to_the_schema() -> None:
    tools = [
        describe(calculator),
        {"type": "function", "function": {"name": "f", "parameters": {}}},
    ]
    grammar = GRAMMARS.call(tools)
    for token in TOKENIZER.encode('\n{"name": "'):
        assert allows(grammar.mask(), token)
        grammar.advance(token)
    assert not allows(grammar.mask(), TOKENIZER.encode("x")[0])
    odd = {"name": "g", "parameters": {"type": "object", "if": {}}}
    closing = GRAMMARS.call([{"type": "function", "function": odd}]).closing()
    assert closing is not None
    calls = Calls.of(TEMPLATE, TOKENIZER, [])
    assert calls and calls.read(TOKENIZER.decode(closing), whole=True)


def test_a_coder_call_is_held_to_the_schema() -> None:
    properties = {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "kind": {"type": "array", "items": {"enum": ["a", "b"]}},
        "odd": {"type": "object", "if": {}},
    }
    find = {"name": "find", "parameters": {"type": "object", "properties": properties}}
    tools = [describe(find), describe({"name": "stop"})]
    written = (
        "\n<function=find>\n<parameter=count>\n-12\n</parameter>\n<parameter=text>\na <b>\n</p\n"
        '</parameter>\n<parameter=kind>\n["a", "b"]\n</parameter>\n<parameter=odd>\n{"x": 1}\n'
        "</parameter>\n</function>\n"
    )
    for text in (written, "\n<function=stop>\n</function>\n"):
        grammar = GRAMMARS.coder_call(tools)
        for token in TOKENIZER.encode(text):
            assert allows(grammar.mask(), token)
            grammar.advance(token)
        assert grammar.complete
    for wrong in ("\n<function=go", "\n<function=find>\n<parameter=count>\nmany"):
        grammar = GRAMMARS.coder_call(tools)
        allowed = []
        for token in TOKENIZER.encode(wrong):
            allowed.append(allows(grammar.mask(), token))
            if not allowed[-1]:
                break
            grammar.advance(token)
        assert not all(allowed)
    closing = GRAMMARS.coder_call(tools).closing()
    calls = Calls.of(ChatTemplate("<function="), TOKENIZER, tools)
    assert closing and calls and calls.read(TOKENIZER.decode(closing), whole=True)
    made = calls.read(written, whole=True)
    assert made and made.arguments == {
        "count": -12,
        "text": "a <b>\n</p",
        "kind": ["a", "b"],
        "odd": {"x": 1},
    }


def test_what_a_tool_or_a_thought_says_may_come_instead_of_json(demo: LLM) -> None:
    reply = demo.chat(
        "What is 1234 + 4321?", tools=[calculator], schema=Answer, thinking=False, seed=1
    )
    assert reply.tool_calls or isinstance(reply.parsed, Answer)


NUMBERS: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "number"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (SCHEMAS[0], '{"name": "Ann \\" x", "age": 12, "kind": "cat", "tags": ["a", "b"]}'),
        (NUMBERS, '{"a": -1234, "b": 12.5e3}'),
        (SCHEMAS[1], "[12, true, null, -0.5]"),
        (SCHEMAS[2], '{"value": "abc", "next": {"value": "ff", "next": null}}'),
    ],
)
def test_a_text_can_be_closed_from_anywhere(schema: dict[str, Any], text: str) -> None:
    grammar = GRAMMARS.schema(schema)
    said: list[int] = []
    for token in TOKENIZER.encode(text):
        closing = grammar.closing()
        assert closing is not None
        assert len(closing) < 40
        jsonschema.validate(json.loads(TOKENIZER.decode(said + closing)), schema)
        grammar.advance(token)
        said.append(token)
    assert grammar.may_end and grammar.closing() == []
    grammar.rewind(0)
    assert grammar.closing() is not None and not grammar.complete


@pytest.mark.parametrize(
    ("options", "error", "complaint"),
    [
        ({"schema": {"if": {}}}, ValueError, r'schema: Unimplemented keys: \["if"\]'),
        ({"schema": 5}, TypeError, "schema must be a JSON schema or a pydantic model, not 5"),
        ({"regex": "("}, ValueError, "regex: .*unclosed group"),
        ({"regex": 5}, TypeError, "regex must be a string, not 5"),
        ({"choice": []}, ValueError, "choice must be one or more non-empty strings"),
        ({"choice": "ab"}, ValueError, "choice must be one or more non-empty strings"),
        ({"grammar": "x"}, ValueError, "grammar: "),
        ({"schema": {}, "regex": "a"}, ValueError, "one form, not schema and regex"),
    ],
)
def test_wrong_forms(
    demo: LLM, options: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        demo.chat("Hello", **options)


@pytest.mark.slow
def test_masks_take_less_than_a_millisecond() -> None:
    grammar, times = GRAMMARS.schema(SCHEMAS[0]), []
    for token in TOKENIZER.encode('{"name": "Ann", "age": 12, "kind": "cat", "tags": ["a", "b"]}'):
        started = time.perf_counter()
        grammar.mask()
        times.append(time.perf_counter() - started)
        grammar.advance(token)
    assert sorted(times)[len(times) // 2] < 1e-3


@pytest.mark.published
def test_masks_of_the_published_vocabulary_are_quick() -> None:
    tokenizer = Tokenizer(Path(os.environ["QWEN3_FILES"]) / "tokenizer.json")
    ends = frozenset(tokenizer.id_of(name) or 0 for name in ("<|im_end|>", "<|endoftext|>"))
    grammar, times = Grammars(tokenizer, ends).schema(SCHEMAS[0]), []
    for token in tokenizer.encode('{"name": "Ann", "age": 12, "kind": "cat", "tags": ["a", "b"]}'):
        started = time.perf_counter()
        mask = grammar.mask()
        times.append(time.perf_counter() - started)
        assert allows(mask, token)
        grammar.advance(token)
    assert grammar.complete and sorted(times)[len(times) // 2] < 1e-3


# --- penalties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("forced", ["form", "thinking", "call"])
def test_penalties_count_what_is_forced(forced: str, tiny: LLM) -> None:
    """The letter that leads by far has been forced so often that the other one is chosen."""

    def QQQQQQQQQQQQ(letter: Literal["Q", "x"]) -> str:
        return letter

    ways: dict[str, dict[str, Any]] = {
        "form": {"regex": f"{'Q' * 12}(Q|x)", "thinking": False},
        "thinking": {
            "thinking": True,
            "thinking_budget": 0,
            "thinking_budget_message": "Q" * 12,
            "regex": "(Q|x)",
        },
        "call": {"tools": [QQQQQQQQQQQQ], "tool_choice": "required", "thinking": False},
    }
    leading, other, opening = (tiny.tokenizer.encode(text)[0] for text in ("Q", "x", "<think>"))
    bias = {leading: 65.0, other: 50.0, opening: 90.0 if forced == "thinking" else 0.0}

    def chosen(penalty: float) -> str:
        reply = tiny.chat(
            "Say it.",
            temperature=0,
            frequency_penalty=penalty,
            logit_bias=bias,
            max_tokens=90,
            **ways[forced],
        )
        letters = [call.arguments["letter"] for call in reply.tool_calls]
        return letters[0] if letters else reply.text[-1]

    assert chosen(0) == "Q"
    assert chosen(2) == "x"


def test_penalised_replies_are_the_same_alone_together_and_with_speculation(
    tiny: LLM, tiny_folder: Path
) -> None:
    options: dict[str, Any] = {
        "schema": SCHEMAS[0],
        "thinking_budget": 6,
        "max_tokens": 120,
        "seed": 8,
        "temperature": 0.8,
        "frequency_penalty": 0.4,
        "presence_penalty": 0.2,
        "repetition_penalty": 1.1,
    }
    prompts = ["Hello", "a b c a b c a b c", "1 2 3 4"]
    alone = [tiny.chat(prompt, **options) for prompt in prompts]
    with load(tiny_folder, draft="ngram") as drafting:
        for replies in (tiny.batch(prompts, **options), drafting.batch(prompts, **options)):
            for reply, expected in zip(replies, alone, strict=True):
                assert (reply.reasoning, reply.text) == (expected.reasoning, expected.text)
