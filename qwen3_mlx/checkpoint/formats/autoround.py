"""AutoRound, which packs as GPTQ or as AWQ does; modules may differ in bits and in group size."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from qwen3_mlx.checkpoint.formats.awq import awq_rows
from qwen3_mlx.checkpoint.formats.gptq_words import gptq_rows
from qwen3_mlx.checkpoint.formats.matrix import Decoder, Scheme, StoredRows
from qwen3_mlx.checkpoint.weights import Weights
from qwen3_mlx.errors import CheckpointError

_BITS = (2, 4, 8)  # a value of 3 bits may lie in two words
_DEFAULT = "auto_round:auto_gptq"


def problem(section: Mapping[str, Any]) -> str:
    """Return why weights of this section cannot be read, or "" if they can."""
    packing = section.get("packing_format") or _DEFAULT
    if not isinstance(packing, str) or packing not in _PACKINGS:
        return f"with packing_format {packing!r}, and only {', '.join(_PACKINGS)} can be read"
    if section.get("data_type") not in (None, "int"):
        return f"with data_type {section['data_type']!r}, and only 'int' can be read"
    return ""


def schemes(section: Mapping[str, Any]) -> list[Scheme]:
    """Return how the modules are stored; those without these tensors are plain."""
    decoder = _PACKINGS[section.get("packing_format") or _DEFAULT]
    return [Scheme("qweight", ("qzeros", "scales"), decoder, ("g_idx",))]


def _as_gptq(weights: Weights, prefix: str, *, zeros_less_one: bool) -> StoredRows:
    zeros, scales = (weights.stored[f"{prefix}.{kind}"].shape for kind in ("qzeros", "scales"))
    for bits in _BITS:
        if zeros and scales and zeros[-1] * 32 == scales[-1] * bits:
            return gptq_rows(weights, prefix, bits, zeros_less_one=zeros_less_one)
    raise CheckpointError(
        f"{prefix}.qzeros is {list(zeros)} beside scales {list(scales)}, and only "
        f"{', '.join(map(str, _BITS))} bits can be read"
    )


_PACKINGS: Mapping[str, Decoder] = {
    _DEFAULT: partial(_as_gptq, zeros_less_one=True),
    "auto_round:gptqmodel": partial(_as_gptq, zeros_less_one=False),
    "auto_round:auto_awq": awq_rows,
}
