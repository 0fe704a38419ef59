"""Leak test of the library: python -m benchmarks.soak [REQUESTS].

Sends the demo checkpoint chats with shared prefixes and long prompts, several at a time, and
cancels some of them at random. Memory, threads and open files are sampled twenty times. Fails if
the maximum of the second half is more than 2 % above the maximum of the first half.
"""

import ctypes
import gc
import os
import random
import sys
import threading
from collections import Counter
from pathlib import Path

import mlx.core as mx

from qwen3_mlx import LLM, Finish, load
from qwen3_mlx.api.stream import Stream

_AT_ONCE = 6
_LOOKS = 20
_LIMIT = 0.02


def main() -> None:
    """Run the requests and print a table."""
    requests = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    rng = random.Random(0)
    with load(dequantize=False) as llm:
        reasons: Counter[str] = Counter()
        states: list[dict[str, int]] = []
        rounds = max(_LOOKS, requests // _AT_ONCE + 1)
        for number in range(rounds):
            reasons.update(ask_some(llm, rng))
            if number * _LOOKS // rounds < (number + 1) * _LOOKS // rounds:
                states.append(state(llm))
    print(f"{reasons.total():,} requests: {dict(reasons)}")
    print(f"{'the most in':20}{'first half':>14}{'second half':>14}")
    grown = False
    for name in states[0]:
        values = [state[name] for state in states]
        first, second = max(values[: _LOOKS // 2]), max(values[_LOOKS // 2 :])
        print(f"{name:20}{first:>14,}{second:>14,}")
        grown |= second > first * (1 + _LIMIT)
    sys.exit("something is left behind" if grown else 0)


def ask_some(llm: LLM, rng: random.Random) -> list[str]:
    """Run a few requests at once and return the finish reason of each."""
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
    """Return what the process holds, after clearing the prefix cache."""
    llm.forget()
    gc.collect()
    _give_back()
    return {
        "MLX's arrays, bytes": mx.get_active_memory(),
        "resident, bytes": _resident(),
        "threads": threading.active_count(),
        "open files": len(os.listdir("/dev/fd")),
    }


def _give_back() -> None:
    """Return freed memory to the system, which glibc by itself does at random."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


def _resident() -> int:
    status = Path("/proc/self/statm")
    if not status.is_file():
        return 0  # macOS reports only the peak
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
