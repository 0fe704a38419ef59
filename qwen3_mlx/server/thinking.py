"""Thinking options of a request: the spellings of all protocols, resolved to one setting.

The most explicit field wins: a switch, then a budget, then an effort, then the server's setting,
then the checkpoint's default. Fields of equal rank that contradict each other are an error, and so
is a combination that is impossible. An effort is a hint: one that the checkpoint cannot follow, or
that a field of higher rank overrules, gives a warning.
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
"""Thinking budget in tokens for each effort: the tiers that other local servers use."""

NamedValue = tuple[str, bool | int | str | None]
"""Name of a field, and its value."""


class Resolved(NamedTuple):
    """Thinking options for the library, and warnings for the client.

    The budget `bends` unless the request names it: it is reduced where `max_tokens` has no room.
    """

    thinking: bool | None
    budget: int | None
    bends: bool
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class ThinkingRequest:
    """Thinking fields of a request: switches by rank, budgets, and an effort.

    `adaptive` is the name of the field that leaves thinking to the model, if there is one.
    `overruled` are fields that the protocol ranks below others, each with the field that wins.
    """

    switches: Sequence[Sequence[NamedValue]] = ()
    budgets: Sequence[NamedValue] = ()
    effort: str | None = None
    effort_name: str = "reasoning_effort"
    adaptive: str | None = None
    overruled: Sequence[tuple[NamedValue, str]] = ()

    def resolve(
        self, thinking: Thinking, default: bool | None, default_budget: int | None
    ) -> Resolved:
        """Return `thinking` and `thinking_budget` for the library, and warnings.

        Raises:
            ValueError: fields contradict each other.
        """
        switches = [field for rank in self.switches if (field := _agreed(rank))]
        switch = switches[0] if switches else None
        named = _agreed(self.budgets)
        budget = int(named[1] or 0) if named else None
        enabled = bool(switch[1]) if switch else None
        if switch and not enabled and named and (budget or 0) > 0:
            raise ValueError(f"{named[0]}={budget} is for thinking, which {switch[0]} switches off")
        effort, effort_warnings = self._effort(thinking, switch, named)
        if enabled is None and budget is None and effort is not None:
            enabled = effort != "none"
        elif enabled is None and budget not in (None, 0):
            enabled = True if thinking.can_think or budget != UNLIMITED else None
        if budget is None and effort not in (None, "none"):
            budget = EFFORTS[str(effort)]
        if enabled is None:
            enabled = default
        thinks = thinking.can_think if enabled is None else enabled
        if budget is None and thinks:
            budget = default_budget
        bounded = thinks and budget not in (None, UNLIMITED)
        warnings = [*self._overruled(switches), *effort_warnings]
        return Resolved(enabled, budget if bounded else None, named is None, warnings)

    def _effort(
        self, thinking: Thinking, switch: NamedValue | None, budget: NamedValue | None
    ) -> tuple[str | None, list[str]]:
        """Return the effort, or None where it is not followed, and warnings with the reason."""
        cannot_think = "this checkpoint cannot think"
        can_think, warnings = thinking.can_think, list[str]()
        if not can_think and self.adaptive:
            warnings.append(_ignored((self.adaptive, "adaptive"), cannot_think))
        if self.effort is None:
            return None, warnings
        on = self.effort != "none"
        winner = switch if switch and bool(switch[1]) != on else None
        off = switch is not None and not on  # the switch and an effort of none agree
        if not winner and can_think and not off and budget and budget[1] != EFFORTS[self.effort]:
            winner = budget
        reason = cannot_think if on and not can_think else ""
        if winner:
            reason = f"{_stated(winner)} comes first"
        if not reason:
            return self.effort, warnings
        return None, [*warnings, _ignored((self.effort_name, self.effort), reason)]

    def _overruled(self, switches: Sequence[NamedValue]) -> Iterator[str]:
        for switch in switches[1:]:
            if switch[1] != switches[0][1]:
                yield _ignored(switch, f"{_stated(switches[0])} comes first")
        for field, winner in self.overruled:
            yield _ignored(field, f"{winner} comes first")


def _agreed(fields: Sequence[NamedValue]) -> NamedValue | None:
    """Return the first field that has a value, if any has.

    Raises:
        ValueError: two fields have different values.
    """
    stated = [(name, value) for name, value in fields if value is not None]
    for name, value in stated[1:]:
        if value != stated[0][1]:
            raise ValueError(
                f"{_stated(stated[0])} and {_stated((name, value))} contradict each other; "
                "send one of them"
            )
    return stated[0] if stated else None


def agreed_effort(efforts: Sequence[tuple[str, str | None]]) -> tuple[str, str | None]:
    """Return the name and value of the effort field that has a value; the first name if none has.

    Raises:
        ValueError: two fields name different efforts.
    """
    field = _agreed(efforts)
    return (field[0], str(field[1])) if field else (efforts[0][0], None)


def _ignored(field: NamedValue, reason: str) -> str:
    return f"{_stated(field)} was ignored: {reason}"


def _stated(field: NamedValue) -> str:
    """Return a field and its value as the client wrote them."""
    name, value = field
    if name == "thinking.type" and isinstance(value, bool):
        value = "enabled" if value else "disabled"
    return f"{name}={value if isinstance(value, str) else str(value).lower()}"
