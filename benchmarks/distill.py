"""What `convert --distill` gains: python -m benchmarks.distill [STEPS]

The demo model, in 4 bits and by the recipe auto. It learns from, and auto measures on, the first
half of Python's help; the divergence is that on the second half, which neither has seen. Exits with
1 unless that of uniform 4 bits falls by a quarter, and none rises.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.quality import DEMO, topics
from qwen3_mlx import convert, load
from qwen3_mlx.evaluate.divergence import divergence

_RECIPES: dict[str, dict[str, Any]] = {
    "uniform, 4 bits": {"bits": 4},
    "auto, 4.5 bits a weight": {"recipe": "auto", "target_bpw": 4.5},
}
_TOKENS = 8192
_MOST = {"uniform, 4 bits": 0.75, "auto, 4.5 bits a weight": 1.0}  # of the divergence before


def main() -> None:
    """Print a table of the recipes, without and with distillation."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    text, failed = topics(), False
    print(f"| {steps} steps | KL without | with | ratio | CPU s without | with |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as scratch, load(DEMO) as original:
        ids = original.tokenizer.encode(text.held_out[0])[:_TOKENS]

        def measured(name: str, distill: int | None) -> tuple[float, float]:
            options = dict(_RECIPES[name])
            if distill or options.get("recipe") == "auto":
                options["calibration"] = text.calibration
            cpu = time.process_time()
            made = convert(DEMO, Path(scratch) / f"{name} {distill}", distill=distill, **options)
            cpu = time.process_time() - cpu
            with load(made.output) as candidate:
                return divergence(original, candidate, ids).mean_kl, cpu

        for name in _RECIPES:
            (before, cpu), (after, distill_cpu) = measured(name, None), measured(name, steps)
            row = (
                f"{before:.4f} | {after:.4f} | {after / before:.2f} | {cpu:.0f} | {distill_cpu:.0f}"
            )
            print(f"| {name} | {row} |", flush=True)
            failed |= after > _MOST[name] * before
    sys.exit(failed)


if __name__ == "__main__":
    main()
