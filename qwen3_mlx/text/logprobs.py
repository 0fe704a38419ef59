"""Collects the log probabilities of a reply's tokens for its events, and those of the prompt's."""

from collections.abc import Callable, Iterable, Sequence

from qwen3_mlx.text.events import PromptTokens, TokenLogprob
from qwen3_mlx.text.tokenizer import Tokenizer

Score = tuple[int, float, Sequence[tuple[int, float]]]
"""A token, its log probability, and the likeliest tokens in its place with theirs."""


def token_logprob(tokenizer: Tokenizer, score: Score) -> TokenLogprob:
    """Return a score with the bytes of its tokens."""
    token, logprob, top = score
    likeliest = [(tokenizer.token_bytes(other), value) for other, value in top]
    return TokenLogprob(tokenizer.token_bytes(token), logprob, likeliest)


class TextLogprobs:
    """The log probabilities of the tokens whose text has not been emitted yet."""

    def __init__(self, tokenizer: Tokenizer, *, with_end: bool = False) -> None:
        """Create the collector; `with_end` reports the token that ends the reply, too."""
        self._tokenizer = tokenizer
        self._with_end = with_end
        self._pending: list[TokenLogprob] = []
        self._next: TokenLogprob | None = None

    def record(self, score: Score) -> None:
        """Record the log probability of the token that the parser receives next."""
        self._next = token_logprob(self._tokenizer, score)

    def add(self, token: int) -> None:
        """Append a token of the text; one without a log probability was forced."""
        forced = TokenLogprob(self._tokenizer.token_bytes(token), 0.0)
        self._pending.append(self._next or forced)
        self._next = None

    def take(self) -> tuple[TokenLogprob, ...]:
        """Return those of the text that is emitted now."""
        taken, self._pending = tuple(self._pending), []
        return taken

    def take_end(self) -> tuple[TokenLogprob, ...]:
        """Return that of the token that has ended the reply, if it is reported."""
        return (self._next,) if self._next and self._with_end else ()

    def skip(self) -> None:
        """Drop that of a token that is not emitted, such as a tag."""
        self._next = None

    def drop(self) -> None:
        """Remove those of tokens that are format or part of a call."""
        self._pending = []

    def rewind(self, count: int) -> None:
        """Remove the last `count` tokens of the text."""
        del self._pending[-count:]


class ScoredPrompt:
    """Collects the scores of the prompt `ids`, and emits one event when they are complete."""

    def __init__(
        self, tokenizer: Tokenizer, ids: Sequence[int], emit: Callable[[PromptTokens], None]
    ) -> None:
        """Create the collector; a score is expected for each id after the first.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        if (greatest := max(ids)) >= len(tokenizer):
            raise ValueError(f"token id {greatest} is not in the vocabulary, so it has no logprob")
        self._tokenizer = tokenizer
        self._ids = ids
        self._emit = emit
        self._scored: list[TokenLogprob] = []
        self._emitted = False

    def add(self, scores: Iterable[Score]) -> None:
        """Append the scores of the next tokens; empty if the prompt has only one token."""
        self._scored += (token_logprob(self._tokenizer, score) for score in scores)
        if len(self._scored) == len(self._ids) - 1 and not self._emitted:
            self._emitted = True
            first = self._tokenizer.token_bytes(self._ids[0])
            self._emit(PromptTokens(first, self._scored))
