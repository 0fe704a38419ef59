"""Measure products of a weight with few rows: python -m benchmarks.products

The forms are x·weightᵀ, weight·xᵀ, and weight·xᵀ in blocks, which is `model/linear.py`'s where
`backend.prefers_columns`. Weights are of 0.6B's shapes, more of them than the cache holds.
"""

import time
from collections.abc import Callable, Sequence
from itertools import cycle
from statistics import median

from qwen3_mlx import backend  # first: the BLAS

# isort: split

import mlx.core as mx

from qwen3_mlx.model.linear import times_weight

SHAPES = {
    "q, k and v": (4096, 1024),
    "gate and up": (6144, 1024),
    "o": (1024, 2048),
    "down": (1024, 3072),
    "head": (151_936, 1024),
}
ROWS = (1, 2, 4, 8, 16, 32, 64)
_WEIGHT_BYTES = 200_000_000  # of a shape, beyond the processor's cache
_SECONDS = 0.4  # for a form


def main() -> None:
    """Print the bytes of weights that each form reads in a second."""
    backend.tune_blas_threads(1024)
    machine = backend.describe()
    print(f"{machine['device']}, {machine['system']}, BLAS {machine['blas']}\n")
    print("GB/s of weights".ljust(24) + "rows x Wt".rjust(12) + "W xt".rjust(12) + "ours".rjust(12))
    for name, (outputs, inputs) in SHAPES.items():
        count = max(1, _WEIGHT_BYTES // (4 * outputs * inputs))
        weights = [mx.random.normal((outputs, inputs)) for _ in range(count)]
        mx.eval(weights)
        for rows in ROWS:
            x = mx.random.normal((rows, inputs))
            mx.eval(x)
            forms = [
                lambda w, x=x: x @ w.T,
                lambda w, x=x: w @ x.T,
                lambda w, x=x: times_weight(x, w),
            ]
            speeds = [4e-9 * outputs * inputs / seconds for seconds in measure(forms, weights)]
            label = f"{name}, {rows} row{'s' * (rows > 1)}"
            print(label.ljust(24) + "".join(f"{speed:12.1f}" for speed in speeds), flush=True)


def measure(
    forms: Sequence[Callable[[mx.array], mx.array]], weights: Sequence[mx.array]
) -> list[float]:
    """Return the median seconds of each form, taken in turn."""
    times: list[list[float]] = [[] for _ in forms]
    each, end = cycle(weights), time.perf_counter() + _SECONDS * len(forms)
    while time.perf_counter() < end:
        for form, taken in zip(forms, times, strict=True):
            weight = next(each)
            begun_at = time.perf_counter()
            mx.eval(form(weight))
            taken.append(time.perf_counter() - begun_at)
    return [median(taken) for taken in times]


if __name__ == "__main__":
    main()
