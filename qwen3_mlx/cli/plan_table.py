"""The table of `qwen3 plan`: the terms of the memory by context, and what fits."""

from collections.abc import Iterator

from qwen3_mlx.cli.chips import by_bandwidth, published
from qwen3_mlx.cli.plan_estimate import SHORTEST_CONTEXT, MemoryEstimate
from qwen3_mlx.engine.memory import count_weights


def table_of(estimate: MemoryEstimate, cache: str) -> str:
    """Return the table for a KV cache of the format `cache`, with notes below it."""
    contexts, config = estimate.contexts, estimate.config
    plans = {fmt: [estimate.plan(fmt, n, cache) for n in contexts] for fmt in estimate.formats}
    terms = next(iter(plans.values()))  # all but the weights are the same for every format
    lines = [
        f"{estimate.name}: {count(count_weights(config))} weights, "
        f"{config.num_hidden_layers} layers, "
        f"context window {config.max_position_embeddings:,} tokens",
        f"{estimate.machine.description}.",
        "",
        f"{'memory in GB':14}{'weights':>8}"
        + "".join(f"{estimate.context_label(n):>8}" for n in contexts)
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
    else:
        lines += ["", *_by_chip(estimate, cache)]
    return "\n".join([*lines, "", *_notes(estimate)])


def _by_chip(estimate: MemoryEstimate, cache: str) -> Iterator[str]:
    """Yield the bound of tokens a second of every chip, at a short context."""
    context = estimate.context_label(SHORTEST_CONTEXT)
    yield f"tokens/s, at most, at a context of {context}, by the bandwidth of a chip's memory"
    heads = "".join(f"{estimate.label(fmt):>8}" for fmt in estimate.formats)
    yield f"{'':37}{'GB/s':>5}{heads}"
    bounds = [estimate.bounds(fmt, cache) for fmt in estimate.formats]
    for speed, chips in by_bandwidth().items():
        row = [of_chips[chips[0]] for of_chips in bounds]
        cells = "".join(f"{bound:>8.1f}" if bound < 10 else f"{bound:>8,.0f}" for bound in row)
        yield f"{', '.join(chips):37}{speed:>5.0f}{cells}"


def _notes(estimate: MemoryEstimate) -> list[str]:
    notes = [
        "(In brackets: does not fit.) A context is prompt and reply together. The compute dtype is",
        f"{estimate.dtype}; prefill is an estimate for {estimate.machine.chunk:,} tokens at once.",
    ]
    if any(estimate.with_yarn(context) for context in estimate.contexts):
        notes.append("* needs YaRN, set as the model card says in config.json's rope_scaling.")
    notes.append(
        "Tokens/s: the bandwidth divided by the bytes that a token reads; real speeds are lower."
    )
    notes.append(f"{published()}.")
    if estimate.bandwidth is None:
        notes.append("By context: --chip 'M4 Max', or --bandwidth 400 (GB/s).")
    if not estimate.machine.fused and estimate.dtype != "float32":
        notes.append("On this CPU the default compute dtype is float32: see --dtype float32.")
    return notes


def _row(name: str, weights: str, cells: list[str]) -> str:
    return f"{name:14}{weights:>8}" + "".join(f"{cell:>8}" for cell in cells)


def count(number: int) -> str:
    """Return a number of weights as text."""
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _in_brackets(cell: str, fits: bool) -> str:
    return cell if fits else f"({cell})"
