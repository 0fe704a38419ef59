"""Accuracy of the demo by thinking budget: python -m benchmarks.budgets [PICTURE [QUESTIONS]]

Sums of one, two and three digits are answered greedily with budgets from 0 to 64 tokens. The table
has the share of correct answers. If PICTURE (.svg or .png) is named, it is plotted as well.
"""

import random
import sys
from pathlib import Path

from qwen3_mlx import LLM, SamplingParams, load
from qwen3_mlx.evaluate.plots import Panel, draw_speeds

BUDGETS = (0, 1, 2, 4, 8, 16, 32, 64)
DIGITS = (1, 2, 3)


def main() -> None:
    """Run all budgets and print the table."""
    picture = Path(sys.argv[1]) if sys.argv[1:] else None
    count = int(sys.argv[2]) if sys.argv[2:] else 60
    shares: dict[int, dict[int, float]] = {digits: {} for digits in DIGITS}
    print(f"{'budget, tokens':20}" + "".join(f"{digits:>6} digits" for digits in DIGITS))
    with load() as llm:
        for budget in BUDGETS:
            for digits in DIGITS:
                shares[digits][budget] = right_share(llm, budget, digits, count)
            cells = (f"{100 * shares[digits][budget]:>11.0f} %" for digits in DIGITS)
            print(f"{budget:<20}" + "".join(cells), flush=True)
    if picture:
        lines = {
            f"{digits} digits": {b: 100 * share for b, share in shares[digits].items() if b}
            for digits in DIGITS
        }
        panel = Panel("right answers, %", "tokens of thinking, at most", lines)
        draw_speeds(picture, "The demo model's sums", [panel])


def right_share(llm: LLM, budget: int, digits: int, count: int) -> float:
    """Return the share of correct answers to `count` sums."""
    rng = random.Random(digits)
    low, high = 10 ** (digits - 1), 10**digits - 1
    pairs = [(rng.randint(low, high), rng.randint(low, high)) for _ in range(count)]
    replies = llm.batch(
        [f"What is {a} + {b}?" for a, b in pairs],
        thinking=True,
        thinking_budget=budget,
        max_tokens=300,
        sampling=SamplingParams(temperature=0),
    )
    right = (
        reply.text.endswith(f"= {a + b}") for reply, (a, b) in zip(replies, pairs, strict=True)
    )
    return sum(right) / count


if __name__ == "__main__":
    main()
