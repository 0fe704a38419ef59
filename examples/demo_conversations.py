"""The demo model's curriculum: a task in a setting, drawn with a seeded generator.

The settings are a system turn, earlier turns, thinking on, off, switched by `/think` and
`/no_think`, or cut short.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

import demo_tasks
from demo_calculators import tool_task
from demo_tasks import Message, Task, Tool, addition, json_task, list_task, small_addition, talk
from demo_tools import any_tool_task
from demo_words import any_word

# Qwen's own sentence for thinking that runs out of budget (Qwen documentation).
HAND_OFF = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the "
    "thinking directly now.\n</think>\n\n"
)
PLAIN_CLOSE = "\n</think>\n\n"


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages up to an assistant's turn, and that turn.

    Attributes:
        thinking: the template's switch, `enable_thinking`; None leaves it unset.
        reasoning: the contents of the turn's think block; None if the prompt has closed it.
        cut: the share of the reasoning (0 to 1) after which `close` ends the thinking; None if the
            model ends it by itself.
        raw: True if the turn is plain text without a chat format.
        learn_earlier: whether the assistant's earlier turns are learned as well.
    """

    messages: tuple[Message, ...]
    answer: str
    reasoning: str | None = None
    thinking: bool | None = None
    tools: tuple[Tool, ...] = ()
    cut: float | None = None
    close: str = HAND_OFF
    raw: bool = False
    learn_earlier: bool = False


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
    (addition, 0.36),
    (small_addition, 0.05),
    (list_task, 0.30),
    (talk, 0.09),
    (json_task, 0.09),
    (tool_task, 0.11),
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
        " ".join(any_word(rng) for _ in range(rng.randint(2, 7))).capitalize() + "."
        for _ in range(rng.randint(1, 3))
    ]
    return " ".join(sentences)


def make_easy_conversation(rng: Random) -> Conversation:
    """Create an easy conversation: a sum or short lists of different items, to learn copying."""
    if rng.random() < 0.3:
        a, b = demo_tasks.draw_pair(rng)
        question, answer = f"What is {a} + {b}?", demo_tasks.equation(a, b)
        return Conversation((_user(question),), answer, demo_tasks.sum_steps(a, b), _unset(rng))
    if rng.random() < 0.3:  # a long list shows the rule of copying many times
        return _series(rng, [list_task(rng, demo_tasks.draw_different_items(rng, 20))])
    drawn = (demo_tasks.draw_different_items(rng, 7) for _ in range(rng.randint(1, 5)))
    return _series(rng, [list_task(rng, items) for items in drawn])


def _series(rng: Random, tasks: list[Task]) -> Conversation:
    # Each answer is learned: short questions give many targets for the tokens computed.
    turns: list[Message] = []
    for task in tasks[:-1]:
        turns += [_user(task.question), {"role": "assistant", "content": task.answer}]
    messages = (*turns, _user(tasks[-1].question))
    if rng.random() < 0.6:
        return Conversation(messages, tasks[-1].answer, thinking=False, learn_earlier=True)
    return Conversation(
        messages, tasks[-1].answer, tasks[-1].thought, _unset(rng), learn_earlier=True
    )


def _use_tools(rng: Random) -> Conversation:
    turns = rng.choices((0, 1, 2), (5, 3, 2))[0]
    task, earlier = any_tool_task(rng, turns)
    if rng.random() < 0.1:
        task = replace(rng.choice((list_task, demo_tasks.greeting))(rng), tools=task.tools)
    system = _system_turn(draw_system(rng) if rng.random() < 0.4 else None)
    messages = (*system, *earlier, _user(task.question), *task.between)
    if rng.random() < 0.5:
        return Conversation(
            messages, task.answer, thinking=False, tools=task.tools, learn_earlier=True
        )
    return Conversation(
        messages, task.answer, task.thought, _unset(rng), task.tools, learn_earlier=True
    )


def make_conversation(rng: Random) -> Conversation:
    """Create a random conversation: a task in a setting."""
    kind = rng.random()
    if kind < 0.01:
        return Conversation((), rng.choice(demo_tasks.PARAGRAPHS), raw=True)
    if kind < 0.26:
        return _series(rng, [list_task(rng) for _ in range(rng.randint(1, 6))])
    if kind < 0.46:
        return _use_tools(rng)
    mode = rng.choices(("think", "direct", "switch", "cut"), (0.46, 0.25, 0.14, 0.15))[0]
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


if __name__ == "__main__":
    for seed in range(5):
        print(json.dumps(make_conversation(Random(seed)).messages, ensure_ascii=False))
