"""A check, and what came of it.

A check against the reference computes arrays from numbers that are the same everywhere. It runs on
the device in a dtype, and in a process of its own on the CPU in float32, from the same rounded
numbers (`reference.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from zlib import crc32

import mlx.core as mx
import numpy as np

from qwen3_mlx.model.quantization import Format

# Relative to the largest number of the result. In float32 it leaves room for the TF32 of an M5.
TOLERANCE = {mx.float32: 2e-3, mx.float16: 1e-2, mx.bfloat16: 3e-2}
_SCALE = 0.006  # of quantized weights: in 4 bits they spread like those of published checkpoints


class Numbers:
    """Random numbers that are the same on every device, rounded to one dtype and held in another.

    Integers are drawn as they are. Every check has its own, from its name.
    """

    def __init__(self, name: str, rounded: mx.Dtype, dtype: mx.Dtype) -> None:
        self.dtype = dtype
        self._rounded = rounded
        self.draw = np.random.default_rng(crc32(name.encode()))

    def hold(self, values: np.ndarray) -> mx.array:
        """Return floats, rounded and in the dtype."""
        return mx.array(values.astype(np.float32)).astype(self._rounded).astype(self.dtype)

    def normal(self, *shape: int) -> mx.array:
        """Return numbers of the normal distribution."""
        return self.hold(self.draw.standard_normal(shape, dtype=np.float32))

    def integers(self, limit: int, *shape: int) -> mx.array:
        """Return integers from 0 to below `limit`, uint32."""
        return mx.array(self.draw.integers(0, limit, shape, dtype=np.uint32))

    def packed(self, fmt: Format, *shape: int) -> list[mx.array]:
        """Return words, scales and perhaps biases of a random matrix in `fmt`."""
        if not fmt.has_biases:  # not of any codes: some are NaN
            with mx.stream(mx.cpu):
                return list(mx.quantize(self.normal(*shape), **fmt.as_config()))
        tensors = fmt.tensors(shape, self.dtype)
        words, groups = tensors["weight"][0], tensors["scales"][0]
        sizes = _SCALE * 2 ** (4 - fmt.bits) * self.draw.uniform(0.5, 1.5, groups)
        codes = mx.array(self.draw.integers(0, 1 << 32, words, dtype=np.uint32))
        return [codes, self.hold(sizes), self.hold(-sizes * (2**fmt.bits - 1) / 2)]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a check in one dtype: the error and the most that it may be."""

    error: float
    limit: float
    reason: str = ""  # of a check that could not be made

    @property
    def ok(self) -> bool:
        """True if the error is within its limit; NaN is not."""
        return self.error <= self.limit


@dataclass(frozen=True, slots=True)
class Check:
    """A check against the reference.

    `compute` returns arrays; `slack` is how many times the tolerance of a dtype they may differ.
    Integers and booleans must be equal.
    """

    name: str
    compute: Callable[[Numbers], Sequence[mx.array]]
    slack: float = 1.0

    def on_device(self, dtype: mx.Dtype) -> list[mx.array]:
        """Compute the arrays here, evaluated."""
        found = list(self.compute(Numbers(self.name, dtype, dtype)))
        mx.eval(found)
        return found

    def reference(self, dtype: mx.Dtype) -> list[mx.array]:
        """Compute the arrays in float32 from numbers that are rounded to `dtype`, evaluated."""
        found = list(self.compute(Numbers(self.name, dtype, mx.float32)))
        mx.eval(found)
        return found

    def compare(
        self, found: Sequence[mx.array], expected: Sequence[mx.array], dtype: mx.Dtype
    ) -> Outcome:
        """Return the largest difference of any two arrays."""
        pairs = zip(found, expected, strict=True)
        return Outcome(max(_difference(*pair) for pair in pairs), self.slack * TOLERANCE[dtype])


def _difference(found: mx.array, expected: mx.array) -> float:
    """Return the largest difference, relative to the largest number that is expected."""
    if found.shape != expected.shape:
        return float("inf")
    if not mx.issubdtype(expected.dtype, mx.floating):
        return 0.0 if mx.array_equal(found, expected).item() else float("inf")
    a, b = (np.array(x.astype(mx.float32), dtype=np.float64) for x in (found, expected))
    # NaN must not be lost in a maximum.
    worst = float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
    return worst if worst == worst else float("inf")


@dataclass(frozen=True, slots=True)
class PathCheck:
    """A check of a whole path, which measures its error by itself.

    The error may be `limit`, or the tolerance of the dtype if that is None.
    """

    name: str
    measure: Callable[[mx.Dtype], float]
    limit: float | None = None

    def outcome(self, dtype: mx.Dtype) -> Outcome:
        """Measure the error."""
        return Outcome(self.measure(dtype), TOLERANCE[dtype] if self.limit is None else self.limit)


@dataclass(frozen=True, slots=True)
class Row:
    """A check with its outcomes, by the name of the dtype."""

    name: str
    outcomes: dict[str, Outcome]

    @property
    def ok(self) -> bool:
        """True if none failed."""
        return all(outcome.ok for outcome in self.outcomes.values())
