"""Perplexity of a model on a text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx

from qwen3_mlx.arguments import Progress
from qwen3_mlx.evaluate.windows import (
    WINDOW,
    log_probabilities,
    mean,
    read,
    token_ids,
    vocabulary_of,
)

if TYPE_CHECKING:
    from qwen3_mlx.api.llm import LLM
    from qwen3_mlx.model.qwen3 import Qwen3


@dataclass(frozen=True, slots=True)
class Perplexity:
    """A perplexity: `mean_nll` is the mean of -log p over `tokens` tokens, in nats."""

    tokens: int
    mean_nll: float

    @property
    def perplexity(self) -> float:
        """exp(mean_nll): a choice among this number of equally likely tokens is as uncertain."""
        return math.exp(self.mean_nll)


def perplexity(
    llm: "LLM",
    text: str | Sequence[int],
    *,
    window: int = WINDOW,
    overlap: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Compute the perplexity of `llm` on a text or its token ids.

    Long text is processed in windows. Every token but the first is scored exactly once.

    Args:
        llm: the model.
        text: the text, or its token ids.
        window: tokens per window.
        overlap: tokens from the end of the window before that each window sees as context; None is
            an eighth of the window.
        progress: callable (done, total) tokens.

    Raises:
        ValueError: an argument is out of its range.
        Qwen3Error: the logits are not finite.
    """
    ids = token_ids(llm, text)
    vocabulary = vocabulary_of(llm)
    losses: list[float] = []
    for (x,), following in read([llm], ids, window=window, overlap=overlap, progress=progress):
        job = partial(_losses, x=x, following=following, vocabulary=vocabulary)
        losses += llm.compute(job).tolist()  # type: ignore[arg-type]
    return Perplexity(len(losses), mean(losses, "the model"))


def _losses(model: "Qwen3", x: mx.array, following: list[int], vocabulary: int) -> mx.array:
    return loss_of(log_probabilities(model, x, vocabulary), following)


def loss_of(log_probability: mx.array, following: list[int]) -> mx.array:
    """Return -log p [R] of the token ids in `following`, from log p [R, V]."""
    targets = mx.array(following, dtype=mx.int32)[:, None]
    return -mx.take_along_axis(log_probability, targets, axis=-1)[:, 0]
