"""The plot of `qwen3 plan`: the parts of the memory, how it grows with the context, and speed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from qwen3_mlx.cli.chips import BANDWIDTHS
from qwen3_mlx.engine.memory import Plan
from qwen3_mlx.evaluate.plots import saved_figure

_TERMS = {
    "weights": "#3b5b92",
    "cache": "#e08e45",
    "activations": "#6aa58c",
    "reserve": "#b8b8b8",
}
_SHADES = ("#1b9e9e", "#2a7f9e", "#2f6096", "#3d4489", "#4d2f74", "#57205b", "#5a1740", "#4a1024")
_BARS_AT = 8192  # tokens
_CROWDED = 1.4  # ratio of neighbouring contexts below which the second gets no label
_TOO_MUCH_COLOUR = "#c0392b"
_TICKS = ("M1", "M4", "M4 Pro", "M3 Max", "M4 Max", "M3 Ultra")


@dataclass(frozen=True, slots=True)
class PlanPlot:
    """Content of the plot: for each weight format, a memory plan per context.

    `speeds` are the most tokens a second of each format by bandwidth in GB/s; `bandwidth` is that
    of the machine in bytes a second, if it is known.
    """

    title: str
    plans: Mapping[str, Sequence[Plan]]
    contexts: Sequence[int]
    labels: Sequence[str]  # of the contexts
    available: int
    machine: str
    speeds: Mapping[str, Mapping[float, float]]
    bandwidth: float | None


def draw(path: Path, picture: PlanPlot) -> None:
    """Write the plot as PNG or SVG, the same bytes for the same plans.

    Raises:
        ValueError, Qwen3Error: as `check_picture`.
    """
    with saved_figure(path, width=14, height=4.6) as figure:
        bars, curves, speeds = figure.subplots(1, 3, width_ratios=(1, 1.25, 1))
        for axes in (bars, curves, speeds):
            axes.spines[["top", "right"]].set_visible(False)
        _draw_bars(bars, picture)
        _draw_curves(curves, picture)
        _draw_speeds(speeds, picture)
        figure.suptitle(picture.title, x=0.01, ha="left", weight="bold")


def _draw_bars(axes: Any, picture: PlanPlot) -> None:
    """Draw one bar per weight format: the terms of the memory at one context, stacked."""
    index = max(
        i for i, n in enumerate(picture.contexts) if n <= max(_BARS_AT, min(picture.contexts))
    )
    names = list(picture.plans)
    below = [0.0] * len(names)
    for term, colour in _TERMS.items():
        sizes = [getattr(plans[index], term) / 1e9 for plans in picture.plans.values()]
        axes.bar(names, sizes, bottom=below, color=colour, label=term, width=0.7)
        below = [low + size for low, size in zip(below, sizes, strict=True)]
    limit = picture.available / 1e9
    for name, total in zip(names, below, strict=True):
        colour = "black" if total <= limit else _TOO_MUCH_COLOUR
        axes.text(name, total, f"{total:.1f}", ha="center", va="bottom", color=colour)
    _draw_limit(axes, picture, top=max(below))
    axes.set_title(f"at a context of {picture.labels[index]}", loc="left", fontsize=10)
    axes.set_ylabel("GB")
    axes.legend(frameon=False, fontsize=9, loc="upper right", reverse=True)


def _draw_curves(axes: Any, picture: PlanPlot) -> None:
    """Draw the total over the context, one curve per format, labelled at its end."""
    totals = {name: [p.total / 1e9 for p in plans] for name, plans in picture.plans.items()}
    top = max(max(curve) for curve in totals.values())
    _draw_limit(axes, picture, top=top)
    lowest = -1.0
    for number, (name, curve) in enumerate(sorted(totals.items(), key=lambda item: item[1])):
        shade = _SHADES[number % len(_SHADES)]
        axes.plot(picture.contexts, curve, color=shade, marker="o", markersize=3)
        lowest = max(curve[-1], lowest + 0.037 * top)  # keeps the labels from overlapping
        position = picture.contexts[-1], lowest
        axes.annotate(
            name, position, (6, 0), textcoords="offset points", va="center", color=shade, fontsize=9
        )
    axes.set_xscale("log", base=2)
    crowded = [b / a < _CROWDED for a, b in pairwise([1, *picture.contexts])]
    labels = ["" if close else label for close, label in zip(crowded, picture.labels, strict=True)]
    axes.set_xticks(picture.contexts, labels)
    axes.minorticks_off()
    with_yarn = any("*" in label for label in picture.labels)
    axes.set_xlabel("context in tokens" + (" (* with YaRN)" if with_yarn else ""))
    axes.set_title("memory by context and weights", loc="left", fontsize=10)


def _draw_speeds(axes: Any, picture: PlanPlot) -> None:
    """Draw the bound of tokens a second over the bandwidth, a line per format, with some chips."""
    fastest_first = sorted(picture.speeds.items(), key=lambda item: -max(item[1].values()))
    lowest = math.inf
    for number, (name, line) in enumerate(fastest_first):
        shade = _SHADES[number % len(_SHADES)]
        axes.plot(*zip(*sorted(line.items()), strict=True), color=shade, marker="o", markersize=3)
        lowest = min(max(line.values()), lowest / 1.15)  # keeps the labels from overlapping
        position = max(line), lowest
        axes.annotate(
            name, position, (6, 0), textcoords="offset points", va="center", color=shade, fontsize=9
        )
    if picture.bandwidth:
        axes.axvline(picture.bandwidth / 1e9, color=_TOO_MUCH_COLOUR, linewidth=1.2, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks([BANDWIDTHS[chip] for chip in _TICKS], _TICKS, fontsize=8, rotation=30)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("bandwidth of the chip's memory")
    axes.set_title("tokens/s, at most, after 2k tokens", loc="left", fontsize=10)


def _draw_limit(axes: Any, picture: PlanPlot, *, top: float) -> None:
    """Draw the available memory as a line, unless it is far above all totals."""
    limit = picture.available / 1e9
    axes.set_ylim(0, 1.12 * top)
    if limit > 1.1 * top:
        return
    name = f"{picture.machine}: {limit:.1f} GB"
    axes.axhline(limit, color=_TOO_MUCH_COLOUR, linewidth=1.2, linestyle="--", label=name)
    axes.axhspan(limit, 1.12 * top, color=_TOO_MUCH_COLOUR, alpha=0.05, linewidth=0)
