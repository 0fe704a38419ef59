"""The table of what is read: quantization methods, by their names in config.json."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qwen3_mlx.checkpoint.formats import awq, fp8, gptq_words
from qwen3_mlx.checkpoint.formats.matrix import Scheme

Section = Mapping[str, Any]


def _only(**allowed: tuple[object, ...]) -> Callable[[Section], str]:
    """Return a check: each key has one of these values; the last is that of a missing key."""

    def problem(section: Section) -> str:
        for key, (*values, default) in allowed.items():
            value = default if section.get(key) is None else section[key]
            if (value.lower() if isinstance(value, str) else value) not in values:
                return (
                    f"with {key} {value!r}, and only {' and '.join(map(repr, values))} can be read"
                )
        return (
            "with `dynamic`, formats of their own for some modules"
            if section.get("dynamic")
            else ""
        )

    return problem


@dataclass(frozen=True, slots=True)
class Method:
    """A quantization method.

    Attributes:
        problem: returns why weights of a section of config.json cannot be read, "" if they can.
        schemes: returns the ways in which modules are stored.
    """

    problem: Callable[[Section], str]
    schemes: Callable[[Section], list[Scheme]]


METHODS: Mapping[str, Method] = {
    "fp8": Method(fp8.problem, fp8.schemes),
    "awq": Method(
        _only(bits=(4, None), version=("gemm", "gemm"), zero_point=(True, None)), awq.schemes
    ),
    "gptq": Method(
        _only(
            bits=(4, 8, None),
            checkpoint_format=("gptq", "gptq_v2", "gptq"),
            is_marlin_format=(False, False),
            pack_dtype=("int32", "int32"),
        ),
        gptq_words.schemes,
    ),
}
