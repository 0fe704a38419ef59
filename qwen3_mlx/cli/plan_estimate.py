"""What a model needs and what a machine has: memory by weight format, KV cache and context."""

from collections.abc import Mapping
from dataclasses import dataclass

from qwen3_mlx import backend
from qwen3_mlx.cache.quantized import CACHE_FORMATS
from qwen3_mlx.cli.chips import BANDWIDTHS
from qwen3_mlx.engine.memory import (
    Plan,
    Workload,
    bytes_read_per_token,
    in_gb,
    largest_context,
    make_plan,
)
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.quantization import FormatOf
from qwen3_mlx.model.sizes import yarn_lengths

SHORTEST_CONTEXT = 2048  # tokens
_MAC_CHUNK = 2048  # tokens of a prompt that a GPU prefills at once
_GIB = 1 << 30
_DTYPE_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True, slots=True)
class Machine:
    """Memory that a machine has for a model, in bytes, and how it prefills prompts."""

    name: str
    description: str  # a sentence about the memory
    available: int
    chunk: int
    fused: bool

    @classmethod
    def here(cls, itemsize: int = 2) -> "Machine":
        """Describe this machine, for a compute dtype of so many bytes."""
        available, limit = backend.available_memory(), backend.memory_limit()
        name, gives = "This machine", f"can give {in_gb(available)} now"
        if backend.memory_from_environment():
            name, gives = "This process", f"can have {in_gb(available)}, as QWEN3_MEMORY says"
        elif backend.on_metal():
            name = "This Mac"
            gives = (
                f"can give {in_gb(available)}, the working set that Metal recommends; "
                f"{in_gb(backend.free_memory())} of memory are free now"
            )
        elif available < limit:
            gives += f", and {in_gb(limit)} with nothing else running"
        fused = backend.has_fused_attention(itemsize)
        return cls(name, f"{name} {gives}", available, backend.prefill_chunk(), fused)

    @classmethod
    def mac(cls, memory: float) -> "Machine":
        total = int(memory * _GIB)
        if backend.on_metal() and total == backend.total_memory():
            name, available = f"This Mac, with {memory:g} GB", backend.working_set()
            gives = f"its GPU can have {in_gb(available)}"
        else:
            name, available = f"A Mac with {memory:g} GB", backend.working_set_of(total)
            share = "two thirds" if available == total * 2 // 3 else "three quarters"
            gives = f"macOS lets the GPU have about {share} by default, {in_gb(available)}"
        return cls(name, f"{name}: {gives} of 10^9 bytes", available, _MAC_CHUNK, True)


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Memory of one model on one machine, for every weight format."""

    name: str
    config: ModelConfig
    machine: Machine
    dtype: str
    formats: Mapping[str, FormatOf]
    weights: Mapping[str, int]
    bandwidth: float | None  # bytes per second

    @property
    def itemsize(self) -> int:
        """Bytes per number in the compute dtype."""
        return backend.compute_dtype(self.dtype).size

    def format_name(self, fmt: str) -> str:
        """Return the name of a format; the key "bf16" stands for any unquantized dtype."""
        return _DTYPE_NAMES[self.dtype] if fmt == "bf16" else fmt

    def label(self, fmt: str) -> str:
        """Return the name of a weight format for display."""
        return f"{fmt} bits" if fmt.isdigit() else self.format_name(fmt)

    @property
    def contexts(self) -> list[int]:
        """Context lengths shown: doubling from 2,048 to the window, the window, YaRN lengths."""
        window, context = self.config.max_position_embeddings, SHORTEST_CONTEXT
        lengths = []
        while context < window:
            lengths.append(context)
            context *= 2
        return [*lengths, window, *yarn_lengths(self.config)]

    def with_yarn(self, context: int) -> bool:
        """Return whether a context of this length needs YaRN."""
        yarn = self.config.yarn
        plain = self.config.max_position_embeddings
        return context > (yarn.original_max_position_embeddings if yarn else plain)

    def context_label(self, context: int) -> str:
        """Return a context length for display, with * if it needs YaRN."""
        length = f"{context // 1024}k" if context % 1024 == 0 else f"{context:,}"
        return f"{length}*" if self.with_yarn(context) else length

    def work(self, context: int, cache: str) -> Workload:
        return Workload(
            context,
            itemsize=self.itemsize,
            cache=CACHE_FORMATS[cache],
            chunk=self.machine.chunk,
            fused=self.machine.fused,
        )

    def plan(self, fmt: str, context: int, cache: str) -> Plan:
        return make_plan(self.config, self.weights[fmt], self.work(context, cache))

    def fits(self, plan: Plan) -> bool:
        return plan.total <= self.machine.available

    def largest(self, fmt: str, cache: str) -> int:
        work, longest = self.work(0, cache), self.contexts[-1]
        available = self.machine.available
        return largest_context(self.config, self.weights[fmt], work, available, longest)

    def tokens_per_second(self, fmt: str, context: int, cache: str) -> float | None:
        """Return an upper bound of decode speed, or None without a bandwidth."""
        return self.bandwidth / self._bytes_read(fmt, context, cache) if self.bandwidth else None

    def bounds(self, fmt: str, cache: str) -> dict[str, float]:
        """Return the upper bound of decode speed on each chip, at a short context."""
        read = self._bytes_read(fmt, SHORTEST_CONTEXT, cache)
        return {chip: speed * 1e9 / read for chip, speed in BANDWIDTHS.items()}

    def _bytes_read(self, fmt: str, context: int, cache: str) -> int:
        """Return what each token reads: the weights that it passes through, and the KV cache."""
        return bytes_read_per_token(self.config, self.formats[fmt], self.work(context, cache))
