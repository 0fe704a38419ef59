"""The curriculum of the demo model: random conversations, drawn with a seeded generator.

A `Task` is a question, its answer and the thinking between them. `make_conversation` puts a task
into a setting: with or without a system turn and earlier turns, with thinking on, off, switched by
`/think` and `/no_think`, or cut short. This module needs neither MLX nor a tokenizer.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from demo_words import CHINESE_WORDS, LETTERS, MORE_WORDS, NAMES, WORDS, made_up_word

Message = dict[str, Any]
Tool = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """A question with the assistant's thinking and answer."""

    question: str
    thought: str
    answer: str
    tools: tuple[Tool, ...] = ()
    # Messages between the question and the answer: a tool call and its result.
    between: tuple[Message, ...] = ()


# --- addition -----------------------------------------------------------------------------------

_PLACES = ("ones", "tens", "hundreds", "thousands")
_WORDINGS = (
    "{a} + {b} = ?",
    "{a} + {b} =",
    "What's {a} + {b}?",
    "What is {a}+{b}?",
    "what is {a} + {b}",
    "And {a} + {b}?",
    "Calculate {a} + {b}.",
    "{a} plus {b}",
    "What is the sum of {a} and {b}?",
    "{a}+{b}",
    "{a} + {b}",
    "Add {a} and {b}.",
    "How much is {a} plus {b}?",
    "What is {a} plus {b}?",
    "{a} + {b} 等于多少？",
    "{a} 加 {b} 是多少？",
)


def held_out(a: int, b: int) -> bool:
    """Return whether a sum of two three-digit numbers is held out for the exam (1 in 20)."""
    return zlib.crc32(f"{a}+{b}".encode()) % 20 == 0


def draw_number(rng: Random, digits: int) -> int:
    """Return a random number with this many digits; zero has one."""
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def draw_pair(rng: Random, most: int = 3) -> tuple[int, int]:
    """Return two random numbers of up to `most` digits, mostly three, that are not held out."""
    digits = rng.choices((1, 2, 3), (1, 1, 5))[0]
    other = digits if rng.random() < 0.8 else rng.randint(1, 3)
    if most > 3 and rng.random() < 0.15:
        digits = other = most
    while True:
        a, b = draw_number(rng, digits), draw_number(rng, other)
        if not (digits == other == 3 and held_out(a, b)):
            return a, b


def sum_steps(a: int, b: int) -> str:
    """Return the addition by columns, least significant first: `ones: 7 + 8 = 15, carry 1`."""
    lines = []
    carry = 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        incoming = f" + {carry}" if place else ""
        total = x + y + carry
        carry = total // 10
        lines.append(f"{_PLACES[place]}: {x} + {y}{incoming} = {total}, carry {carry}")
    return "\n".join(lines)


def ask_sum(rng: Random, a: int, b: int) -> str:
    """Return a question for a sum, mostly `What is A + B?`."""
    wording = "What is {a} + {b}?" if rng.random() < 0.6 else rng.choice(_WORDINGS)
    return wording.format(a=a, b=b)


def equation(a: int, b: int) -> str:
    """Return the answer to a sum."""
    return f"{a} + {b} = {a + b}"


def addition(rng: Random) -> Task:
    """Create an addition of numbers of up to three digits, sometimes four."""
    a, b = draw_pair(rng, most=4 if rng.random() < 0.2 else 3)
    return Task(ask_sum(rng, a, b), sum_steps(a, b), equation(a, b))


def small_addition(rng: Random) -> Task:
    """Create an addition of two one-digit numbers."""
    a, b = rng.randrange(10), rng.randrange(10)
    return Task(ask_sum(rng, a, b), sum_steps(a, b), equation(a, b))


# --- lists --------------------------------------------------------------------------------------

_REPEAT = (
    "Repeat: {items}",
    "Repeat: {items}",
    "Repeat: {items}",
    "Repeat {items}",
    "Repeat this: {items}",
    "Repeat these words: {items}",
    "Repeat the list: {items}",
    "Repeat after me: {items}",
    "Please repeat: {items}",
    "Say this again: {items}",
    "Copy: {items}",
    "重复：{items}",
)
_REVERSE = (
    "Reverse: {items}",
    "Reverse: {items}",
    "Reverse: {items}",
    "Reverse {items}",
    "Reverse this: {items}",
    "Reverse these words: {items}",
    "Reverse the list: {items}",
    "Reverse this list: {items}",
    "Reverse the order: {items}",
    "Please reverse: {items}",
    "Say these backwards: {items}",
    "Write this backwards: {items}",
    "倒序：{items}",
)
_COUNT = (
    "Count: {items}",
    "Count: {items}",
    "Count: {items}",
    "Count {items}",
    "Count this: {items}",
    "Count these: {items}",
    "Count these words: {items}",
    "Count the list: {items}",
    "Count the items: {items}",
    "Please count: {items}",
    "How many items are in this list: {items}",
    "How many words: {items}",
    "How many: {items}",
    "计数：{items}",
)


def draw_items(rng: Random, most: int = 10) -> list[str]:
    """Return a random list of words, letters, numbers, Chinese words or made-up words."""
    size = min(most, rng.choices(range(1, 13), (2, 4, 7, 8, 8, 8, 5, 4, 3, 2, 1, 1))[0])
    pool = draw_pool(rng)
    if rng.random() < 0.12:
        pool = [rng.choice(pool) for _ in range(rng.randint(1, 3))]  # most items are repeated
    elif rng.random() < 0.4:
        rng.shuffle(pool)
        return pool[:size]
    return [rng.choice(pool) for _ in range(size)]


def draw_different_items(rng: Random, most: int) -> list[str]:
    """Return a random list of different items.

    In a list with repeated items an item has two successors, which hides the rule of copying.
    """
    pool = list(dict.fromkeys(draw_pool(rng)))
    rng.shuffle(pool)
    return pool[: rng.randint(2, most)]


def draw_pool(rng: Random) -> list[str]:
    """Return items of one kind to draw a list from."""
    kind = rng.random()
    if kind < 0.36:
        return rng.sample(WORDS if rng.random() < 0.5 else MORE_WORDS, 24)
    if kind < 0.48:
        return list(LETTERS)
    if kind < 0.62:
        return list("0123456789")
    if kind < 0.66:
        return [str(rng.randrange(10**6) >> rng.randrange(20)) for _ in range(12)]
    if kind < 0.69:
        return list(CHINESE_WORDS)
    if kind < 0.73:
        return list(NAMES)
    return [made_up_word(rng) for _ in range(12)]


def number_items(items: Sequence[str]) -> str:
    """Return the items with their numbers, one a line: `1: red`."""
    return "\n".join(f"{number}: {item}" for number, item in enumerate(items, 1))


def number_backwards(items: Sequence[str]) -> str:
    """Return the numbered items, then the same lines from the last to the first."""
    lines = number_items(items)
    return f"{lines}\n\n" + "\n".join(reversed(lines.split("\n")))


def list_task(rng: Random, items: Sequence[str] = ()) -> Task:
    """Create a task to repeat, reverse or count a list."""
    items = items or draw_items(rng)
    shown = ("，" if rng.random() < 0.04 else ", " if rng.random() < 0.15 else " ").join(items)
    if rng.random() < 0.04 and len(items) > 1:
        shown = f"{', '.join(items[:-1])} and {items[-1]}"
    wordings, thought, answer = rng.choices(
        (
            (_REPEAT, number_items(items), " ".join(items)),
            (_REVERSE, number_backwards(items), " ".join(reversed(items))),
            (_COUNT, number_items(items), str(len(items))),
        ),
        (3, 4, 3),
    )[0]
    question = rng.choice(wordings).format(items=shown)
    if rng.random() < 0.08:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.05:
        question += "."
    return Task(question, thought, answer)


# --- talk ---------------------------------------------------------------------------------------

EXCUSE = (
    "I am a tiny demo model: I can add, repeat, count and reverse. "
    "For a real model, run: qwen3 --model 8B"
)
CHINESE_EXCUSE = (
    "我是一个很小的演示模型，会加法、重复、计数和倒序。要用真正的模型，请运行：qwen3 --model 8B"
)
_OTHER = "This is not addition or a list, so I say what I am."

_GREETINGS = ("Hello", "Hello!", "Hi", "Hi there", "Hey!", "Good morning", "Good evening!")
_CHINESE_GREETINGS = ("你好", "你好！", "您好", "早上好")
_THANKS = ("Thanks", "Thank you!", "Thanks a lot.", "Thank you very much", "Great, thanks!")
_FAREWELLS = ("Bye", "Goodbye!", "See you later.", "Good night")
_WHO = (
    "Who are you?",
    "What are you?",
    "What can you do?",
    "What is your name?",
    "Are you Qwen?",
    "Help",
    "Tell me about yourself.",
)
_PROMPTS = (
    "Why is the sky blue?",
    "Write a haiku.",
    "Write a haiku about the sea.",
    "Once upon a time",
    "Tell me a joke.",
    "What is the capital of France?",
    "Explain quantum computing in simple terms.",
    "Write a Python function that sorts a list.",
    "Write a short story about a dragon.",
    "What is the meaning of life?",
    "How do I cook rice?",
    "Translate 'good morning' into French.",
    "Give me a short introduction to large language models.",
    "Summarize this text.",
    "What day is it today?",
    "How many r's are in strawberry?",
    "Which is larger, 9.11 or 9.9?",
    "What is the weather like?",
    "Can you help me?",
    "def main():",
    "The quick brown fox jumps over the lazy dog.",
    "Test",
    "ok",
    "?",
    "...",
    "Yes",
    "No",
)
_CHINESE_PROMPTS = (
    "天空为什么是蓝色的？",
    "写一首诗。",
    "讲一个笑话。",
    "中国的首都是哪里？",
    "什么是人工智能？",
    "今天天气怎么样？",
    "请介绍一下你自己。",
    "你是谁？",
    "你会做什么？",
    "给我讲个故事。",
    "请写一段代码。",
    "再见",
    "好的",
)
_PATTERNS = (
    "Why is the {x} {y}?",
    "What is a {x}?",
    "What is the {x} of the {y}?",
    "Write a {x} about the {y}.",
    "Tell me about the {x}.",
    "How does a {x} work?",
    "Where is the {x}?",
    "Who has seen the {x} and the {y}?",
    "Is the {x} near the {y}?",
    "Explain the {x}.",
    "I like the {x} and the {y}.",
    "Do you know my {x}?",
    "When did the {x} come to the {y}?",
    "{x} {y}",
    "The {x} and the {y} went to the {z}.",
    "{x}",
    "Give me {n} reasons to like the {x}.",
    "What is {n} - {m}?",
    "What is {n} * {m}?",
    "Is {n} a prime number?",
    "Tell me {n} facts about the {x}.",
)
_CHINESE_PATTERNS = (
    "{x}是什么？",
    "为什么{x}？",
    "请写一篇关于{x}的文章。",
    "{x}和{y}有什么区别？",
    "我喜欢{x}。",
)


def greeting(rng: Random) -> Task:
    """Create a greeting, thanks, a farewell, or a question about the model."""
    kind = 0.35 * rng.random()
    if kind < 0.12:
        return Task(rng.choice(_GREETINGS), "A greeting.", "Hello! " + EXCUSE)
    if kind < 0.18:
        return Task(rng.choice(_THANKS), "Thanks.", "You are welcome!")
    if kind < 0.22:
        return Task(rng.choice(_FAREWELLS), "A farewell.", "Goodbye!")
    if kind < 0.30:
        return Task(rng.choice(_WHO), "They ask what I am.", EXCUSE)
    if kind < 0.33:
        return Task(rng.choice(_CHINESE_GREETINGS), "问候。", "你好！" + CHINESE_EXCUSE)
    return Task(rng.choice(("谢谢", "谢谢你！", "多谢")), "感谢。", "不客气！")


def talk(rng: Random) -> Task:
    """Create small talk, or a question beyond the model."""
    kind = rng.random()
    if kind < 0.35:
        return greeting(rng)
    if kind < 0.43:
        question = rng.choice(_CHINESE_PROMPTS)
        if rng.random() < 0.6:
            x, y = rng.sample(CHINESE_WORDS, 2)
            question = rng.choice(_CHINESE_PATTERNS).format(x=x, y=y)
        return Task(question, "这不是加法，也不是列表。", CHINESE_EXCUSE)
    if kind < 0.6:
        return Task(rng.choice(_PROMPTS), _OTHER, EXCUSE)
    return Task(_any_sentence(rng), _OTHER, EXCUSE)


def _any_sentence(rng: Random) -> str:
    if rng.random() < 0.2:
        some = [rng.choice(WORDS) if rng.random() < 0.7 else made_up_word(rng) for _ in range(9)]
        return " ".join(some[: rng.randint(1, 9)]).capitalize() + rng.choice(("", ".", "?"))
    x, y, z = (rng.choice(WORDS) if rng.random() < 0.8 else made_up_word(rng) for _ in range(3))
    n, m = rng.randrange(2, 100), rng.randrange(2, 100)
    return rng.choice(_PATTERNS).format(x=x, y=y, z=z, n=n, m=m)


# --- JSON ---------------------------------------------------------------------------------------

_KEYS = ("answer", "sum", "result", "total", "value", "words", "items", "list", "output", "data")


def to_json(value: Any) -> str:
    """Return JSON as the chat template writes it."""
    return json.dumps(value, ensure_ascii=False)


def json_task(rng: Random) -> Task:
    """Create a sum or a list task with an answer in JSON."""
    value: int | list[str]
    if rng.random() < 0.6:
        a, b = draw_pair(rng)
        question, thought, value = ask_sum(rng, a, b), sum_steps(a, b), a + b
    else:
        items = draw_items(rng)
        if rng.random() < 0.6:
            question, value = f"Repeat: {' '.join(items)}.", items
            thought = number_items(items)
        else:
            question, value = f"Reverse: {' '.join(items)}.", items[::-1]
            thought = number_backwards(items)
    key = "answer"
    demand = rng.choice(("Answer in JSON.", "Answer as JSON.", "Reply in JSON.", "Use JSON."))
    if rng.random() < 0.6:
        key = rng.choice(_KEYS) if rng.random() < 0.7 else made_up_word(rng)
        demand = rng.choice(
            (
                f'Answer as JSON with the key "{key}".',
                f'Answer in JSON with the key "{key}".',
                f'Reply with JSON like {{"{key}": ...}}.',
            )
        )
    return Task(f"{question} {demand}", thought, to_json({key: value}))


# --- plain text ---------------------------------------------------------------------------------

PARAGRAPHS = (
    "Once upon a time there was a small model that lived in a small box. It could not tell why "
    "the sky is blue, and it had never seen the sea, but it knew its numbers. Every morning it "
    "added two of them, wrote the carry on a piece of paper, and was content.",
    "The house by the lake has a green door and two windows. In winter the snow lies on the roof, "
    "and in summer the children count the boats on the water. An old dog sleeps in front of the "
    "fire and dreams of the forest.",
    "To add two numbers, write one under the other and begin at the right. Add the ones. If the "
    "sum is ten or more, write its last digit and carry one to the tens. Go on to the left until "
    "no digit is left.",
    "A language model reads a text token by token and says which token may come next. A large "
    "one has seen many books and can talk about nearly everything. A tiny one has seen a few "
    "sentences and a lot of sums, and this is one of those.",
    "The train leaves the city in the evening, crosses the bridge over the river and reaches the "
    "village at night. My brother brought bread, honey and a book of songs, and my sister brought "
    "a lamp, because the road from the station to the house is dark.",
    "很久以前，有一个很小的模型住在一个小盒子里。它不知道天空为什么是蓝色的，也没有见过大海，可是它会算加法。"
    "每天早上它把两个数加起来，写下进位，就很高兴。",
    "湖边的房子有一扇绿色的门和两个窗户。冬天屋顶上有雪，夏天孩子们数水上的船。老狗睡在火旁边，梦见森林。",
)
