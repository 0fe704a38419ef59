"""`qwen3 plan`: the memory of a model in each format and context, and what fits a machine."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

from qwen3_mlx import backend
from qwen3_mlx.cache.quantized import CACHE_FORMATS
from qwen3_mlx.checkpoint.description import indexed_tensor_names, read_config
from qwen3_mlx.checkpoint.gguf_folder import describe_remote
from qwen3_mlx.checkpoint.hub import Source
from qwen3_mlx.checkpoint.stored_formats import formats_held, held, matrices_of
from qwen3_mlx.checkpoint.weights import has_all_weights, with_stored_head, without_missing_head
from qwen3_mlx.cli.chips import BANDWIDTHS, chip_named, this_chip
from qwen3_mlx.cli.console import note
from qwen3_mlx.cli.option_groups import option
from qwen3_mlx.cli.options import GgufFile, Plot, alias_meant, complete_model, with_file
from qwen3_mlx.cli.plan_estimate import Machine, MemoryEstimate
from qwen3_mlx.cli.plan_hosts import divisions, table_of_hosts
from qwen3_mlx.cli.plan_plots import PlanPlot, draw
from qwen3_mlx.cli.plan_sizes import recommend, sizes_as_json, table_of_sizes
from qwen3_mlx.cli.plan_table import table_of
from qwen3_mlx.cluster.hosts import ClusterOptions
from qwen3_mlx.engine.memory import count_weights, weight_bytes
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.quantization import Format, FormatOf
from qwen3_mlx.model.sizes import DEMO, SIZES, hub_name, is_demo, published_model_config, size_named

_MAX_MEMORY_GB = 100_000
_CONTEXT = 4096  # tokens
_FORMATS = {
    "bf16": None,
    "8": Format(8, 64),
    "6": Format(6, 64),
    "5": Format(5, 64),
    "4": Format(4, 64),
    "mxfp4": Format(4, 32, "mxfp4"),
    "3": Format(3, 64),
}


def _gigabytes(stated: str, name: str = "--memory") -> float:
    """Return the memory that an option states, with or without its unit, in GB."""
    number = stated.strip().upper().removesuffix("GB")
    with suppress(ValueError):
        if 1 <= float(number) <= _MAX_MEMORY_GB:
            return float(number)
    raise ValueError(f"{name} must be GB, from 1 to {_MAX_MEMORY_GB:,}, not {stated}")


def _memories(hosts: str) -> list[float]:
    memories = [_gigabytes(part, "--hosts") for part in hosts.split(",")]
    if len(memories) < 2:
        raise ValueError("--hosts need the memory of two machines or more, such as 24,36")
    return memories


def plan(  # noqa: PLR0913 - one parameter an option
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help=f"Size ({', '.join(SIZES)}), folder, hub name or {DEMO}; without it, one is "
            "recommended.",
            callback=alias_meant,
            autocompletion=complete_model,
            show_default=False,
        ),
    ] = None,
    revision: Annotated[str | None, option(text="Branch, tag or commit on the hub.")] = None,
    file: GgufFile = None,
    memory: Annotated[
        str | None,
        option(text="Plan for a Mac with this many GB, not for this machine.", metavar="GB"),
    ] = None,
    hosts: Annotated[
        str | None,
        option(
            text="Plan for several Macs with so many GB each, such as 24,36; the first one leads.",
            metavar="GB,GB",
        ),
    ] = None,
    layers: Annotated[
        str | None, option(text="Layers of each of --hosts, such as 24,40 (default: by memory).")
    ] = None,
    context: Annotated[
        int | None,
        option(
            text=f"Context that --hosts are planned for, in tokens (default: {_CONTEXT:,}).", min=1
        ),
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
        option(text='Bound tokens/s by the bandwidth of this chip, such as "M4 Max".'),
    ] = None,
    plot: Plot = None,
    as_json: Annotated[
        bool, option("--json", text="Print everything as JSON, sizes in bytes.")
    ] = False,
) -> None:
    """Show the memory a model needs in each format and context, and what fits.

    [bold]qwen3 plan[/bold]   recommend a size and a format for this machine.
    [bold]qwen3 plan --memory 16 --chip M4[/bold]   recommend for another machine.
    [bold]qwen3 plan 8B[/bold]   plan the memory of a size, term by term.
    [bold]qwen3 plan 32B --hosts 24,36[/bold]   divide it between two Macs.

    No weights are loaded. For a hub name, only config.json is fetched, and at
    most the index of its files; of a GGUF file its header, some 10 MB.
    """
    if cache not in CACHE_FORMATS:
        raise ValueError(f"--cache must be one of {', '.join(CACHE_FORMATS)}, not {cache!r}")
    itemsize = backend.compute_dtype(dtype).size
    machine = Machine.here(itemsize) if memory is None else Machine.mac(_gigabytes(memory))
    own = this_chip() if memory is None and bandwidth is None else None
    speed = _bytes_per_second(bandwidth, own if chip is None else chip)

    def estimate_of(model: str) -> MemoryEstimate:
        name, config, formats = _resolve(model, revision)
        weights = {fmt: weight_bytes(config, of, itemsize) for fmt, of in formats.items()}
        return MemoryEstimate(name, config, machine, dtype, formats, weights, speed)

    if hosts:
        if any(each is not None for each in (memory, chip, bandwidth, plot)):
            raise ValueError(
                "--hosts go without --memory, --chip, --bandwidth and --plot: they state the "
                "memory of each Mac, and nothing is known of the speed of the link"
            )
        if model is None:
            raise ValueError("--hosts need a model: qwen3 plan 32B --hosts 24,36")
        memories, context = _memories(hosts), context or _CONTEXT
        counts = ClusterOptions(hosts, layers=layers).counts()
        estimate = estimate_of(with_file(model, file) or model)
        found = list(divisions(estimate, memories, counts, context, cache))
        table = table_of_hosts(estimate.name, found, context)
        print(json.dumps([asdict(one) for one in found], indent=1) if as_json else table)
        return
    if layers or context:
        raise ValueError("--layers and --context go with --hosts: qwen3 plan 32B --hosts 24,36")
    if model is None:
        if plot or revision or file or cache != "bf16":
            raise ValueError("--plot, --revision, --file and --cache need a model: qwen3 plan 8B")
        estimates = {size: estimate_of(size) for size in SIZES}
        best = recommend(estimates)
        sizes = sizes_as_json(estimates, best)
        print(json.dumps(sizes, indent=1) if as_json else table_of_sizes(estimates, best))
        return
    estimate = estimate_of(with_file(model, file) or model)
    if plot:
        draw(plot, _picture(estimate, cache))
        note(f"drawn: {plot}")
    print(json.dumps(_as_json(estimate, cache), indent=1) if as_json else table_of(estimate, cache))


def _resolve(model: str, revision: str | None) -> tuple[str, ModelConfig, dict[str, FormatOf]]:
    """Return the name and config of a model, and the weight formats to plan."""
    formats = {name: _format_of(fmt) for name, fmt in _FORMATS.items()}
    if size := size_named(model):
        if revision is not None:
            raise ValueError(
                f"--revision belongs to hub names; {size} is planned from its published config"
            )
        return f"Qwen3-{size}", published_model_config(size), formats
    source = Source(hub_name(model), revision)
    parts = source.gguf_files()
    stored: FormatOf | None
    if source.missing(parts):
        content, weights = describe_remote(source, parts)
        config, stored = ModelConfig.from_dict(content), held(matrices_of(weights, content)).get
    else:
        folder, content = read_config(source, ["config.json"])
        config = ModelConfig.from_dict(_checked_config(content, source, folder))
        stored = formats_held(content, folder)
    if stored:
        formats = {"as it is": stored, **formats}
    return DEMO if is_demo(model) else source.name, config, formats


def _checked_config(content: Mapping[str, Any], source: Source, folder: Path) -> Mapping[str, Any]:
    """Return the content of config.json, corrected for the head that the weights have.

    Weights that are not on disk cannot be compared; then a note warns of a possible head.

    Raises:
        CheckpointError: the weights are of a kind that cannot be read.
    """
    if has_all_weights(folder):
        return with_stored_head(content, folder)
    tensors = indexed_tensor_names(source, folder) or ()
    content = without_missing_head(content, tensors)
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
        if (known := chip_named(chip)) is None:
            raise ValueError(
                f"--chip {chip!r} is not among {', '.join(BANDWIDTHS)}; give --bandwidth instead"
            )
        bandwidth = BANDWIDTHS[known]
    if bandwidth is None:
        return None
    if not 0 < bandwidth < math.inf:
        raise ValueError(f"--bandwidth must be GB/s, more than 0, not {bandwidth:g}")
    return bandwidth * 1e9


def _as_json(estimate: MemoryEstimate, cache: str) -> dict[str, Any]:
    """Return the whole estimate for JSON, for every cache format, in bytes and tokens.

    The bounds by chip are those of the format `cache`.
    """
    config, machine = estimate.config, estimate.machine
    rows = []
    for fmt, kept, context in product(estimate.formats, CACHE_FORMATS, estimate.contexts):
        plan = estimate.plan(fmt, context, kept)
        row = {
            "weight_format": estimate.format_name(fmt),
            "cache_format": estimate.format_name(kept),
            "context": context,
            "yarn": estimate.with_yarn(context),
            **asdict(plan),
            "total": plan.total,
            "fits": estimate.fits(plan),
            "tokens_per_second_at_most": estimate.tokens_per_second(fmt, context, kept),
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
        "tokens_per_second_at_most": {
            estimate.format_name(fmt): estimate.bounds(fmt, cache) for fmt in estimate.formats
        },
        "largest_context": {
            estimate.format_name(fmt): {
                estimate.format_name(kept): estimate.largest(fmt, kept) for kept in CACHE_FORMATS
            }
            for fmt in estimate.formats
        },
        "rows": rows,
    }


def _picture(estimate: MemoryEstimate, cache: str) -> PlanPlot:
    contexts = estimate.contexts
    return PlanPlot(
        title=f"{estimate.name}, KV cache {estimate.format_name(cache)}",
        plans={
            estimate.label(fmt): [estimate.plan(fmt, context, cache) for context in contexts]
            for fmt in estimate.formats
        },
        contexts=contexts,
        labels=[estimate.context_label(context) for context in contexts],
        available=estimate.machine.available,
        machine=estimate.machine.name,
        speeds={
            estimate.label(fmt): {BANDWIDTHS[chip]: bound for chip, bound in bounds.items()}
            for fmt, bounds in ((fmt, estimate.bounds(fmt, cache)) for fmt in estimate.formats)
        },
        bandwidth=estimate.bandwidth,
    )
