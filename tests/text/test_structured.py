"""Answers in a form: always valid, whatever the model would rather say."""

import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import jsonschema  # type: ignore[import-untyped]
import pytest
from pydantic import BaseModel, ConfigDict

from qwen3_mlx import LLM, SamplingParams, load
from qwen3_mlx.text.grammar import allows
from qwen3_mlx.text.grammar_compiler import GrammarCompiler
from qwen3_mlx.text.template import ChatTemplate
from qwen3_mlx.text.tokenizer import Tokenizer
from qwen3_mlx.text.tool_calls import ToolCallSyntax, tool_schema
from tests.support import TINY, write_tiny
from tests.text.harness import END, TEMPLATE, TOKENIZER, calculator

GRAMMARS = GrammarCompiler(TOKENIZER, frozenset([END]))
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


class Colour(Enum):
    """Of paint."""

    RED = "r"
    BLUE = "b"


class Brush(BaseModel):
    """What to paint with."""

    model_config = ConfigDict(extra="forbid")
    colour: Colour
    width: Literal[1, 2]


def generate_valid(llm: LLM, count: int, lengths: Sequence[int], **options: Any) -> None:
    """Have `count` replies for each of the schemas and lengths, and hold them to it."""
    for number, schema in enumerate(SCHEMAS):
        for most in lengths:
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
    generate_valid(tiny, 2, (40,), thinking=False)


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
    generate_valid(tiny, 84, (40, 120), thinking=False)  # 6 schemas, 2 lengths: 1,008


def test_a_pydantic_model_comes_back(demo: LLM) -> None:
    reply = demo.chat("What is 5 + 6?", thinking=False, schema=Answer, seed=1, max_tokens=60)
    assert isinstance(reply.parsed, Answer)
    assert json.loads(reply.text) == reply.parsed.model_dump()
    cut = demo.chat("What is 5 + 6?", thinking=False, schema=Answer, seed=1, max_tokens=3)
    assert (cut.parsed, cut.finish_reason) == (None, "length")


def test_patterns_choices_and_grammars(tiny: LLM) -> None:
    options: dict[str, Any] = {"thinking": False, "sampling": WILD, "max_tokens": 60}
    for seed in range(3):
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
        tool_schema(calculator),
        {"type": "function", "function": {"name": "f", "parameters": {}}},
    ]
    grammar = GRAMMARS.hermes_call(tools)
    for token in TOKENIZER.encode('\n{"name": "'):
        assert allows(grammar.mask(), token)
        grammar.advance(token)
    assert not allows(grammar.mask(), TOKENIZER.encode("x")[0])
    odd = {"name": "g", "parameters": {"type": "object", "if": {}}}
    closing = GRAMMARS.hermes_call([{"type": "function", "function": odd}]).closing()
    assert closing is not None
    calls = ToolCallSyntax.of(TEMPLATE, TOKENIZER, [])
    assert calls and calls.read(TOKENIZER.decode(closing), whole=True)


def test_a_coder_call_is_held_to_the_schema() -> None:
    properties = {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "kind": {"type": "array", "items": {"enum": ["a", "b"]}},
        "odd": {"type": "object", "if": {}},
    }
    find = {"name": "find", "parameters": {"type": "object", "properties": properties}}
    tools = [tool_schema(find), tool_schema({"name": "stop"})]
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
    calls = ToolCallSyntax.of(ChatTemplate("<function="), TOKENIZER, tools)
    assert closing and calls and calls.read(TOKENIZER.decode(closing), whole=True)
    made = calls.read(written, whole=True)
    assert made and made.arguments == {
        "count": -12,
        "text": "a <b>\n</p",
        "kind": ["a", "b"],
        "odd": {"x": 1},
    }


@pytest.mark.parametrize(
    "value",
    [
        *("", "\n", "a</parameter>", "a\n</parameter> b", "</parameter><parameter=count>\n1"),
        *("a\n</parameter></function>", "a\n<parameter=text>\nb", "</function>\n", "\n</function>"),
    ],
)
def test_a_coder_call_is_read_as_its_grammar_has_it(value: str) -> None:
    properties = {"text": {"type": "string"}, "count": {"type": "integer"}}
    tools = [tool_schema({"name": "find", "parameters": {"properties": properties}})]
    begun = f"\n<function=find>\n<parameter=text>\n{value}\n</parameter>\n"
    calls = ToolCallSyntax.of(ChatTemplate("<function="), TOKENIZER, tools)
    grammar = GRAMMARS.coder_call(tools)
    for token in TOKENIZER.encode(f"{begun}<parameter=count>\n7\n</parameter>\n</function>\n"):
        assert allows(grammar.mask(), token) and not grammar.complete
        grammar.advance(token)
    assert grammar.complete
    made = calls and calls.read(
        f"{begun}<parameter=count>\n7\n</parameter>\n</function>", whole=False
    )
    assert made and made.arguments == {"text": value, "count": 7}


def test_an_empty_text_in_a_coder_call_needs_no_line() -> None:
    properties = {"text": {"type": "string"}}
    tools = [tool_schema({"name": "find", "parameters": {"properties": properties}})]
    call = "\n<function=find>\n<parameter=text>\n</parameter>\n</function>\n"
    grammar = GRAMMARS.coder_call(tools)
    for token in TOKENIZER.encode(call):
        assert allows(grammar.mask(), token)
        grammar.advance(token)
    calls = ToolCallSyntax.of(ChatTemplate("<function="), TOKENIZER, tools)
    made = calls and calls.read(call, whole=False)
    assert grammar.complete and made and made.arguments == {"text": ""}


def tool_of(parameters: Any, name: str = "f") -> dict[str, Any]:
    return {"name": name, "description": "Do it.", "parameters": parameters}


WITH_REFERENCES: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"unit": {"$ref": "#/$defs/Unit"}},
        "required": ["unit"],
        "$defs": {"Unit": {"enum": ["c", "f"]}},
    },
    {
        "type": "object",
        "properties": {"unit": {"$ref": "#/definitions/Unit"}},
        "required": ["unit"],
        "definitions": {"Unit": {"enum": [1, 2]}},
    },
    {
        "$ref": "#/$defs/Call",
        "$defs": {
            "Call": {
                "type": "object",
                "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
                "required": ["n"],
                "additionalProperties": False,
            }
        },
    },
    {
        "type": "object",
        "properties": {"a": {"enum": [3, 4]}, "b": {"$ref": "#/properties/a"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {"n": {"enum": [7, 8]}, "next": {"$ref": "#"}},
        "required": ["n"],
        "additionalProperties": False,
    },
    SCHEMAS[2],
]
NOT_SUPPORTED: list[tuple[Any, str]] = [
    (
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)"}}},
        "look-around",
    ),
    ({"type": "object", "properties": {"a": {"type": "int"}}}, "Invalid type: int"),
    ({"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}}, "does not exist"),
    ({"type": "object", "if": {}}, r'Unimplemented keys: \["if"\]'),
    ({"$ref": "#"}, "circular references"),
    ({"type": "array", "items": {"type": "integer"}}, "the arguments of a tool are an object"),
    (
        {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 3000017}}},
        "multipleOf is supported up to 100,000",
    ),
]


@pytest.mark.heavy
@pytest.mark.parametrize("parameters", WITH_REFERENCES)
def test_references_in_a_schema_hold_in_a_call(demo: LLM, parameters: dict[str, Any]) -> None:
    tools = [tool_of({"type": "object"}, "other"), tool_of(parameters)]
    called = 0
    for seed in range(40):  # most that are begun find no end
        if called > 2:
            break
        reply = demo.chat(
            "Hello",
            tools=tools,
            tool_choice="f",
            parallel_tool_calls=False,
            thinking=False,
            max_tokens=150,
            sampling=WILD,
            seed=seed,
        )
        assert "schema" not in warning(reply)
        for call in reply.tool_calls:
            jsonschema.validate(call.arguments, parameters)
            called += 1
    assert called


@pytest.mark.heavy
@pytest.mark.parametrize(("parameters", "complaint"), NOT_SUPPORTED)
def test_what_is_not_supported_of_a_schema_is_warned_of(
    demo: LLM, parameters: Any, complaint: str
) -> None:
    options: dict[str, Any] = {"thinking": False, "seed": 1}
    tools = [tool_of(parameters, "odd"), tool_of(WITH_REFERENCES[0])]
    reply = demo.chat("Hello", tools=tools, tool_choice="f", **options)
    assert "warning" not in reply.details  # only those that may be called
    reply = demo.chat("Hello", tools=tools, max_tokens=12, **options)
    assert re.search(f"the schema of the tool odd is (not )?enforced.*{complaint}", warning(reply))
    reply = demo.chat("Hello", tools=tools, tool_choice="odd", max_tokens=50, **options)
    assert all(call.name == "odd" for call in reply.tool_calls) and warning(reply)
    conversation = demo.conversation(tools=tools, max_tokens=12, **options)
    events = list(conversation.stream("Hello"))
    assert complaint.split()[0] in warning(events[-1])


def warning(finish: Any) -> str:
    return str(finish.details.get("warning", ""))


@pytest.mark.heavy
@pytest.mark.parametrize(
    "parameters", [None, True, [], {}, {"type": "object", "properties": None, "required": None}]
)
def test_parameters_that_are_no_schema_are_any_object(
    demo: LLM, coder: LLM, parameters: Any
) -> None:
    for llm in (demo, coder):
        reply = llm.chat(
            "Hello",
            tools=[tool_of(parameters)],
            tool_choice="required",
            max_tokens=80,
            thinking=None if llm is coder else False,
            seed=1,
        )
        assert all(call.name == "f" for call in reply.tool_calls)
        assert "schema" not in warning(reply)


CODER_TEMPLATE = """{%- for tool in tools or [] %}<function={{ tool.function.name }}>
{%- endfor %}{%- for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}<|im_start|>assistant
"""
CODER_TYPES: dict[str, Any] = {
    "type": "object",
    "properties": {
        "limit": {"anyOf": [{"$ref": "#/$defs/Digit"}, {"type": "null"}]},
        "again": {"$ref": "#/properties/limit"},
        "where": {"$ref": "#/$defs/Where"},
        "exact": {"allOf": [{"type": "boolean"}], "default": True},
    },
    "$defs": {
        "Digit": {"enum": [1, 2, 3]},
        "Where": {
            "type": "object",
            "properties": {"n": {"$ref": "#/$defs/Digit"}},
            "required": ["n"],
            "additionalProperties": False,
        },
    },
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def coder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """A random checkpoint that calls tools as Qwen3-Coder does."""
    # By one with two layers not all parameters are named in so few calls.
    folder = write_tiny(tmp_path_factory.mktemp("coder"), {**TINY, "num_hidden_layers": 3})
    (folder / "chat_template.jinja").write_text(CODER_TEMPLATE)
    with load(folder) as llm:
        yield llm


@pytest.mark.parametrize(
    "parameters", [CODER_TYPES, {"$ref": "#/$defs/All", "$defs": {"All": {"$ref": "#/$defs/It"}}}]
)
def test_coder_values_are_held_to_schemas_through_references(
    coder: LLM, parameters: dict[str, Any]
) -> None:
    if "$ref" in parameters:
        own = {key: value for key, value in CODER_TYPES.items() if key != "$defs"}
        own["properties"] = {**own["properties"], "again": {"$ref": "#/$defs/It/properties/limit"}}
        parameters = {
            **parameters,
            "$defs": CODER_TYPES["$defs"] | parameters["$defs"] | {"It": own},
        }
    seen: set[str] = set()
    for seed in range(40):  # most that are begun find no end
        if seen == CODER_TYPES["properties"].keys():
            break
        reply = coder.chat(
            "?",
            tools=[tool_of(parameters)],
            tool_choice="required",
            parallel_tool_calls=False,
            max_tokens=400,
            sampling=SamplingParams(temperature=2.0, top_k=0, top_p=1.0),
            seed=seed,
        )
        assert not warning(reply)
        for call in reply.tool_calls:
            jsonschema.validate(call.arguments, parameters)
            seen |= call.arguments.keys()
    assert seen == CODER_TYPES["properties"].keys()


def test_tools_that_are_too_much_together_are_not_enforced() -> None:
    tools = [
        tool_schema(
            tool_of(
                {
                    "type": "object",
                    "properties": {
                        "a": {"pattern": "|".join(f"x{n}y{part}*z" for part in range(200))}
                    },
                },
                f"f{n}",
            )
        )
        for n in range(100)
    ]
    grammar = GRAMMARS.hermes_call(tools)
    assert len(grammar.warnings) == 1 and len(grammar.warnings[0]) < 400
    assert re.search("schemas of the tools are not enforced: tools: .*too big", grammar.warnings[0])
    for token in TOKENIZER.encode('\n{"name": "f7", "arguments": {"any'):
        grammar.advance(token)
    assert GRAMMARS.hermes_call(tools[:9]).warnings == []


def test_a_tool_with_types_of_its_own_is_run(demo: LLM) -> None:
    arrived: list[Any] = []

    def paint(colour: Colour, brush: Brush) -> str:
        """Paint."""
        arrived.append((colour, brush))
        return "done"

    demo.run(
        "Hello",
        tools=[paint],
        tool_choice="required",
        parallel_tool_calls=False,
        thinking=False,
        sampling=WILD,
        seed=1,
    )
    colour, brush = arrived[0]
    assert isinstance(colour, Colour) and isinstance(brush, Brush)
    assert isinstance(brush.colour, Colour)


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


def intersected() -> Iterator[dict[str, Any]]:
    """Yield schemas on which llguidance spends hours and all memory before it refuses them."""
    parts: list[dict[str, Any]] = [
        {"type": "string", "pattern": f"^.*a.{{{n}}}$"} for n in range(1, 26)
    ]
    yield {"allOf": parts}
    nested: dict[str, Any] = {"type": "string"}
    for part in parts:
        nested = {**part, "anyOf": [nested]}
    yield nested
    yield {"allOf": [{"type": "object", "properties": {"x": part}} for part in parts]}


INTERSECTED = list(intersected())
MANY = " & ".join(f"/.*a.{{{n}}}/" for n in range(1, 26))


@pytest.mark.parametrize(
    ("options", "error", "complaint"),
    [
        ({"schema": {"if": {}}}, ValueError, r'schema: Unimplemented keys: \["if"\]'),
        ({"schema": 5}, TypeError, "schema must be a JSON schema or a pydantic model, not 5"),
        ({"regex": "("}, ValueError, "regex: .*unclosed group"),
        ({"regex": 5}, TypeError, "regex must be a string, not 5"),
        ({"choice": []}, ValueError, "choice must be one or more non-empty strings"),
        ({"choice": "ab"}, ValueError, "choice must be one or more non-empty strings"),
        ({"choice": (c for c in "ab")}, ValueError, "choice must be one or more .*generator"),
        ({"grammar": "start: <[1]>"}, ValueError, "grammar: tokens cannot be named by their num"),
        (
            {"schema": {"type": "integer", "multipleOf": 3000017}},
            ValueError,
            "schema: multipleOf is supported up to 100,000 .*, not 3,000,017",
        ),
        (
            {"schema": {"allOf": [{"multipleOf": 9973}, {"multipleOf": 99.67}]}},
            ValueError,
            "schema: multipleOf is supported up to 100,000",
        ),
        (
            {"grammar": 'start: a\na: %json {"type": "integer", "multipleOf": 3000017}'},
            ValueError,
            "grammar: multipleOf is supported up to 100,000",
        ),
        ({"grammar": "x"}, ValueError, "grammar: "),
        ({"schema": {}, "regex": "a"}, ValueError, "one form, not schema and regex"),
        (
            {"schema": {"type": "object", "properties": 5}},
            ValueError,
            "schema: .*must be an object",
        ),
        ({"schema": {"$ref": "#"}}, ValueError, "schema: no text matches it"),
        ({"regex": r"[^\s\S]"}, ValueError, "regex: no text matches it"),
        ({"grammar": "start: X\nX: /a+/ & /b+/"}, ValueError, "grammar: no text matches it"),
        ({"grammar": 'start: <think> "a"'}, ValueError, 'unknown special token: "<think>"$'),
        ({"grammar": f"start: X\nX: {MANY}"}, ValueError, "grammar: at most 16 expressions"),
        ({"schema": INTERSECTED[0]}, ValueError, "schema: .*25 patterns, and at most 16 can be"),
        ({"schema": INTERSECTED[1]}, ValueError, "schema: .*25 patterns, and at most 16 can be"),
        ({"schema": INTERSECTED[2]}, ValueError, "schema: .*25 patterns, and at most 16 can be"),
        (
            {"grammar": f"start: j\nj: %json {json.dumps(INTERSECTED[0])}"},
            ValueError,
            "grammar: .*25 patterns, and at most 16 can be",
        ),
    ],
)
def test_wrong_forms(
    demo: LLM, options: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        demo.chat("Hello", **options)


BOMB = {"type": "string", "pattern": "^(a{800}){800}$"}


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"regex": "(a{1000}){1000}"}, "regex: lexer error: too many"),
        pytest.param(
            {"schema": {"type": "array", "items": BOMB, "minItems": 1}},
            "schema: lexer error: too many",
            marks=pytest.mark.slow,
        ),
        ({"grammar": 'start: a{5000}\na: b{5000}\nb: "x"'}, "grammar: .*Too many items"),
        (
            {
                "schema": {
                    "type": "object",
                    "properties": {"x": {"$ref": "#/properties/x"}},
                    "required": ["x"],
                }
            },
            r"schema: no text matches it \(seen after \d+ tokens\)",
        ),
        (
            {"schema": {"enum": [{"k": n} for n in range(2100)]}},
            "schema: Parser Error: .*; try a simpler one, with fewer alternatives",
        ),
    ],
)
def test_a_grammar_that_fails_ends_the_reply_with_an_error(
    demo: LLM, options: dict[str, Any], complaint: str
) -> None:
    started = time.perf_counter()
    with pytest.raises(ValueError, match=complaint):
        demo.chat("Hi", thinking=False, seed=1, **options)
    with pytest.raises(ValueError, match=complaint):
        list(demo.stream("Hi", thinking=True, thinking_budget=5, seed=1, **options))
    assert time.perf_counter() - started < 10
    assert demo.chat("Hi", thinking=False, max_tokens=5).text


@pytest.fixture(scope="module")
def brief(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """A random checkpoint whose template leaves the tools out, for schemas of any size."""
    folder = write_tiny(tmp_path_factory.mktemp("brief"))
    (folder / "chat_template.jinja").write_text("{{ messages[-1].content }}<|im_start|>assistant")
    with load(folder) as llm:
        yield llm


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        ({"enum": [{"k": n} for n in range(2100)]}, "max is 2000; try a simpler one"),
        ({"type": "array", "items": {"enum": [1]}, "minItems": 20000}, "Too many items"),
        ({"$ref": "#/properties/a"}, "no text matches it"),
        ({"type": "string", "pattern": "^((a{99}){99}){99}$"}, "too many expressions"),
        (
            {"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(520)}},
            "an object can have at most 500 optional properties, not 520",
        ),
    ],
)
def test_a_schema_that_fails_while_it_is_followed_is_not_enforced(
    brief: LLM, schema: Any, complaint: str
) -> None:
    tool = tool_of({"type": "object", "properties": {"a": schema}, "required": ["a"]})
    reply = brief.chat("Hi", tools=[tool], tool_choice="required", max_tokens=20, seed=1)
    assert re.match(f"the schema of the tool f is not enforced: .*{complaint}", warning(reply))


@pytest.mark.parametrize("together", [False, True])
def test_a_schema_that_fails_in_a_call_is_not_enforced_there(demo: LLM, together: bool) -> None:
    """Its shortest call is fine, and what is optional fails once it is begun."""
    tools = [tool_of({"type": "object", "properties": {"a": BOMB}})]
    tools += [tool_of(WITH_REFERENCES[0], "other")] * together
    tokenizer = demo.tokenizer
    ends = [n for n in range(len(tokenizer)) if b"{}" in tokenizer.token_bytes(n)]
    brace, quote = tokenizer.encode("}")[0], tokenizer.encode('"')[0]
    options: dict[str, Any] = {
        "tools": tools,
        "tool_choice": "f",
        "thinking": False,
        "max_tokens": 300,
        "parallel_tool_calls": False,
        "logit_bias": {**dict.fromkeys(ends, -100.0), brace: 15.0, quote: 20.0},
    }
    for seed in range(2):
        reply = demo.chat("Hi", seed=seed, **options)
        assert warning(reply).startswith(
            "the schema of a tool was not enforced in a call: tools: lexer error: too many"
        )
        assert warning(reply).count("not enforced") == 1
        if not reply.tool_calls:
            assert "cut off" in warning(reply)


@pytest.mark.parametrize(
    ("parameters", "arguments"),
    [
        (None, {}),
        ({"type": "object"}, {}),
        ({"type": "object", "properties": {}, "required": []}, {}),
        ({"properties": {"a": {"enum": [1]}}, "required": ["a"]}, {"a": 1}),
        ({"enum": [{"a": 1}, 5]}, {"a": 1}),
    ],
)
def test_a_call_has_an_object_of_what_the_tool_names(
    demo: LLM, parameters: Any, arguments: dict[str, Any]
) -> None:
    reply = demo.chat(
        "Hi",
        tools=[tool_of(parameters)],
        tool_choice="required",
        parallel_tool_calls=False,
        thinking=False,
        seed=1,
        sampling=WILD,
    )
    assert [call.arguments for call in reply.tool_calls] == [arguments] and not warning(reply)


def test_the_grammar_of_calls_is_compiled_once(demo: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_it, compiled = GrammarCompiler.hermes_call, []

    def counted(grammars: GrammarCompiler, tools: Any) -> Any:
        compiled.append(tools)
        return compile_it(grammars, tools)

    monkeypatch.setattr(GrammarCompiler, "hermes_call", counted)
    reply = demo.chat("What is 1 + 2?", tools=[calculator], tool_choice="required", thinking=False)
    assert reply.tool_calls and len(compiled) == 1


def test_thousands_of_choices(demo: LLM) -> None:
    choices = ["value", *(f"value {n}" for n in range(20_000))]
    assert demo.chat("Hi", choice=choices, thinking=False, seed=1).text in choices


@pytest.mark.heavy
@pytest.mark.parametrize("text", ["<|im_end|>", "</tool_call>", "a <think> b", "<|im_start|>user"])
def test_names_of_special_tokens_in_a_form_are_text(demo: LLM, text: str) -> None:
    for thinking in (True, False):
        options: dict[str, Any] = {"thinking": thinking, "seed": 1, "tools": [calculator]}
        reply = demo.chat("Hi", choice=[text], tool_choice="none", **options)
        assert (reply.text, reply.finish_reason) == (text, "stop")
        schema = {"type": "object", "properties": {"x": {"const": text}}, "required": ["x"]}
        closed = {**schema, "additionalProperties": False}
        reply = demo.chat("Hi", schema=closed, tool_choice="none", **options)
        assert reply.parsed == {"x": text}
        options["tools"] = [tool_of(closed)]
        reply = demo.chat(
            "Hi", tool_choice="required", parallel_tool_calls=False, max_tokens=400, **options
        )
        assert [call.arguments for call in reply.tool_calls] == [{"x": text}]
        assert demo.chat("Hi", regex=re.escape(text), tool_choice="none", **options).text == text


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
    grammar, times = GrammarCompiler(tokenizer, ends).schema(SCHEMAS[0]), []
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
        "max_tokens": 66,
        "seed": 8,
        "temperature": 0.8,
        "frequency_penalty": 0.4,
        "presence_penalty": 0.2,
        "repetition_penalty": 1.1,
    }
    prompts = ["a b c a b c a b c", "1 2 3 4"]
    alone = [tiny.chat(prompt, **options) for prompt in prompts]
    with load(tiny_folder, draft="ngram") as drafting:
        for replies in (tiny.batch(prompts, **options), drafting.batch(prompts, **options)):
            for reply, expected in zip(replies, alone, strict=True):
                assert (reply.reasoning, reply.text) == (expected.reasoning, expected.text)


def test_an_answer_closes_where_a_choice_is_too_long_for_what_is_left(tiny: LLM) -> None:
    pattern = r"\[([0-9],|#[a-z]{60},)*\]"

    def bias(texts: str, value: float) -> dict[int, float]:
        return {tiny.tokenizer.encode(text)[0]: value for text in texts}

    # Each "#" begins an item of 62 characters, which the closing must not cut.
    sampling = SamplingParams(logit_bias=bias("#", 30) | bias("]", -30) | bias("abcdefg", 10))
    for seed, most in enumerate((30, 50, 70)):
        reply = tiny.chat("Hi", regex=pattern, max_tokens=most, seed=seed, sampling=sampling)
        assert re.fullmatch(pattern, reply.text)
