"""Thinking by every spelling that clients have, made one wish.

What is said most plainly wins: a switch, then a budget, then an effort, then what the server was
started with, then the checkpoint's own default. Where two say the same thing differently and
neither comes first, or what is wished cannot be, that is an error. An effort is a hint: what cannot
be done about it, or is decided by something that comes first, is a warning.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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

Said = tuple[str, bool | int | str | None]
"""A field's name and what it says."""


class Resolved(NamedTuple):
    """What a wish is for the library, whether its budget `bends`, and what clients are warned of.

    A budget bends unless the request names it: where `max_tokens` leave no room, it gives way.
    """

    thinking: bool | None
    budget: int | None
    bends: bool
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class ThinkingRequest:
    """What a request says of thinking: switches by rank, budgets, and an effort.

    `adaptive` is the field that leaves it to the model, where one does. `overruled` are fields that
    the protocol itself puts after others, and which those are.
    """

    switches: Sequence[Sequence[Said]] = ()
    budgets: Sequence[Said] = ()
    effort: str | None = None
    effort_name: str = "reasoning_effort"
    adaptive: str | None = None
    overruled: Sequence[tuple[Said, str]] = ()

    def resolve(
        self, thinking: Thinking, default: bool | None, default_budget: int | None
    ) -> Resolved:
        """Give `thinking` and `thinking_budget` for the library, and warnings.

        Raises:
            ValueError: the request contradicts itself.
        """
        agreed = [found for rank in self.switches if (found := _agreed(rank))]
        switch = agreed[0] if agreed else None
        said = _agreed(self.budgets)
        budget = int(said[1] or 0) if said else None
        wanted = bool(switch[1]) if switch else None
        if switch and not wanted and said and (budget or 0) > 0:
            raise ValueError(f"{said[0]}={budget} is for thinking, which {switch[0]} switches off")
        effort, why = self._effort(thinking, switch, said)
        if wanted is None and budget is None and effort is not None:
            wanted = effort != "none"
        elif wanted is None and budget not in (None, 0):
            wanted = True if thinking.can_think or budget != UNLIMITED else None
        if budget is None and effort not in (None, "none"):
            budget = EFFORTS[str(effort)]
        if wanted is None:
            wanted = default
        thinks = thinking.can_think if wanted is None else wanted
        if budget is None and thinks:
            budget = default_budget
        bounded = thinks and budget not in (None, UNLIMITED)
        warnings = [*self._overruled(agreed), *why]
        return Resolved(wanted, budget if bounded else None, said is None, warnings)

    def _effort(
        self, thinking: Thinking, switch: Said | None, budget: Said | None
    ) -> tuple[str | None, list[str]]:
        """Give the effort, if it has a say, and why it has none otherwise."""
        unable = "this checkpoint cannot think"
        able, warnings = thinking.can_think, list[str]()
        if not able and self.adaptive:
            warnings.append(_ignored((self.adaptive, "adaptive"), unable))
        if self.effort is None:
            return None, warnings
        on = self.effort != "none"
        first = switch if switch and bool(switch[1]) != on else None
        off = switch is not None and not on  # a switch has said the same as an effort of none
        if not first and able and not off and budget and budget[1] != EFFORTS[self.effort]:
            first = budget
        why = unable if on and not able else ""
        if first:
            why = f"{_stated(first)} comes first"
        if not why:
            return self.effort, warnings
        return None, [*warnings, _ignored((self.effort_name, self.effort), why)]

    def _overruled(self, switches: Sequence[Said]) -> Iterator[str]:
        for one in switches[1:]:
            if one[1] != switches[0][1]:
                yield _ignored(one, f"{_stated(switches[0])} comes first")
        for one, other in self.overruled:
            yield _ignored(one, f"{other} comes first")


def _agreed(fields: Sequence[Said]) -> Said | None:
    """Give the field that says something, if any does; all that do must say the same."""
    stated = [(name, value) for name, value in fields if value is not None]
    for name, value in stated[1:]:
        if value != stated[0][1]:
            raise ValueError(
                f"{_stated(stated[0])} and {_stated((name, value))} contradict each other; "
                "send one of them"
            )
    return stated[0] if stated else None


def agreed_effort(efforts: Sequence[tuple[str, str | None]]) -> tuple[str, str | None]:
    """Give the field of an effort that says something, and what; the first, if none does.

    Raises:
        ValueError: two name different efforts.
    """
    found = _agreed(efforts)
    return (found[0], str(found[1])) if found else (efforts[0][0], None)


def _ignored(field: Said, why: str) -> str:
    return f"{_stated(field)} was ignored: {why}"


def _stated(field: Said) -> str:
    """Give a field and its value as the client wrote them."""
    name, value = field
    if name == "thinking.type" and isinstance(value, bool):
        value = "enabled" if value else "disabled"
    return f"{name}={value if isinstance(value, str) else str(value).lower()}"
