"""Submitting a step late, early or in two halves: python -m benchmarks.orders [FOLDER] [TOKENS]

Time and CPU time of a token, and the memory above weights and caches, of one sequence and of eight,
in turns. FOLDER is a checkpoint, by default the demo. On a GPU, late steps leave it idle, and early
ones copy caches; see record 008.
"""

import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from unittest.mock import patch

import qwen3_mlx
from qwen3_mlx import backend  # first: the BLAS

# isort: split

import mlx.core as mx

from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.in_flight import InFlightStep
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.verify.paths import Decoding

Order = Callable[[InFlightStep, InFlightStep], None]
_REPEATS = 5


def late(step: InFlightStep, former: InFlightStep) -> None:
    """Leave the whole step for when the one before it is done."""


def early(step: InFlightStep, former: InFlightStep) -> None:
    """Submit the whole step while the one before it runs, as mlx-lm does."""
    mx.async_eval(step.arrays)


ORDERS: Mapping[str, Order] = {
    "late": late,
    "early": early,
    "halves": InFlightStep.submit_first_half,
}


def decode(model: Qwen3, sequences: int, count: int) -> tuple[list[list[int]], dict[str, float]]:
    """Decode `count` tokens of each sequence; return them, and milliseconds and MB of it."""
    engine = Engine(model, vocabulary=model.config.vocab_size)
    prompts = [[(7 * number + n) % 256 for n in range(64)] for number in range(sequences)]
    decoding = Decoding(prompts, count + 16)
    decoding.submit(engine)
    while min(map(len, decoding.replies)) < 8:  # prompts read, joint buffers made
        engine.step()
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        engine.step()
    figures = {
        "ms a token": (time.perf_counter() - started) / count * 1e3,
        "CPU ms": (time.process_time() - cpu) / count * 1e3,
        "MB above": (mx.get_peak_memory() - held) / 1e6,
    }
    while engine.step():
        pass
    return decoding.replies, figures


def main() -> None:
    """Decode in each order in turn, and print the medians."""
    source = sys.argv[1] if len(sys.argv) > 1 else "demo"
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    with qwen3_mlx.load(source) as llm:
        print(f"{source} on {backend.describe()['device']}, {count} tokens, {_REPEATS} turns")
        print(f"{'':22}{'ms a token':>12}{'CPU ms':>12}{'MB above':>12}")
        for sequences in (1, 8):
            llm.compute(partial(_compare, sequences=sequences, count=count))


def _compare(model: Qwen3, sequences: int, count: int) -> None:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ORDERS}
    replies = []
    for _ in range(_REPEATS):
        for name, order in ORDERS.items():
            with patch.object(InFlightStep, "submit_first_half", order):
                tokens, figures = decode(model, sequences, count)
            replies.append(tokens)
            found[name].append(figures)
    for name, runs in found.items():
        medians = [median(run[key] for run in runs) for key in runs[0]]
        print(f"{sequences} together, {name:10}" + "".join(f"{value:12.3f}" for value in medians))
    print(f"tokens equal: {all(reply == replies[0] for reply in replies)}", flush=True)


if __name__ == "__main__":
    main()
