"""Tools: described to the model, called by it, executed and answered."""

import json
import random
from collections.abc import Sequence
from enum import Enum
from random import Random
from typing import Annotated, Any, Literal

import jsonschema  # type: ignore[import-untyped]
import pytest
from pydantic import BaseModel

from qwen3_mlx import LLM, Qwen3Error, SamplingParams
from qwen3_mlx.text.events import Reasoning, Text, ToolCall
from qwen3_mlx.text.parser import Parser
from qwen3_mlx.text.template import ChatTemplate
from qwen3_mlx.text.tool_schema import kinds_of
from qwen3_mlx.text.tools import Calls, CoderCalls, HermesCalls, answer, describe, functions_of
from tests.test_text import TEMPLATE, THINKING, TOKENIZER

GREEDY = SamplingParams(temperature=0)
CALLS = Calls.of(TEMPLATE, TOKENIZER, [])
CODER = Calls.of(
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
    assert describe(calculate)["function"] == {
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

    properties = describe(tool)["function"]["parameters"]["properties"]
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
    parameters = describe(weather)["function"]["parameters"]
    jsonschema.Draft202012Validator.check_schema(parameters)
    right = {"place": {"city": "Ulm", "unit": "F", "near": [{"city": "Bonn"}]}, "unit": "C"}
    jsonschema.validate(right, parameters)
    for wrong in ({"city": "Ulm", "unit": "K"}, {"city": "Ulm", "near": [{"city": 1}]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"place": wrong, "unit": "C"}, parameters)
    assert parameters["properties"]["unit"]["enum"] == ["C", "F"]
    assert parameters["required"] == ["place", "unit"]


def test_arguments_arrive_as_the_types_of_the_function() -> None:
    functions = functions_of([weather])
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
        assert answer(ToolCall("1", "weather", arguments), functions)["content"].startswith(words)


def test_descriptions_are_taken_in_both_forms() -> None:
    bare = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
    assert describe(bare) == describe({"type": "function", "function": bare})
    assert describe({"name": "f"})["function"]["parameters"]["properties"] == {}


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
        (unknown, TypeError, "parameters of the tool unknown are not known: .*Nowhere"),
        (by_place, TypeError, "takes value by its position only"),
    ):
        with pytest.raises(error, match=words):
            describe(wrong)  # type: ignore[arg-type]


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
    tool = describe({"name": "search", "parameters": Search.model_json_schema()})
    calls = Calls.of(ChatTemplate("<tool_call>\n<function="), TOKENIZER, [tool])
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

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
BAD = "<tool_call>\nno JSON\n</tool_call>"
XML = "<function=find>\n<parameter=count>\n12\n</parameter>\n</function>"


def parse(
    text: str, calls: Calls | None = CALLS, cuts: Sequence[int] = (), inside: bool = False
) -> tuple[str, str, list[tuple[str, dict[str, Any]]], Parser]:
    said: list[Reasoning | Text | ToolCall] = []
    parser = Parser(TOKENIZER, said.append, thinking=THINKING, calls=calls, inside=inside)
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
        (f"a\n{BAD}\nb", "", f"a{BAD}\nb", []),
        (f"a {CALL} b", "", "a  b", [F]),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}', "", "", [F]),
        ('<tool_call>\n{"name": "f", "argum', "", '<tool_call>\n{"name": "f", "argum', []),
        (f"<tool_call>\ncut {CALL}", "", "<tool_call>\ncut ", [F]),
        ("a </tool_call> b", "", "a </tool_call> b", []),
        ("<think>\nx <tool_call>\n{</think>y", "x <tool_call>\n{", "y", []),
        ("<tool_call>\n{<think>y</think>z", "y", "<tool_call>\n{z", []),
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
        ("a <function=find", "a <function=find", 0),
        ("<function", "<function", 0),
    ],
)
def test_coder_calls_without_their_tag(text: str, words: str, made: int) -> None:
    found = parse(text, CODER)
    assert found[:3] == ("", words, [("find", {"count": 12})] * made)


def test_without_tools_tags_are_text() -> None:
    assert parse(CALL, None)[1:3] == (CALL, [])


def test_tokens_of_a_call_that_ends_the_thinking_are_no_thinking() -> None:
    before = parse("<think>\nhm\n")[3].reasoning_tokens
    assert parse(f"<think>\nhm\n{CALL}")[3].reasoning_tokens == before
    assert parse(f"<think>\nhm\n{CALL} no")[3].reasoning_tokens > before + 5


# --- run ----------------------------------------------------------------------------------------


def test_answers_of_tools() -> None:
    def fail() -> None:
        raise OSError("no disk")

    functions = functions_of([calculate, fail])
    made = ToolCall("1", "calculate", {"a": 2, "b": 3})
    assert answer(made, functions) == {
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
        assert answer(ToolCall("1", name, arguments), functions)["content"].startswith(words)
    with pytest.raises(TypeError, match="must be functions"):
        functions_of([{"name": "f"}])


def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression

    Args:
        expression: the expression
    """
    numbers = [int(part) for part in expression.split("+")]
    return str(sum(numbers))


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
    functions = functions_of([calculator])
    result = answer(first.tool_calls[0], functions)
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
        ([], TypeError, "to run tools they must be functions"),
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
    call["function"]["arguments"] = "{"  # type: ignore[index]
    with pytest.raises(Qwen3Error, match="arguments of a tool call are not JSON"):
        template.render([message])
