"""Side by side with mlx-lm on this machine: python -m benchmarks, or make bench.

Every pair of figures comes from the same run, each side in a process of its own, in turn.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from qwen3_mlx import backend  # first: the BLAS

# isort: split

from benchmarks.checkpoint import random_checkpoint
from benchmarks.graph import batch_build_times, build_time, dispatches_per_layer
from benchmarks.processes import json_of
from benchmarks.sampling import sampling_times
from benchmarks.startup import startup_times

_NOTE = """
Out of the box is what each user gets: here mlx-lm computes in bfloat16 on quantized weights with
MLX's own BLAS, and we preload a BLAS and hold the weights as float32. That is MLX's CPU path and
says nothing about Macs. Equal terms: mlx-lm's own model dequantized to float32, the same BLAS.
"""


def main() -> None:
    """Measure everything and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--size", default="0.6B", help="0.6B, 1.7B, 4B or 8B (default: 0.6B)")
    parser.add_argument("--checkpoints", type=Path, help="keep the random checkpoint here")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of prompt (default: 128)")
    parser.add_argument("--decode", type=int, default=16, help="tokens to decode (default: 16)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side (default: 3)")
    parser.add_argument("--quick", action="store_true", help="leave mlx-lm out of the box out")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        kept = options.checkpoints or Path(scratch)
        print(f"Making a random {options.size} checkpoint, 4-bit ...", file=sys.stderr)
        folder = random_checkpoint(kept / f"random-{options.size}-4bit", options.size)
        figures = measure(folder, options)
        print("Loading, quantized and quantizing ...", file=sys.stderr)
        bf16 = random_checkpoint(kept / f"random-{options.size}-bf16", options.size, bits=None)
        figures["loading"] = {
            "4-bit": json_of("benchmarks.loading", str(folder)),
            "bits=4 from bf16": json_of("benchmarks.loading", str(bf16), "4"),
        }
    print(table(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Take all measurements."""
    figures: dict[str, Any] = {"machine": backend.describe(), "size": options.size}
    sides = {
        "ours": ("ours", "out-of-the-box", options.prompt, options.decode),
        "peer, equal terms": ("peer", "equal-terms", options.prompt, options.decode),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(options.repeats):
        for name, arguments in sides.items():
            print(f"Run {number + 1} of {options.repeats}: {name} ...", file=sys.stderr)
            runs[name].append(_side(folder, *arguments))
    if not options.quick:
        print("mlx-lm out of the box: a few minutes ...", file=sys.stderr)
        runs["peer, out of the box"] = [_side(folder, "peer", "out-of-the-box", 16, 3)]
    for name, results in runs.items():
        figures[name] = {key: median(run[key] for run in results) for key in results[0]}
    figures["sampling"] = sampling_times()
    figures["dispatches per layer"] = dispatches_per_layer()
    figures["graph building"] = build_time()
    figures["graph of several"] = batch_build_times()
    figures["start to first token"] = startup_times()
    figures["date"] = time.strftime("%Y-%m-%d")
    return figures


def table(figures: dict[str, Any]) -> str:
    """Write the figures as a table of ratios."""
    machine = figures["machine"]
    lines = [
        f"{machine['device']}, {machine['system']}, BLAS {machine['blas']}, "
        f"Qwen3-{figures['size']} geometry, random 4-bit weights, {figures['date']}",
        _NOTE,
        f"{'':44}{'qwen3-mlx':>12}{'mlx-lm':>12}{'ratio':>10}",
    ]
    ours = figures["ours"]
    for name in ("peer, out of the box", "peer, equal terms"):
        if name in figures:
            terms = name.removeprefix("peer, ")
            for phase in ("decode", "prefill"):
                speeds = 1 / ours[phase], 1 / figures[name][phase]
                lines.append(_row(f"{phase}, tokens/s, {terms}", *speeds, higher_is_better=True))
    for label, key, scale in (
        ("one sampling step (0.6/0.95/20), ms", "sampling", 1e3),
        ("start to first token, demo folder, s", "start to first token", 1),
        ("kernels a layer and decoded token", "dispatches per layer", 1),
        ("building a token's graph, ms", "graph building", 1e3),
    ):
        pair = figures[key]
        lines.append(
            _row(label, pair["ours"] * scale, pair["peer"] * scale, higher_is_better=False)
        )
    for size, pair in figures["graph of several"].items():
        label = f"building the graph for {size} sequences, ms"
        lines.append(_row(label, pair["ours"] * 1e3, pair["peer"] * 1e3, higher_is_better=False))
    plain, quantizing = figures["loading"].values()
    bound = quantizing["result"] + quantizing["largest tensor"]
    lines += [
        "",
        f"peak of loading 4-bit weights as they are: {plain['peak'] / plain['files']:.2f} x files",
        f"peak of quantizing to 4 bits while loading: {quantizing['peak'] / bound:.2f} x "
        "(result + largest tensor)",
    ]
    return "\n".join(lines)


def _row(label: str, ours: float, peer: float, *, higher_is_better: bool) -> str:
    ratio = ours / peer if higher_is_better else peer / ours
    return f"{label:44}{ours:>12.3g}{peer:>12.3g}{ratio:>9.2f}x"


def _side(folder: Path, side: str, terms: str, prompt: int, decoded: int) -> dict[str, float]:
    arguments = [side, terms, str(folder), str(prompt), str(decoded)]
    figures: dict[str, float] = json_of("benchmarks.sides", *arguments)
    return figures


if __name__ == "__main__":
    main()
