"""Collects the log probabilities of the prompt's tokens during prefill."""

from collections.abc import Callable, Iterable, Sequence

from qwen3_mlx.text.events import PromptTokens, TokenLogprob
from qwen3_mlx.text.tokenizer import Tokenizer

Score = tuple[int, float, Sequence[tuple[int, float]]]
"""A token, its log probability, and the likeliest tokens in its place with theirs."""


class ScoredPrompt:
    """Collects the scores of the prompt `ids`, and emits one event when they are complete."""

    def __init__(
        self, tokenizer: Tokenizer, ids: Sequence[int], tell: Callable[[PromptTokens], None]
    ) -> None:
        """Create the collector; a score is expected for each id after the first.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        if (greatest := max(ids)) >= len(tokenizer):
            raise ValueError(f"token id {greatest} is not in the vocabulary, so it has no logprob")
        self._tokenizer = tokenizer
        self._ids = ids
        self._emit = tell
        self._scored: list[TokenLogprob] = []
        self._emitted = False

    def add(self, scores: Iterable[Score]) -> None:
        """Append the scores of the next tokens; empty if the prompt has only one token."""
        token_bytes = self._tokenizer.token_bytes
        self._scored += (
            TokenLogprob(
                token_bytes(token), logprob, [(token_bytes(other), value) for other, value in top]
            )
            for token, logprob, top in scores
        )
        if len(self._scored) == len(self._ids) - 1 and not self._emitted:
            self._emitted = True
            self._emit(PromptTokens(token_bytes(self._ids[0]), self._scored))
