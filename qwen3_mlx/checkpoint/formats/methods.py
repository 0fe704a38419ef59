"""The table of what is read: quantization methods, by their names in config.json."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qwen3_mlx.checkpoint.formats import (
    autoround,
    awq,
    bitsandbytes,
    compressed_tensors,
    fp8,
    gguf,
    gptq_words,
)
from qwen3_mlx.checkpoint.formats.affine import mlx_group_size
from qwen3_mlx.checkpoint.formats.matrix import Scheme
from qwen3_mlx.model.quantization import AFFINE_BITS, Format

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


def _integers(section: Section) -> Format:
    """Return the format of integers with `bits` bits in groups of `group_size`."""
    return Format(section["bits"], mlx_group_size(section.get("group_size")) or 64)


def _compressed_tensors(section: Section) -> Format:
    bits, group = compressed_tensors.usual(section) or (8, 64)
    return Format(bits if bits in AFFINE_BITS else 8, mlx_group_size(group) or 64)


@dataclass(frozen=True, slots=True)
class Method:
    """A quantization method.

    Attributes:
        title: its name in messages.
        problem: returns why weights of a section of config.json cannot be read, "" if they can.
        schemes: returns the ways in which modules are stored.
        usual: returns the format in which most matrices are held, None for floats.
        is_kept: whether a conversion keeps these formats unless others are asked for.
    """

    title: str
    problem: Callable[[Section], str]
    schemes: Callable[[Section], list[Scheme]]
    usual: Callable[[Section], Format | None]
    is_kept: bool = True


GGUF = "gguf"
"""The method that the config.json of a GGUF file states: see `gguf_folder`."""

METHODS: Mapping[str, Method] = {
    "fp8": Method("FP8", fp8.problem, fp8.schemes, lambda _: Format(8, 64), is_kept=False),
    "awq": Method(
        "AWQ",
        _only(bits=(4, None), version=("gemm", "gemm"), zero_point=(True, None)),
        awq.schemes,
        _integers,
    ),
    GGUF: Method("GGUF", lambda _: "", gguf.schemes, lambda _: Format(8, 64)),
    "gptq": Method(
        "GPTQ",
        _only(
            bits=(4, 8, None),
            checkpoint_format=("gptq", "gptq_v2", "gptq"),
            is_marlin_format=(False, False),
            pack_dtype=("int32", "int32"),
        ),
        gptq_words.schemes,
        _integers,
    ),
    "auto-round": Method("AutoRound", autoround.problem, autoround.schemes, _integers),
    "bitsandbytes": Method(
        "bitsandbytes", bitsandbytes.problem, bitsandbytes.schemes, lambda _: Format(8, 64)
    ),
    "compressed-tensors": Method(
        "compressed-tensors",
        compressed_tensors.problem,
        compressed_tensors.schemes,
        _compressed_tensors,
    ),
}
