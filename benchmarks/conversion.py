"""Conversion on this machine: python -m benchmarks.conversion

sizes: memory and time of converting random bfloat16 checkpoints of real size to 4 bits (groups of
64), by this package and by mlx-lm, in turn, each in its own process, the source dropped from the
file cache before; and whether the results are bit-identical.
resume: a conversion that is killed ten times, by Ctrl-C and by SIGKILL, and resumed each time.
quality: the demo checkpoint converted by each recipe, and its divergence on held-out text.
exam: the demo's exam, for the original, 4 bits, and the measured recipe at 4.5 bits per weight.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from filecmp import cmpfiles
from pathlib import Path
from random import Random
from typing import Any

from qwen3_mlx import backend  # first: the BLAS

# isort: split

from benchmarks import quality
from benchmarks.processes import json_of
from qwen3_mlx import convert
from qwen3_mlx.evaluate.plots import draw

_PARTS = ("sizes", "resume", "quality", "exam")
_STEPS = "benchmarks.converting"
_INTERRUPTIONS = 10


def main() -> None:
    """Run the requested parts and print the report."""
    options = _options()
    figures: dict[str, Any] = {"machine": backend.describe(), "date": time.strftime("%Y-%m-%d")}
    with tempfile.TemporaryDirectory(dir=options.checkpoints) as scratch:
        folder = Path(scratch)
        if "sizes" in options.parts:
            figures["sizes"] = {
                size: _convert_both(size, folder, options.checkpoints, options.repeats)
                for size in options.sizes
            }
        if "resume" in options.parts:
            figures["resume"] = _resume(_checkpoint("0.6B", folder, options.checkpoints), folder)
        if "quality" in options.parts:
            figures["quality"] = quality.measure(folder, quick=options.quick)
        if "exam" in options.parts:
            figures["exam"] = quality.exams(_for_the_exam(folder), quick=options.quick)
    print(report(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))
    if options.plot and "quality" in figures:
        made = [quality.Made(**one) for one in figures["quality"]["topics"]]
        draw(options.plot, quality.points(made))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.conversion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def names(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--sizes", type=names, default=["0.6B", "4B", "8B"], help="0.6B,4B,8B")
    parser.add_argument("--parts", type=names, default=_PARTS, help=",".join(_PARTS))
    parser.add_argument("--checkpoints", type=Path, help="keep the random checkpoints here")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each side; the best counts")
    parser.add_argument("--quick", action="store_true", help="fewer recipes and exam questions")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--plot", type=Path, help="draw bits against divergence (.svg or .png)")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(_PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    return options


# --- memory and time ----------------------------------------------------------------------------


def _checkpoint(size: str, folder: Path, kept: Path | None) -> Path:
    source = (kept or folder) / f"random-{size}-bf16"
    print(f"A random {size} checkpoint, bfloat16 ...", file=sys.stderr)
    json_of(_STEPS, "make", size, source)
    return source


def _convert_both(size: str, folder: Path, kept: Path | None, repeats: int) -> dict[str, Any]:
    source = _checkpoint(size, folder, kept)
    outputs = {side: folder / f"{size}-{side}" for side in ("ours", "peer")}
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in outputs}
    for number in range(repeats):
        for side, output in outputs.items():
            print(f"{size}, run {number + 1} of {repeats}: {side} ...", file=sys.stderr)
            shutil.rmtree(output, ignore_errors=True)
            runs[side].append(json_of(_STEPS, side, source, output))
    compared = json_of(_STEPS, "compare", *outputs.values())
    for output in outputs.values():
        shutil.rmtree(output)
    if not kept:
        shutil.rmtree(source)
    best = {
        side: {
            "seconds": min(run["seconds"] for run in of),
            "peak": max(run["peak"] for run in of),
        }
        for side, of in runs.items()
    }
    return {**best, **compared, "runs": runs}


# --- interruptions ------------------------------------------------------------------------------


def _resume(source: Path, folder: Path) -> dict[str, Any]:
    """Interrupt a conversion at random places, resume it, and compare it with an uninterrupted one.

    SIGINT and SIGKILL alternate. Returns the bytes found finished at each start.
    """
    whole, output = folder / "whole", folder / "in-pieces"
    total = json_of(_STEPS, "interrupted", source, whole, 1 << 60, 0)["done"]
    rng = Random(0)
    found = [0]
    for number in range(_INTERRUPTIONS):
        print(f"interruption {number + 1} of {_INTERRUPTIONS} ...", file=sys.stderr)
        how = signal.SIGKILL if number % 2 else signal.SIGINT
        after = int(rng.uniform(0, 0.4) * (total - found[-1]))
        step = json_of(_STEPS, "interrupted", source, output, after, int(how), dies=True)
        if output.exists():
            sys.exit("an interrupted conversion left what looks finished")
        if step["found"] < found[-1]:
            sys.exit("finished shards were thrown away")
        found.append(step["found"])
    last = json_of(_STEPS, "interrupted", source, output, 1 << 60, 0)
    return {
        "interruptions": _INTERRUPTIONS,
        "found": [*found[1:], last["found"]],
        "total": total,
        "differing": _differing(whole, output),
    }


def _differing(first: Path, second: Path) -> list[str]:
    names = sorted({path.name for folder in (first, second) for path in folder.iterdir()})
    # README.md contains the name of the folder.
    _, *different = cmpfiles(first, second, set(names) - {"README.md"}, shallow=False)
    return sorted(sum(different, []))


# --- the exam -----------------------------------------------------------------------------------


def _for_the_exam(folder: Path) -> dict[str, Path]:
    calibration = quality.topics().calibration
    convert(quality.DEMO, folder / "exam-4-bit", bits=4)
    convert(
        quality.DEMO,
        folder / "exam-auto",
        recipe="auto",
        target_bpw=4.5,
        calibration=calibration,
    )
    return {
        "original": quality.DEMO,
        "uniform 4-bit": folder / "exam-4-bit",
        "auto 4.5": folder / "exam-auto",
    }


# --- the report ---------------------------------------------------------------------------------


def report(figures: dict[str, Any]) -> str:
    """Return the figures as tables."""
    machine = figures["machine"]
    lines = [f"{machine['device']}, {machine['system']}, BLAS {machine['blas']}, {figures['date']}"]
    if "sizes" in figures:
        lines += ["", f"{'bf16 to 4 bits':16}{'peak resident, GB':>24}{'seconds':>24}"]
        lines += [
            f"{'':16}{'qwen3-mlx':>12}{'mlx-lm':>12}{'qwen3-mlx':>12}{'mlx-lm':>12}{'ratio':>8}"
        ]
        lines += [_size_row(size, found) for size, found in figures["sizes"].items()]
    if "resume" in figures:
        lines += ["", _resume_line(figures["resume"])]
    for kind, rows in figures.get("quality", {}).items():
        made = [quality.Made(**row) for row in rows]
        lines += ["", f"{kind:24}{'bits a weight':>14}{'mean KL, nats':>14}{'seconds':>10}"]
        lines += [
            f"{one.recipe + ' ' + one.name:24}{one.bits_per_weight:>14.3f}{one.mean_kl:>14.5f}"
            f"{one.seconds:>10.1f}"
            for one in made
        ]
        lines += [f"{name}: {ratio:.2f}x" for name, ratio in quality.verdicts(made).items()]
    if "exam" in figures:
        original = figures["exam"]["original"]
        for name, exam in figures["exam"].items():
            lines += ["", f"exam of {name}: {quality.mean_of(exam):.1f} % over {len(exam)} rows"]
            lines += [f"  {row}" for row in quality.most_different(original, exam, 5)]
    return "\n".join(lines)


def _size_row(size: str, found: dict[str, Any]) -> str:
    ours, peer = found["ours"], found["peer"]
    same = (
        f"{len(found['differing'])} tensors differ"
        if found["differing"]
        else f"all {found['tensors']} tensors alike"
    )
    return (
        f"{size:16}{ours['peak'] / 1e9:>12.2f}{peer['peak'] / 1e9:>12.2f}"
        f"{ours['seconds']:>12.1f}{peer['seconds']:>12.1f}"
        f"{peer['seconds'] / ours['seconds']:>7.2f}x  {same}"
    )


def _resume_line(found: dict[str, Any]) -> str:
    end = f"{', '.join(found['differing'])} differ" if found["differing"] else "all files alike"
    kept = ", ".join(f"{100 * done / found['total']:.0f}" for done in found["found"])
    return f"interrupted {found['interruptions']} times, found done (%): {kept}; at the end {end}"


if __name__ == "__main__":
    main()
