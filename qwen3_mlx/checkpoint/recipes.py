"""Which bits go where: from a recipe's name to a format for each module of the network."""

from collections.abc import Mapping

from qwen3_mlx.model.quantization import Format

RECIPES = ("uniform", "mixed", "mixed-rich", "auto")
"""`auto` measures; see `sensitivity.py`. The others are decided by names alone."""

Formats = dict[str, Format | None]
"""The format of each module's weights by its path; None leaves them as they are."""

# Modules over the same input, which the network stores as one matrix where their formats agree.
TOGETHER = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up"),
}
_RICHER = {2: 4, 3: 5, 4: 6, 5: 8, 6: 8, 8: 8}  # bits to spend where they matter


def group_of(path: str) -> str:
    """Name the group of modules that must have one format: q, k, v of a layer, gate and up."""
    parent, dot, name = path.rpartition(".")
    return f"{parent}{dot}{TOGETHER.get(name, name)}"


def choose_formats(modules: Mapping[str, tuple[int, ...]], recipe: str, fmt: Format) -> Formats:
    """Give each module its format by the recipe `uniform`, `mixed` or `mixed-rich`.

    `modules` are the weights' shapes by path, of modules that can be quantized. `mixed` spends more
    on the embedding, the head and the first and last layer, `mixed-rich` also on all attention
    projections and `down_proj`. Rows that are no multiple of the group size stay as they are.

    Raises:
        ValueError: the recipe is unknown, or has no richer form of this mode.
    """
    if recipe == "uniform":
        return {path: _fitting(fmt.for_module(path), shape) for path, shape in modules.items()}
    if recipe not in RECIPES[1:3]:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, not {recipe!r}")
    if fmt.mode != "affine":
        raise ValueError(f"recipe {recipe!r} mixes bits, and {fmt.mode} has one kind of them")
    richer = Format(_RICHER[fmt.bits], fmt.group_size)
    last = max((_layer(path) for path in modules), default=0)

    def matters(path: str) -> bool:
        if _layer(path) in (-1, 0, last):
            return True
        return recipe == "mixed-rich" and (".self_attn." in path or path.endswith("down_proj"))

    return {
        path: _fitting((richer if matters(path) else fmt).for_module(path), shape)
        for path, shape in modules.items()
    }


def _fitting(fmt: Format, shape: tuple[int, ...]) -> Format | None:
    return fmt if shape[-1] % fmt.group_size == 0 else None


def _layer(path: str) -> int:
    """Give the number of the layer that a module belongs to; -1 for embedding and head."""
    before, found, after = path.partition(".layers.")
    return int(after.partition(".")[0]) if found else -1


def assign(
    scores: Mapping[str, Mapping[Format, float]],
    bytes_of: Mapping[str, Mapping[Format, int]],
    budget: int,
) -> dict[str, Format]:
    """Choose a format for each group so that the scores' sum is least within `budget` bytes.

    Each price of a byte has a best choice for every group by itself, so the price is what is
    looked for (Lagrange relaxation); what is left of the budget then goes to whichever change
    still gains most for its bytes.

    Raises:
        ValueError: not even the smallest formats fit.
    """

    def at(price: float) -> dict[str, Format]:
        return {
            group: min(of, key=lambda fmt: (of[fmt] + price * bytes_of[group][fmt], fmt.bits))
            for group, of in scores.items()
        }

    def size(choice: Mapping[str, Format]) -> int:
        return sum(bytes_of[group][fmt] for group, fmt in choice.items())

    low, high = 0.0, 1e6  # too cheap, dear enough
    if size(at(high)) > budget:
        raise ValueError("the target is below what the smallest formats take")
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if size(at(middle)) <= budget else (middle, high)
    choice = at(high)
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
