"""Plots: divergence against bits, weight errors, speeds, losses; figures saved reproducibly."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.evaluate.weight_errors import ModuleRow
from qwen3_mlx.extras import install_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MIN_DIVERGENCE = 1e-9  # nats; a logarithmic axis shows this in place of zero


@dataclass(frozen=True, slots=True)
class Point:
    """A checkpoint in the plot: its bits per weight and its mean KL divergence in nats.

    Points with the same `line` are joined, and the legend names the line. Points without one are
    drawn alone.
    """

    label: str
    bits: float
    divergence: float
    line: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """A chart: lines of heights, by position on a logarithmic axis of base 2.

    The vertical axis begins at 0. `places` is the label of the horizontal axis.
    """

    title: str
    places: str
    lines: Mapping[str, Mapping[int, float]]


def check_picture(path: Path) -> None:
    """Check that a plot can be saved to `path`, before the measurements for it are made.

    Raises:
        ValueError: the name ends neither in .png nor in .svg, or its parent is not a folder.
        Qwen3Error: matplotlib is not installed.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"a picture's name must end in .png or .svg, and {path.name} does not")
    if not path.parent.is_dir():
        raise ValueError(f"a picture cannot be saved in {path.parent}, which is no folder")
    if find_spec("matplotlib") is None:
        raise Qwen3Error(f"a picture needs matplotlib: {install_command('plot')}")


def draw(path: Path, points: Sequence[Point], modules: Sequence[ModuleRow] = ()) -> None:
    """Draw one or more points, and next to them a bar for each module, to a PNG or SVG file.

    The same input gives the same file, byte by byte.

    Raises:
        ValueError, Qwen3Error: as `check_picture`.
    """
    panels = 2 if modules else 1
    with saved_figure(path, width=5.5 * panels) as figure:
        axes = figure.subplots(1, panels, squeeze=False)[0]
        _draw_points(axes[0], points)
        if modules:
            _draw_modules(axes[1], modules)


def draw_speeds(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Draw panels side by side, with one legend, to a PNG or SVG file.

    Raises:
        ValueError, Qwen3Error: as `check_picture`.
    """
    with saved_figure(path, width=3.7 * len(panels)) as figure:
        for axes, panel in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            for name, points in panel.lines.items():
                axes.plot(list(points), list(points.values()), "o-", label=name)
            axes.set_xscale("log", base=2)
            places = sorted({place for points in panel.lines.values() for place in points})
            axes.set_xticks(places, [f"{place:,}" for place in places])
            axes.minorticks_off()
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.2)
            axes.set(title=panel.title, xlabel=panel.places)
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False
        )


def draw_losses(
    path: Path, training: Mapping[int, float], validation: Mapping[int, float], best: int
) -> None:
    """Draw the losses of a training by step, and mark the best step, to a PNG or SVG file.

    Raises:
        ValueError, Qwen3Error: as `check_picture`.
    """
    with saved_figure(path, width=6) as figure:
        axes = figure.subplots()
        axes.plot(list(training), list(training.values()), alpha=0.4, label="a batch")
        if validation:
            axes.plot(list(validation), list(validation.values()), "o-", label="validation")
            axes.axvline(best, color="0.6", linestyle=":", label=f"the best, step {best:,}")
        axes.set_yscale("log")
        axes.grid(alpha=0.2)
        axes.set(xlabel="step", ylabel="loss (nats a token)")
        axes.legend(frameon=False)


@contextmanager
def saved_figure(path: Path, *, width: float, height: float = 4) -> "Iterator[Figure]":
    """Yield a figure of `width` x `height` inches and save it when the block ends.

    The same drawing gives the same file: no date, no random ids.

    Raises:
        ValueError, Qwen3Error: as `check_picture`.
    """
    check_picture(path)
    # Imported here because it takes a second. pyplot is not used: it opens windows, keeps state.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "qwen3-mlx", "font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        ending = path.suffix.lower()[1:]
        metadata = {"Date": None} if ending == "svg" else None
        figure.savefig(path, format=ending, dpi=150, metadata=metadata)


def _draw_points(axes: "Axes", points: Sequence[Point]) -> None:
    ordered = sorted(points, key=lambda point: point.bits)
    heights = [max(point.divergence, _MIN_DIVERGENCE) for point in ordered]
    lines = list(dict.fromkeys(point.line for point in points))
    for line in lines:
        of_line = [place for place in zip(ordered, heights, strict=True) if place[0].line == line]
        places = [point.bits for point, _ in of_line], [height for _, height in of_line]
        axes.plot(*places, "o-" if line else "o", label=line)
    if any(lines):
        axes.legend()
    for point, height in zip(ordered, heights, strict=True):
        place = (point.bits, height)
        axes.annotate(point.label, place, xytext=(5, 4), textcoords="offset points")
    axes.set_yscale("log")
    axes.set_xlim(ordered[0].bits - 0.5, ordered[-1].bits + 1)  # room for the last label
    axes.set_ylim(min(heights) / 3, max(heights) * 3)
    axes.grid(alpha=0.2)
    axes.set(xlabel="bits per weight", ylabel="mean KL divergence (nats)")


def _draw_modules(axes: "Axes", modules: Sequence[ModuleRow]) -> None:
    kinds: dict[str, list[int]] = {}
    for place, row in enumerate(modules):
        kinds.setdefault(row.path.rsplit(".", 1)[-1], []).append(place)
    for kind, places in kinds.items():
        axes.bar(places, [100 * modules[place].error for place in places], width=1, label=kind)
    axes.legend(fontsize=7, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    axes.grid(axis="y", alpha=0.2)
    axes.set(xlabel="module, in the order of the layers", ylabel="error of its weights (%)")
