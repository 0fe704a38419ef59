"""Tools: described to the model, called by it, executed and answered."""

import functools
import json
import random
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal

import jsonschema  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from qwen3_mlx import LLM, Finish, Qwen3Error, SamplingParams, load
from qwen3_mlx.api.stream import collect
from qwen3_mlx.text.events import Reasoning, Text, ToolCall, ToolCallDelta
from qwen3_mlx.text.parser import ReplyParser
from qwen3_mlx.text.template import ChatTemplate
from qwen3_mlx.text.tool_calls import (
    CoderCalls,
    HermesCalls,
    ToolCallSyntax,
    run_tool,
    tool_functions,
    tool_schema,
)
from qwen3_mlx.text.tool_schema import kinds_of
from tests.support import DEMO, write_tiny
from tests.text.harness import (
    BAD,
    CALL,
    CALLS,
    TEMPLATE,
    TOKENIZER,
    calculator,
    new_parser,
)

GREEDY = SamplingParams(temperature=0)
PARTIAL = ToolCallSyntax.of(TEMPLATE, TOKENIZER, [], partial=True)
CODER = ToolCallSyntax.of(
    ChatTemplate("<tool_call>\n<function="),
    TOKENIZER,
    [
        {
            "function": {
                "name": "find",
                "parameters": {
                    "properties": {
                        "text": {"type": "string"},
                        "count": {"type": "integer"},
                        "exact": {"type": "boolean"},
                        "places": {"type": "array"},
                        "limit": {"type": ["integer", "null"]},
                        "kind": {"enum": ["a", 1]},
                    }
                },
            }
        }
    ],
)


def calculate(a: int, b: int, operation: Literal["add", "multiply"] = "add") -> int:
    """Calculate exactly.

    Use it for sums.

    Args:
        a: the first number
        b (int): the second
    """
    return a + b if operation == "add" else a * b


# --- described ----------------------------------------------------------------------------------


def test_a_function_is_described_by_its_hints_and_words() -> None:
    assert tool_schema(calculate)["function"] == {
        "name": "calculate",
        "description": "Calculate exactly. Use it for sums.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "the first number"},
                "b": {"type": "integer", "description": "the second"},
                "operation": {"enum": ["add", "multiply"], "type": "string"},
            },
            "required": ["a", "b"],
        },
    }


def test_kinds_of_parameters() -> None:
    def tool(  # type: ignore[no-untyped-def]
        plain: Any,
        untyped,
        words: Annotated[list[str], "some words"],
        maybe: float | None = None,
        either: int | str = 1,
        table: dict | None = None,  # type: ignore[type-arg]
        counts: dict[str, int] | None = None,
        null: int | None = 1,
    ) -> None:
        """:param plain: anything
        :param maybe: a number
        """

    properties = tool_schema(tool)["function"]["parameters"]["properties"]
    assert properties == {
        "plain": {"description": "anything"},
        "untyped": {"type": "string"},
        "words": {
            "type": "array",
            "items": {"type": "string"},
            "description": "some words",
        },
        "maybe": {"type": "number", "description": "a number"},
        "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        "table": {"type": "object"},
        "counts": {"type": "object", "additionalProperties": {"type": "integer"}},
        "null": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    }
    assert json.dumps(properties["words"]).startswith('{"type": "array", "items": ')


class Unit(Enum):
    """A unit of temperature."""

    CELSIUS = "C"
    FAHRENHEIT = "F"


class Place(BaseModel):
    """Where to look."""

    city: str
    unit: Unit = Unit.CELSIUS
    near: list["Place"] = []


def weather(
    place: Place, unit: Unit, other: Unit | None = None, days: set[int] | None = None
) -> str:
    """Tell the weather.

    Args:
        place: where
        unit: how to write it
    """
    assert isinstance(place, Place) and isinstance(unit, Unit)
    return f"{place.city} {place.unit.name} {unit.name} {other} {days}"


def test_enums_and_nested_models_are_described() -> None:
    parameters = tool_schema(weather)["function"]["parameters"]
    jsonschema.Draft202012Validator.check_schema(parameters)
    right = {"place": {"city": "Ulm", "unit": "F", "near": [{"city": "Bonn"}]}, "unit": "C"}
    jsonschema.validate(right, parameters)
    for wrong in ({"city": "Ulm", "unit": "K"}, {"city": "Ulm", "near": [{"city": 1}]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"place": wrong, "unit": "C"}, parameters)
    assert parameters["properties"]["unit"]["enum"] == ["C", "F"]
    assert parameters["required"] == ["place", "unit"]


def test_arguments_arrive_as_the_types_of_the_function() -> None:
    functions = tool_functions([weather])
    for arguments, words in (
        ({"place": {"city": "Ulm", "unit": "F"}, "unit": "C"}, "Ulm FAHRENHEIT CELSIUS None None"),
        (
            {"place": {"city": "Ulm"}, "unit": "C", "other": None, "days": [1, 1]},
            "Ulm CELSIUS CELSIUS None {1}",
        ),
        ({"place": {"city": "Ulm"}, "unit": "K"}, "Error: TypeError: unit: Input should be 'C' or"),
        ({"place": {}, "unit": "C"}, "Error: TypeError: place.city: Field required"),
        ({"unit": "C"}, "Error: TypeError: weather() missing 1 required"),
    ):
        assert run_tool(ToolCall("1", "weather", arguments), functions)["content"].startswith(words)


def test_descriptions_are_taken_in_both_forms() -> None:
    bare = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
    assert tool_schema(bare) == tool_schema({"type": "function", "function": bare})
    assert tool_schema({"name": "f"}) == {"type": "function", "function": {"name": "f"}}


def test_what_is_no_tool_is_refused() -> None:
    def many(*values: int) -> None: ...

    def odd(value: Random) -> None: ...

    def unknown(value: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821

    def by_place(value: int, /) -> None: ...

    for wrong, error, words in (
        (5, TypeError, "must be a function or a description"),
        ({"description": "d"}, ValueError, "needs a function with a name"),
        (many, TypeError, "takes \\*values"),
        (odd, TypeError, r"odd\(value\) is of type .*Random"),
        (unknown, TypeError, "parameters of the tool unknown cannot be determined: .*Nowhere"),
        (by_place, TypeError, "takes value by position only"),
    ):
        with pytest.raises(error, match=words):
            tool_schema(wrong)  # type: ignore[arg-type]


# --- read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', '{"a": 1}'),
        ('\n{"arguments":  {"a":1},"name":"f"}\n', '{"a":1}'),
        ('{"name": "f", "arguments": {"a": "x\ny"}}', '{"a": "x\ny"}'),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),
        ('{"name": "f", "arguments": {"a": 1}', '{"a": 1}'),
        ('{"name": "f", "arguments": {"a": 1}}},', None),
        ('{"name": "f", "arguments": {"a": 1}}}', '{"a": 1}'),
        ('{"name": "f", "arguments": {"a": 1}},', '{"a": 1}'),
        ('{"name": "f"}', "{}"),
        ('{"name": "f", "arguments": {"a": "x}', None),
        ('{"name": "f", "arguments": [1]}', None),
        ('{"name": 5, "arguments": {}}', None),
        ("{'name': 'f'}", None),
        ("[1]", None),
        ("", None),
    ],
)
def test_hermes_calls(text: str, arguments: str | None) -> None:
    found = HermesCalls().read(text, whole=True)
    assert (found and found[2]) == arguments
    if found:
        assert found[:2] == ("f", json.loads(found[2], strict=False))


def test_a_call_that_was_cut_off_is_not_mended() -> None:
    cut = '{"name": "f", "arguments": {"a": 1}'
    assert HermesCalls().read(cut, whole=True) and not HermesCalls().read(cut, whole=False)


def test_coder_calls_are_typed_by_the_schema() -> None:
    assert CODER and isinstance(CODER.format, CoderCalls)
    written = (
        "\n<function=find>\n<parameter=text>\n12\nlines\n</parameter>\n<parameter=count>\n12\n"
        "</parameter>\n<parameter=exact>\nTrue\n</parameter>\n<parameter=places>\n[1, 2]\n"
        "</parameter>\n<parameter=limit>\nnull\n</parameter>\n<parameter=kind>\n1\n</parameter>\n"
        "<parameter=other>\nfree\n</parameter>\n</function>\n"
    )
    found = CODER.format.read(written, whole=True)
    assert found and found[0] == "find"
    assert found[1] == {
        "text": "12\nlines",
        "count": 12,
        "exact": True,
        "places": [1, 2],
        "limit": None,
        "kind": 1,
        "other": "free",
    }
    wrong = CODER.format.read("<function=find>\n<parameter=count>\nmany\n</parameter>", whole=True)
    assert wrong and wrong[1] == {"count": "many"}
    assert CODER.format.read("<function=find>\n<parameter=count>\n12", whole=False) is None
    assert CODER.format.read("nothing", whole=True) is None


class Filter(BaseModel):
    """A nested model."""

    key: str
    n: int = 1


class Search(BaseModel):
    """What pydantic makes of Python's types."""

    path: str
    unit: Unit
    where: Filter
    limit: int | None = None
    ratio: float | None = None
    recursive: bool | None = None
    tags: list[str] | None = None
    either: int | str = 0
    level: Literal["1", "2"] = "1"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("path", "123", "123"),
        ("path", "null", "null"),
        ("unit", "C", "C"),
        ("where", '{"key": "12", "n": 2}', {"key": "12", "n": 2}),
        ("limit", "5", 5),
        ("limit", "null", None),
        ("ratio", "5", 5),
        ("ratio", "0.5", 0.5),
        ("ratio", "NaN", "NaN"),
        ("recursive", "True", True),
        ("recursive", "false", False),
        ("tags", '["True", "b"]', ["True", "b"]),
        ("either", "7", 7),
        ("either", "seven", "seven"),
        ("either", "1.5", "1.5"),
        ("level", "1", "1"),
    ],
)
def test_coder_values_are_typed_through_references_and_alternatives(
    name: str, text: str, value: Any
) -> None:
    tool = tool_schema({"name": "search", "parameters": Search.model_json_schema()})
    calls = ToolCallSyntax.of(ChatTemplate("<tool_call>\n<function="), TOKENIZER, [tool])
    written = f"<function=search>\n<parameter={name}>\n{text}\n</parameter>\n</function>"
    found = parse(f"<tool_call>\n{written}\n</tool_call>", calls)[2]
    assert found == [("search", {name: value})]
    assert type(found[0][1][name]) is type(value)


@pytest.mark.parametrize(
    ("schema", "kinds"),
    [
        ({}, ""),
        (True, ""),
        (None, ""),
        ({"type": "str"}, ""),
        ({"type": 5}, ""),
        ({"description": "anything"}, ""),
        ({"type": "number"}, "integer number"),
        ({"type": ["string", "null"]}, "null string"),
        ({"type": "string", "nullable": True}, "null string"),
        ({"enum": ["1", 2, None]}, "integer null string"),
        ({"enum": ["1", "2"], "type": "string"}, "string"),
        ({"const": True}, "boolean"),
        ({"properties": {"a": {}}}, "object"),
        ({"items": {}}, "array"),
        ({"anyOf": [{"type": "integer"}, {"const": "auto"}]}, "integer string"),
        ({"oneOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}, "integer null number"),
        ({"anyOf": [{"type": "integer"}, {}]}, ""),
        ({"allOf": [{"type": ["string", "integer"]}, {"type": "number"}]}, "integer"),
        ({"$ref": "#/$defs/n"}, "integer number"),
        ({"$ref": "#/$defs/a~1b%20c"}, "array"),
        ({"$ref": "#/properties/first/anyOf/1"}, "boolean"),
        ({"$ref": "#"}, "object"),
        ({"$ref": "#/$defs/loop"}, ""),
        ({"$ref": "#/$defs/none"}, ""),
        ({"$ref": "other.json#/$defs/n"}, ""),
    ],
)
def test_kinds_of_values(schema: Any, kinds: str) -> None:
    root = {
        "type": "object",
        "properties": {"first": {"anyOf": [{"type": "null"}, {"type": "boolean"}]}},
        "$defs": {
            "n": {"type": "number"},
            "a/b c": {"type": "array"},
            "loop": {"anyOf": [{"$ref": "#/$defs/loop"}, {"type": "null"}]},
        },
    }
    assert " ".join(sorted(kinds_of(schema, root))) == kinds


def test_kinds_of_values_nested_without_end() -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(5000):
        schema = {"anyOf": [schema]}
    assert kinds_of(schema, {}) == frozenset()


# --- parsed -------------------------------------------------------------------------------------

XML = "<function=find>\n<parameter=count>\n12\n</parameter>\n</function>"


def parse(
    text: str, calls: ToolCallSyntax | None = CALLS, cuts: Sequence[int] = (), inside: bool = False
) -> tuple[str, str, list[tuple[str, dict[str, Any]]], ReplyParser]:
    said: list[Reasoning | Text | ToolCall | ToolCallDelta] = []
    parser = new_parser(said.append, calls=calls, inside=inside)
    ids = TOKENIZER.encode(text)
    for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        parser.advance(ids[start:stop])
    parser.close()
    reasoning = "".join(event.text for event in said if isinstance(event, Reasoning))
    words = "".join(event.text for event in said if isinstance(event, Text))
    made = [(event.name, event.arguments) for event in said if isinstance(event, ToolCall)]
    return reasoning, words, made, parser


F = ("f", {"a": 1})


@pytest.mark.parametrize(
    ("text", "reasoning", "words", "made"),
    [
        (CALL, "", "", [F]),
        (f"Let me see.\n{CALL}", "", "Let me see.", [F]),
        (f"{CALL}\n{CALL}\n", "", "", [F, F]),
        (f"<think>\nhm\n</think>\n\n{CALL}", "hm", "", [F]),
        (f"<think>\nhm\n{CALL}", "hm", "", [F]),
        (f"<think>\nhm\n{CALL}\n{CALL}\n", "hm", "", [F, F]),
        (f"<think>\nhm\n{CALL}\nno, wait\n</think>\n\nYes.", f"hm\n{CALL}\nno, wait", "Yes.", []),
        (f"<think>\nhm\n{CALL}\n</think>\n\nYes.", f"hm\n{CALL}", "Yes.", []),
        (f"<think>\n{CALL}\n</think>\n\n{CALL}", CALL, "", [F]),
        (f"<think>\n{BAD}\n", f"{BAD}\n", "", []),
        (BAD, "", BAD, []),
        (f"a\n{BAD}\nb", "", f"a\n{BAD}\nb", []),
        (f"a {CALL} b", "", "a  b", [F]),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}', "", "", [F]),
        ('<tool_call>\n{"name": "f", "argum', "", '<tool_call>\n{"name": "f", "argum', []),
        (f"<tool_call>\ncut {CALL}", "", "<tool_call>\ncut ", [F]),
        ("a </tool_call> b", "", "a </tool_call> b", []),
        ("<think>\nx <tool_call>\n{</think>y", "x <tool_call>\n{", "y", []),
        ("<tool_call>\n{<think>y</think>z", "", "<tool_call>\n{<think>y</think>z", []),
    ],
)
def test_calls_are_told_apart(text: str, reasoning: str, words: str, made: list[Any]) -> None:
    found = parse(text)
    assert found[:3] == (reasoning, words, made)
    assert found[3].called == bool(made)
    assert ("warning" in found[3].details) == ("<tool_call>" in words)
    rng = random.Random(0)
    count = len(TOKENIZER.encode(text))
    for _ in range(20):
        cuts = sorted(rng.sample(range(count + 1), rng.randint(0, min(6, count))))
        assert parse(text, cuts=cuts)[:3] == found[:3]


@pytest.mark.parametrize(
    ("text", "words", "made"),
    [
        (f"<tool_call>\n{XML}\n</tool_call>", "", 1),
        (f"I look.\n\n{XML}\n</tool_call>", "I look.", 1),
        (f"{XML}\n{XML}", "", 2),
        ("a <function b", "a <function b", 0),
        ("It begins with <function=name>, then more.", None, 0),
        ("It is <function=find>, then <function=find>\n.", None, 0),
        (
            f"Not <function=name>\n<parameter=a>\n but {XML}",
            "Not <function=name>\n<parameter=a>\n but ",
            1,
        ),
        ("a <function=find", "a <function=find", 0),
        ("<function", "<function", 0),
    ],
)
def test_coder_calls_without_their_tag(text: str, words: str | None, made: int) -> None:
    words = text if words is None else words
    found = parse(text, CODER)
    assert found[:3] == ("", words, [("find", {"count": 12})] * made)
    assert not found[3].details
    assert CODER and streamed(TOKENIZER.encode(text), CODER)[2] == words
    for end in range(len(text)) if "tool_call" not in text else ():  # nothing is lost
        part = streamed(TOKENIZER.encode(text[:end]), CODER)
        assert part[1] or part[2] == text[:end]


@pytest.mark.parametrize(
    "text",
    [
        "It is\n<function=find>\n<parameter=text>\na\n</parameter>\n... and so on.\n",
        "Say <function=find>\n<parameter=of which there are many.\n",
        f"{XML.removesuffix('</function>')}\nthen </function> ",
    ],
)
def test_what_only_begins_like_a_coder_call_is_text_and_hides_no_call(text: str) -> None:
    ids = TOKENIZER.encode(f"{text}{XML}\nDone.")
    rng = random.Random(0)
    for _ in range(20):
        cuts = sorted(rng.sample(range(len(ids) + 1), rng.randint(0, 6)))
        _, words, made, parser = parse(f"{text}{XML}\nDone.", CODER, cuts)
        assert (words, made) == (f"{text.removesuffix(chr(10))}Done.", [("find", {"count": 12})])
        assert "could not be read" in parser.details["warning"]
    said = [streamed(ids[:end], CODER)[2] for end in range(len(TOKENIZER.encode(text)))]
    assert all(text.startswith(part) for part in said) and max(map(len, said)) > len(text) // 2


def test_coder_calls_without_their_tag_are_made_whole_or_stay_text(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    template = folder / "chat_template.jinja"
    template.write_text("{#- <function= #}" + template.read_text())
    value = "Close it with </parameter> and </function> or <parameter=count>\n7, and go on"
    call = f"<function=find>\n<parameter=text>\n{value}\n</parameter>\n</function>"
    talk = "A call begins with <function=name> and its end is a tag. This goes on."
    opening = TOKENIZER.id_of("<tool_call>")
    assert opening is not None
    with load(folder) as llm:
        for text in (call, talk):
            for most in range(4, len(TOKENIZER.encode(text)) + 2, 5):
                asked: dict[str, Any] = {
                    "tools": [FIND],
                    "choice": [text],
                    "logit_bias": {opening: -100},
                    "max_tokens": most,
                    "thinking": False,
                }
                for reply in (
                    llm.chat("Hi", **asked),
                    collect(llm.stream("Hi", **asked, partial_calls=True)),
                ):
                    assert [one.arguments for one in reply.tool_calls] in ([], [{"text": value}])
                    assert reply.tool_calls or text.startswith(reply.text) and reply.text


def test_without_tools_tags_are_text() -> None:
    assert parse(CALL, None)[1:3] == (CALL, [])


def test_tokens_of_a_call_that_ends_the_thinking_are_no_thinking() -> None:
    before = parse("<think>\nhm\n")[3].reasoning_tokens
    assert parse(f"<think>\nhm\n{CALL}")[3].reasoning_tokens == before
    assert parse(f"<think>\nhm\n{CALL} no")[3].reasoning_tokens > before + 5


# --- cut off ------------------------------------------------------------------------------------

TEXT = "<function=find>\n<parameter=text>\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{TEXT}rm -rf /ho", f"{TEXT}rm -rf /ho"),
        (f"{TEXT}a </function>", f"{TEXT}a </function>"),
        (f"{TEXT}a </function> b", f"{TEXT}a </function> b"),
        (f"<tool_call>\n{TEXT}a </function> b", f"<tool_call>\n{TEXT}a </function> b"),
        (f"<tool_call>\n{TEXT}a\n</function>", f"<tool_call>\n{TEXT}a\n</function>"),
        ("<tool_call>\n<function=find>\n", "<tool_call>\n<function=find>\n"),
    ],
)
def test_coder_calls_that_are_cut_off_are_text(text: str, words: str) -> None:
    found = parse(text, CODER)
    assert found[:3] == ("", words, []) and "cut off" in found[3].details["warning"]


def test_a_value_may_hold_the_tag_that_ends_a_call() -> None:
    call = f"{TEXT}a </function> b\n</parameter>\n</function>"
    for text in (call, f"<tool_call>\n{call}", f"<tool_call>\n{call}\n</tool_call>"):
        assert parse(text, CODER)[:3] == ("", "", [("find", {"text": "a </function> b"})])


@pytest.mark.parametrize("calls", [f"{CALL}\n", CALL, CALL.removesuffix("\n</tool_call>")])
def test_a_call_in_thinking_that_is_cut_off_stays_a_draft(calls: str) -> None:
    for cut in (False, True):
        said: list[Reasoning | Text | ToolCall | ToolCallDelta] = []
        parser = new_parser(said.append, calls=PARTIAL)
        parser.advance(TOKENIZER.encode(f"<think>\nhm\n{calls}"))
        parser.close(cut=cut)
        made = [event for event in said if not isinstance(event, Reasoning)]
        assert bool(made) == (not cut) == parser.called
        reasoning = "".join(event.text for event in said if isinstance(event, Reasoning))
        assert reasoning == (f"hm\n{calls}" if cut else "hm")


CUT: dict[str, Any] = {
    "messages": "What is 12 + 34? Use the calculator.",
    "thinking": False,
    "sampling": GREEDY,
}
WHOLE = {"expression": "12 + 34"}


@pytest.mark.heavy
@pytest.mark.parametrize(
    "limits", [(1, 2, 12, 21), pytest.param(range(3, 21), marks=pytest.mark.slow)]
)
def test_a_call_that_is_cut_off_by_the_limit_is_not_made(demo: LLM, limits: Sequence[int]) -> None:
    """The demo writes 24 tokens: the tag, the call of 22, and the tag that ends it."""
    made = []

    def calculator(expression: str) -> str:
        """Evaluate an arithmetic expression"""
        made.append(expression)
        return "46"

    for most in limits:
        asked = {**CUT, "tools": [calculator], "max_tokens": most}
        (batched,) = demo.batch([asked.pop("messages")], **asked)
        for reply in (demo.chat(CUT["messages"], **asked), batched):
            assert (reply.finish_reason, reply.tool_calls) == ("length", [])
            assert "a tool call was cut off" in reply.details["warning"]
            assert reply.text.startswith("<tool_call>")
        last = demo.run(CUT["messages"], **asked)
        assert last.finish_reason == "length" and len(last.messages) == 1
        talk = demo.conversation(**asked)
        assert talk.chat(CUT["messages"]).finish_reason == "length"
        assert talk.messages[-1] == {"role": "assistant", "content": batched.text}
        with pytest.raises(ValueError, match="calls no tool"):
            talk.answer_calls([calculator])
        assert talk.chat("What is 1 + 2?", tools=None, max_tokens=2).text
    for most in (22, 23):  # only the tag that ends it is missing
        reply = demo.chat(**CUT, tools=[calculator], max_tokens=most)
        assert [call.arguments for call in reply.tool_calls] == [WHOLE]
        assert (reply.finish_reason, reply.details) == ("length", {})
    assert demo.chat(**CUT, tools=[calculator], max_tokens=24).finish_reason == "tool_calls"
    assert not made


def test_a_call_that_is_cut_off_by_the_context_is_not_made() -> None:
    with load(dequantize=False) as llm:
        prompt = llm.tokenizer.encode(
            llm.render(CUT["messages"], thinking=False, tools=[calculator])
        )
    for room in (12, 20):
        with load(DEMO, context=len(prompt) + room, dequantize=False) as llm:
            reply = llm.chat(**CUT, tools=[calculator])
        assert (reply.finish_reason, reply.tool_calls) == ("length", [])
        assert "a tool call was cut off" in reply.details["warning"]


@pytest.mark.parametrize("choice", ["required", "calculator"])
def test_a_call_that_is_demanded_may_find_no_room(demo: LLM, choice: str) -> None:
    for thinking, most in ((False, 1), (False, 5), (False, 15), (True, 45)):
        for seed in range(3):
            reply = demo.chat(
                "Count from 3 to 30.",
                tools=[calculator],
                tool_choice=choice,
                thinking=thinking,
                max_tokens=most,
                seed=seed,
            )
            assert reply.finish_reason == "length" or reply.tool_calls
            if not reply.tool_calls:
                assert "a tool call was cut off" in reply.details["warning"]


def test_a_whole_call_before_one_that_is_cut_off_is_given(demo: LLM) -> None:
    made = []

    def calculator(expression: str) -> str:
        """Evaluate an arithmetic expression"""
        made.append(expression)
        return "46"

    again = SamplingParams(temperature=0, logit_bias={demo.tokenizer.id_of("<tool_call>") or 0: 99})
    asked: dict[str, Any] = {**CUT, "tools": [calculator], "sampling": again, "max_tokens": 44}
    reply = demo.chat(**asked)
    assert [call.arguments for call in reply.tool_calls] == [WHOLE]
    assert reply.finish_reason == "length" and "cut off" in reply.details["warning"]
    assert reply.text.startswith("<tool_call>")
    assert demo.run(**asked).finish_reason == "length" and not made
    events = list(demo.stream(**asked, partial_calls=True))
    told = dict.fromkeys(event.id for event in events if isinstance(event, ToolCallDelta))
    (call,) = [event for event in events if isinstance(event, ToolCall)]
    assert next(iter(told)) == call.id and len(told) == 2


def test_a_loop_within_a_call_does_not_close_it(demo: LLM, short_circles: None) -> None:
    """A token that is likelier than all others is written for ever; a call of it is not made."""
    token = TOKENIZER.encode("x")[0]
    sampling = SamplingParams(temperature=0, logit_bias={token: 1000.0})
    reply = demo.chat(
        "What is 12 + 34?",
        tools=[calculator],
        tool_choice="required",
        thinking=False,
        sampling=sampling,
        max_tokens=2000,
    )
    assert (reply.finish_reason, reply.tool_calls) == ("length", [])
    assert reply.details["ended_by"] == "loop" and "cut off" in reply.details["warning"]
    assert reply.text.endswith("xxx")


# --- as they are written ------------------------------------------------------------------------

WRITTEN = [
    (CALLS, '{"name": "f", "arguments": {"a": 1}}'),
    (CALLS, '{"name":"f" , "arguments" :  {"a": {"b": [1, "}"]}, "c": "\\"{\\\\"} }'),
    (CALLS, '{"name": "f", "arguments": {}}'),
    (CALLS, '{"name": "f", "arguments": {"a": "你好 👍"}},'),
    (CALLS, '{"name": "f", "arguments": {"a": 1}'),
    (CALLS, '{"arguments": {"a": 1}, "name": "f"}'),
    (CALLS, '{"name": "f", "arguments": "{\\"a\\": 1}"}'),
    (CALLS, '{"name": "f"}'),
    (CALLS, '{"name": "f", "arguments": {"a": 1}, "arguments": {"a": 2}}'),
    (CALLS, '{"name": "f", "arguments": {"a": "x}'),
    (CODER, "<function=find>\n</function>"),
    (CODER, f'{TEXT}one\n\ttwo <b> "q" </p 你好\n\n</parameter>\n</function>'),
    (CODER, f"{TEXT}1\n</parameter>\n<parameter=count>\n12\n</parameter>\n</function>"),
    (
        CODER,
        "<function=find>\n<parameter=places>\n[1, 2]\n</parameter>\n<parameter=limit>\nnull\n"
        "</parameter>\n<parameter=kind>\na\n</parameter>\n</function>",
    ),
    (CODER, f"{TEXT}a </function> b\n</parameter>\n</function>"),
    (CODER, f"{TEXT}a\n</parameter>\n{TEXT[16:]}b\n</parameter>\n</function>"),
    (CODER, f"{TEXT}no end \n</function>"),
    (CODER, f"{TEXT}a<parameter=count>3</function>"),
]


def streamed(
    ids: Sequence[int],
    calls: ToolCallSyntax | None,
    cuts: Sequence[int] = (),
    *,
    partial: bool = True,
) -> tuple[list[tuple[str, str]], list[ToolCall], str]:
    """Give what was told of each call, by name, then the calls made, and the text."""
    said: list[Reasoning | Text | ToolCall | ToolCallDelta] = []
    assert calls
    calls = replace(calls, partial=partial)
    parser = new_parser(said.append, calls=calls)
    for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        parser.advance(ids[start:stop])
    parser.close(cut=True)
    told: dict[str, tuple[str, str]] = {}
    for event in said:
        if isinstance(event, ToolCallDelta):
            name, text = told.get(event.id, (event.name, ""))
            assert event.name == name and event.text
            told[event.id] = name, text + event.text
        elif isinstance(event, ToolCall) and partial:
            assert told[event.id] == (event.name, event.raw_arguments)
    text = "".join(event.text for event in said if isinstance(event, Text))
    return list(told.values()), [event for event in said if isinstance(event, ToolCall)], text


def is_json(text: str) -> bool:
    """Say whether text is JSON."""
    try:
        json.loads(text, strict=False)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(("calls", "call"), WRITTEN)
def test_arguments_come_as_they_are_written(calls: ToolCallSyntax, call: str) -> None:
    tagged = f"Well.\n<tool_call>\n{call}\n</tool_call>"
    bare = [f"{call} and {call}"] * (calls is CODER)
    rng = random.Random(0)
    for text in (tagged, f"{tagged}\n{tagged}", *bare):
        ids = TOKENIZER.encode(text)
        told, made, words = streamed(ids, calls)
        plain = streamed(ids, calls, partial=False)
        assert [(one.name, one.arguments, one.raw_arguments) for one in plain[1]] == [
            (one.name, one.arguments, one.raw_arguments) for one in made
        ]
        assert not plain[0] and (words == plain[2] or len(told) > len(made))
        for _ in range(10):
            cuts = sorted(rng.sample(range(len(ids) + 1), rng.randint(0, min(9, len(ids)))))
            again = streamed(ids, calls, cuts)
            assert (again[0], again[2]) == (told, words)
        for end in range(len(ids)):
            pieces, whole, _ = streamed(ids[:end], calls)
            assert sum(is_json(written) for _, written in pieces) == len(whole)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@settings(max_examples=50, deadline=None)
@given(
    arguments=st.dictionaries(st.text(max_size=6), VALUES, max_size=4),
    ascii_only=st.booleans(),
    at=st.floats(0, 1),
)
def test_any_arguments_come_whole_or_cannot_be_read(
    arguments: dict[str, Any], ascii_only: bool, at: float
) -> None:
    written = unicodedata.normalize("NFC", json.dumps(arguments, ensure_ascii=ascii_only))
    ids = TOKENIZER.encode(f'<tool_call>\n{{"name": "f", "arguments": {written}}}\n</tool_call>')
    assert streamed(ids, CALLS)[0] == [("f", written)]
    told, made, _ = streamed(ids[: round(at * len(ids))], CALLS)
    for _, part in told:
        assert written.startswith(part.rstrip("\ufffd")) and is_json(part) == bool(made)


CODER_PIECES = st.sampled_from(
    [
        *(
            "</parameter>",
            "<parameter=count>",
            "<parameter=text>",
            "</function>",
            "<function=find>",
        ),
        *("\n", "\n\n", " ", "a", "<", "</", "你", "\\", '"', "</tool", "</param", "7"),
    ]
)
CODER_TEXTS = (
    st.lists(CODER_PIECES, max_size=9)
    .map("".join)
    .filter(lambda text: "\n</parameter>\n" not in f"\n{text}\n")
)


@settings(max_examples=15)
@given(texts=st.lists(CODER_TEXTS, max_size=3))
def test_any_text_of_a_coder_call_comes_whole_or_cannot_be_read(texts: list[str]) -> None:
    check_coder_call(texts)


@pytest.mark.slow
@settings(max_examples=200)
@given(texts=st.lists(CODER_TEXTS, max_size=3))
def test_many_texts_of_coder_calls_come_whole_or_cannot_be_read(texts: list[str]) -> None:
    check_coder_call(texts)


def check_coder_call(texts: list[str]) -> None:
    """Stream a call with these arguments, whole and cut off at each token."""
    arguments = dict(zip(("text", "other", "third"), texts, strict=False))
    parameters = "".join(
        f"<parameter={name}>\n{text}\n</parameter>\n" for name, text in arguments.items()
    )
    call = f"<function=find>\n{parameters}</function>"
    for tags in (("<tool_call>\n", "\n</tool_call>"), ("", "")):
        ids = TOKENIZER.encode(call.join(tags))
        told, made, words = streamed(ids, CODER)
        assert [one.arguments for one in made] == [arguments] and not words
        assert told == [("find", made[0].raw_arguments)]
        for end in range(len(ids)):
            pieces, whole, _ = streamed(ids[:end], CODER)
            assert [one.arguments for one in whole] in ([], [arguments])
            assert bool(whole) <= (call in TOKENIZER.decode(ids[:end]))
            for _, part in pieces:
                assert made[0].raw_arguments.startswith(part.rstrip("\ufffd"))
                assert is_json(part) == bool(whole)


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ("<parameter=text>\na\n</parameter>\n", {"text": "a"}),
        ("<parameter=text>\na\n</function>\n", {"text": "a"}),
        ("<parameter=text>\na</parameter>\n</function>\n", {"text": "a"}),
        ("<parameter=text>\na\n</parameter></function>", {"text": "a"}),
        ("<parameter=text>\n</parameter>\n</function>", {"text": ""}),
        (
            "<parameter=count>\n7\n</parameter>\n\n<parameter=text>\na\n</function>",
            {"count": 7, "text": "a"},
        ),
        ("<parameter=text>\na", None),
        ("<parameter=text>\na\n</parameter>\nb\n</parameter>\n</function>", None),
        ("<parameter=text>\na\n<parameter=count>\n7\n", None),
    ],
)
def test_slips_in_a_coder_call_that_its_own_tag_closes(
    written: str, arguments: dict[str, Any] | None
) -> None:
    call = f"<tool_call>\n<function=find>\n{written}"
    _, made, words = streamed(TOKENIZER.encode(f"{call}</tool_call>"), CODER)
    assert [one.arguments for one in made] == ([] if arguments is None else [arguments])
    assert made or words == "" or words.startswith(call)
    if "</parameter>\n</function>" not in written:
        assert not streamed(TOKENIZER.encode(call), CODER)[1]


def test_a_draft_is_not_streamed() -> None:
    ids = TOKENIZER.encode(f"<think>\n{CALL}\nno\n</think>\n\nYes.")
    assert streamed(ids, CALLS) == ([], [], "Yes.")


def test_partial_calls_are_for_those_who_ask(demo: LLM) -> None:
    for thinking in (False, True):
        asked: dict[str, Any] = {**CUT, "tools": [calculator], "thinking": thinking}
        plain = list(demo.stream(**asked))
        assert not any(isinstance(event, ToolCallDelta) for event in plain)
        events = list(demo.stream(**asked, partial_calls=True))
        pieces = [event for event in events if isinstance(event, ToolCallDelta)]
        (call,) = [event for event in events if isinstance(event, ToolCall)]
        assert len(pieces) > 5
        assert "".join(event.text for event in pieces) == call.raw_arguments
        assert {(event.id, event.name) for event in pieces} == {(call.id, call.name)}
        assert isinstance(events[-1], Finish) and events[-1].reason == "tool_calls"
        rest = [event for event in events if not isinstance(event, ToolCallDelta)]
        assert [type(event) for event in rest] == [type(event) for event in plain]
        reply = demo.chat(**asked, partial_calls=True, logprobs=1)
        assert [one.raw_arguments for one in reply.tool_calls] == [call.raw_arguments]
        assert not reply.text and not reply.logprobs
    stopped = list(demo.stream(**CUT, tools=[calculator], stop=["12", "expr"], partial_calls=True))
    assert [event.arguments for event in stopped if isinstance(event, ToolCall)] == [WHOLE]
    with pytest.raises(TypeError, match="partial_calls must be True or False"):
        demo.chat("Hello", partial_calls=1)  # type: ignore[arg-type]


FIND: dict[str, Any] = {
    "name": "find",
    "parameters": {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
            "exact": {"type": "boolean"},
        },
    },
}


def test_calls_in_the_tags_of_qwen3_coder_stream_or_are_cut_off(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    template = folder / "chat_template.jinja"
    template.write_text("{#- <function= #}" + template.read_text())
    # Without the usual token of the tag that ends a call, more parameters are written.
    wild = SamplingParams(temperature=1.5, logit_bias={TOKENIZER.encode("</function>")[0]: -100})
    ended = []
    with load(folder) as llm:
        for seed in range(12):
            events = list(
                llm.stream(
                    "Find something!",
                    tools=[FIND],
                    tool_choice="required",
                    parallel_tool_calls=False,
                    thinking=False,
                    sampling=wild,
                    max_tokens=35,
                    seed=seed,
                    partial_calls=True,
                )
            )
            last = events[-1]
            assert isinstance(last, Finish)
            ended.append(last.reason)
            told = "".join(event.text for event in events if isinstance(event, ToolCallDelta))
            made = [event for event in events if isinstance(event, ToolCall)]
            assert [one.raw_arguments for one in made] == ([told] if made else [])
            assert is_json(told) == bool(made) == (last.reason == "tool_calls")
            assert ("cut off" in last.details.get("warning", "")) == (not made)
    assert set(ended) == {"length", "tool_calls"}


# --- run ----------------------------------------------------------------------------------------


def test_answers_of_tools() -> None:
    def fail() -> None:
        raise OSError("no disk")

    functions = tool_functions([calculate, fail])
    made = ToolCall("1", "calculate", {"a": 2, "b": 3})
    assert run_tool(made, functions) == {
        "role": "tool",
        "tool_call_id": "1",
        "name": "calculate",
        "content": "5",
    }
    for name, arguments, words in (
        ("fail", {}, "Error: OSError: no disk"),
        ("calculate", {"c": 1}, "Error: TypeError: calculate() got an unexpected"),
        ("sum", {}, "Error: there is no tool sum; there are calculate, fail"),
    ):
        assert run_tool(ToolCall("1", name, arguments), functions)["content"].startswith(words)
    with pytest.raises(TypeError, match="must be functions"):
        tool_functions([{"name": "f"}])


def test_tools_that_do_not_return_their_result_are_refused(demo: LLM) -> None:
    async def later(expression: str) -> str:
        return expression

    def pieces(expression: str) -> Iterator[str]:
        yield expression

    class Later:
        async def __call__(self, expression: str) -> str:
            return expression

    for tool, words in (
        (later, "the tool later is an async function"),
        (functools.partial(later, expression="1"), "the tool later is an async function"),
        (pieces, "the tool pieces is a generator"),
        (Later(), "the tool Later is an async function"),
    ):
        with pytest.raises(TypeError, match=words):
            demo.run("Hello", tools=[tool])
    assert demo.chat("Hello", tools=[later], thinking=False, max_tokens=3).usage


def test_lone_surrogates_of_a_tool_are_shown_to_the_model(demo: LLM) -> None:
    def calculator(expression: str) -> str:
        """Evaluate an arithmetic expression"""
        if results:
            raise ValueError("\udfff")
        results.append(expression)
        return "4\ud8006"

    results: list[str] = []
    for words in ("4\\ud8006", "Error: ValueError: \\udfff"):
        reply = demo.run("What is 12 + 34?", tools=[calculator], thinking=False, sampling=GREEDY)
        assert reply.messages[1]["content"] == words


def test_partial_functions_and_models_are_tools() -> None:
    described = tool_schema(functools.partial(calculate, b=2))["function"]
    assert described["name"] == "calculate" and described["description"].startswith("Calculate")
    assert described["parameters"]["required"] == ["a"]
    described = tool_schema(Filter)["function"]
    assert (described["name"], described["description"]) == ("Filter", "A nested model.")
    assert described["parameters"] == Filter.model_json_schema()
    made = run_tool(ToolCall("1", "Filter", {"key": "a"}), tool_functions([Filter]))
    assert made["content"] == json.dumps("key='a' n=1")


def test_the_demo_calls_a_function_and_answers(demo: LLM) -> None:
    reply = demo.run("What is 1234 + 4321?", tools=[calculator], thinking=False, sampling=GREEDY)
    assert "5555" in reply.text
    roles = [message["role"] for message in reply.messages]
    assert roles == ["assistant", "tool", "assistant"]
    called = reply.messages[0]["tool_calls"][0]["function"]
    assert called["name"] == "calculator" and "1234" in called["arguments"]
    stream = demo.stream("What is 1234 + 4321?", tools=[calculator], thinking=True, sampling=GREEDY)
    events = list(stream)
    assert [type(event) for event in events if isinstance(event, ToolCall)] == [ToolCall]
    assert events[-1].reason == "tool_calls"  # type: ignore[union-attr]


def test_a_tool_loop_reads_only_what_is_new(demo: LLM) -> None:
    """What was written is rendered as it was, thinking included."""
    demo.forget()
    messages = [{"role": "user", "content": "What is 1234 + 4321?"}]
    first = demo.chat(messages, tools=[calculator], thinking=True, sampling=GREEDY)
    functions = tool_functions([calculator])
    result = run_tool(first.tool_calls[0], functions)
    second = demo.chat(
        [*messages, *first.messages, result], tools=[calculator], thinking=True, sampling=GREEDY
    )
    assert (
        second.usage.cached_tokens >= first.usage.prompt_tokens + first.usage.completion_tokens - 2
    )
    assert "5555" in second.text


def test_a_run_that_never_answers_is_ended(demo: LLM) -> None:
    with pytest.raises(Qwen3Error, match="still calls tools after 1 replies"):
        demo.run(
            "What is 1234 + 4321?",
            tools=[calculator],
            max_steps=1,
            thinking=False,
            sampling=GREEDY,
        )


@pytest.mark.parametrize(
    ("tools", "error", "complaint"),
    [
        (calculator, TypeError, "tools must be a list"),
        ([calculator, calculator], ValueError, "two tools are called calculator"),
        ([{"name": "f"}], TypeError, "to run tools they must be functions"),
        ([], TypeError, "run needs tools"),
    ],
)
def test_wrong_tools(demo: LLM, tools: Any, error: type[Exception], complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        demo.run("Hello", tools=tools)


def test_arguments_of_clients_are_read_for_templates_that_go_through_them() -> None:
    template = ChatTemplate(
        "{%- for call in messages[0].tool_calls %}<function={{ call.function.name }}>"
        "{%- for key, value in call.function.arguments | items %}{{ key }}={{ value }}{% endfor %}"
        "{%- endfor %}"
    )
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert template.render([message]) == "<function=f>a=1"
    for cut in ("{", "[1]", None):
        call["function"]["arguments"] = cut  # type: ignore[index]
        assert template.render([message]) == f"<function=f>arguments={[1] if cut == '[1]' else cut}"
