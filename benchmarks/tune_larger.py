"""What a fine-tune teaches and forgets: python -m benchmarks.tune_larger [LOSSES BARS]

The demo model learns which of two numbers is larger. Counted are right answers to 24 questions that
are no lessons, before and after; how many of them it still thinks about when asked to; and sums
whose likeliest reply is what it was, with and without thinking. The pictures are the losses of the
last run, and these shares of all runs.
"""

import json
import random
import shutil
import sys
import tempfile
import time
from itertools import count, islice
from pathlib import Path
from typing import Any

import qwen3_mlx
from qwen3_mlx.evaluate.plots import saved_figure

_RUNS: dict[str, dict[str, Any]] = {
    "60 steps": {"steps": 60, "batch": 8},
    "200 steps": {"steps": 200, "batch": 16},
    "200 steps, --keep": {
        "steps": 200,
        "batch": 8,
        "learning_rate": 5e-4,
        "keep": "keep.txt",
        "keep_weight": 20.0,
    },
}


def main() -> None:
    """Print a table of the runs."""
    draw = random.Random(0)
    lessons = [_question(draw) for _ in range(1500)]
    others = (_question(random.Random(1000 + place)) for place in count())
    asked = list(islice((pair for pair in others if pair not in lessons), 24))
    held = [_sum(random.Random(2000 + place)) for place in range(40)]
    print("| | right | still thinks | sums as before: direct | thinking | KL | CPU s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = folder / "lessons.jsonl"
        pairs = [{"prompt": question, "completion": answer} for question, answer in lessons]
        data.write_text("\n".join(map(json.dumps, pairs)))
        (folder / "keep.txt").write_text("\n".join(_sum(draw) for _ in range(300)))
        right, thinking, before = _measured(None, asked, held)
        print(f"| before | {right} of {len(asked)} | {thinking} | | | | |", flush=True)
        shares: dict[str, list[float]] = {"before": [right / len(asked), 1.0, 1.0]}
        for name, options in _RUNS.items():
            if "keep" in options:
                options = {**options, "keep": folder / options["keep"]}
            cpu, out = time.process_time(), folder / name
            made = qwen3_mlx.tune("demo", data=data, out=out, **options)
            cpu = time.process_time() - cpu
            right, thinking, after = _measured(out, asked, held)
            equal = [sum(map(str.__eq__, *pair)) for pair in zip(before, after, strict=True)]
            same = [f"{count} of {len(held)}" for count in equal]
            shares[name] = [right / len(asked), *(count / len(held) for count in equal)]
            kl = "" if made.kept_kl is None else f"{made.kept_kl:.1e}"
            print(
                f"| {name} | {right} of {len(asked)} | {thinking} | {' | '.join(same)} "
                f"| {kl} | {cpu:.0f} |",
                flush=True,
            )
        if len(sys.argv) > 1:
            shutil.copy(out / "losses.svg", sys.argv[1])
            _draw(Path(sys.argv[2]), shares)


def _draw(path: Path, shares: dict[str, list[float]]) -> None:
    """Draw a group of bars for each of the shares, with a bar for each run."""
    labels = ["which is larger: right", "sums as before, direct", "sums as before, thinking"]
    with saved_figure(path, width=8) as figure:
        axes = figure.subplots()
        width = 0.8 / len(shares)
        for place, (name, of_run) in enumerate(shares.items()):
            heights = [100 * share for share in of_run]
            starts = [group + place * width for group in range(len(labels))]
            axes.bar(starts, heights, width, align="edge", label=name)
        axes.set_xticks([group + 0.4 for group in range(len(labels))], labels)
        axes.set_ylabel("per cent")
        axes.grid(alpha=0.2, axis="y")
        figure.legend(loc="outside lower left", ncols=len(shares), frameon=False)


def _question(draw: random.Random) -> tuple[str, str]:
    a, b = draw.sample(range(1, 100), 2)
    return f"Which is larger, {a} or {b}?", str(max(a, b))


def _sum(draw: random.Random) -> str:
    return f"What is {draw.randint(1, 60)} + {draw.randint(1, 39)}?"


def _measured(
    adapter: Path | None, asked: list[tuple[str, str]], sums: list[str]
) -> tuple[int, int, list[list[str]]]:
    """Return the right answers, the replies that think, and the replies to sums in both modes."""
    questions = [question for question, _ in asked]
    with qwen3_mlx.load("demo", adapter=adapter) as llm:

        def replies(prompts: list[str], *, thinking: bool) -> list[qwen3_mlx.Reply]:
            return llm.batch(prompts, thinking=thinking, temperature=0, max_tokens=200)

        direct = replies(questions, thinking=False)
        right = sum(
            reply.text.strip() == answer for reply, (_, answer) in zip(direct, asked, strict=True)
        )
        thought = sum(bool(reply.reasoning) for reply in replies(questions, thinking=True))
        of_sums = [[r.text for r in replies(sums, thinking=mode)] for mode in (False, True)]
    return right, thought, of_sums


if __name__ == "__main__":
    main()
