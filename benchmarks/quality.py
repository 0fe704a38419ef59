"""Quality of quantized demo checkpoints: divergence on held-out text, and the exam.

Two kinds of text. The topics of Python's own help: measured recipes calibrate on the first half,
and all are evaluated on the second. And conversations of the demo's own curriculum, of two seeds.
"""

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import qwen3_mlx  # first: the BLAS
from qwen3_mlx import LLM, convert, load
from qwen3_mlx.checkpoint.calibration_text import default_text
from qwen3_mlx.evaluate.divergence import divergence
from qwen3_mlx.evaluate.plots import Point
from qwen3_mlx.text.template import ChatTemplate

DEMO = Path(qwen3_mlx.__file__).parent / "demo"
_EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
_TOKENS = 8192  # of the held-out text
_ROW = re.compile(r"(.+?)\s+(\d+)/(\d+)\s+[\d.]+%")


@dataclass(frozen=True, slots=True)
class Made:
    """A converted demo: recipe, bits per weight, mean KL (nats) on held-out text, and seconds."""

    recipe: str
    name: str
    bits_per_weight: float
    mean_kl: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Text:
    """Text for calibration, and held-out pieces for evaluation."""

    calibration: str
    held_out: Sequence[str]


def topics() -> Text:
    """Return the topics of Python's help, split in two halves."""
    text = default_text()
    first, second = text[: len(text) // 2], text[len(text) // 2 :]
    return Text(first, [second])


def conversations(count: int = 300) -> Text:
    """Return conversations of the demo's curriculum, rendered with its template, of two seeds."""
    sys.path.insert(0, str(_EXAMPLES))
    tasks: Any = import_module("demo_conversations")
    template = ChatTemplate.from_folder(DEMO)
    assert template

    def write(seed: str) -> list[str]:
        rng, written = Random(seed), []
        for _ in range(count):
            talk = tasks.make_conversation(rng)
            prompt = ""
            if not talk.raw:
                prompt = template.render(talk.messages, thinking=talk.thinking, tools=talk.tools)
            thought = "" if talk.reasoning is None else f"<think>\n{talk.reasoning}\n</think>\n\n"
            written.append(f"{prompt}{thought}{talk.answer}<|im_end|>\n")
        return written

    return Text("".join(write("calibration")), write("held out"))


def recipes(folder: Path, text: Text, *, quick: bool) -> list[Made]:
    """Convert and evaluate the demo by each recipe; `auto` also at the size of each mixed one."""
    with load(DEMO) as original:
        pieces = [original.tokenizer.encode(piece)[:_TOKENS] for piece in text.held_out]

        def make(recipe: str, name: str, **options: Any) -> Made:
            print(f"{recipe} {name} ...", file=sys.stderr)
            output = folder / f"{recipe}-{name}"
            made = convert(DEMO, output, recipe=recipe, force=True, **options)
            with load(output) as candidate:
                found = _mean_kl(original, candidate, pieces)
            return Made(recipe, name, made.bits_per_weight, found, made.seconds)

        fixed = [make("uniform", f"{bits}-bit", bits=bits) for bits in (3, 4, 5, 6)]
        for recipe in ("mixed", "mixed-rich"):
            fixed += [make(recipe, f"{bits}-bit", bits=bits) for bits in (3, 4)]
        targets = [4.5]
        if not quick:
            targets += [made.bits_per_weight for made in fixed if "mixed" in made.recipe]
            targets += [3.5]
        measured = [
            make("auto", f"{target:.2f}", target_bpw=target, calibration=text.calibration)
            for target in targets
        ]
    return fixed + measured


def _mean_kl(original: LLM, candidate: LLM, pieces: Sequence[list[int]]) -> float:
    found = [divergence(original, candidate, piece) for piece in pieces]
    return sum(one.mean_kl * one.tokens for one in found) / sum(one.tokens for one in found)


def verdicts(made: Sequence[Made]) -> dict[str, float]:
    """Compute the ratio of `auto` to uniform (at 4.5 bits), and to each mixed one at its size."""
    four = next(one for one in made if one.recipe == "uniform" and one.name == "4-bit")
    measured = [one for one in made if one.recipe == "auto"]
    first = measured[0]
    found = {"auto 4.5 / uniform 4-bit": first.mean_kl / four.mean_kl}
    for one in made:
        # Results no larger than the mixed recipe's, and hardly smaller.
        rivals = [
            rival
            for rival in measured
            if -1e-6 <= one.bits_per_weight - rival.bits_per_weight < 0.15
        ]
        if one.recipe.startswith("mixed") and rivals:
            rival = max(rivals, key=lambda rival: rival.bits_per_weight)
            found[f"auto / {one.recipe} {one.name}"] = rival.mean_kl / one.mean_kl
    return found


def points(made: Sequence[Made]) -> list[Point]:
    """Return the points of a plot: a line per recipe; uniform results are labelled."""
    return [
        Point(
            one.name if one.recipe == "uniform" else "",
            one.bits_per_weight,
            one.mean_kl,
            one.recipe,
        )
        for one in made
    ]


# --- the exam -----------------------------------------------------------------------------------


def exams(folders: dict[str, Path], *, quick: bool) -> dict[str, dict[str, float]]:
    """Run examples/exam_demo.py on checkpoints; return the share of correct replies by row."""
    counts = ("--sums", "20", "--others", "10") if quick else ("--sums", "60", "--others", "30")
    return {name: _exam(folder, counts) for name, folder in folders.items()}


def _exam(folder: Path, counts: Sequence[str]) -> dict[str, float]:
    print(f"exam of {folder.name} ...", file=sys.stderr)
    command = [sys.executable, str(_EXAMPLES / "exam_demo.py"), str(folder), *counts]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return read_exam(done.stdout)


def read_exam(printed: str) -> dict[str, float]:
    """Parse the table that the exam prints."""
    rows = (_ROW.fullmatch(line.strip()) for line in printed.splitlines())
    return {row[1]: int(row[2]) / int(row[3]) for row in rows if row}


def mean_of(exam: dict[str, float]) -> float:
    """Return the mean over the rows, in per cent."""
    return 100 * sum(exam.values()) / len(exam)


def most_different(one: dict[str, float], other: dict[str, float], count: int) -> list[str]:
    """Return the `count` rows that differ most, with both values in per cent."""
    ordered = sorted(one, key=lambda row: -abs(other[row] - one[row]))
    return [
        f"{row}: {100 * one[row]:.0f} -> {100 * other[row]:.0f} %"
        for row in ordered[:count]
        if other[row] != one[row]
    ]


def measure(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Run all divergence measurements; converted checkpoints are written to `folder`."""
    figures: dict[str, Any] = {}
    kinds: dict[str, Callable[[], Text]] = {"topics": topics, "conversations": conversations}
    for kind, text in kinds.items():
        place = folder / kind
        place.mkdir()
        figures[kind] = [asdict(one) for one in recipes(place, text(), quick=quick)]
        quick = True  # one kind of text is enough for the sizes between
    return figures
