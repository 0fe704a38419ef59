"""Host work around the network, against mlx-lm: python -m benchmarks.host [FOLDER]

One table: a sampling step, the start-up, the kernels and the graph of a decoded token, and the peak
memory of loading. FOLDER keeps the random checkpoints that loading is measured on.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qwen3_mlx import backend  # first: the BLAS

# isort: split

from benchmarks.checkpoint import random_checkpoint
from benchmarks.graph import build_times, dispatches_per_layer
from benchmarks.processes import json_of
from benchmarks.sampling import sampling_times
from benchmarks.startup import startup_times

_SIZE = "0.6B"


def main() -> None:
    """Run all measurements and print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(sys.argv[1] if len(sys.argv) > 1 else scratch)
        print(table(measure(kept)))


def measure(kept: Path) -> dict[str, Any]:
    """Return all measurements, each taken of both packages in turn."""
    folder = random_checkpoint(kept / f"random-{_SIZE}-4bit", _SIZE)
    bf16 = random_checkpoint(kept / f"random-{_SIZE}-bf16", _SIZE, bits=None)
    return {
        "machine": backend.describe(),
        "date": time.strftime("%Y-%m-%d"),
        "start to first token": startup_times(),
        "sampling": sampling_times(),
        "dispatches per layer": dispatches_per_layer(),
        "graph building": build_times(),
        "loading": json_of("benchmarks.loading", str(folder)),
        "quantizing": json_of("benchmarks.loading", str(bf16), "4"),
    }


def table(figures: dict[str, Any]) -> str:
    """Return the figures as a table; a ratio above 1 is in favour of this package."""
    machine = figures["machine"]
    lines = [
        f"{machine['device']}, {machine['system']}, BLAS {machine['blas']}, {figures['date']}",
        "",
        f"{'':44}{'qwen3-mlx':>12}{'mlx-lm':>12}",
        _row("one sampling step (0.6/0.95/20), ms", figures["sampling"], 1e3),
        _row("start to first token, demo folder, s", figures["start to first token"]),
        _row("kernels a layer and decoded token", figures["dispatches per layer"]),
    ]
    for size, pair in figures["graph building"].items():
        lines.append(_row(f"building the graph of {size} together, ms", pair, 1e3))
    plain, quantizing = figures["loading"], figures["quantizing"]
    bound = quantizing["result"] + quantizing["largest tensor"]
    lines += [
        "",
        f"peak of loading 4-bit weights as they are: {plain['peak'] / plain['files']:.2f} x files",
        f"peak of quantizing to 4 bits while loading: {quantizing['peak'] / bound:.2f} x "
        "(result + largest tensor)",
    ]
    return "\n".join(lines)


def _row(label: str, pair: dict[str, float], scale: float = 1) -> str:
    ours, peer = pair["ours"] * scale, pair["peer"] * scale
    return f"{label:44}{ours:>12.3g}{peer:>12.3g}{peer / ours:>9.2f}x"


if __name__ == "__main__":
    main()
