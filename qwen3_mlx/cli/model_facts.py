"""What the subcommands state of a checkpoint from its config.json: formats, memory, what fits."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_mlx.checkpoint.stored import quantization_of
from qwen3_mlx.checkpoint.stored_formats import formats_held
from qwen3_mlx.cli.plan_estimate import Machine, MemoryEstimate
from qwen3_mlx.engine.memory import Module, Plan, modules, weight_bytes
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.quantization import AFFINE, Format, FormatOf

_STORED = "as it is"
_KINDS = {"embedding": "an embedding model", "reranker": "a reranker"}
_FLOATS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_MAIN_SHARE = 0.98  # of the weights; routers that keep 8 bits make no mixed format
_LAYER = re.compile(r"^model\.(layers\.\d+\.)?")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A checkpoint as its config.json describes it, and its memory on a machine.

    Attributes:
        config: the geometry.
        floats: the dtype of weights that are not quantized, such as "bf16".
        method: the method of quantization, such as "MLX" or "FP8"; "" for floats.
        formats: the format of each module in memory.
        estimate: its memory.
    """

    config: ModelConfig
    floats: str
    method: str
    formats: FormatOf
    estimate: MemoryEstimate

    @classmethod
    def of(cls, config: Mapping[str, Any], folder: Path | None, machine: Machine) -> "ModelFacts":
        """Create the facts of a checkpoint from the contents of its config.json.

        Raises:
            CheckpointError: it is not a Qwen3, or quantized by a method that is not supported.
        """
        network, found = ModelConfig.from_dict(config), quantization_of(config)
        stated = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        floats, method = _FLOATS.get(stated, stated), found.title if found else ""
        formats = formats_held(config, folder) or (lambda _: None)
        weights = weight_bytes(network, formats)
        estimate = MemoryEstimate(
            "", network, machine, "bfloat16", {_STORED: formats}, {_STORED: weights}, None
        )
        return cls(network, floats, method, formats, estimate)

    @property
    def format(self) -> str:
        """The format of most weights, such as "4 bits"; ", mixed" if many have another."""
        sizes: Counter[str] = Counter()
        for module, label in self._matrices():
            sizes[label] += module.size
        main, size = sizes.most_common(1)[0]
        return main if size > _MAIN_SHARE * sizes.total() else f"{main}, mixed"

    def module_formats(self) -> dict[str, dict[str, int]]:
        """Return for each kind of module how many of its layers have which format."""
        kinds: dict[str, Counter[str]] = {}
        for module, label in self._matrices():
            kind = _LAYER.sub("", module.path)
            kinds.setdefault(kind, Counter())[label] += 1
        return {kind: dict(counts) for kind, counts in kinds.items()}

    @property
    def weights(self) -> int:
        """Bytes of the weights in memory."""
        return self.estimate.weights[_STORED]

    def plan(self, context: int) -> Plan:
        """Return the memory with a context of so many tokens."""
        return self.estimate.plan(_STORED, context, "bf16")

    @property
    def fits(self) -> int:
        """The longest context that fits the machine, at most the window; 0 if none does."""
        return min(self.estimate.largest(_STORED, "bf16"), self.config.context_window)

    def _matrices(self) -> Iterator[tuple[Module, str]]:
        """Yield the modules with matrices, and the names of their formats."""
        for module in modules(self.config):
            fmt = self.formats(module.path)
            if module.columns:
                yield module, format_label(fmt, self.floats)


def refuse_other_kinds(kind: str, what: str) -> None:
    """Refuse a checkpoint that is not for text, of whose use `what` says nothing.

    Raises:
        Qwen3Error: it is an embedding model or a reranker.
    """
    if kind in _KINDS:
        raise Qwen3Error(
            f"this checkpoint is {_KINDS[kind]}, and {what} how a model writes text, which it "
            "is not for"
        )


def format_label(fmt: Format | None, floats: str) -> str:
    """Return the name of a format for display; `floats` is that of weights not quantized."""
    if fmt is None:
        return floats
    return f"{fmt.bits} bits" if fmt.mode == AFFINE else fmt.mode
