"""The settings of a training run, checked."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from qwen3_mlx.tuning.layers import FULL, TYPES

# For adapters as PEFT's and Unsloth's guides have it; whole tensors need smaller steps.
_LEARNING_RATES = {False: 2e-4, True: 1e-5}
_LEAST = (("rank", 1), ("batch", 1), ("accumulate", 1), ("max_length", 2), ("seed", 0))


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a training run; those of the public `tune`, under the same names."""

    type: str = "lora"
    rank: int = 8
    scale: float = 2.0
    layers: int | None = None
    batch: int = 4
    accumulate: int = 1
    learning_rate: float | None = None
    max_length: int = 2048
    checkpointing: bool = False
    keep_weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            TypeError, ValueError: one has the wrong type or is out of its range.
        """
        if self.type not in TYPES:
            raise ValueError(f"type must be one of {', '.join(TYPES)}, not {self.type!r}")
        for name, least in _LEAST:
            check_count(name, getattr(self, name), least)
        if self.layers is not None:
            check_count("layers", self.layers, 1)
        for name in ("scale", "keep_weight", "learning_rate"):
            value = getattr(self, name)
            if name == "learning_rate" and value is None:
                continue
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0, not {value!r}")
        if not isinstance(self.checkpointing, bool):
            raise TypeError(f"checkpointing must be True or False, not {self.checkpointing!r}")

    @property
    def step_lessons(self) -> int:
        """The lessons of a step: `accumulate` batches."""
        return self.batch * self.accumulate

    @property
    def rate(self) -> float:
        """The learning rate, stated or of the type."""
        return self.learning_rate or _LEARNING_RATES[self.type == FULL]

    def as_dict(self) -> dict[str, Any]:
        """Return what decides the result; how it is computed does not."""
        return {**asdict(self), "learning_rate": self.rate, "checkpointing": None}


def check_count(name: str, value: object, least: int) -> None:
    """Check that an argument is a whole number of at least `least`.

    Raises:
        ValueError: it is not.
    """
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be a whole number from {least} up, not {value!r}")
