"""Tools of any name and parameters, for the demo model's curriculum.

The values of a call stand in the question: numbers, names, quoted text, or words after the name of
a parameter. They fill the parameters by type, and in their order, unless the question names them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import demo_tasks
from demo_tasks import Message, Task, Tool
from demo_words import NAMES, any_word

Value = str | int | float

# Questions as people ask them; S is a text, N a number. The values fill the parameters in order.
_FRAMES = (
    "What is the weather in S?",
    "How warm is it in S?",
    "Will it rain in S on S?",
    "What time is it in S?",
    "Play S.",
    "Play S by S.",
    "Send S to S.",
    "Send an e-mail to S about S.",
    "Call S.",
    "Write to S that S.",
    "Set a timer for N minutes.",
    "Set an alarm for N.",
    "Remind S in N hours.",
    "Remind me to S in N minutes.",
    "Convert N S to S.",
    "Change N from S to S.",
    "Book N seats to S.",
    "Book a room in S for N nights.",
    "Book a room for N in S on S.",
    "Translate S into S.",
    "How do you say S in S?",
    "Search for S.",
    "Search the web for S, N results.",
    "Read S.",
    "Open S.",
    "Delete S.",
    "Order N S for S.",
    "How far is it from S to S?",
    "Set the light in S to N.",
    "Turn on the lamp in S.",
    "Add S to the list.",
    "Add N and N.",
    "Find S near S.",
    "Find trains from S to S on S.",
    "Find flights from S to S for N people.",
    "Multiply N by N.",
    "What is N times N?",
    "Divide N by N.",
    "Take N from N.",
    "Round N to N digits.",
    "A box of N by N by N.",
    "Pay N to S.",
    "Move N from S to S.",
    "Who is S?",
    "How old is S?",
    "Show me S.",
    "Show N photos of S.",
    "What is the price of S in S?",
    "Draw a line from N to N.",
    "Roll N dice with N sides.",
    "Give me N facts about S.",
    "Save S as S.",
    "Put S on S at N.",
    "Tell S that S is N.",
    "Where do I find S in S?",
    "Can I drive to S by way of S?",
    "How can I reach S?",
    "May I visit S on S?",
    "When do I meet S in S?",
    "I want N tickets for S.",
    "I will call S at N.",
    "Should I take the bus from S or from S?",
    "Write the words S on S.",
    "Give S the note S.",
    "Read the text S to S.",
    "Say the word S in S.",
)
_VERBS = (
    "get set send find book play read write open close add make show take move turn call check "
    "search start stop create delete update list load save convert translate order pay count "
    "measure fetch lookup query run print store draw roll post plan log track".split()
)
_DESCRIPTIONS = (
    "{v} the {x}",
    "{v} the {x} of a {y}.",
    "{v} a {x} for the {y}",
    "Use this to {v} a {x}.",
    "The {x} and the {y}.",
    "{x} {y}",
    "{v}s the {x} in the {y} and returns it.",
)
_ABOUT_PARAMETERS = (
    "The {x}",
    "a {x}",
    "The {x} of the {y}",
    "{x}, e.g. {y}",
    "how {x} the {y} is",
)
_NAMED = ("{p} {v}", "{p} is {v}", "{p}: {v}", "{p} = {v}", "{p}={v}", "the {p} {v}", "{v} as {p}")


def draw_schema(rng: Random, name: str, description: str, properties: dict[str, Any]) -> Tool:
    """Return a tool's description, its keys sometimes shuffled, or one of them left out."""
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if rng.random() < 0.7:
        parameters["required"] = list(properties)
    parts = [("name", name), ("description", description), ("parameters", parameters)]
    if rng.random() < 0.2:
        rng.shuffle(parts)
    if rng.random() < 0.1:
        parts = [part for part in parts if part[0] != "description" or "calc" not in name]
    return {"type": "function", "function": dict(parts)}


def write_calls(calls: Sequence[Message]) -> str:
    """Return tool calls as the chat template writes them."""
    return "\n".join(
        f'<tool_call>\n{{"name": "{call["function"]["name"]}", '
        f'"arguments": {demo_tasks.to_json(call["function"]["arguments"])}}}\n</tool_call>'
        for call in calls
    )


def identifier(rng: Random, most: int = 3) -> str:
    """Return the name of a function or a parameter: of one to `most` parts."""
    if most < 3 and rng.random() < 0.06:
        return rng.choice("abcdefghijklmnopqrstuvwxyz")
    parts = [
        any_word(rng).lower() for _ in range(rng.choices(range(1, most + 1), (5, 4, 1)[:most])[0])
    ]
    if rng.random() < 0.25:
        parts[0] = rng.choice(_VERBS)
    if len(parts) > 1 and rng.random() < 0.2:
        return parts[0] + "".join(part.capitalize() for part in parts[1:])
    return "_".join(parts) + (rng.choice("0123456789") if rng.random() < 0.05 else "")


@dataclass(frozen=True, slots=True)
class AnyTool:
    """A tool with one to three parameters, each a text or a number."""

    name: str
    parameters: tuple[str, ...]
    kinds: str  # a letter for each parameter: S text, N number

    def call(self, values: Sequence[Value]) -> Message:
        """Return a call as an item of a message's `tool_calls`."""
        arguments = dict(zip(self.parameters, values, strict=True))
        return {"type": "function", "function": {"name": self.name, "arguments": arguments}}

    def describe(self, rng: Random, about: str) -> Tool:
        """Return the tool's description for the model."""
        number = "number" if rng.random() < 0.6 else "integer"
        properties: dict[str, Any] = {}
        described = rng.random() < 0.35
        for parameter, kind in zip(self.parameters, self.kinds, strict=True):
            properties[parameter] = {"type": "string" if kind == "S" else number}
            if described and rng.random() < 0.8:
                text = rng.choice(_ABOUT_PARAMETERS).format(x=any_word(rng), y=any_word(rng))
                properties[parameter]["description"] = text
        return draw_schema(rng, self.name, about, properties)


def draw_value(rng: Random, kind: str, *, plain: bool) -> tuple[Value, str]:
    """Return a value and how a question writes it; a plain word stands there without quotes."""
    if kind == "N":
        number: Value = rng.randrange(10 ** rng.choices((1, 2, 3, 4), (4, 4, 2, 1))[0])
        if rng.random() < 0.08:
            number = round(rng.random() * 10 ** rng.randint(1, 3), 1)
        return number, str(number)
    form = rng.random()
    if plain and form < 0.4:
        word = any_word(rng)
        return word, word
    if form < 0.75:
        word = rng.choice(NAMES) if rng.random() < 0.3 else any_word(rng).capitalize()
        if rng.random() < 0.12:
            word += " " + any_word(rng).capitalize()
        return word, word
    text = " ".join(any_word(rng) for _ in range(rng.choices((1, 2, 3), (4, 3, 2))[0]))
    text = text.capitalize() if rng.random() < 0.25 else text
    mark = '"' if rng.random() < 0.6 else "'"
    return text, f"{mark}{text}{mark}"


def draw_request(rng: Random) -> tuple[AnyTool, list[Value], str, str]:
    """Return a tool, the values of a call, the question for it, and what the tool is about."""
    verb, x, y = rng.choice(_VERBS), any_word(rng), any_word(rng)
    about = rng.choice(_DESCRIPTIONS).format(v=verb, x=x, y=y).capitalize()
    form = rng.random()
    if form < 0.3:
        frame = rng.choice(_FRAMES)
        kinds = "".join(word.strip(".,?") for word in frame.split() if word.strip(".,?") in "SN")
        parts, plain = frame.split(" "), rng.random() < 0.15
    else:
        kinds = "".join(rng.choice("SSN") for _ in range(rng.choices((1, 2, 3), (3, 4, 4))[0]))
        parts, plain = _any_frame(rng, kinds, verb, x), False
    tool = _name(rng, kinds, verb, x)
    drawn = [draw_value(rng, kind, plain=plain) for kind in kinds]
    values = [value for value, _ in drawn]
    if form < 0.65:
        written = iter(text for _, text in drawn)
        words = [
            part.replace(part.strip(".,?"), next(written), 1)
            if part.strip(".,?") in ("S", "N")
            else part
            for part in parts
        ]
        question = " ".join(words)
        if rng.random() < 0.1:
            question += f" Use {tool.name}."
    else:
        values, question = _explicit(rng, tool)
    return tool, values, question, about


def _name(rng: Random, kinds: str, verb: str, x: str) -> AnyTool:
    name = f"{verb}_{x.lower()}" if rng.random() < 0.3 else identifier(rng)
    names: dict[str, None] = {}
    while len(names) < len(kinds):
        names[identifier(rng, 2)] = None
    return AnyTool(name, tuple(names), kinds)


def _any_frame(rng: Random, kinds: str, verb: str, x: str) -> list[str]:
    # A sentence of any words around the values: `Find the box of S with N.`
    starts = (
        "{v} the {x}",
        "{v}",
        "{v} a {x}",
        "Please {v}",
        "What is the {x} of",
        "How is the {x} in",
    )
    links = ("of", "in", "with", "for", "to", "from", "and", "on", "by", "at", "about", ",", "as")
    start = rng.choice(starts).format(v=verb, x=x)
    words = [start[0].upper() + start[1:]]
    for index, kind in enumerate(kinds):
        if index or rng.random() < 0.4:
            words.append(rng.choice(links))
        if rng.random() < 0.2:
            words.append(any_word(rng).lower())
        words.append(kind)
        if rng.random() < 0.2:
            words.append(any_word(rng).lower())
    text = " ".join(words).replace(" ,", ",")
    return (text + ("?" if text.startswith(("What", "How")) else rng.choice((".", ".", "")))).split(
        " "
    )


def _explicit(rng: Random, tool: AnyTool) -> tuple[list[Value], str]:
    # The question names the tool, and mostly its parameters, then in any order.
    drawn = [draw_value(rng, kind, plain=True) for kind in tool.kinds]
    values, texts = [value for value, _ in drawn], [text for _, text in drawn]
    if rng.random() < 0.4:
        joined = ", ".join(texts[:-1]) + " and " + texts[-1] if len(texts) > 1 else texts[0]
        wording = rng.choice(
            (
                "Call {t} with {j}.",
                "Use {t} with {j}.",
                "Use {t} for {j}.",
                "{t} {s}",
                "{t}({c})",
                "{t}: {s}",
                "Please call {t} with {j}.",
                "Run {t} on {j}.",
            )
        )
        return values, wording.format(t=tool.name, j=joined, s=" ".join(texts), c=", ".join(texts))
    pairs = list(zip(tool.parameters, texts, strict=True))
    if rng.random() < 0.4:
        rng.shuffle(pairs)
    form = rng.choice(_NAMED)
    named = [form.format(p=parameter, v=text) for parameter, text in pairs]
    joined = (
        ", ".join(named[:-1]) + rng.choice((" and ", ", ")) + named[-1]
        if len(named) > 1
        else named[0]
    )
    wording = rng.choice(
        (
            "Call {t} with {j}.",
            "Use {t} with {j}.",
            "{t} with {j}",
            "{t}: {j}",
            "{j}",
            "Use {t}: {j}.",
            "{j}. Use {t}.",
        )
    )
    return values, wording.format(t=tool.name, j=joined)


def any_tool_task(rng: Random, turns: int = 0) -> tuple[Task, tuple[Message, ...]]:
    """Create a task for a tool of any name, and the earlier turns, which use such tools as well."""
    requests = [draw_request(rng) for _ in range(turns + 1)]
    tools = [tool.describe(rng, about) for tool, _, _, about in requests]
    # A further tool that nothing asks for: the question must tell which one is meant.
    for _ in range(rng.choices((0, 1), (8, 2))[0]):
        other, _, _, about = draw_request(rng)
        tools.append(other.describe(rng, about))
    earlier: list[Message] = []
    many = len(tools) > 1
    for tool, values, question, _ in requests[:-1]:
        call = tool.call(values)
        result = _result(rng)
        earlier += [
            {"role": "user", "content": _say_tool(rng, question, tool, many)},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": result},
            {"role": "assistant", "content": result},
        ]
    tool, values, question, _ = requests[-1]
    question = _say_tool(rng, question, tool, many)
    call = tool.call(values)
    rng.shuffle(tools)
    task = Task(question, f"I call {tool.name}.", write_calls([call]), tuple(tools))
    if not turns and rng.random() < 0.2:
        request: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        if rng.random() < 0.5:
            request["reasoning_content"] = task.thought
        result = _result(rng)
        task = replace(
            task,
            between=(request, {"role": "tool", "content": result}),
            thought="I have the result.",
            answer=result,
        )
    return task, tuple(earlier)


def _say_tool(rng: Random, question: str, tool: AnyTool, many: bool) -> str:
    if not many or tool.name in question:
        return question
    return f"{question} Use {tool.name}." if rng.random() < 0.6 else f"Use {tool.name}. {question}"


def _result(rng: Random) -> str:
    form = rng.random()
    if form < 0.25:
        return str(rng.randrange(10 ** rng.randint(1, 4)))
    words = [
        any_word(rng) if rng.random() < 0.8 else str(rng.randrange(100))
        for _ in range(rng.randint(1, 6))
    ]
    text = " ".join(words)
    return text if form < 0.7 else text.capitalize() + rng.choice((".", "", ""))
