"""Decoding several sequences at once, beside mlx-lm: python -m benchmarks.batches [FOLDER [N ...]]

One table: tokens a second of 1, 2, 4 and 8 sequences together, ours and mlx-lm's BatchGenerator on
equal terms (its model dequantized to float32, our BLAS), then 8 of mlx-lm's out of the box. Each
figure has a process of its own. Without a folder a random 4-bit 0.6B is made.
"""

import sys
import tempfile
from pathlib import Path

from benchmarks.checkpoint import random_checkpoint
from benchmarks.processes import json_of

_SIDES = "benchmarks.batch_sides"


def main() -> None:
    """Measure both sides in turn and print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        given = sys.argv[1:]
        folder = (
            Path(given[0]) if given else random_checkpoint(Path(scratch) / "random-0.6B", "0.6B")
        )
        print(f"{'tokens/s':34}{'qwen3-mlx':>12}{'mlx-lm':>12}{'ratio':>10}")
        ours = {}
        for size in map(int, given[1:] or (1, 2, 4, 8)):
            ours[size] = json_of(_SIDES, "ours", "-", folder, size, 12)
            peer = json_of(_SIDES, "peer", "equal-terms", folder, size, 12)
            print(_row(f"{size} together, equal terms", ours[size], peer), flush=True)
        peer = json_of(_SIDES, "peer", "out-of-the-box", folder, size, 2)
        print(_row(f"{size} together, out of the box", ours[size], peer))
        print(f"{size} together / 1: {ours[size] / ours[1]:.2f}x")


def _row(label: str, ours: float, peer: float) -> str:
    return f"{label:34}{ours:>12.3g}{peer:>12.3g}{ours / peer:>9.2f}x"


if __name__ == "__main__":
    main()
