"""`qwen3 plan`: the memory of a model in each format and context, and what fits a machine."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from qwen3_mlx import backend
from qwen3_mlx.cache.quantized import CACHE_FORMATS
from qwen3_mlx.checkpoint.description import indexed_tensor_names, read_config
from qwen3_mlx.checkpoint.hub import Source
from qwen3_mlx.checkpoint.stored import MLX, formats_stored, quantization_of
from qwen3_mlx.checkpoint.weights import has_all_weights, untie_if_needed
from qwen3_mlx.cli.console import note
from qwen3_mlx.cli.options import Plot, option
from qwen3_mlx.cli.plan_plots import PlanPlot, draw
from qwen3_mlx.engine.memory import (
    Plan,
    Workload,
    bytes_per_token,
    count_weights,
    in_gb,
    largest_context,
    make_plan,
    weight_bytes,
)
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.quantization import Format, FormatOf
from qwen3_mlx.model.sizes import SIZES, published_model_config, size_named, yarn_lengths

_SHORTEST_CONTEXT = 2048  # tokens
_MAC_CHUNK = 2048  # tokens of a prompt that a GPU prefills at once
_GIB = 1 << 30
_MAX_MEMORY_GB = 100_000
# Memory bandwidth in GB/s, from Apple's technical specifications; the faster of two variants.
_BANDWIDTHS = dict(
    [("M1", 68), ("M1 Pro", 200), ("M1 Max", 400), ("M1 Ultra", 800)]
    + [("M2", 100), ("M2 Pro", 200), ("M2 Max", 400), ("M2 Ultra", 800)]
    + [("M3", 100), ("M3 Pro", 150), ("M3 Max", 400), ("M3 Ultra", 819)]
    + [("M4", 120), ("M4 Pro", 273), ("M4 Max", 546), ("M5", 153)]
)
_DTYPE_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_FORMATS = {
    "bf16": None,
    "8": Format(8, 64),
    "6": Format(6, 64),
    "5": Format(5, 64),
    "4": Format(4, 64),
    "mxfp4": Format(4, 32, "mxfp4"),
    "3": Format(3, 64),
}


@dataclass(frozen=True, slots=True)
class _Machine:
    """Memory that a machine has for a model, in bytes, and how it prefills prompts."""

    name: str
    description: str  # a sentence about the memory
    available: int
    chunk: int
    fused: bool

    @classmethod
    def here(cls) -> "_Machine":
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
        return cls(name, f"{name} {gives}", available, backend.prefill_chunk(), backend.on_gpu())

    @classmethod
    def mac(cls, memory: float) -> "_Machine":
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
class _MemoryEstimate:
    """Memory of one model on one machine, for every weight format."""

    name: str
    config: ModelConfig
    machine: _Machine
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
        window, context = self.config.max_position_embeddings, _SHORTEST_CONTEXT
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
        """Return an upper bound of decode speed, or None without a bandwidth.

        Each token reads the weights that it passes through, and the KV cache.
        """
        moved = bytes_per_token(self.config, self.formats[fmt], self.work(context, cache))
        return self.bandwidth / moved if self.bandwidth else None


def plan(  # noqa: PLR0913 - one parameter an option
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help=f"Size ({', '.join(SIZES)}), folder or hub name."),
    ],
    revision: Annotated[str | None, option(text="Branch, tag or commit on the hub.")] = None,
    memory: Annotated[
        float | None,
        option(text="Plan for a Mac with this many GB, not for this machine."),
    ] = None,
    cache: Annotated[
        str,
        option(text=f"KV cache precision shown: {', '.join(CACHE_FORMATS)} (default: bf16)."),
    ] = "bf16",
    dtype: Annotated[
        str,
        option(text="Compute dtype: bfloat16 (the default), float16 or float32."),
    ] = "bfloat16",
    bandwidth: Annotated[
        float | None, option(text="Memory bandwidth in GB/s, to bound tokens/s.")
    ] = None,
    chip: Annotated[
        str | None,
        option(text='Use the memory bandwidth of this chip, such as "M4 Max".'),
    ] = None,
    plot: Plot = None,
    as_json: Annotated[
        bool, option("--json", text="Print everything as JSON, sizes in bytes.")
    ] = False,
) -> None:
    """Show the memory a model needs in each format and context, and what fits.

    No weights are loaded. For a hub name, only config.json is fetched, and at
    most the index of its files.
    """
    if cache not in CACHE_FORMATS:
        raise ValueError(f"--cache must be one of {', '.join(CACHE_FORMATS)}, not {cache!r}")
    if memory is not None and not 1 <= memory <= _MAX_MEMORY_GB:
        raise ValueError(f"--memory must be GB, from 1 to {_MAX_MEMORY_GB:,}, not {memory:g}")
    itemsize = backend.compute_dtype(dtype).size
    machine = _Machine.here() if memory is None else _Machine.mac(memory)
    name, config, formats = _resolve(model, revision)
    weights = {fmt: weight_bytes(config, of, itemsize) for fmt, of in formats.items()}
    estimate = _MemoryEstimate(
        name, config, machine, dtype, formats, weights, _bytes_per_second(bandwidth, chip)
    )
    if plot:
        draw(plot, _picture(estimate, cache))
        note(f"drawn: {plot}")
    print(json.dumps(_as_json(estimate), indent=1) if as_json else _table(estimate, cache))


def _resolve(model: str, revision: str | None) -> tuple[str, ModelConfig, dict[str, FormatOf]]:
    """Return the name and config of a model, and the weight formats to plan."""
    formats = {name: _format_of(fmt) for name, fmt in _FORMATS.items()}
    if size := size_named(model):
        if revision is not None:
            raise ValueError(
                f"--revision belongs to hub names; {size} is planned from its published config"
            )
        return f"Qwen3-{size}", published_model_config(size), formats
    source = Source(model, revision)
    folder, content = read_config(source, ["config.json"])
    config = ModelConfig.from_dict(_checked_config(content, source, folder))
    quantization = quantization_of(content)
    if quantization and quantization.method == MLX and (stored := formats_stored(content, folder)):
        formats = {"as it is": stored, **formats}
    elif quantization:
        note(
            f"The weights are {quantization.method.upper()} and must be converted first: "
            f"qwen3 convert {model} FOLDER. This plan is for the converted model."
        )
    return source.name, config, formats


def _checked_config(content: Mapping[str, Any], source: Source, folder: Path) -> Mapping[str, Any]:
    """Return the content of config.json, corrected to untied if the weights have their own head.

    Weights that are not on disk cannot be compared; then a note warns of a possible head.

    Raises:
        CheckpointError: the weights are of a kind that cannot be read.
    """
    if has_all_weights(folder):
        return untie_if_needed(content, folder)
    tensors = indexed_tensor_names(source, folder) or ()
    if content.get("tie_word_embeddings") is True and "lm_head.weight" in tensors:
        note(
            "config.json ties the head to the embedding, but there is an lm_head; if it is not a "
            "copy of the embedding, it is loaded as well and takes the same memory again."
        )
    return content


def _format_of(fmt: Format | None) -> FormatOf:
    return lambda path: fmt.for_module(path) if fmt else None


def _bytes_per_second(bandwidth: float | None, chip: str | None) -> float | None:
    """Return the memory bandwidth in bytes per second, or None if neither option is given."""
    if chip is not None:
        if bandwidth is not None:
            raise ValueError("--chip and --bandwidth set the same value; give one of them")
        known = {name.lower(): speed for name, speed in _BANDWIDTHS.items()}
        bandwidth = known.get(" ".join(chip.lower().removeprefix("apple ").split()))
        if bandwidth is None:
            raise ValueError(
                f"--chip {chip!r} is not among {', '.join(_BANDWIDTHS)}; give --bandwidth instead"
            )
    if bandwidth is None:
        return None
    if not 0 < bandwidth < math.inf:
        raise ValueError(f"--bandwidth must be GB/s, more than 0, not {bandwidth:g}")
    return bandwidth * 1e9


def _as_json(estimate: _MemoryEstimate) -> dict[str, Any]:
    """Return the whole estimate for JSON, for every cache format, in bytes and tokens."""
    config, machine = estimate.config, estimate.machine
    rows = []
    for fmt in estimate.formats:
        for cache in CACHE_FORMATS:
            for context in estimate.contexts:
                plan = estimate.plan(fmt, context, cache)
                row = {
                    "weight_format": estimate.format_name(fmt),
                    "cache_format": estimate.format_name(cache),
                    "context": context,
                    "yarn": estimate.with_yarn(context),
                    **asdict(plan),
                    "total": plan.total,
                    "fits": estimate.fits(plan),
                    "tokens_per_second_at_most": estimate.tokens_per_second(fmt, context, cache),
                }
                rows.append(row)
    return {
        "model": estimate.name,
        "parameters": count_weights(config),
        "window": config.max_position_embeddings,
        "available": machine.available,
        "assumed": machine.description,
        "dtype": estimate.dtype,
        "chunk": machine.chunk,
        "weights": {estimate.format_name(fmt): size for fmt, size in estimate.weights.items()},
        "largest_context": {
            estimate.format_name(fmt): {
                estimate.format_name(cache): estimate.largest(fmt, cache) for cache in CACHE_FORMATS
            }
            for fmt in estimate.formats
        },
        "rows": rows,
    }


def _table(estimate: _MemoryEstimate, cache: str) -> str:
    contexts, config = estimate.contexts, estimate.config
    plans = {fmt: [estimate.plan(fmt, n, cache) for n in contexts] for fmt in estimate.formats}
    terms = next(iter(plans.values()))  # all but the weights are the same for every format
    lines = [
        f"{estimate.name}: {_count(count_weights(config))} weights, "
        f"{config.num_hidden_layers} layers, "
        f"context window {config.max_position_embeddings:,} tokens",
        f"{estimate.machine.description}.",
        "",
        f"{'memory in GB':14}{'weights':>8}"
        + "".join(f"{_length(n) + ('*' if estimate.with_yarn(n) else ''):>8}" for n in contexts)
        + f"{'fits up to':>12}",
        _row(
            f"cache, {estimate.format_name(cache)}",
            "",
            [f"{plan.cache / 1e9:.2f}" for plan in terms],
        ),
        _row("prefill", "", [f"{plan.activations / 1e9:.2f}" for plan in terms]),
        _row("reserve", "", [f"{plan.reserve / 1e9:.2f}" for plan in terms]),
    ]
    for fmt, row in plans.items():
        totals = [_in_brackets(f"{plan.total / 1e9:.1f}", estimate.fits(plan)) for plan in row]
        longest = estimate.largest(fmt, cache)
        mark = "*" if estimate.with_yarn(longest) else ""
        weights = f"{estimate.weights[fmt] / 1e9:.2f}"
        lines.append(
            _row(estimate.label(fmt), weights, totals)
            + f"{f'{longest:,}{mark}' if longest else '-':>12}"
        )
    if estimate.bandwidth:
        lines += ["", f"tokens/s, at most, at {estimate.bandwidth / 1e9:g} GB/s"]
        for fmt in estimate.formats:
            speeds = [estimate.tokens_per_second(fmt, n, cache) or 0 for n in contexts]
            cells = [
                _in_brackets(f"{speed:.0f}", estimate.fits(plan))
                for speed, plan in zip(speeds, plans[fmt], strict=True)
            ]
            lines.append(_row(estimate.label(fmt), "", cells))
    return "\n".join([*lines, "", *_notes(estimate)])


def _notes(estimate: _MemoryEstimate) -> list[str]:
    notes = [
        "(In brackets: does not fit.) A context is prompt and reply together. The compute dtype is",
        f"{estimate.dtype}; prefill is an estimate for {estimate.machine.chunk:,} tokens at once.",
    ]
    if any(estimate.with_yarn(context) for context in estimate.contexts):
        notes.append("* needs YaRN, set as the model card says in config.json's rope_scaling.")
    if estimate.bandwidth is None:
        notes.append("For an upper bound of tokens/s: --bandwidth 400 (GB/s), or --chip 'M4 Max'.")
    else:
        notes.append(
            "Tokens/s: the bandwidth divided by the bytes read per token; real speeds are lower."
        )
    if not estimate.machine.fused and estimate.dtype != "float32":
        notes.append("On this CPU the default compute dtype is float32: see --dtype float32.")
    return notes


def _row(name: str, weights: str, cells: list[str]) -> str:
    return f"{name:14}{weights:>8}" + "".join(f"{cell:>8}" for cell in cells)


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _in_brackets(cell: str, fits: bool) -> str:
    return cell if fits else f"({cell})"


def _length(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else f"{tokens:,}"


def _picture(estimate: _MemoryEstimate, cache: str) -> PlanPlot:
    contexts = estimate.contexts
    return PlanPlot(
        title=f"{estimate.name}, KV cache {estimate.format_name(cache)}",
        plans={
            estimate.label(fmt): [estimate.plan(fmt, context, cache) for context in contexts]
            for fmt in estimate.formats
        },
        contexts=contexts,
        labels=[_length(n) + ("*" if estimate.with_yarn(n) else "") for n in contexts],
        available=estimate.machine.available,
        machine=estimate.machine.name,
    )
