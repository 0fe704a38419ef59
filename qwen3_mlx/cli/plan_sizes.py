"""`qwen3 plan` without a model: all published sizes on one machine, and which of them to take.

Recommended is the best size that fits with room for a context of `_LEAST_CONTEXT` tokens, in 4 bits
or more, and as many bits as leave room for the context that the models were trained with.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen3_mlx.cli.chips import published
from qwen3_mlx.cli.plan_estimate import SHORTEST_CONTEXT, MemoryEstimate

# From the least to the best. 30B-A3B answers about as well as 32B and reads a tenth of the weights
# for each token, so it is several times faster.
_BY_QUALITY = ("0.6B", "1.7B", "4B", "8B", "14B", "32B", "30B-A3B", "235B-A22B")
_FORMATS = ("8", "6", "4")  # bits, for which the hub has builds for MLX of every size
_LEAST_CONTEXT, _TRAINED_CONTEXT = 8192, 32768  # tokens
_COMFORT = 0.9  # of the memory: with the least context, a model that takes more is a tight fit
_READING_SPEED = 10  # tokens a second, where the bandwidth is known; slower is a trial of patience


@dataclass(frozen=True, slots=True)
class Recommendation:
    """A size to take, in a format of so many bits, with the longest context that then fits."""

    size: str
    bits: str
    name: str
    context: int


def recommend(estimates: Mapping[str, MemoryEstimate]) -> Recommendation | None:
    """Return the recommended size of those whose estimates are given; None if none fits."""
    for size in reversed(_BY_QUALITY):
        estimate = estimates[size]
        speed = estimate.tokens_per_second("4", _LEAST_CONTEXT, "bf16")
        limit = _COMFORT * estimate.machine.available
        if estimate.plan("4", _LEAST_CONTEXT, "bf16").total > limit or (
            speed is not None and speed < _READING_SPEED
        ):
            continue
        bits = next(filter(lambda bits: _has_room(estimate, bits), _FORMATS), "4")
        context = min(estimate.largest(bits, "bf16"), estimate.config.context_window)
        return Recommendation(size, bits, f"Qwen/Qwen3-{size}-MLX-{bits}bit", context)
    return None


def _has_room(estimate: MemoryEstimate, bits: str) -> bool:
    speed = estimate.tokens_per_second(bits, _LEAST_CONTEXT, "bf16")
    fast = speed is None or speed >= _READING_SPEED
    return fast and estimate.fits(estimate.plan(bits, _TRAINED_CONTEXT, "bf16"))


def table_of_sizes(estimates: Mapping[str, MemoryEstimate], best: Recommendation | None) -> str:
    """Return a table of the sizes with the recommendation below it."""
    some = next(iter(estimates.values()))
    shown = [*_FORMATS[::-1], "bf16"]
    lines = [
        f"{some.machine.description}.",
        "",
        f"{'longest context in tokens':26}" + "".join(f"{some.label(fmt):>10}" for fmt in shown),
    ]
    for size in _BY_QUALITY:
        cells = (f"{_longest(estimates[size], fmt) or '-':>10}" for fmt in shown)
        mark = "  <--" if best and best.size == size else ""
        lines.append(f"{f'Qwen3-{size}':26}" + "".join(cells) + mark)
    if some.bandwidth:
        lines += ["", *_speeds(estimates, shown)]
    return "\n".join([*lines, "", *_advice(best, some)])


def _speeds(estimates: Mapping[str, MemoryEstimate], shown: Sequence[str]) -> Iterator[str]:
    """Yield the bound of tokens a second of each size that fits."""
    some = next(iter(estimates.values()))
    heads = "".join(f"{some.label(fmt):>10}" for fmt in shown)
    yield f"{f'tokens/s at most, {(some.bandwidth or 0) / 1e9:g} GB/s':26}{heads}"
    for size in _BY_QUALITY:
        estimate = estimates[size]
        cells = []
        for fmt in shown:
            speed = estimate.tokens_per_second(fmt, SHORTEST_CONTEXT, "bf16")
            cells.append(f"{f'{speed:,.0f}' if _longest(estimate, fmt) else '-':>10}")
        yield f"{f'Qwen3-{size}':26}{''.join(cells)}"
    yield f"Real speeds are lower; {published()}."


def _longest(estimate: MemoryEstimate, fmt: str) -> str:
    longest = min(estimate.largest(fmt, "bf16"), estimate.config.context_window)
    return f"{longest:,}" if longest else ""


def _advice(best: Recommendation | None, some: MemoryEstimate) -> Iterator[str]:
    if best is None:
        speed = " at a readable speed" if some.bandwidth else ""
        yield f"None of them fits with {_LEAST_CONTEXT:,} tokens{speed}."
        return
    model = best.size if best.bits == "4" else best.name
    yield f"Recommended: Qwen3-{best.size} in {best.bits} bits, with up to {best.context:,} tokens."
    yield f"  qwen3 pull {model}      # then: qwen3 chat -m {model}"
    yield f"  qwen3 plan {best.size}      # its memory, term by term"


def sizes_as_json(
    estimates: Mapping[str, MemoryEstimate], best: Recommendation | None
) -> dict[str, Any]:
    """Return the sizes and the recommendation for JSON, in bytes and tokens.

    The speeds are bounds, as in the table; without a bandwidth they are None.
    """
    some = next(iter(estimates.values()))
    return {
        "available": some.machine.available,
        "assumed": some.machine.description,
        "recommended": best
        and {
            "model": best.name,
            "size": best.size,
            "bits": int(best.bits),
            "context": best.context,
        },
        "sizes": {
            size: {
                estimate.format_name(fmt): {
                    "weights": estimate.weights[fmt],
                    "largest_context": estimate.largest(fmt, "bf16"),
                    "tokens_per_second_at_most": estimate.tokens_per_second(
                        fmt, SHORTEST_CONTEXT, "bf16"
                    ),
                }
                for fmt in estimate.formats
            }
            for size, estimate in estimates.items()
        },
    }
