"""Windows: predictions over long text in bounded memory.

With a large vocabulary the logits of one window can be larger than a model. So the network computes
the last hidden states of a window, and the head is applied to a few rows of them at a time.

N tokens read, R rows of a block, D hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.arguments import Progress
from qwen3_mlx.errors import Qwen3Error

if TYPE_CHECKING:  # for the annotations only: they are slow to import
    from qwen3_mlx.api.llm import LLM
    from qwen3_mlx.cache.quantized import CacheFormat
    from qwen3_mlx.model.qwen3 import Qwen3


WINDOW = 1024  # tokens
_BLOCK = 1 << 23  # logits held at once: 32 MiB in float32


def vocabulary_of(llm: "LLM") -> int:
    """Return the number of ids that are tokens; the network may have more rows, as padding."""
    return min(len(llm.tokenizer), llm.config.vocab_size)


def token_ids(llm: "LLM", text: str | Sequence[int]) -> list[int]:
    """Return the token ids of a text; ids are only checked.

    Raises:
        ValueError: there are fewer than two ids, or one is outside the vocabulary.
    """
    ids = llm.tokenizer.encode(text) if isinstance(text, str) else list(text)
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens; two are the least to measure anything")
    count = vocabulary_of(llm)
    if outside := next((token for token in ids if not 0 <= token < count), None):
        raise ValueError(f"ids must be numbers from 0 to {count - 1:,}, not {outside:,}")
    return ids


def spans(count: int, window: int, overlap: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, first, end) of windows that cover the positions 0..count-1.

    A window reads [start, end). The positions before `first` are context only: an earlier window
    has scored them.
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
    """Yield the last hidden states [R, D] of each model, and the R token ids to predict from them.

    Every id but the first is yielded exactly once. A window reads `window` tokens. The first
    `overlap` tokens of every window but the first repeat the window before; None is an eighth of a
    window. `progress` is called with (done, total) ids.

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
        hidden = [llm.compute(partial(job, cache_format=llm.cache_format)) for llm in llms]
        for at, blocks in zip(range(first, end, rows), zip(*hidden, strict=True), strict=True):
            if progress:
                progress(at, count)
            yield list(blocks), list(ids[at + 1 : min(at + rows, end) + 1])
    if progress:
        progress(count, count)


def log_probabilities(model: "Qwen3", x: mx.array, vocabulary: int) -> mx.array:
    """Return the log-softmax [R, V] of the logits of x [R, D], in float32, without padding rows."""
    logits = model.head(x)[:, :vocabulary].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def mean(values: Sequence[float], of: str) -> float:
    """Return the mean of values computed from a model, which `of` names.

    Raises:
        Qwen3Error: the mean is NaN or infinite.
    """
    average = sum(values) / len(values)
    if not abs(average) < float("inf"):
        raise Qwen3Error(f"the logits of {of} are not finite: its weights are damaged")
    return average


def _last_hidden(
    model: "Qwen3", ids: Sequence[int], skip: int, rows: int, cache_format: "CacheFormat"
) -> list[mx.array]:
    """Return the last hidden states of ids [N] from `skip` on, in blocks of up to `rows` rows."""
    mx.clear_cache()
    tokens = mx.array(list(ids), dtype=mx.int32)[None]
    cache = model.make_cache(len(ids), cache_format=cache_format)
    chunk = backend.prefill_chunk()
    parts = []
    for start in range(0, len(ids), chunk):
        parts.append(model.model(tokens[:, start : start + chunk], cache, None)[0])
        mx.eval(parts[-1], [layer.state for layer in cache])
    x = mx.concatenate(parts)
    return [x[start : start + rows] for start in range(skip, len(ids), rows)]
