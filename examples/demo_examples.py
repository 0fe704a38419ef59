"""Examples and batches of token ids, from the demo model's curriculum.

B rows, L tokens, T positions with a loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import demo_conversations
import mlx.core as mx
import numpy as np
from demo_tokenizer import render_prompt
from tokenizers import Tokenizer

from qwen3_mlx.text.template import ChatTemplate

TOKENS_A_STEP = 3072
LONGEST = 800  # tokens; longer conversations are skipped
POOL = 768  # conversations drawn at once and sorted by length, for little padding


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids; `start` begins the last turn, and the loss covers the tokens at `learned`."""

    ids: list[int]
    start: int
    learned: Sequence[int]


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded inputs [B, L], the flat positions [T] with a loss, and their target tokens [T]."""

    inputs: mx.array
    positions: mx.array
    targets: mx.array


def make_example(
    talk: demo_conversations.Conversation, template: ChatTemplate, tokenizer: Tokenizer, rng: Random
) -> Example:
    """Convert a conversation to token ids; tokens that the engine forces have no loss."""

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    def example(prompt: list[int], turn: str, earlier: Sequence[int] = ()) -> Example:
        ids = prompt + encode(turn)
        return Example(ids, len(prompt), [*earlier, *range(len(prompt), len(ids))])

    if talk.raw:
        ids = encode(talk.answer + "<|endoftext|>")
        return Example(ids, 1, range(1, len(ids)))
    prompt = encode(render_prompt(template, talk))
    earlier = _answers(prompt, tokenizer) if talk.learn_earlier else ()
    if talk.reasoning is None:
        return example(prompt, talk.answer + "<|im_end|>", earlier)
    if talk.cut is None:
        turn = f"<think>\n{talk.reasoning}\n</think>\n\n{talk.answer}<|im_end|>"
        return example(prompt, turn, earlier)
    thoughts = encode(f"<think>\n{talk.reasoning}\n")
    kept = thoughts[: 1 + round(talk.cut * (len(thoughts) - 1))]
    # An engine appends the ids of the hand-off; a prompt may also contain it as text.
    if rng.random() < 0.6:
        closed = kept + encode(talk.close)
    else:
        closed = encode(tokenizer.decode(kept, skip_special_tokens=False) + talk.close)
    return example(prompt + closed, talk.answer + "<|im_end|>")


def _answers(prompt: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Return the positions of the assistant's earlier turns, without the first token of each.

    The first token decides whether to think: it is learned from the last turn alone.
    """
    begin = tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False).ids
    end = tokenizer.token_to_id("<|im_end|>")
    positions: list[int] = []
    for start in range(len(begin), len(prompt)):
        if prompt[start - len(begin) : start] == begin and end in prompt[start:]:
            positions += range(start + 1, prompt.index(end, start) + 1)
    return positions


def draw_steps(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    make: Callable[[Random], demo_conversations.Conversation],
    *,
    pool: Random,
    shares: int,
) -> list[list[Batch]]:
    """Create a pool of conversations and split it into steps, each into batches for the threads."""
    talks = (make(pool) for _ in range(POOL))
    drawn = (make_example(talk, template, tokenizer, pool) for talk in talks)
    examples = sorted((e for e in drawn if len(e.ids) <= LONGEST), key=lambda e: len(e.ids))
    steps: list[list[Example]] = []
    rows: list[Example] = []
    for example in examples:
        if len(rows) >= shares and (len(rows) + 1) * len(example.ids) > TOKENS_A_STEP:
            steps.append(rows)
            rows = []
        rows.append(example)
    if len(rows) >= shares:
        steps.append(rows)
    pool.shuffle(steps)
    return [[pad(rows[share::shares]) for share in range(shares)] for rows in steps]


def pad(rows: Sequence[Example]) -> Batch:
    """Join examples to a batch, padded to the longest."""
    length = max(len(row.ids) for row in rows) - 1
    inputs = np.zeros((len(rows), length), np.int32)
    positions: list[int] = []
    targets: list[int] = []
    for index, row in enumerate(rows):
        inputs[index, : len(row.ids) - 1] = row.ids[:-1]
        positions += [index * length + position - 1 for position in row.learned]
        targets += [row.ids[position] for position in row.learned]
    return Batch(mx.array(inputs), mx.array(positions), mx.array(targets))
