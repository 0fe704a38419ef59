"""All that a machine with a GPU is asked for, as one log: python -m benchmarks.gpu [STEP ...]

- verify: the checks of `qwen3 doctor --verify`
- tests: the tests whose results depend on the device
- demo: `qwen3 bench` of the demo
- 0.6B, 8B: random 4-bit checkpoints of these shapes beside mlx-lm: alone after 2,048 tokens, and
  eight together
- orders: steps submitted late, early and in two halves, of 0.6B's shape (`benchmarks.orders`)

Without STEP all of them, which takes a quarter of an hour. Each step has a limit of its time, so
that a machine that is at hand for minutes shows something of every step. The exit code is 1 if a
step failed.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkpoint import random_checkpoint

_ROOMS = ("tests/cache", "tests/model", "tests/engine", "tests/api", "tests/verify")
_FOLDER = "{size}"  # of a random checkpoint, in a command


@dataclass(frozen=True, slots=True)
class Step:
    """A command, with the seconds that it may take; `size` names the checkpoint that it needs."""

    seconds: float
    command: Sequence[str]
    size: str | None = None


def _bench(size: str, seconds: float) -> Step:
    options = ["--against", "mlx-lm", "--terms", "box", "--prompts", "2048", "--together", "8"]
    command = ["-m", "qwen3_mlx", "bench", _FOLDER, *options, "--repeats", "3"]
    return Step(seconds, command, size)


STEPS: Mapping[str, Step] = {
    "verify": Step(120, ["-m", "qwen3_mlx.verify"]),
    "tests": Step(300, ["-m", "pytest", "-q", "-p", "no:cacheprovider", *_ROOMS]),
    "demo": Step(60, ["-m", "qwen3_mlx", "bench", "demo"]),
    "0.6B": _bench("0.6B", 150),
    "8B": _bench("8B", 240),
    "orders": Step(30, ["-m", "benchmarks.orders", _FOLDER], "0.6B"),
}


def main(names: Sequence[str], steps: Mapping[str, Step] = STEPS) -> int:
    """Run the steps of these names, by default all; return the exit code."""
    if unknown := [name for name in names if name not in steps]:
        sys.exit(f"there is no step {unknown[0]!r}; there are {', '.join(steps)}")
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names or steps:
            step, started = steps[name], time.monotonic()
            print(f"\n=== {name}", flush=True)
            if _run(step, Path(folder)):
                failed.append(name)
            print(f"=== {name}: {time.monotonic() - started:.0f} s", flush=True)
    print(f"\nfailed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def _run(step: Step, folder: Path) -> int:
    """Run a step, with its output as it comes; return the exit code, 1 if its time was over."""
    command = [sys.executable, *step.command]
    if step.size:
        made = str(random_checkpoint(folder / step.size, step.size))
        command = [made if word == _FOLDER else word for word in command]
    try:
        return subprocess.run(command, timeout=step.seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"stopped after {step.seconds:.0f} s")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
