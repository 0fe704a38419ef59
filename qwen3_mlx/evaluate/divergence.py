"""Divergence: the distance of a checkpoint's predictions from those of its original."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx

from qwen3_mlx.arguments import Progress
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.evaluate.perplexity import Perplexity, loss_of
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
class Divergence:
    """The difference between a candidate's and a reference's predictions of a text.

    Attributes:
        tokens: the number of tokens predicted.
        mean_kl: the mean of KL(reference || candidate) over the tokens, in nats.
        p99_kl: its 99th percentile, in nats.
        agreement: the share of tokens, 0 to 1, for which both have the same likeliest token.
        reference: the perplexity of the reference.
        candidate: the perplexity of the candidate.
    """

    tokens: int
    mean_kl: float
    p99_kl: float
    agreement: float
    reference: Perplexity
    candidate: Perplexity


def divergence(
    reference: "LLM",
    candidate: "LLM",
    text: str | Sequence[int],
    *,
    window: int = WINDOW,
    overlap: int | None = None,
    progress: Progress | None = None,
) -> Divergence:
    """Compute the divergence of two models with the same tokenizer on a text or its token ids.

    Long text is processed in windows, as in `perplexity`. Probabilities are computed in float32
    from the logits of each model.

    Args:
        reference: the original.
        candidate: the model to compare with it.
        text: the text, or its token ids.
        window: tokens per window.
        overlap: tokens of context from the window before; None is an eighth of the window.
        progress: callable (done, total) tokens.

    Raises:
        ValueError: an argument is out of its range.
        Qwen3Error: the models cannot be compared, or their logits are not finite.
    """
    ids = token_ids(reference, text)
    _refuse_other_tokenizer(
        reference, candidate, text if isinstance(text, str) else reference.tokenizer.decode(ids)
    )
    vocabulary = vocabulary_of(reference)
    columns: list[list[float]] = [[], [], [], []]
    models = [reference, candidate]
    for (x, y), following in read(models, ids, window=window, overlap=overlap, progress=progress):
        log_p = reference.compute(partial(log_probabilities, x=x, vocabulary=vocabulary))
        found = candidate.compute(partial(_compare, x=y, log_p=log_p, following=following))
        for column, values in zip(columns, found, strict=True):
            column += values.tolist()  # type: ignore[arg-type]
    kl, same, reference_loss, candidate_loss = columns
    count = len(kl)
    return Divergence(
        tokens=count,
        reference=Perplexity(count, mean(reference_loss, "the reference")),
        candidate=Perplexity(count, mean(candidate_loss, "the candidate")),
        mean_kl=mean(kl, "the candidate"),
        p99_kl=_percentile(kl, 0.99),
        agreement=sum(same) / count,
    )


def _refuse_other_tokenizer(reference: "LLM", candidate: "LLM", text: str) -> None:
    first, second = vocabulary_of(reference), vocabulary_of(candidate)
    if first != second:
        raise Qwen3Error(
            f"the checkpoints have vocabularies of {first:,} and {second:,} tokens and cannot be "
            "compared; take two of one family"
        )
    if reference.tokenizer.encode(text) != candidate.tokenizer.encode(text):
        raise Qwen3Error(
            "the checkpoints cut this text into different tokens and cannot be compared; take two "
            "with one tokenizer"
        )


def _compare(
    model: "Qwen3", x: mx.array, log_p: mx.array, following: list[int]
) -> tuple[mx.array, ...]:
    """Return KL, agreement and both losses, each [R].

    `x` [R, D] are the candidate's last hidden states, `log_p` [R, V] the reference's log
    probabilities, `following` the R token ids to predict.
    """
    log_q = log_probabilities(model, x, log_p.shape[-1])
    kl = (mx.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    same = log_p.argmax(axis=-1) == log_q.argmax(axis=-1)
    # KL is below zero by rounding only. maximum() keeps NaN, which `mean` then refuses.
    return mx.maximum(kl, 0), same, loss_of(log_p, following), loss_of(log_q, following)


def _percentile(values: Sequence[float], share: float) -> float:
    """Return the percentile `share` (0 to 1) of values, interpolated linearly."""
    ordered = sorted(values)
    low, rest = divmod(share * (len(ordered) - 1), 1)
    below, above = ordered[int(low)], ordered[min(int(low) + 1, len(ordered) - 1)]
    return below + rest * (above - below)
