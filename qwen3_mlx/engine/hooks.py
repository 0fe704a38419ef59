"""What follows one generation: a sink of its tokens, and a constraint on the next one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # numpy would cost the start a tenth of a second
    import numpy as np
    from numpy.typing import NDArray

    Mask = NDArray[np.uint32]


class TokenSink(Protocol):
    """Follows the tokens of one generation and may end it."""

    finished: bool

    def advance(self, ids: Sequence[int]) -> None:
        """Take the next tokens; end tokens are not among them."""

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens taken: the constraint of this generation takes them back.

        They are tokens that the constraint itself would not have shown yet.
        """


class Constraint(Protocol):
    """Steers one generation: a grammar, say, or a budget of thinking.

    After each `advance` the engine looks at `finished`, `rollback`, `forced_tokens` and
    `needs_mask`, in this order. Only while `needs_mask` does a step have to wait for the token of
    the one before.
    """

    @property
    def finished(self) -> bool:
        """Whether the reply ends here."""

    @property
    def rollback(self) -> int:
        """How many of the last tokens are to be taken back; it has forgotten them itself."""

    @property
    def needs_mask(self) -> bool:
        """Whether `mask` is to be asked before the next token is chosen."""

    def advance(self, ids: Sequence[int]) -> None:
        """Take the next tokens, chosen or forced; end tokens are among them."""

    def forced_tokens(self) -> list[int]:
        """Give the ids that must come next; the engine takes them as if they had been chosen."""

    def mask(self) -> "Mask | None":
        """Give the ids allowed next as bits, 32 to a word, or None for all.

        Asked while the forward pass runs.
        """

    def lookahead_masks(self, ids: Sequence[int]) -> "list[Mask | None]":
        """Give the mask for the next token, and those for the tokens that follow `ids`, if they
        should come: at most one more than ids, and only as far as nothing is sure to be forced.
        """
