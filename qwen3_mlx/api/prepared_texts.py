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
    """

    texts: Sequence[Sequence[int]]
    width: int
    finish: Finish
    shared: Sequence[int] = ()

    @property
    def num_tokens(self) -> int:
        """The tokens of all texts, shared ones counted for each."""
        return sum(len(self.shared) + len(text) for text in self.texts)
