"""Many requests in a row, and what stays behind: python -m benchmarks.soak [REQUESTS].

Asks the demo checkpoint chats, completions, shared prefixes and long prompts, several at a time,
and cancels some of them at random. Memory, threads and open files are looked at after a quarter of
the requests and at the end. Fails where memory has grown by more than 2 %, or anything is left.
"""

import gc
import os
import random
import sys
import threading
from pathlib import Path

import mlx.core as mx

from qwen3_mlx import LLM, Finish, load
from qwen3_mlx.streams import Stream

_AT_ONCE = 6
_LIMIT = 0.02


def main() -> None:
    """Run the requests and print a table."""
    requests = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    rng = random.Random(0)
    with load(dequantize=False) as llm:
        reasons: dict[str, int] = {}
        for number in range(0, requests, _AT_ONCE):
            if number // _AT_ONCE == requests // _AT_ONCE // 4:
                before = state(llm)
            for reason in ask_some(llm, rng):
                reasons[reason] = reasons.get(reason, 0) + 1
        after = state(llm)
    print(f"{sum(reasons.values())} requests: {reasons}")
    for name, value in before.items():
        print(f"{name:20}{value:>14,}{after[name]:>14,}")
    grown = any(after[name] > before[name] * (1 + _LIMIT) for name in before)
    sys.exit("something is left behind" if grown else 0)


def ask_some(llm: LLM, rng: random.Random) -> list[str]:
    """Ask a few things at once and say how each ended."""
    streams: list[Stream] = []
    for _ in range(_AT_ONCE):
        a, b = rng.randrange(100), rng.randrange(100)
        words = f"What is {a} + {b}?"
        if rng.random() < 0.2:
            words = f"{'Repeat: red green blue. ' * rng.randint(5, 60)}{words}"
        thinking = rng.random() < 0.5
        streams.append(llm.stream(words, thinking=thinking, max_tokens=rng.randint(1, 60)))
    reasons = []
    for stream in streams:
        wanted = rng.randint(0, 8) if rng.random() < 0.3 else None
        for number, event in enumerate(stream):
            if number == wanted:
                stream.close()
            if isinstance(event, Finish):
                reasons.append(event.reason)
    return reasons


def state(llm: LLM) -> dict[str, int]:
    """Give what the process holds, without the prefixes that are kept on purpose."""
    llm.forget()
    gc.collect()
    return {
        "MLX's arrays, bytes": mx.get_active_memory(),
        "resident, bytes": _resident(),
        "threads": threading.active_count(),
        "open files": len(os.listdir("/dev/fd")),
    }


def _resident() -> int:
    status = Path("/proc/self/statm")
    if not status.is_file():
        return 0  # macOS tells a process only its peak
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
