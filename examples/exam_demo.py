"""Examine the demo checkpoint through the public API: `python examples/exam_demo.py`.

Each row of the table is the share of correct replies, decoded greedily. The three-digit sums are
held out: `train_demo.py` never trains on them.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import demo_calculators
import demo_conversations
import demo_tasks
import demo_tools
import demo_words

from qwen3_mlx import LLM, Reply, SamplingParams, load

GREEDY = SamplingParams(temperature=0)
MAX_TOKENS = 200  # of a reply
_TYPES = {"S": "string", "N": "number"}


def describe(name: str, description: str, kinds: dict[str, str]) -> dict[str, Any]:
    """Return a tool's description; `kinds` are its parameters, S for a text and N for a number."""
    properties = {parameter: {"type": _TYPES[kind]} for parameter, kind in kinds.items()}
    parameters = {"type": "object", "properties": properties, "required": list(kinds)}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


CALCULATOR = describe("calculator", "Evaluate an arithmetic expression", {"expression": "S"})
ADDER = describe("plus_numbers", "Adds two numbers and returns the sum.", {"p": "N", "q": "N"})
# Tools of which no name, parameter or question is in the curriculum: S a text, N a number.
UNSEEN_TOOLS = (
    ("weather_report", {"town_name": "S"}, "How is the weather in {}?"),
    ("lookup_capital", {"nation": "S"}, "Which city is the capital of {}?"),
    ("square_root", {"radicand": "N"}, "What is the square root of {}?"),
    ("launchCountdown", {"seconds": "N"}, "Start a countdown of {} seconds."),
    ("spellcheck", {"sentence": "S"}, 'Check the spelling of "{}".'),
    ("reserve_table", {"restaurant": "S", "guests": "N"}, "Reserve a table at {} for {} guests."),
    ("currency_quote", {"amount": "N", "target": "S"}, "How much is {} dollars in {}?"),
    ("send_telegram", {"recipient": "S", "body": "S"}, 'Send {} the words "{}".'),
    ("power_of", {"basis": "N", "exponent": "N"}, "What is {} to the power of {}?"),
    ("dim_lights", {"zone_id": "S", "percent": "N"}, "Dim the lights in {} to {} percent."),
    ("route_planner", {"origin": "S", "destination": "S"}, "How do I get from {} to {}?"),
    (
        "hire_bike",
        {"depot": "S", "hours": "N", "helmets": "N"},
        "Hire a bike in {} for {} hours with {} helmets.",
    ),
    (
        "train_ticket",
        {"departure": "S", "arrival": "S", "weekday": "S"},
        "Buy a ticket from {} to {} on {}.",
    ),
    (
        "ship_parcel",
        {"grams": "N", "sender": "S", "addressee": "S"},
        "Ship {} grams from {} to {}.",
    ),
    (
        "box_volume",
        {"length_cm": "N", "width_cm": "N", "height_cm": "N"},
        "Compute the volume of {} by {} by {}.",
    ),
    (
        "calendar_entry",
        {"subject": "S", "date": "S", "minutes_long": "N"},
        'Enter "{}" on {} for {} minutes.',
    ),
)
_CALL = re.compile(r"<tool_call>\n(.*)\n</tool_call>")

Sums = list[tuple[int, int]]
Row = tuple[str, list[bool]]


def unseen_sums(rng: Random, count: int) -> Sums:
    """Return random three-digit sums that are held out from the training."""
    sums: Sums = []
    while len(sums) < count:
        a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
        if demo_tasks.held_out(a, b):
            sums.append((a, b))
    return sums


def ask(llm: LLM, question: str, *, thinking: bool | None, system: str | None = None) -> Reply:
    """Return the greedy reply to one question."""
    messages = [{"role": "user", "content": question}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return llm.chat(messages, thinking=thinking, max_tokens=MAX_TOKENS, sampling=GREEDY)


def is_sum(text: str, a: int, b: int) -> bool:
    """Return whether a text ends with the sum."""
    return text.strip().endswith(f" {a + b}")


def exam_sums(llm: LLM, rng: Random, count: int) -> Iterable[Row]:
    """Yield rows on sums: both modes, several wordings, with and without a system turn."""
    sums = unseen_sums(rng, count)
    digits = [(a, b) for a in range(10) for b in range(10)]

    def share(pairs: Sums, question: str, *, thinking: bool, system: str | None = None) -> Row:
        replies = [
            ask(llm, question.format(a, b), thinking=thinking, system=system) for a, b in pairs
        ]
        right = [is_sum(reply.text, a, b) for reply, (a, b) in zip(replies, pairs, strict=True)]
        thought.setdefault(thinking, []).extend(bool(reply.reasoning) for reply in replies)
        ended.extend(reply.finish_reason == "stop" for reply in replies)
        return question.format("A", "B") + f", thinking {'on' if thinking else 'off'}", right

    thought: dict[bool, list[bool]] = {}
    ended: list[bool] = []
    usual = "What is {} + {}?"
    name, right = share(sums, usual, thinking=True)
    yield f"3 digits: {name}", right
    name, right = share(sums, usual, thinking=False)
    yield f"3 digits: {name}", right
    name, right = share(digits, usual, thinking=False)
    yield f"1 digit: {name}", right
    name, right = share(digits, usual, thinking=True)
    yield f"1 digit: {name}", right
    few = sums[: count // 4]
    terse = "You are terse."
    yield "3 digits, with a system turn", share(few, usual, thinking=True, system=terse)[1]
    for question in ("How much is {} plus {}?", "{}+{}", "{} + {} 等于多少？", "{} 加 {} 是多少？"):
        name, right = share(few, question, thinking=True)
        yield f"3 digits: {name}", right
    yield "thinking on: reasoning is not empty", thought[True]
    yield "thinking off: reasoning is empty", [not given for given in thought[False]]
    yield "sums: the reply ends by itself", ended


def exam_turns(llm: LLM, rng: Random, count: int) -> Iterable[Row]:
    """Yield the row on sums asked as the second of two questions."""
    right = []
    for a, b in unseen_sums(rng, count):
        c, d = rng.randrange(100), rng.randrange(100)
        messages = [
            {"role": "user", "content": f"What is {c} + {d}?"},
            {"role": "assistant", "content": demo_tasks.equation(c, d)},
            {"role": "user", "content": f"What is {a} + {b}?"},
        ]
        reply = llm.chat(messages, thinking=True, max_tokens=MAX_TOKENS, sampling=GREEDY)
        right.append(is_sum(reply.text, a, b))
    yield "3 digits in the second turn, thinking on", right


def exam_cuts(llm: LLM, rng: Random, count: int) -> Iterable[Row]:
    """Yield rows on thinking closed at a random character, as a budget closes it at a token."""
    for name, close in (
        ("hand-off", demo_conversations.HAND_OFF),
        ("plain", demo_conversations.PLAIN_CLOSE),
    ):
        given, right = [], []
        for a, b in unseen_sums(rng, count):
            steps = demo_tasks.sum_steps(a, b)
            prompt = llm.render(f"What is {a} + {b}?", thinking=True)
            part = steps[: rng.randint(0, len(steps))].rstrip()
            reply = llm.complete(
                f"{prompt}<think>\n{part}{close}", max_tokens=MAX_TOKENS, sampling=GREEDY
            )
            given.append(bool(reply.text.strip()) and "<think>" not in reply.text)
            right.append(is_sum(reply.text, a, b))
        yield f"forced close ({name}): an answer", given
        yield f"forced close ({name}): the right one", right


def read_calls(text: str) -> list[Any]:
    """Return the tool calls in a reply; a call that is not JSON becomes None."""
    calls: list[Any] = []
    for body in _CALL.findall(text):
        try:
            calls.append(json.loads(body))
        except ValueError:
            calls.append(None)
    return calls


def draw_call(
    rng: Random, name: str, kinds: dict[str, str], question: str
) -> tuple[Any, str, dict[str, Any]]:
    """Return a tool's description, a question with random values, and the call expected."""
    names = rng.sample(demo_words.UNSEEN_NAMES, len(kinds))
    values: list[str | int] = [
        rng.randrange(2, 500) if kind == "N" else names.pop() for kind in kinds.values()
    ]
    tool = describe(name, name.replace("_", " "), kinds)
    arguments = dict(zip(kinds, values, strict=True))
    return tool, question.format(*values), {"name": name, "arguments": arguments}


def draw_made_up_call(rng: Random) -> tuple[Any, str, dict[str, Any]]:
    """Return a tool and a question as in the curriculum, with other random names and values."""
    tool, values, question, about = demo_tools.draw_request(rng)
    return tool.describe(rng, about), question, tool.call(values)["function"]


def exam_tools(llm: LLM, rng: Random, count: int) -> Iterable[Row]:
    """Yield rows on tool calls, and on answers after the tool's result."""

    def reply_to(messages: Any, tools: Any, *, thinking: bool) -> str:
        prompt = llm.render(messages, thinking=thinking, tools=tools)
        reply = llm.complete(prompt, max_tokens=MAX_TOKENS, sampling=GREEDY)
        return reply.text.rpartition("</think>")[2]

    def calls(tool: Any, arguments: Callable[[int, int], Any], *, thinking: bool) -> list[bool]:
        right = []
        for a, b in unseen_sums(rng, count):
            expected = {"name": tool["function"]["name"], "arguments": arguments(a, b)}
            text = reply_to(f"What is {a} + {b}?", [tool], thinking=thinking)
            right.append(read_calls(text) == [expected])
        return right

    for thinking in (True, False):
        mode = f"thinking {'on' if thinking else 'off'}"
        by_text = calls(CALCULATOR, lambda a, b: {"expression": f"{a} + {b}"}, thinking=thinking)
        yield f"tool call, calculator(expression), {mode}", by_text
        by_number = calls(ADDER, lambda a, b: {"p": a, "q": b}, thinking=thinking)
        yield f"tool call, unknown name and parameters, {mode}", by_number
        answers = []
        for a, b in unseen_sums(rng, count):
            calculator = demo_calculators.Calculator("calculator", "", ("expression",))
            messages = [
                {"role": "user", "content": f"What is {a} + {b}?"},
                {"role": "assistant", "content": "", "tool_calls": [calculator.call(a, b)]},
                {"role": "tool", "content": str(a + b)},
            ]
            answers.append(is_sum(reply_to(messages, [CALCULATOR], thinking=thinking), a, b))
        yield f"answer after the tool's result, {mode}", answers
        for parameters in (1, 2, 3):
            few = [tool for tool in UNSEEN_TOOLS if len(tool[1]) == parameters]
            drawn = [draw_call(rng, *rng.choice(few)) for _ in range(count)]
            yield (
                f"unseen tool, {parameters} parameters, {mode}",
                [
                    read_calls(reply_to(question, [tool], thinking=thinking)) == [call]
                    for tool, question, call in drawn
                ],
            )
        made_up = [draw_made_up_call(rng) for _ in range(count)]
        yield (
            f"unseen tool, made-up names and any wording, {mode}",
            [
                read_calls(reply_to(question, [tool], thinking=thinking)) == [call]
                for tool, question, call in made_up
            ],
        )
    greetings = [
        reply_to(hello, [CALCULATOR], thinking=True) for hello in ("Hello", "Who are you?")
    ]
    yield "no call for a greeting", [bool(text) and not read_calls(text) for text in greetings]


def exam_switches(llm: LLM, rng: Random, count: int) -> Iterable[Row]:
    """Yield rows on /think and /no_think, after the question and in the system turn."""
    sums = unseen_sums(rng, count)
    for flag, thinks in (("/think", True), ("/no_think", False)):
        at_end = [ask(llm, f"What is {a} + {b}? {flag}", thinking=None) for a, b in sums]
        system = f"You are a helpful assistant. {flag}"
        above = [ask(llm, f"What is {a} + {b}?", thinking=None, system=system) for a, b in sums]
        for place, replies in (("at the end", at_end), ("in the system turn", above)):
            obeyed = [bool(r.reasoning) == thinks and bool(r.text) for r in replies]
            yield f"{flag} {place} is obeyed", obeyed


def exam_lists(llm: LLM, rng: Random, count: int) -> Iterable[Row]:
    """Yield rows on repeating, reversing and counting lists of three to six items."""
    kinds: tuple[tuple[str, Callable[[list[str]], str]], ...] = (
        ("Repeat", lambda items: " ".join(items)),
        ("Reverse", lambda items: " ".join(reversed(items))),
        ("Count", lambda items: str(len(items))),
    )

    def share(verb: str, answer: Callable[[list[str]], str], source: Any, *, thinking: bool) -> Row:
        right = []
        for _ in range(count):
            pool = rng.choice(source)
            items = [rng.choice(pool) for _ in range(rng.randint(3, 6))]
            reply = ask(llm, f"{verb}: {' '.join(items)}", thinking=thinking)
            right.append(reply.text.strip() == answer(items))
        return f"{verb}, thinking {'on' if thinking else 'off'}", right

    seen = (demo_words.WORDS, demo_words.LETTERS, "0123456789")
    for label, source in (("", seen), ("unseen words: ", (demo_words.UNSEEN_WORDS,))):
        for verb, answer in kinds:
            for thinking in (True, False):
                name, right = share(verb, answer, source, thinking=thinking)
                yield f"{label}{name}", right


def exam_json(llm: LLM, rng: Random, count: int) -> Iterable[Row]:
    """Yield rows on answers in JSON, under the usual key and under a given one."""
    for demand, key in (
        ("Answer in JSON.", "answer"),
        ('Answer as JSON with the key "sum".', "sum"),
    ):
        replies = [
            (ask(llm, f"What is {a} + {b}? {demand}", thinking=True).text, a + b)
            for a, b in unseen_sums(rng, count)
        ]
        yield f"JSON is valid: {demand}", [_read_json(text) is not None for text, _ in replies]
        yield f"JSON is right: {demand}", [_read_json(text) == {key: n} for text, n in replies]


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def exam_talk(llm: LLM) -> Iterable[Row]:
    """Yield the row on questions beyond the model, which it should decline."""
    questions = (
        "Why is the sky blue?",
        "Write a haiku about winter rain.",
        "What is the capital of Japan?",
        "Who wrote Hamlet?",
        "Once upon a time",
        "What is 7 * 8?",
        "Explain recursion to a child.",
        "Where do birds sleep?",
    )
    replies = [ask(llm, q, thinking=t) for q in questions for t in (True, False)]
    yield "other questions: it says what it is", ["demo model" in r.text for r in replies]


def exam_unlearned(llm: LLM, rng: Random, count: int) -> Iterable[Row]:
    """Yield the row on a task that is kept from the model, for users to teach it."""
    right = []
    for _ in range(count):
        a, b = rng.sample(range(1000), 2)
        text = ask(llm, f"Which is larger, {a} or {b}?", thinking=rng.random() < 0.5).text
        right.append(text.strip().strip(".").endswith(str(max(a, b))))
    yield "not taught: which of two numbers is larger", right


def examine(
    model: str | Path | None, seed: int = 1, sums: int = 200, others: int = 50
) -> Iterator[str]:
    """Yield the lines of the exam: `sums` three-digit sums, and `others` of each other kind."""
    rng = Random(seed)
    with load(model) as llm:
        parts: tuple[Iterable[Row], ...] = (
            exam_sums(llm, rng, sums),
            exam_turns(llm, rng, others),
            exam_cuts(llm, rng, sums // 2),
            exam_tools(llm, rng, others),
            exam_switches(llm, rng, others),
            exam_lists(llm, rng, others),
            exam_json(llm, rng, others),
            exam_talk(llm),
            exam_unlearned(llm, rng, others),
        )
        for part in parts:
            for name, right in part:
                yield f"{name:61} {sum(right):4}/{len(right):<4} {share(right):6.1%}"


def share(right: list[bool]) -> float:
    """Return the share of True."""
    return sum(right) / len(right)


def main() -> None:
    """Parse the command line, run the exam and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", help="a checkpoint's folder; default: the demo")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sums", type=int, default=200, help="three-digit sums to ask for")
    parser.add_argument("--others", type=int, default=50, help="questions of each other kind")
    options = parser.parse_args()
    for line in examine(options.model, options.seed, options.sums, options.others):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
