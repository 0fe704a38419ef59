"""Quantization recipes: choose a format for each module of the network."""

from collections.abc import Mapping

from qwen3_mlx.model.quantization import AFFINE, Format

RECIPES = ("uniform", "mixed", "mixed-rich", "auto")
"""`auto` measures the modules (see `sensitivity.py`); the others decide by module names alone."""

Formats = dict[str, Format | None]
"""The format of each module's weights by module path; None leaves them unquantized."""

# Modules over the same input. The network stores them as one matrix if their formats agree.
FUSED_GROUPS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up"),
}
_RICHER_BITS = {2: 4, 3: 5, 4: 6, 5: 8, 6: 8, 8: 8}  # bits of sensitive modules


def group_of(path: str) -> str:
    """Return the name of a module's group, which has one format: q, k, v of a layer; gate, up."""
    parent, dot, name = path.rpartition(".")
    return f"{parent}{dot}{FUSED_GROUPS.get(name, name)}"


def choose_formats(modules: Mapping[str, tuple[int, ...]], recipe: str, fmt: Format) -> Formats:
    """Return the format of each module by the recipe `uniform`, `mixed` or `mixed-rich`.

    `modules` are the weight shapes of the modules that can be quantized, by path. `mixed` spends
    more bits on the embedding, the head, and the first and last layer; `mixed-rich` also on all
    attention projections and `down_proj`. Modules whose rows are no multiple of the group size stay
    unquantized.

    Raises:
        ValueError: the recipe is unknown, or the mode has only one number of bits.
    """
    if recipe == "uniform":
        return {path: _fitting(fmt.for_module(path), shape) for path, shape in modules.items()}
    if recipe not in RECIPES[1:3]:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, not {recipe!r}")
    if fmt.mode != AFFINE:
        raise ValueError(f"recipe {recipe!r} mixes bits, and {fmt.mode} has only one choice")
    richer = Format(_RICHER_BITS[fmt.bits], fmt.group_size)
    last = max((_layer(path) for path in modules), default=0)

    def is_sensitive(path: str) -> bool:
        if _layer(path) in (-1, 0, last):
            return True
        return recipe == "mixed-rich" and (".self_attn." in path or path.endswith("down_proj"))

    return {
        path: _fitting((richer if is_sensitive(path) else fmt).for_module(path), shape)
        for path, shape in modules.items()
    }


def _fitting(fmt: Format, shape: tuple[int, ...]) -> Format | None:
    return fmt if fmt.fits(shape) else None


def _layer(path: str) -> int:
    """Return the number of the layer that a module belongs to; -1 for embedding and head."""
    before, found, after = path.partition(".layers.")
    return int(after.partition(".")[0]) if found else -1


def assign(
    scores: Mapping[str, Mapping[Format, float]],
    bytes_of: Mapping[str, Mapping[Format, int]],
    budget: int,
) -> dict[str, Format]:
    """Return a format for each group that minimises the sum of scores within `budget` bytes.

    For a given price of a byte, the best choice of each group is independent of the others, so the
    search is for the price (Lagrangian relaxation). What is left of the budget is spent greedily,
    on the change that gains most for its bytes.

    Raises:
        ValueError: not even the smallest formats fit.
    """

    def choice_at(price: float) -> dict[str, Format]:
        return {
            group: min(of, key=lambda fmt: (of[fmt] + price * bytes_of[group][fmt], fmt.bits))
            for group, of in scores.items()
        }

    def size(choice: Mapping[str, Format]) -> int:
        return sum(bytes_of[group][fmt] for group, fmt in choice.items())

    low, high = 0.0, 1e6  # at `low` the choice may exceed the budget; at `high` it fits
    if size(choice_at(high)) > budget:
        raise ValueError("the target is below what the smallest formats take")
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if size(choice_at(middle)) <= budget else (middle, high)
    choice = choice_at(high)
    while True:
        room = budget - size(choice)
        gains = [
            ((scores[group][choice[group]] - score) / extra, group, fmt)
            for group, of in scores.items()
            for fmt, score in of.items()
            if 0 < (extra := bytes_of[group][fmt] - bytes_of[group][choice[group]]) <= room
            and score < scores[group][choice[group]]
        ]
        if not gains:
            return choice
        _, group, fmt = max(gains, key=lambda gain: gain[0])
        choice[group] = fmt
