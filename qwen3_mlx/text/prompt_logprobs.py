"""The tokens of a prompt with their log probabilities, collected as the prompt is read."""

from collections.abc import Callable, Iterable, Sequence

from qwen3_mlx.text.events import PromptTokens, TokenLogprob
from qwen3_mlx.text.tokenizer import Tokenizer

Score = tuple[int, float, Sequence[tuple[int, float]]]
"""A token, its log probability, and the likeliest in its place with theirs."""


class ScoredPrompt:
    """Collects the scores of the prompt `ids`, and makes one event of them when all are there."""

    def __init__(
        self, tokenizer: Tokenizer, ids: Sequence[int], tell: Callable[[PromptTokens], None]
    ) -> None:
        """Prepare for as many scores as there are ids after the first.

        Raises:
            ValueError: an id stands for no token.
        """
        if (greatest := max(ids)) >= len(tokenizer):
            raise ValueError(f"token id {greatest} stands for no token, so it has no logprob")
        self._tokenizer = tokenizer
        self._ids = ids
        self._tell = tell
        self._others: list[TokenLogprob] = []
        self._told = False

    def add(self, scores: Iterable[Score]) -> None:
        """Take the scores of the tokens that come next; none, where the prompt has but one."""
        written = self._tokenizer.token_bytes
        self._others += (
            TokenLogprob(written(token), logprob, [(written(one), value) for one, value in top])
            for token, logprob, top in scores
        )
        if len(self._others) == len(self._ids) - 1 and not self._told:
            self._told = True
            self._tell(PromptTokens(written(self._ids[0]), self._others))
