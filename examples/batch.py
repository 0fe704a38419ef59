"""Batches: several prompts share each forward pass."""

import time

from qwen3_mlx import SamplingParams, load
from qwen3_mlx.cli.console import Bar

QUESTIONS = [f"What is {a} + {b}?" for a in (17, 25) for b in (12, 29)]
GREEDY = SamplingParams(temperature=0)


def main() -> None:
    """Answer the questions one by one, then in one batch, and compare the times."""
    with load() as llm, Bar("Answering") as bar:
        started = time.perf_counter()
        for question in QUESTIONS:
            llm.chat(question, sampling=GREEDY, max_tokens=200)
        alone = time.perf_counter() - started
        llm.forget()
        started = time.perf_counter()
        replies = llm.batch(QUESTIONS, sampling=GREEDY, max_tokens=200, progress=bar)
        together = time.perf_counter() - started
    for question, reply in zip(QUESTIONS, replies, strict=True):
        print(f"{question} {reply.text}")
    print(f"one by one {alone:.2f} s, together {together:.2f} s")


if __name__ == "__main__":
    main()
