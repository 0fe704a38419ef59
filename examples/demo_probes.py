"""Probes that show the progress of the demo model's training, on held-out questions."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import demo_calculators
import demo_conversations
import demo_tasks
import demo_tools
import demo_words
import mlx.core as mx
import numpy as np
from demo_examples import Example, make_example, pad
from demo_network import logits_of
from demo_tasks import Task
from tokenizers import Tokenizer

from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.text.template import ChatTemplate


class Probe:
    """Conversations with a known next turn, to measure the share that is reproduced exactly."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.batch = pad(examples)
        ends = np.cumsum([len(example.ids) - example.start for example in examples])
        self._starts = np.concatenate([[0], ends[:-1]])

    def run(self, model: Qwen3) -> float:
        """Return the share of turns that greedy decoding reproduces exactly.

        One forward pass is enough: a turn is reproduced if each of its tokens is the likeliest
        after the tokens before it.
        """
        guesses = mx.argmax(logits_of(model, self.batch), axis=-1)
        right = np.array(guesses == self.batch.targets)
        return float(np.logical_and.reduceat(right, self._starts).mean())


def make_probes(template: ChatTemplate, tokenizer: Tokenizer) -> dict[str, Probe]:
    """Create the probes that show the progress of a training."""
    rng = Random("probes")
    unseen: list[tuple[int, int]] = []
    while len(unseen) < 50:
        a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
        if demo_tasks.held_out(a, b):
            unseen.append((a, b))
    sums = [
        Task(f"What is {a} + {b}?", demo_tasks.sum_steps(a, b), demo_tasks.equation(a, b))
        for a, b in unseen
    ]
    settings = {"sums": [_as_turn(task) for task in sums]}
    items = []
    for _ in range(64):
        source = rng.choice((demo_words.WORDS, "abcdefghijklmnopqrstuvwxyz", "0123456789"))
        items.append([rng.choice(source) for _ in range(rng.randint(3, 6))])
    new = [rng.choices(demo_words.UNSEEN_WORDS, k=rng.randint(3, 6)) for _ in range(64)]
    for name, lists in (("", items), ("unseen ", new)):
        for verb, answer, thought in (
            ("Repeat", lambda x: " ".join(x), demo_tasks.number_items),
            ("Reverse", lambda x: " ".join(reversed(x)), demo_tasks.number_backwards),
            ("Count", lambda x: str(len(x)), demo_tasks.number_items),
        ):
            tasks = [Task(f"{verb}: {' '.join(x)}", thought(x), answer(x)) for x in lists]
            settings[f"{name}{verb}"] = [_as_turn(task) for task in tasks]
            settings[f"{name}{verb} direct"] = [_direct(task) for task in tasks]
    settings["JSON"] = [_as_turn(demo_tasks.json_task(rng)) for _ in range(50)]
    settings["calc"] = [_as_turn(demo_calculators.tool_task(rng)) for _ in range(50)]
    settings["tools"] = [_as_turn(demo_tools.any_tool_task(rng)[0]) for _ in range(64)]
    settings["tools direct"] = [_direct(demo_tools.any_tool_task(rng)[0]) for _ in range(64)]
    return {
        name: Probe([make_example(talk, template, tokenizer, rng) for talk in talks])
        for name, talks in settings.items()
    }


def _as_turn(task: Task) -> demo_conversations.Conversation:
    question: demo_tasks.Message = {"role": "user", "content": task.question}
    return demo_conversations.Conversation(
        (question, *task.between), task.answer, task.thought, tools=task.tools
    )


def _direct(task: Task) -> demo_conversations.Conversation:
    return replace(_as_turn(task), reasoning=None, thinking=False)


def run_probes(probes: dict[str, Probe], model: Qwen3) -> dict[str, float]:
    """Run all probes and return the share of each."""
    return {name: probe.run(model) for name, probe in probes.items()}
