"""Texts that are ready to be read for their last hidden states: for vectors, or for scores."""

from collections.abc import Sequence
from dataclasses import dataclass

from qwen3_mlx.engine.last_states import Finish


@dataclass(frozen=True, slots=True)
class PreparedTexts:
    """Texts that are checked and encoded: `LoadedModel.compute_texts` only runs them.

    Attributes:
        texts: the token ids of each text, without `shared`.
        width: the numbers of each result.
        finish: computes the results from the last hidden states.
        shared: token ids that all texts begin with; they are read once.
        num_cut: the number of texts that were cut at their end.
    """

    texts: Sequence[Sequence[int]]
    width: int
    finish: Finish
    shared: Sequence[int] = ()
    num_cut: int = 0

    @property
    def num_tokens(self) -> int:
        """The tokens of all texts, shared ones counted for each."""
        return sum(len(self.shared) + len(text) for text in self.texts)

    @property
    def num_read(self) -> int:
        """The tokens that are computed: shared ones count once."""
        return len(self.shared) + sum(map(len, self.texts))
