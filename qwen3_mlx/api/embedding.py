"""Vectors of texts: checks and encodes texts as the files of the checkpoint say.

The vector of a text is the hidden state of its last token, the one that the tokenizer appends, cut
to the dimensions that are asked for and divided by its length (Qwen3-Embedding's model card).

N texts, D hidden, F dimensions of a vector.
"""

from collections.abc import Iterable, Sequence

import mlx.core as mx

from qwen3_mlx.api.context_window import MAX_COUNTED, refuse_unknown_tokens
from qwen3_mlx.api.prepared_texts import PreparedTexts
from qwen3_mlx.api.text_processor import TextProcessor
from qwen3_mlx.arguments import items, plain, token_ids
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.errors import ContextError, KindError, Qwen3Error
from qwen3_mlx.text.kind import EMBEDDING, Kind
from qwen3_mlx.text.messages import check_unicode
from qwen3_mlx.text.tokenizer import TooLong

_MIN_LENGTH = 1e-12  # of a vector that is divided by it, as in torch
_FORCED = 'pooling="last" takes the hidden state of the last token all the same'


def prepare_embedding(
    processor: TextProcessor,
    engine: Engine,
    texts: Iterable[str | Sequence[int]],
    *,
    instruction: str | None,
    prompt_name: str | None,
    dimensions: int | None,
    pooling: str | None,
    truncate: bool,
) -> PreparedTexts:
    """Check and encode texts; see `LLM.embed`."""
    kind, hidden_size = processor.kind, engine.model.config.hidden_size
    _check_kind(kind, pooling)
    if not isinstance(truncate := plain(truncate), bool):
        raise TypeError(f"truncate must be True or False, not {truncate!r}")
    dimensions = hidden_size if dimensions is None else plain(dimensions)
    if type(dimensions) is not int or not 1 <= dimensions <= hidden_size:
        raise ValueError(f"dimensions must be from 1 to {hidden_size}, not {dimensions!r}")
    prompt = _prompt(kind, instruction, prompt_name)
    encoder = _Encoder(processor, engine, prompt, truncate=truncate)
    ids = [encoder.ids(f"texts[{place}]", text) for place, text in enumerate(items("texts", texts))]
    return PreparedTexts(
        ids,
        dimensions,
        lambda hidden: unit_vectors(hidden[:, :dimensions]),
        num_cut=encoder.num_cut,
    )


def unit_vectors(x: mx.array) -> mx.array:
    """Compute x / |x| of vectors x [N, F], in float32."""
    x = x.astype(mx.float32)
    return x / mx.maximum(mx.linalg.norm(x, axis=-1, keepdims=True), _MIN_LENGTH)


def _check_kind(kind: Kind, pooling: str | None) -> None:
    """Refuse a checkpoint that is no embedding model, or one whose files ask for something else."""
    if pooling not in (None, "last"):
        raise ValueError(f"pooling must be 'last', not {pooling!r}")
    if pooling:
        return
    if kind.name != EMBEDDING:
        raise KindError(
            f"this checkpoint is {kind.described}, not an embedding model; load one such as "
            f"Qwen/Qwen3-Embedding-0.6B; {_FORCED}",
            EMBEDDING,
        )
    if kind.problem:
        raise Qwen3Error(
            f"this checkpoint cannot embed as its files say: {kind.problem}; {_FORCED}"
        )


def _prompt(kind: Kind, instruction: str | None, name: str | None) -> str:
    """Return the text that stands before each text."""
    if instruction is not None and name is not None:
        raise ValueError(
            f"instruction={instruction!r:.100} and prompt_name={name!r:.100} exclude each other"
        )
    if instruction is not None:
        if not isinstance(instruction, str):
            raise TypeError(f"instruction must be text, not {instruction!r}")
        check_unicode(instruction, "instruction")
        return f"Instruct: {instruction}\nQuery:"  # as on the model card; no space follows
    if name is not None and name not in [*kind.prompts]:
        known = ", ".join(kind.prompts) or "none"
        raise ValueError(f"prompt_name must be one of the checkpoint's ({known}), not {name!r}")
    return kind.default_prompt if name is None else kind.prompts[name]


class _Encoder:
    """Encodes the texts of one call, with the prompt before and the tokenizer's tokens around."""

    def __init__(
        self, processor: TextProcessor, engine: Engine, prompt: str, *, truncate: bool
    ) -> None:
        self._tokenizer = processor.tokenizer
        self._before, self._after = processor.tokenizer.around
        self._prompt = prompt
        self._rows = engine.model.config.vocab_size
        self._limit = min(engine.context, processor.kind.max_tokens or engine.context)
        self._truncate = truncate
        self.num_cut = 0

    def ids(self, name: str, text: str | Sequence[int]) -> list[int]:
        """Return the ids of a text, or of ids without the tokens around them.

        Raises:
            TypeError, ValueError: it is neither, or has no token.
            ContextError: it is too long, and must not be truncated.
            Qwen3Error: it has a token that the model does not know.
        """
        own = self._encoded(name, text) if isinstance(text, str) else self._given(name, text)
        body = self._before + own
        room = self._limit - len(self._after)
        if len(body) > room and not self._truncate:
            raise self._too_long(name, f"{len(body) + len(self._after):,} tokens")
        self.num_cut += len(body) > room
        ids = body[:room] + self._after
        if not ids:
            raise ValueError(f"{name} is empty, and this tokenizer appends no token to it")
        refuse_unknown_tokens(name, ids, self._rows, self._tokenizer)
        return ids

    def _encoded(self, name: str, text: str) -> list[int]:
        check_unicode(text, name)
        most = None if self._truncate else MAX_COUNTED * self._limit
        try:
            return self._tokenizer.encode(self._prompt + text, most)
        except TooLong as error:
            raise self._too_long(name, f"{error.min_tokens:,} tokens or more") from error

    def _given(self, name: str, ids: Sequence[int]) -> list[int]:
        """Return given ids; the end token is appended to them as to a text's, never twice."""
        try:
            given = token_ids(ids)
        except TypeError as error:
            raise TypeError(
                f"{name} must be text or token ids, which are whole numbers, not {ids!r:.100}"
            ) from error
        if self._prompt:
            raise ValueError("an instruction or a prompt goes with texts, not with token ids")
        if any(token < 0 for token in given):
            raise ValueError(f"{name}: token ids are 0 to {self._rows - 1:,}, not {min(given)}")
        count = len(self._after)
        return given[:-count] if count and given[-count:] == self._after else given

    def _too_long(self, name: str, counted: str) -> ContextError:
        return ContextError(
            f"{name} has {counted} and the most is {self._limit:,}; shorten it, or have it cut at "
            "its end (truncate=True)"
        )
