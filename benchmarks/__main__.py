"""Run the benchmarks, most of them side by side with mlx-lm: python -m benchmarks, or make bench.

Each part is a command that can also be run by itself. Its output goes to stdout, and with --write
into the document, where it replaces the output of an earlier run.
"""

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.checkpoint import random_checkpoint

_FOLDER = "random-0.6B-4bit"
_RANKS = (
    "--hosts local:2 --against mlx-lm --terms equal --prompts 64 --together 8 --decode 100 "
    "--repeats 5"
)
PARTS = {
    "speed": f"qwen3 bench {_FOLDER} --against mlx-lm --terms equal --prompts 128,1024 "
    "--decode 16 --repeats 5 --plot speed.svg",
    # Short prompts: on a CPU, MLX's own bfloat16 takes seconds per prompt token.
    "out of the box": f"qwen3 bench {_FOLDER} --against mlx-lm --terms box --prompts 8 "
    "--together 8 --decode 3 --minutes 30",
    "second turn": f"python -m benchmarks.second_turn {_FOLDER}",
    "budgets": "python -m benchmarks.budgets budget.svg",
    "tools": "python -m benchmarks.tools",
    "host": "python -m benchmarks.host",
    "orders": "python -m benchmarks.orders",
    "products": "python -m benchmarks.products",
    "step profile": f"python -m benchmarks.step_profile {_FOLDER}",
    "tensor": f"qwen3 bench demo --split tensor {_RANKS}",
    "pipeline": f"qwen3 bench demo --split pipeline {_RANKS}",
    "server": "python -m benchmarks.server 32",
    "soak": "python -m benchmarks.soak",
    "server soak": "python -m benchmarks.server_soak",
    "hostile": "python -m benchmarks.hostile",
    "speculation": "python -m benchmarks.speculation",
    "contexts": "python -m benchmarks.contexts contexts.svg",
    "tune": "python -m benchmarks.tune",
    "tune larger": "python -m benchmarks.tune_larger tune.svg tune-kept.svg",
    "distill": "python -m benchmarks.distill",
    "plan": "python -m benchmarks.plan 0.6B 4B 8B:4",
}


def main() -> None:
    """Run the named parts, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; else all")
    parser.add_argument("--write", type=Path, help="put the tables into this document")
    parser.add_argument("--checkpoints", type=Path, help="keep the random checkpoints here")
    options = parser.parse_args()
    for name in options.parts:
        if name not in PARTS:
            parser.error(f"no part {name!r}: there are {', '.join(PARTS)}")
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        kept = options.checkpoints or Path(scratch)
        pictures = options.write.parent if options.write else kept
        for name in options.parts or PARTS:
            command = PARTS[name]
            print(f"$ {command}", flush=True)
            output = run(command, kept, pictures)
            if output is None:
                failed.append(name)
            elif options.write:
                options.write.write_text(with_part(options.write.read_text(), name, output))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def run(command: str, kept: Path, pictures: Path) -> str | None:
    """Run a part's command and return its output, or None if it fails."""
    words = shlex.split(command)
    if _FOLDER in words:
        words[words.index(_FOLDER)] = str(random_checkpoint(kept / _FOLDER, "0.6B"))
    words = [str(pictures / word) if word.endswith(".svg") else word for word in words]
    program = ["-m", "qwen3_mlx"] if words[0] == "qwen3" else []
    lines = []
    with subprocess.Popen(
        [sys.executable, *program, *words[1:]], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return None if process.returncode else "".join(lines)


def with_part(document: str, name: str, output: str) -> str:
    """Return the document with a part's command and output between the part's marks.

    Raises:
        ValueError: the marks do not occur exactly once.
    """
    start, end = f"<!-- {name} -->", "<!-- end -->"
    block = f"{start}\n\n```text\n$ {PARTS[name]}\n{output.rstrip()}\n```\n\n{end}"
    pattern = f"{re.escape(start)}.*?{re.escape(end)}"
    written, places = re.subn(pattern, lambda _: block, document, flags=re.DOTALL)
    if places != 1:
        raise ValueError(f"the document has {places} places for {name}")
    return written


if __name__ == "__main__":
    main()
