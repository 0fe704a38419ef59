"""Examine the demo checkpoint through the public API: `python examples/exam_demo.py`.

Each row of the table is the share of correct replies, decoded greedily. The three-digit sums are
held out: `train_demo.py` never trains on them.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from random import Random
from typing import Any

import demo_tasks

from qwen3_mlx import LLM, Reply, SamplingParams, load

GREEDY = SamplingParams(temperature=0)
MAX_TOKENS = 200  # of a reply
CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
ADDER = {
    "type": "function",
    "function": {
        "name": "plus_numbers",
        "description": "Adds two numbers and returns the sum.",
        "parameters": {
            "type": "object",
            "properties": {"p": {"type": "number"}, "q": {"type": "number"}},
            "required": ["p", "q"],
        },
    },
}
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


def exam_turns(llm: LLM, rng: Random, count: int) -> Row:
    """Return the row on sums asked as the second of two questions."""
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
    return "3 digits in the second turn, thinking on", right


def exam_cuts(llm: LLM, rng: Random, count: int) -> Iterable[Row]:
    """Yield rows on thinking closed at a random character, as a budget closes it at a token."""
    for name, close in (("hand-off", demo_tasks.HAND_OFF), ("plain", demo_tasks.PLAIN_CLOSE)):
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
            calculator = demo_tasks.Calculator("calculator", "", ("expression",))
            messages = [
                {"role": "user", "content": f"What is {a} + {b}?"},
                {"role": "assistant", "content": "", "tool_calls": [calculator.call(a, b)]},
                {"role": "tool", "content": str(a + b)},
            ]
            answers.append(is_sum(reply_to(messages, [CALCULATOR], thinking=thinking), a, b))
        yield f"answer after the tool's result, {mode}", answers
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
    for verb, answer in kinds:
        for thinking in (True, False):
            right = []
            for _ in range(count):
                source = rng.choice((demo_tasks.WORDS, "abcdefghijklmnopqrstuvwxyz", "0123456789"))
                items = [rng.choice(source) for _ in range(rng.randint(3, 6))]
                reply = ask(llm, f"{verb}: {' '.join(items)}", thinking=thinking)
                right.append(reply.text.strip() == answer(items))
            yield f"{verb}, thinking {'on' if thinking else 'off'}", right


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


def exam_talk(llm: LLM) -> Row:
    """Return the row on questions beyond the model, which it should decline."""
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
    return "other questions: it says what it is", ["demo model" in r.text for r in replies]


def main() -> None:
    """Parse the command line, run the exam and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", help="a checkpoint's folder; default: the demo")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sums", type=int, default=200, help="three-digit sums to ask for")
    parser.add_argument("--others", type=int, default=50, help="questions of each other kind")
    options = parser.parse_args()
    rng = Random(options.seed)
    with load(options.model) as llm:
        parts: tuple[Iterable[Row], ...] = (
            exam_sums(llm, rng, options.sums),
            (exam_turns(llm, rng, options.others) for _ in range(1)),
            exam_cuts(llm, rng, options.sums // 2),
            exam_tools(llm, rng, options.others),
            exam_switches(llm, rng, options.others),
            exam_lists(llm, rng, options.others),
            exam_json(llm, rng, options.others),
            (exam_talk(llm) for _ in range(1)),
        )
        for part in parts:
            for name, right in part:
                sys.stdout.write(f"{name:58} {sum(right):4}/{len(right):<4} {share(right):6.1%}\n")
                sys.stdout.flush()


def share(right: list[bool]) -> float:
    """Return the share of True."""
    return sum(right) / len(right)


if __name__ == "__main__":
    main()
