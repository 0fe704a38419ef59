"""Calculators for the demo model's curriculum: tools that add, under any name."""

from dataclasses import dataclass, replace
from random import Random
from typing import Any

import demo_tasks
from demo_tasks import Message, Task, Tool
from demo_tools import draw_schema, identifier, write_calls
from demo_words import any_word

_TOOL_NAMES = (
    "calc",
    "add",
    "sum_numbers",
    "math",
    "evaluate",
    "compute",
    "add_numbers",
    "arithmetic",
    "eval_expression",
    "sum",
    "python_calc",
)
_TOOL_DESCRIPTIONS = (
    "Evaluate an arithmetic expression",
    "Evaluates a mathematical expression.",
    "Calculate the result of an arithmetic expression.",
    "A calculator",
    "Add two numbers",
    "Adds two numbers and returns the sum.",
    "Do arithmetic",
    "Compute a sum.",
    "Useful for math.",
)
_ONE_PARAMETER = ("expr", "query", "input", "formula", "text", "e")
_TWO_PARAMETERS = (("a", "b"), ("x", "y"), ("first", "second"), ("left", "right"), ("n", "m"))
_OTHER_TOOLS = (
    ("get_weather", "Current weather for a city", "city"),
    ("get_time", "Tell the time in a time zone.", "zone"),
    ("search", "Search the web", "query"),
    ("send_mail", "Send an e-mail.", "to"),
    ("read_file", "Read a file from disk", "path"),
    ("translate", "Translate a text into another language", "text"),
)


@dataclass(frozen=True, slots=True)
class Calculator:
    """A tool that adds, under any name: one parameter for an expression, or two for numbers."""

    name: str
    description: str
    parameters: tuple[str, ...]

    def call(self, a: int, b: int) -> Message:
        """Return the call as an item of a message's `tool_calls`."""
        if len(self.parameters) == 1:
            arguments: dict[str, Any] = {self.parameters[0]: f"{a} + {b}"}
        else:
            arguments = dict(zip(self.parameters, (a, b), strict=True))
        return {"type": "function", "function": {"name": self.name, "arguments": arguments}}


def draw_calculator(rng: Random) -> Calculator:
    """Return a random calculator, often the usual one."""
    name = "calculator"
    parameters: tuple[str, ...] = ("expression",)
    if rng.random() < 0.6:
        name = rng.choice(_TOOL_NAMES)
        if rng.random() < 0.5:
            name = "_".join(any_word(rng).lower() for _ in range(rng.randint(1, 2)))
    if rng.random() < 0.5:
        parameters = (rng.choice(_ONE_PARAMETER),)
        if rng.random() < 0.5:
            parameters = (identifier(rng, 2),)
        if rng.random() < 0.5:
            parameters = rng.choice(_TWO_PARAMETERS)
            if rng.random() < 0.6:
                parameters = two_identifiers(rng)
    return Calculator(name, rng.choice(_TOOL_DESCRIPTIONS), parameters)


def two_identifiers(rng: Random) -> tuple[str, str]:
    """Return two different names of parameters."""
    first = second = identifier(rng, 2)
    while second == first:
        second = identifier(rng, 2)
    return first, second


def describe_calculator(rng: Random, tool: Calculator) -> Tool:
    """Return a calculator's description, its keys sometimes shuffled."""
    kind = "string" if len(tool.parameters) == 1 else rng.choice(("number", "integer"))
    properties: dict[str, Any] = {}
    for parameter in tool.parameters:
        properties[parameter] = {"type": kind}
        if rng.random() < 0.15:
            properties[parameter]["description"] = rng.choice(
                ("e.g. 1 + 2", "The expression", "A number", "what to compute")
            )
    return draw_schema(rng, tool.name, tool.description, properties)


def offer_tools(rng: Random, tool: Calculator) -> tuple[Tool, ...]:
    """Return the tools on offer: a calculator, sometimes with another tool."""
    tools = [describe_calculator(rng, tool)]
    if rng.random() < 0.25:
        name, description, parameter = rng.choice(_OTHER_TOOLS)
        tools.append(draw_schema(rng, name, description, {parameter: {"type": "string"}}))
        rng.shuffle(tools)
    return tuple(tools)


def tool_task(rng: Random) -> Task:
    """Create a task with tools on offer: a sum for the tool, or a task that needs none."""
    tool = draw_calculator(rng)
    tools = offer_tools(rng, tool)
    if rng.random() < 0.15:
        task = rng.choice((demo_tasks.list_task, demo_tasks.talk))(rng)
        return replace(task, tools=tools)
    pairs = [_tool_pair(rng)]
    question = demo_tasks.ask_sum(rng, *pairs[0])
    if rng.random() < 0.15:
        pairs.append(_tool_pair(rng))
        (a, b), (c, d) = pairs
        question = rng.choice(
            ("What is {} + {} and {} + {}?", "What is {} + {}, and what is {} + {}?")
        ).format(a, b, c, d)
    if rng.random() < 0.2:
        question = f"{question} Use the {rng.choice(('tool', 'calculator', tool.name))}."
    calls = [tool.call(a, b) for a, b in pairs]
    task = Task(question, f"I call {tool.name}.", write_calls(calls), tools)
    return _after_call(rng, task, calls, pairs) if rng.random() < 0.4 else task


def _tool_pair(rng: Random) -> tuple[int, int]:
    if rng.random() < 0.1:
        return demo_tasks.draw_number(rng, rng.randint(4, 5)), demo_tasks.draw_number(
            rng, rng.randint(4, 5)
        )
    return demo_tasks.draw_pair(rng, most=4)


def _after_call(
    rng: Random, task: Task, calls: list[Message], pairs: list[tuple[int, int]]
) -> Task:
    request: Message = {"role": "assistant", "content": "", "tool_calls": calls}
    if rng.random() < 0.5:
        request["reasoning_content"] = task.thought
    form = rng.choice(("{}", "{}", "{}", '{{"result": {}}}', "{}.0", "The result is {}"))
    results = [{"role": "tool", "content": form.format(a + b)} for a, b in pairs]
    answer = "\n".join(demo_tasks.equation(a, b) for a, b in pairs)
    return replace(task, between=(request, *results), thought="I have the result.", answer=answer)
