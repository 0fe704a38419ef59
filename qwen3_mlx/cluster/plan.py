"""The plan of a forward pass, in numbers: all that a follower needs to take part in it.

Token ids are not in it: they come with the tensors, so that a plan can be sent while the device
still chooses them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Event = tuple[int, ...]
"""A change of caches before a pass.

(key,) is dropped, (key, 0) is new and plain, (key, parent, tokens) is a copy. Of other new caches,
which have the format of the cluster, the first plan tells.
"""


@dataclass(frozen=True, slots=True)
class PlanPart:
    """One sequence's part of a pass.

    Attributes:
        key: the number of its caches.
        offset: the tokens that they hold before the pass; what they held beyond is dropped.
        length: the new tokens.
        wanted: the last of them whose hidden states are needed.
        capacity: the tokens that the next growth of the caches allocates.
    """

    key: int
    offset: int
    length: int
    wanted: int
    capacity: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A pass over ids [batch, tokens].

    Attributes:
        step: the number of the pass.
        batch, tokens: the shape of the ids.
        parts: the sequences, end to end; none if whole sequences are read without caches.
        wanted: the positions whose hidden states are needed, where there are no parts; None is all.
        columns: those of the joint caches that hold all sequences; 0 if each has its own.
    """

    step: int
    batch: int
    tokens: int
    parts: Sequence[PlanPart] = ()
    wanted: Sequence[int] | None = None
    columns: int = 0

    def to_message(self) -> dict[str, Any]:
        """Return it for `Channel.send`."""
        parts = [
            [part.key, part.offset, part.length, part.wanted, part.capacity] for part in self.parts
        ]
        message: dict[str, Any] = {"plan": [self.step, self.batch, self.tokens], "p": parts}
        if self.wanted is not None:
            message["w"] = list(self.wanted)
        if self.columns:
            message["j"] = self.columns
        return message

    @classmethod
    def of_message(cls, message: dict[str, Any]) -> "Plan":
        """Create it from the message that was received."""
        parts = [PlanPart(*numbers) for numbers in message["p"]]
        step, batch, tokens = message["plan"]
        return cls(step, batch, tokens, parts, message.get("w"), message.get("j", 0))
