"""Perplexity: how surprised a model is by a text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx

from qwen3_mlx.evaluate.windows import (
    WINDOW,
    Progress,
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
    """What a model thought of `tokens` tokens; `mean_nll` is -log p of one, in nats."""

    tokens: int
    mean_nll: float

    @property
    def perplexity(self) -> float:
        """exp(mean_nll): as unsure as if so many tokens were equally likely."""
        return math.exp(self.mean_nll)


def perplexity(
    llm: "LLM",
    text: str | Sequence[int],
    *,
    window: int = WINDOW,
    overlap: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Measure `llm` on a text, or on its token ids.

    Long text is read in windows of `window` tokens. Every token but the first is scored once; a
    window sees the last `overlap` tokens of the one before as context (None: an eighth of it).
    `progress` is told (done, total) tokens.

    Raises:
        ValueError: an argument is out of its range.
        Qwen3Error: the model gives no numbers.
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
    """Give -log p [R] of the tokens that follow, from log p [R, V]."""
    places = mx.array(following, dtype=mx.int32)[:, None]
    return -mx.take_along_axis(log_probability, places, axis=-1)[:, 0]
