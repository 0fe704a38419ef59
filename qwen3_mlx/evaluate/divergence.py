"""Divergence: how far a checkpoint's predictions are from those of the one it was made from."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx

from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.evaluate.perplexity import Perplexity, loss_of
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
class Divergence:
    """How a candidate's predictions of `tokens` tokens differ from the reference's.

    `mean_kl` and `p99_kl`, the 99th percentile, are of KL(reference || candidate) of a token, in
    nats; `agreement` is the share of tokens, 0 to 1, for which both hold the same one likeliest.
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
    """Compare two models on a text, or on its token ids; they must share a tokenizer.

    Long text is read in windows, as `perplexity` does. Probabilities are computed in float32 from
    the logits that each model gives.

    Raises:
        ValueError: an argument is out of its range.
        Qwen3Error: the models cannot be compared, or give no numbers.
    """
    ids = token_ids(reference, text)
    _refuse_strangers(
        reference, candidate, text if isinstance(text, str) else reference.tokenizer.decode(ids)
    )
    vocabulary = vocabulary_of(reference)
    columns: list[list[float]] = [[], [], [], []]
    both = [reference, candidate]
    for (x, y), following in read(both, ids, window=window, overlap=overlap, progress=progress):
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


def _refuse_strangers(reference: "LLM", candidate: "LLM", text: str) -> None:
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
    """Give KL, agreement and both losses [R] of the candidate's x [R, D] and log p [R, V]."""
    log_q = log_probabilities(model, x, log_p.shape[-1])
    kl = (mx.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    same = log_p.argmax(axis=-1) == log_q.argmax(axis=-1)
    # Never below zero but by rounding. NaN stays what it is.
    return mx.maximum(kl, 0), same, loss_of(log_p, following), loss_of(log_q, following)


def _percentile(values: Sequence[float], share: float) -> float:
    """Interpolate between the values that stand next to `share` of the way from least to most."""
    ordered = sorted(values)
    low, rest = divmod(share * (len(ordered) - 1), 1)
    below, above = ordered[int(low)], ordered[min(int(low) + 1, len(ordered) - 1)]
    return below + rest * (above - below)
