"""The curriculum of the demo model: random conversations, drawn with a seeded generator.

A `Task` is a question, its answer and the thinking between them. `make_conversation` puts a task
into a setting: with or without a system turn and earlier turns, with thinking on, off, switched by
`/think` and `/no_think`, or cut short. This module needs neither MLX nor a tokenizer.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

Message = dict[str, Any]
Tool = dict[str, Any]

# Qwen's own sentence for thinking that runs out of budget (Qwen documentation).
HAND_OFF = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the "
    "thinking directly now.\n</think>\n\n"
)
PLAIN_CLOSE = "\n</think>\n\n"


@dataclass(frozen=True, slots=True)
class Task:
    """A question with the assistant's thinking and answer."""

    question: str
    thought: str
    answer: str
    tools: tuple[Tool, ...] = ()
    # Messages between the question and the answer: a tool call and its result.
    between: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages up to an assistant's turn, and that turn.

    Attributes:
        thinking: the template's switch, `enable_thinking`; None leaves it unset.
        reasoning: the contents of the turn's think block; None if the prompt has closed it.
        cut: the share of the reasoning (0 to 1) after which `close` ends the thinking; None if the
            model ends it by itself.
        raw: True if the turn is plain text without a chat format.
    """

    messages: tuple[Message, ...]
    answer: str
    reasoning: str | None = None
    thinking: bool | None = None
    tools: tuple[Tool, ...] = ()
    cut: float | None = None
    close: str = HAND_OFF
    raw: bool = False


# --- addition -----------------------------------------------------------------------------------

_PLACES = ("ones", "tens", "hundreds", "thousands")
_WORDINGS = (
    "{a} + {b} = ?",
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

WORDS = (
    "red green blue yellow black white orange purple apple pear plum lemon cherry grape dog cat "
    "bird fish horse mouse bear wolf sun moon star sky rain snow wind cloud house door window "
    "roof wall table chair lamp book pen paper stone river lake sea hill tree leaf flower grass "
    "bread milk tea salt sugar honey spoon cup plate king queen ship boat train road bridge city "
    "village garden forest island winter summer spring autumn morning evening night day week "
    "month music song dance game ball box bag coat shoe hat ring gold silver iron glass fire "
    "water earth air hand foot head heart eye ear nose mouth friend brother sister mother father "
    "one two three four five six seven eight nine ten small large old new warm cold quick slow"
).split()
CHINESE_WORDS = (
    "红 绿 蓝 猫 狗 鸟 鱼 山 水 火 天空 月亮 太阳 苹果 花 树 书 茶 米 雨 雪 风 云"
).split()

_REPEAT = (
    "Repeat: {items}",
    "Repeat: {items}",
    "Repeat after me: {items}",
    "Please repeat: {items}",
    "Say this again: {items}",
    "重复：{items}",
)
_REVERSE = (
    "Reverse: {items}",
    "Reverse: {items}",
    "Reverse this list: {items}",
    "Please reverse: {items}",
    "Say these backwards: {items}",
    "倒序：{items}",
)
_COUNT = (
    "Count: {items}",
    "Count: {items}",
    "Count these: {items}",
    "How many items are in this list: {items}",
    "How many words: {items}",
    "计数：{items}",
)


def draw_different_items(rng: Random) -> list[str]:
    """Return a random list of different words or letters.

    In a list with repeated items an item has two successors, which hides the rule of copying. Long
    lists show the rule most often per step of training.
    """
    pool = rng.choice((WORDS, WORDS, WORDS, "abcdefghijklmnopqrstuvwxyz"))
    return rng.sample(pool, rng.randint(2, 7) if rng.random() < 0.4 else rng.randint(8, 26))


def draw_items(rng: Random) -> list[str]:
    """Return a random short list of words, letters, digits, Chinese words or made-up words."""
    size = rng.choices(range(1, 9), (2, 4, 6, 5, 4, 3, 2, 1))[0]
    kind = rng.random()
    if kind < 0.45:
        return [rng.choice(WORDS) for _ in range(size)]
    if kind < 0.6:
        return [rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(size)]
    if kind < 0.75:
        return [str(rng.randrange(10)) for _ in range(size)]
    if kind < 0.8:
        return [rng.choice(CHINESE_WORDS) for _ in range(size)]
    return [made_up_word(rng) for _ in range(min(size, 5))]


def made_up_word(rng: Random) -> str:
    """Return a word of random syllables."""
    syllables = (rng.choice("bcdfghklmnprstvwz") + rng.choice("aeiou") for _ in range(3))
    return "".join(syllables)[: rng.randint(3, 6)]


def number_items(items: Sequence[str]) -> str:
    """Return the items with their numbers: `1 red 2 green`."""
    return " ".join(f"{number} {item}" for number, item in enumerate(items, 1))


def list_task(rng: Random) -> Task:
    """Create a task to repeat, reverse or count a list."""
    items = draw_items(rng)
    shown = ("，" if rng.random() < 0.05 else ", " if rng.random() < 0.15 else " ").join(items)
    wordings, answer = rng.choice(
        (
            (_REPEAT, " ".join(items)),
            (_REVERSE, " ".join(reversed(items))),
            (_COUNT, str(len(items))),
        )
    )
    return Task(rng.choice(wordings).format(items=shown), number_items(items), answer)


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


def talk(rng: Random) -> Task:
    """Create small talk, or a question beyond the model."""
    kind = rng.random()
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
    if kind < 0.35:
        return Task(rng.choice(("谢谢", "谢谢你！", "多谢")), "感谢。", "不客气！")
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
        thought = number_items(items)
        if rng.random() < 0.6:
            question, value = f"Repeat: {' '.join(items)}.", items
        else:
            question, value = f"Reverse: {' '.join(items)}.", items[::-1]
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


# --- tools --------------------------------------------------------------------------------------

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
        if rng.random() < 0.35:
            name = "_".join(made_up_word(rng) for _ in range(rng.randint(1, 2)))
    if rng.random() < 0.5:
        parameters = (rng.choice(_ONE_PARAMETER),)
        if rng.random() < 0.3:
            parameters = (made_up_word(rng),)
        if rng.random() < 0.5:
            parameters = rng.choice(_TWO_PARAMETERS)
    return Calculator(name, rng.choice(_TOOL_DESCRIPTIONS), parameters)


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
    return _schema(rng, tool.name, tool.description, properties)


def _schema(rng: Random, name: str, description: str, properties: dict[str, Any]) -> Tool:
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if rng.random() < 0.7:
        parameters["required"] = list(properties)
    parts = [("name", name), ("description", description), ("parameters", parameters)]
    if rng.random() < 0.2:
        rng.shuffle(parts)
    if rng.random() < 0.1:
        parts = [part for part in parts if part[0] != "description" or "calc" not in name]
    return {"type": "function", "function": dict(parts)}


def offer_tools(rng: Random, tool: Calculator) -> tuple[Tool, ...]:
    """Return the tools on offer: a calculator, sometimes with another tool."""
    tools = [describe_calculator(rng, tool)]
    if rng.random() < 0.25:
        name, description, parameter = rng.choice(_OTHER_TOOLS)
        tools.append(_schema(rng, name, description, {parameter: {"type": "string"}}))
        rng.shuffle(tools)
    return tuple(tools)


def write_calls(calls: Sequence[Message]) -> str:
    """Return tool calls as the chat template writes them."""
    return "\n".join(
        f'<tool_call>\n{{"name": "{call["function"]["name"]}", '
        f'"arguments": {to_json(call["function"]["arguments"])}}}\n</tool_call>'
        for call in calls
    )


def tool_task(rng: Random) -> Task:
    """Create a task with tools on offer: a sum for the tool, or a task that needs none."""
    tool = draw_calculator(rng)
    tools = offer_tools(rng, tool)
    if rng.random() < 0.15:
        task = rng.choice((list_task, talk))(rng)
        return replace(task, tools=tools)
    pairs = [_tool_pair(rng)]
    question = ask_sum(rng, *pairs[0])
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
        return draw_number(rng, rng.randint(4, 5)), draw_number(rng, rng.randint(4, 5))
    return draw_pair(rng, most=4)


def _after_call(
    rng: Random, task: Task, calls: list[Message], pairs: list[tuple[int, int]]
) -> Task:
    request: Message = {"role": "assistant", "content": "", "tool_calls": calls}
    if rng.random() < 0.5:
        request["reasoning_content"] = task.thought
    form = rng.choice(("{}", "{}", "{}", '{{"result": {}}}', "{}.0", "The result is {}"))
    results = [{"role": "tool", "content": form.format(a + b)} for a, b in pairs]
    answer = "\n".join(equation(a, b) for a, b in pairs)
    return replace(task, between=(request, *results), thought="I have the result.", answer=answer)


# --- settings -----------------------------------------------------------------------------------

_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are terse.",
    "Be brief.",
    "Answer politely.",
    "You are a careful calculator.",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "你是一个有用的助手。",
)
_TASKS: tuple[tuple[Callable[[Random], Task], float], ...] = (
    (addition, 0.42),
    (small_addition, 0.05),
    (list_task, 0.18),
    (talk, 0.10),
    (json_task, 0.09),
    (tool_task, 0.16),
)
_MAKERS = tuple(maker for maker, _ in _TASKS)
_SHARES = tuple(share for _, share in _TASKS)


def draw_task(rng: Random) -> Task:
    """Create a random task of any kind."""
    return rng.choices(_MAKERS, _SHARES)[0](rng)


def draw_system(rng: Random) -> str | None:
    """Return a random system message: none, a usual one, or random sentences."""
    kind = rng.random()
    if kind < 0.55:
        return None
    if kind < 0.85:
        return rng.choice(_SYSTEMS)
    sentences = [
        " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 7))).capitalize() + "."
        for _ in range(rng.randint(1, 3))
    ]
    return " ".join(sentences)


def make_easy_conversation(rng: Random) -> Conversation:
    """Create an easy conversation: a single sum or list, from which copying is learned first."""
    if rng.random() < 0.6:
        a, b = draw_pair(rng)
        task = Task(f"What is {a} + {b}?", sum_steps(a, b), equation(a, b))
    else:
        task = list_task(rng)
    if rng.random() < 0.35:
        if rng.random() < 0.5:
            task = small_addition(rng)
        return Conversation((_user(task.question),), task.answer, thinking=False)
    return Conversation((_user(task.question),), task.answer, task.thought, _unset(rng))


def make_copying_conversation(rng: Random) -> Conversation:
    """Create any conversation, or half of the time a list of different items to copy."""
    if rng.random() < 0.5:
        return make_conversation(rng)
    items = draw_different_items(rng)
    turned = rng.random() < 0.35
    wordings, answer = (_REVERSE, items[::-1]) if turned else (_REPEAT, items)
    question = rng.choice(wordings).format(items=" ".join(items))
    if len(items) > 7 or rng.random() < 0.5:
        return Conversation((_user(question),), " ".join(answer), thinking=False)
    thought = number_items(items)
    return Conversation((_user(question),), " ".join(answer), thought, _unset(rng))


def make_conversation(rng: Random) -> Conversation:
    """Create a random conversation: a task in a setting."""
    if rng.random() < 0.015:
        return Conversation((), rng.choice(PARAGRAPHS), raw=True)
    mode = rng.choices(("think", "direct", "switch", "cut"), (0.46, 0.27, 0.13, 0.14))[0]
    task = draw_task(rng)
    if mode == "direct" and rng.random() < 0.3:
        task = small_addition(rng)  # all hundred are learned by heart
    earlier = _draw_history(rng)
    system = draw_system(rng)
    if mode == "switch":
        return _switched(rng, task, system, earlier)
    flag = _suffix(rng.choice((True, False)) if mode == "direct" and rng.random() < 0.1 else None)
    messages = (*_system_turn(system), *earlier, _user(task.question + flag), *task.between)
    if mode == "direct":  # the hard switch: flags have no effect
        return Conversation(messages, task.answer, thinking=False, tools=task.tools)
    talk = Conversation(messages, task.answer, task.thought, _unset(rng), task.tools)
    if mode == "think":
        return talk
    cut = 0.0 if rng.random() < 0.15 else rng.random()
    return replace(talk, cut=cut, close=HAND_OFF if rng.random() < 0.75 else PLAIN_CLOSE)


def _unset(rng: Random) -> bool | None:
    return rng.choice((None, True))


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _system_turn(system: str | None) -> tuple[Message, ...]:
    return () if system is None else ({"role": "system", "content": system},)


def _draw_history(rng: Random) -> tuple[Message, ...]:
    turns: list[Message] = []
    for _ in range(rng.choices((0, 1, 2, 4), (0.74, 0.18, 0.06, 0.02))[0]):
        task = rng.choices((addition, list_task, talk), (0.5, 0.3, 0.2))[0](rng)
        answer: Message = {"role": "assistant", "content": task.answer}
        if rng.random() < 0.3:
            answer["reasoning_content"] = task.thought
        turns += [_user(task.question), answer]
    return tuple(turns)


def _switched(
    rng: Random, task: Task, system: str | None, earlier: tuple[Message, ...]
) -> Conversation:
    # The last flag wins, whether in the system turn or at the end of a question.
    thinks = True
    flags: list[bool | None] = [rng.choice((True, False, None, None))]
    turns = []
    for message in (*earlier, _user(task.question)):
        if message["role"] == "user":
            flags.append(rng.choice((True, False, False, None)))
            message = _user(message["content"] + _suffix(flags[-1]))
        turns.append(message)
    for flag in flags:
        thinks = thinks if flag is None else flag
    if flags[0] is not None:
        system = f"{system or ''}{_suffix(flags[0])}".lstrip()
    return Conversation(
        (*_system_turn(system), *turns, *task.between),
        task.answer,
        task.thought if thinks else "",
        _unset(rng),
        task.tools,
    )


def _suffix(flag: bool | None) -> str:
    return "" if flag is None else " /think" if flag else " /no_think"


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


if __name__ == "__main__":
    for seed in range(5):
        print(json.dumps(make_conversation(Random(seed)).messages, ensure_ascii=False))
