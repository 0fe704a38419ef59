"""What a generation calls: a sink for its tokens, and a constraint on the next token."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # numpy would cost the start a tenth of a second
    import numpy as np
    from numpy.typing import NDArray

    Mask = NDArray[np.uint32]


class TokenSink(Protocol):
    """Receives the tokens of one generation, and may end it."""

    finished: bool

    def advance(self, ids: Sequence[int]) -> None:
        """Append the next tokens; end tokens are not among them."""

    def rewind(self, count: int) -> None:
        """Remove the last `count` tokens: the constraint of this generation rolls them back.

        They are tokens that the constraint itself would not have shown yet.
        """


class TokenCollector:
    """The plain sink: collects tokens until `take`."""

    finished = False

    def __init__(self) -> None:
        self._tokens: list[int] = []

    def advance(self, ids: Sequence[int]) -> None:
        """Append the next tokens."""
        self._tokens += ids

    def rewind(self, count: int) -> None:
        """Remove the last `count` tokens."""
        del self._tokens[len(self._tokens) - count :]

    def take(self) -> list[int]:
        """Return the tokens collected since the last call."""
        tokens, self._tokens = self._tokens, []
        return tokens


class Constraint(Protocol):
    """Decides which tokens may come next in one generation: a grammar or a thinking budget.

    After each `advance` the engine reads `rollback`, `finished`, `forced_tokens` and `needs_mask`,
    in this order. Only while `needs_mask` is true does a step wait for the token of the step
    before it.
    """

    @property
    def finished(self) -> bool:
        """True if the reply ends here."""

    @property
    def rollback(self) -> int:
        """Number of last tokens to roll back; the constraint itself has dropped them already."""

    @property
    def needs_mask(self) -> bool:
        """True if `mask` restricts the next token."""

    def advance(self, ids: Sequence[int]) -> None:
        """Append the next tokens, chosen or forced; end tokens are among them."""

    def forced_tokens(self) -> list[int]:
        """Return the ids that must come next; the engine appends them like chosen ones."""

    def mask(self) -> "Mask | None":
        """Return the allowed next ids as bits, 32 to a word, or None if all are allowed.

        Called while the forward pass runs.
        """

    def lookahead_masks(self, ids: Sequence[int]) -> "list[Mask | None]":
        """Return the mask for the next token, and one for the token after each of `ids`.

        Those hold if the draft tokens `ids` are chosen: at most len(ids) + 1 masks, and only up to
        the first place where tokens are sure to be forced.
        """
