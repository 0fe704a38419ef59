"""Thinking by every spelling that clients have, made one wish.

What is said most plainly wins: a switch, then a budget, then an effort, then what the server was
started with, then the checkpoint's own default. Where two say the same thing differently and
neither comes first, or what is wished cannot be, that is an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qwen3_mlx.text.thinking import Thinking

UNLIMITED = -1
EFFORTS = {
    "none": 0,
    "minimal": 256,
    "low": 512,
    "medium": 2048,
    "high": 8192,
    "xhigh": UNLIMITED,
    "max": UNLIMITED,
}
"""Tokens of thinking; those of the tiers that other local servers use."""

Said = tuple[str, bool | int | None]
"""A field's name and what it says."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request says of thinking: switches by rank, budgets, and an effort."""

    switches: Sequence[Sequence[Said]] = ()
    budgets: Sequence[Said] = ()
    effort: str | None = None

    def resolve(
        self, thinking: Thinking, default: bool | None, default_budget: int | None
    ) -> tuple[bool | None, int | None]:
        """Give `thinking` and `thinking_budget` for the library.

        Raises:
            ValueError: the request contradicts itself, or a budget is negative.
        """
        switch = next((found for rank in self.switches if (found := _agreed(rank))), None)
        said = _agreed(self.budgets)
        if said and said[1] is not None and said[1] < UNLIMITED:
            raise ValueError(f"{said[0]} must be at least 0, or -1 for no limit, not {said[1]}")
        budget = said[1] if said else None
        wanted = switch[1] if switch else None
        if switch and not wanted and said and (budget or 0) > 0:
            raise ValueError(f"{said[0]}={budget} is for thinking, which {switch[0]} switches off")
        if wanted is None and budget is None and self.effort is not None:
            wanted = self.effort != "none"
        elif wanted is None and budget is not None and budget != 0:
            wanted = True
        if budget is None and self.effort not in (None, "none"):
            budget = EFFORTS[str(self.effort)]
        if wanted is None:
            wanted = default
        thinks = thinking.can_think if wanted is None else wanted
        if budget is None and thinks:
            budget = default_budget
        bounded = thinks and budget not in (None, UNLIMITED)
        return None if wanted is None else bool(wanted), budget if bounded else None


def _agreed(fields: Sequence[Said]) -> Said | None:
    """Give the field that says something, if any does; all that do must say the same."""
    stated = [(name, value) for name, value in fields if value is not None]
    for name, value in stated[1:]:
        if value != stated[0][1]:
            raise ValueError(
                f"{stated[0][0]}={_shown(stated[0][1])} and {name}={_shown(value)} contradict "
                "each other; send one of them"
            )
    return stated[0] if stated else None


def _shown(value: bool | int | None) -> str:
    return str(value).lower()
