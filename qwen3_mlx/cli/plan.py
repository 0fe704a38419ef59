"""`qwen3 plan`: what a model takes in each format and context, and what of it fits a machine."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from qwen3_mlx import backend
from qwen3_mlx.cache.quantized import CACHE_FORMATS
from qwen3_mlx.checkpoint.description import read_config, tensors_listed
from qwen3_mlx.checkpoint.hub import Source
from qwen3_mlx.checkpoint.stored import MLX, formats_stored, quantization_of
from qwen3_mlx.checkpoint.weights import are_here, untied
from qwen3_mlx.cli.console import note
from qwen3_mlx.cli.plan_plots import Picture, draw
from qwen3_mlx.engine.memory import (
    FormatOf,
    Plan,
    Workload,
    bytes_a_token,
    count_weights,
    in_gb,
    largest_context,
    make_plan,
    weight_bytes,
)
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.quantization import Format
from qwen3_mlx.model.sizes import SIZES, published, size_named, yarn_lengths

_SHORTEST = 2048
_MAC_CHUNK = 2048  # tokens of a prompt that a GPU reads at once
_GIB = 1 << 30
_MOST_MEMORY = 100_000  # GB
# Memory bandwidth in GB/s, of Apple's technical specifications; of two variants, the faster.
_CHIPS = dict(
    [("M1", 68), ("M1 Pro", 200), ("M1 Max", 400), ("M1 Ultra", 800)]
    + [("M2", 100), ("M2 Pro", 200), ("M2 Max", 400), ("M2 Ultra", 800)]
    + [("M3", 100), ("M3 Pro", 150), ("M3 Max", 400), ("M3 Ultra", 819)]
    + [("M4", 120), ("M4 Pro", 273), ("M4 Max", 546), ("M5", 153)]
)
_PLAIN = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
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
    """What a model may take, and how prompts are read there."""

    words: str
    available: int
    chunk: int
    fused: bool

    @classmethod
    def here(cls) -> "_Machine":
        available, most = backend.available_memory(), backend.memory_limit()
        if backend.stated_memory():
            words = f"This process can have {in_gb(available)}, as QWEN3_MEMORY says"
        elif backend.on_metal():
            words = (
                f"This Mac can give {in_gb(available)}, the working set that Metal recommends; "
                f"{in_gb(backend.free_memory())} of memory are free now"
            )
        else:
            words = f"This machine can give {in_gb(available)} now"
            if available < most:
                words += f", and {in_gb(most)} with nothing else running"
        return cls(words, available, backend.prefill_chunk(), backend.on_gpu())

    @classmethod
    def mac(cls, memory: float) -> "_Machine":
        total = int(memory * _GIB)
        if backend.on_metal() and total == backend.total_memory():
            available = backend.working_set()
            words = (
                f"This Mac, with {memory:g} GB: its GPU can have {in_gb(available)} of 10^9 bytes"
            )
        else:
            available = backend.working_set_of(total)
            share = "two thirds" if available == total * 2 // 3 else "three quarters"
            words = (
                f"A Mac with {memory:g} GB: macOS lets the GPU have about {share} by default, "
                f"{in_gb(available)} of 10^9 bytes"
            )
        return cls(words, available, _MAC_CHUNK, True)


@dataclass(frozen=True, slots=True)
class _MemoryEstimate:
    """One model on one machine, in every format of weights."""

    name: str
    config: ModelConfig
    machine: _Machine
    dtype: str
    formats: Mapping[str, FormatOf]
    weights: Mapping[str, int]
    speed: float | None  # bytes a second

    @property
    def itemsize(self) -> int:
        """The bytes of a number in the compute dtype."""
        return backend.compute_dtype(self.dtype).size

    def word(self, form: str) -> str:
        """Name a format as what it is; "bf16" stands for whatever is not quantized."""
        return _PLAIN[self.dtype] if form == "bf16" else form

    def label(self, form: str) -> str:
        """Name a format of weights for people."""
        return f"{form} bits" if form.isdigit() else self.word(form)

    @property
    def contexts(self) -> list[int]:
        """The lengths shown: doubling to the window, the window, and the published YaRN lengths."""
        window, context = self.config.max_position_embeddings, _SHORTEST
        lengths = []
        while context < window:
            lengths.append(context)
            context *= 2
        return [*lengths, window, *yarn_lengths(self.config)]

    def with_yarn(self, context: int) -> bool:
        """Say whether so long a context needs YaRN."""
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

    def plan(self, form: str, context: int, cache: str) -> Plan:
        return make_plan(self.config, self.weights[form], self.work(context, cache))

    def fits(self, plan: Plan) -> bool:
        return plan.total <= self.machine.available

    def largest(self, form: str, cache: str) -> int:
        work, most = self.work(0, cache), self.contexts[-1]
        available = self.machine.available
        return largest_context(self.config, self.weights[form], work, available, most)

    def tokens_a_second(self, form: str, context: int, cache: str) -> float | None:
        """Give the upper bound: every token moves the weights it goes through, and the cache."""
        moved = bytes_a_token(self.config, self.formats[form], self.work(context, cache))
        return self.speed / moved if self.speed else None


def _option(*names: str, text: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, show_default=False, **more)


def plan(  # noqa: PLR0913 - one parameter an option
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help=f"A size ({', '.join(SIZES)}), a folder, or a hub name."
        ),
    ],
    revision: Annotated[
        str | None, _option("--revision", text="The hub's branch, tag or commit.")
    ] = None,
    memory: Annotated[
        float | None, _option("--memory", text="Plan for a Mac with so many GB, not this machine.")
    ] = None,
    cache: Annotated[
        str,
        _option("--cache", text=f"The KV cache shown: {', '.join(CACHE_FORMATS)} (default: bf16)."),
    ] = "bf16",
    dtype: Annotated[
        str,
        _option("--dtype", text="Compute in bfloat16 (the default), float16 or float32."),
    ] = "bfloat16",
    bandwidth: Annotated[
        float | None, _option("--bandwidth", text="Of the memory, in GB/s: bounds tokens/s.")
    ] = None,
    chip: Annotated[
        str | None, _option("--chip", text='Take that of a chip, such as "M4 Max".')
    ] = None,
    plot: Annotated[
        Path | None, _option("--plot", text="Draw it, too: a .png or .svg file.")
    ] = None,
    as_json: Annotated[bool, _option("--json", text="All of it, for programs, in bytes.")] = False,
) -> None:
    """Tell how much memory a model takes, in each format and context, and what of it fits.

    Nothing is loaded; of a hub's model config.json is fetched, and at most the index of its files.
    """
    if cache not in CACHE_FORMATS:
        raise ValueError(f"--cache must be one of {', '.join(CACHE_FORMATS)}, not {cache!r}")
    if memory is not None and not 1 <= memory <= _MOST_MEMORY:
        raise ValueError(f"--memory must be GB, from 1 to {_MOST_MEMORY:,}, not {memory:g}")
    itemsize = backend.compute_dtype(dtype).size
    machine = _Machine.here() if memory is None else _Machine.mac(memory)
    name, config, formats = _find(model, revision)
    weights = {form: weight_bytes(config, of, itemsize) for form, of in formats.items()}
    speed = _speed(bandwidth, chip)
    survey = _MemoryEstimate(name, config, machine, dtype, formats, weights, speed)
    if plot:
        draw(plot, _picture(survey, cache))
        note(f"drawn: {plot}")
    print(json.dumps(_everything(survey), indent=1) if as_json else _table(survey, cache))


def _find(model: str, revision: str | None) -> tuple[str, ModelConfig, dict[str, FormatOf]]:
    """Give a model's name, its network, and the formats to plan it in."""
    formats = {name: _format_of(form) for name, form in _FORMATS.items()}
    if size := size_named(model):
        if revision is not None:
            raise ValueError(
                f"--revision belongs to hub names; {size} is planned from what is known"
            )
        return f"Qwen3-{size}", published(size), formats
    source = Source(model, revision)
    folder, content = read_config(source, ["config.json"])
    config = ModelConfig.from_dict(_judged(content, source, folder))
    quantization = quantization_of(content)
    if quantization and quantization.method == MLX and (stored := formats_stored(content, folder)):
        formats = {"as it is": stored, **formats}
    elif quantization:
        note(
            f"Its weights are {quantization.method.upper()}, which must be converted first: "
            f"qwen3 convert {model} FOLDER. This is the plan of what that makes."
        )
    return source.name, config, formats


def _judged(content: Mapping[str, Any], source: Source, folder: Path) -> Mapping[str, Any]:
    """Return a config.json, untied if the weights have a head of their own, or say they may.

    Raises:
        CheckpointError: the weights are of a kind that is not read.
    """
    if are_here(folder):
        return untied(content, folder)
    tensors = tensors_listed(source, folder) or ()
    if content.get("tie_word_embeddings") is True and "lm_head.weight" in tensors:
        note(
            "config.json ties the head to the embedding, but there is an lm_head; if it is no copy "
            "of the embedding, it is loaded beside that, and takes as much again."
        )
    return content


def _format_of(form: Format | None) -> FormatOf:
    return lambda path: form.for_module(path) if form else None


def _speed(bandwidth: float | None, chip: str | None) -> float | None:
    """Give the memory's bandwidth in bytes a second, if it is told."""
    if chip is not None:
        if bandwidth is not None:
            raise ValueError("--chip and --bandwidth say the same; give one of them")
        known = {name.lower(): speed for name, speed in _CHIPS.items()}
        bandwidth = known.get(" ".join(chip.lower().removeprefix("apple ").split()))
        if bandwidth is None:
            raise ValueError(
                f"--chip {chip!r} is not among {', '.join(_CHIPS)}; give --bandwidth instead"
            )
    if bandwidth is None:
        return None
    if not 0 < bandwidth < math.inf:
        raise ValueError(f"--bandwidth must be GB/s, more than 0, not {bandwidth:g}")
    return bandwidth * 1e9


def _everything(survey: _MemoryEstimate) -> dict[str, Any]:
    """Give all that is known, for every cache format, in bytes and tokens."""
    config, machine = survey.config, survey.machine
    rows = []
    for form in survey.formats:
        for cache in CACHE_FORMATS:
            for context in survey.contexts:
                plan = survey.plan(form, context, cache)
                row = {
                    "weight_format": survey.word(form),
                    "cache_format": survey.word(cache),
                    "context": context,
                    "yarn": survey.with_yarn(context),
                    **asdict(plan),
                    "total": plan.total,
                    "fits": survey.fits(plan),
                    "tokens_per_second_at_most": survey.tokens_a_second(form, context, cache),
                }
                rows.append(row)
    return {
        "model": survey.name,
        "parameters": count_weights(config),
        "window": config.max_position_embeddings,
        "available": machine.available,
        "assumed": machine.words,
        "dtype": survey.dtype,
        "chunk": machine.chunk,
        "weights": {survey.word(form): size for form, size in survey.weights.items()},
        "largest_context": {
            survey.word(form): {
                survey.word(cache): survey.largest(form, cache) for cache in CACHE_FORMATS
            }
            for form in survey.formats
        },
        "rows": rows,
    }


def _table(survey: _MemoryEstimate, cache: str) -> str:
    contexts, config = survey.contexts, survey.config
    plans = {form: [survey.plan(form, n, cache) for n in contexts] for form in survey.formats}
    terms = next(iter(plans.values()))  # but for the weights, they are the same for every format
    lines = [
        f"{survey.name}: {_count(count_weights(config))} weights, "
        f"{config.num_hidden_layers} layers, a window of {config.max_position_embeddings:,} tokens",
        f"{survey.machine.words}.",
        "",
        f"{'memory in GB':14}{'weights':>8}"
        + "".join(f"{_length(n) + ('*' if survey.with_yarn(n) else ''):>8}" for n in contexts)
        + f"{'fits up to':>12}",
        _row(f"cache, {survey.word(cache)}", "", [f"{plan.cache / 1e9:.2f}" for plan in terms]),
        _row("prefill", "", [f"{plan.activations / 1e9:.2f}" for plan in terms]),
        _row("reserve", "", [f"{plan.reserve / 1e9:.2f}" for plan in terms]),
    ]
    for form, row in plans.items():
        totals = [_in_brackets(f"{plan.total / 1e9:.1f}", survey.fits(plan)) for plan in row]
        most = survey.largest(form, cache)
        mark = "*" if survey.with_yarn(most) else ""
        weights = f"{survey.weights[form] / 1e9:.2f}"
        lines.append(
            _row(survey.label(form), weights, totals) + f"{f'{most:,}{mark}' if most else '-':>12}"
        )
    if survey.speed:
        lines += ["", f"tokens/s, at most, at {survey.speed / 1e9:g} GB/s"]
        for form in survey.formats:
            speeds = [survey.tokens_a_second(form, n, cache) or 0 for n in contexts]
            cells = [
                _in_brackets(f"{speed:.0f}", survey.fits(plan))
                for speed, plan in zip(speeds, plans[form], strict=True)
            ]
            lines.append(_row(survey.label(form), "", cells))
    return "\n".join([*lines, "", *_notes(survey)])


def _notes(survey: _MemoryEstimate) -> list[str]:
    notes = [
        "(In brackets: does not fit.) A context is prompt and reply together. Computing is in",
        f"{survey.dtype}; prefill is an estimate for {survey.machine.chunk:,} tokens at once.",
    ]
    if any(survey.with_yarn(context) for context in survey.contexts):
        notes.append("* needs YaRN, set as the model card says in config.json's rope_scaling.")
    if survey.speed is None:
        notes.append("For an upper bound of tokens/s: --bandwidth 400 (GB/s), or --chip 'M4 Max'.")
    else:
        notes.append("Tokens/s: the bandwidth over the bytes a token moves; real ones are lower.")
    if not survey.machine.fused and survey.dtype != "float32":
        notes.append(
            "On this CPU, loading computes in float32 unless told otherwise: see --dtype float32."
        )
    return notes


def _row(name: str, weights: str, cells: list[str]) -> str:
    return f"{name:14}{weights:>8}" + "".join(f"{cell:>8}" for cell in cells)


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _in_brackets(cell: str, fits: bool) -> str:
    return cell if fits else f"({cell})"


def _length(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else f"{tokens:,}"


def _picture(survey: _MemoryEstimate, cache: str) -> Picture:
    contexts = survey.contexts
    return Picture(
        title=f"{survey.name}, KV cache {survey.word(cache)}",
        plans={
            survey.label(form): [survey.plan(form, context, cache) for context in contexts]
            for form in survey.formats
        },
        contexts=contexts,
        labels=[_length(n) + ("*" if survey.with_yarn(n) else "") for n in contexts],
        available=survey.machine.available,
        machine=survey.machine.words.split(":")[0].split(" can")[0],
    )
