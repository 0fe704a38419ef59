"""Long text read in windows, and its logits looked at in blocks of rows, in bounded memory.

Where the vocabulary is large, the logits of one window would be larger than many a model: so the
network runs to its last hidden states, and the head is applied to a few rows of them at a time.

N tokens read, R rows of a block, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.errors import Qwen3Error

if TYPE_CHECKING:  # all that is slow to import is in the models that are handed in
    from qwen3_mlx.api.llm import LLM
    from qwen3_mlx.model.qwen3 import Qwen3

Progress = Callable[[int, int], None]

WINDOW = 1024  # tokens
_BLOCK = 1 << 23  # logits held at once: 32 MiB in float32


def vocabulary_of(llm: "LLM") -> int:
    """Count the ids that stand for something; a network may have more rows, as padding."""
    return min(len(llm.tokenizer), llm.config.vocab_size)


def token_ids(llm: "LLM", text: str | Sequence[int]) -> list[int]:
    """Give the ids of a text, or check ids.

    Raises:
        ValueError: there are fewer than two, or one is not in the vocabulary.
    """
    ids = llm.tokenizer.encode(text) if isinstance(text, str) else list(text)
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens; two are the least to measure anything")
    most = vocabulary_of(llm)
    if wrong := next((token for token in ids if not 0 <= token < most), None):
        raise ValueError(f"ids must be numbers from 0 to {most - 1:,}, not {wrong:,}")
    return ids


def spans(count: int, window: int, overlap: int) -> Iterator[tuple[int, int, int]]:
    """Cover the places 0..count-1: yield (start, first, end) of windows that read [start, end).

    Those before `first` have been scored already and are read as context only.
    """
    first = 0
    while first < count:
        start = max(0, first - overlap)
        end = min(start + window, count)
        yield start, first, end
        first = end


def read(
    llms: Sequence["LLM"],
    ids: Sequence[int],
    *,
    window: int,
    overlap: int | None,
    progress: Progress | None,
) -> Iterator[tuple[list[mx.array], list[int]]]:
    """Run `llms` over `ids`: yield their last hidden states [R, D] and the R ids that follow.

    Every id but the first follows exactly once. A window reads `window` tokens; the first
    `overlap` of them, of each window but the first, were in the one before (None: an eighth).
    `progress` is told (done, total) ids.

    Raises:
        ValueError: the window does not fit a model, or the overlap does not fit the window.
    """
    limit = min(llm.config.context_window for llm in llms)
    if not 1 <= window <= limit:
        raise ValueError(f"window must be from 1 to the context of {limit:,}, not {window:,}")
    overlap = window // 8 if overlap is None else overlap
    if not 0 <= overlap < window:
        raise ValueError(f"overlap must be from 0 to {window - 1:,}, not {overlap:,}")
    rows = max(1, _BLOCK // max(llm.config.vocab_size for llm in llms))
    count = len(ids) - 1  # nothing follows the last
    for start, first, end in spans(count, window, overlap):
        job = partial(_last_hidden, ids=ids[start:end], skip=first - start, rows=rows)
        hidden = [llm.compute(job) for llm in llms]
        for at, blocks in zip(range(first, end, rows), zip(*hidden, strict=True), strict=True):
            if progress:
                progress(at, count)
            yield list(blocks), list(ids[at + 1 : min(at + rows, end) + 1])
    if progress:
        progress(count, count)


def log_probabilities(model: "Qwen3", x: mx.array, vocabulary: int) -> mx.array:
    """Give log-softmax [R, V] of the logits of x [R, D], in float32, without the padding."""
    logits = model.head(x)[:, :vocabulary].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def mean(values: Sequence[float], of: str) -> float:
    """Average what came out of a model.

    Raises:
        Qwen3Error: it is no number.
    """
    average = sum(values) / len(values)
    if not abs(average) < float("inf"):
        raise Qwen3Error(f"the logits of {of} are not finite: its weights are damaged")
    return average


def _last_hidden(model: "Qwen3", ids: Sequence[int], skip: int, rows: int) -> list[mx.array]:
    """Run the network over ids [N] up to its head; give [N - skip, D] in blocks of `rows`."""
    mx.clear_cache()
    tokens = mx.array(list(ids), dtype=mx.int32)[None]
    cache = model.make_cache(len(ids))
    chunk = backend.prefill_chunk()
    parts = []
    for start in range(0, len(ids), chunk):
        parts.append(model.model(tokens[:, start : start + chunk], cache, None)[0])
        mx.eval(parts[-1], [layer.state for layer in cache])
    x = mx.concatenate(parts)
    return [x[start : start + rows] for start in range(skip, len(ids), rows)]
