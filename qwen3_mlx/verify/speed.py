"""Speed beside what the memory's bandwidth allows; no check, since a machine may be busy."""

from dataclasses import dataclass

from qwen3_mlx import backend
from qwen3_mlx.bench.measure import Case, measure
from qwen3_mlx.bench.targets import Ours
from qwen3_mlx.checkpoint.load import parent_of
from qwen3_mlx.engine.memory import Workload, bytes_read_per_token
from qwen3_mlx.model.quantization import Format
from qwen3_mlx.model.qwen3 import Qwen3

_PROMPT, _STEPS = 256, 16  # tokens


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second of prefill and decode, and the most that decoding could reach."""

    prefill: float
    decode: float
    bound: float
    bandwidth: float  # bytes a second, measured

    def __str__(self) -> str:
        return (
            f"prefill {self.prefill:,.0f} tokens/s; decode {self.decode:,.1f} tokens/s, "
            f"{self.decode / self.bound:.0%} of the {self.bound:,.1f} that "
            f"{self.bandwidth / 1e9:,.0f} GB/s allow"
        )


def speed_of(model: Qwen3) -> Speed:
    """Measure a prompt and some tokens after it; on the thread that owns the network."""
    bandwidth = backend.memory_bandwidth()
    (found,) = measure(Ours(model), [Case(1, _PROMPT)], _STEPS)
    work = Workload(_PROMPT, itemsize=model.model.norm.weight.dtype.size)

    def format_of(path: str) -> Format | None:
        place, name = parent_of(model, path)
        module = place[name]
        if not hasattr(module, "bits"):
            return None
        return Format(module.bits, module.group_size, module.mode)

    bound = bandwidth / bytes_read_per_token(model.config, format_of, work)
    return Speed(found.prefill, found.decode, bound, bandwidth)
