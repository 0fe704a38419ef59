"""Scores of documents for a query: the probability that a reranker answers "yes".

It is sigmoid(logit of "yes" − logit of "no") at the end of the prompt (Qwen3-Reranker's model
card), or the sigmoid of the only output of a sequence classifier made from it.
"""

import logging
from collections.abc import Iterable
from functools import partial

import mlx.core as mx

from qwen3_mlx.api.context_window import refuse_unknown_tokens
from qwen3_mlx.api.prepared_texts import PreparedTexts
from qwen3_mlx.api.text_processor import TextProcessor
from qwen3_mlx.arguments import items
from qwen3_mlx.cache.prefix import common_prefix
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.errors import ContextError, KindError, Qwen3Error
from qwen3_mlx.model.config import SCORE
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.text.kind import RERANKER, Kind
from qwen3_mlx.text.messages import check_unicode
from qwen3_mlx.text.rerank_prompt import RerankPrompt
from qwen3_mlx.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
_MAX_TOKENS = 8192  # of a prompt, on the model card
_YES_NO = "yes-no"


def prepare_rerank(
    processor: TextProcessor,
    engine: Engine,
    query: str,
    documents: Iterable[str],
    *,
    instruction: str | None,
    scoring: str | None,
) -> PreparedTexts:
    """Check and encode a query and its documents; see `LLM.rerank`."""
    kind, model = processor.kind, engine.model
    _check_kind(kind, scoring)
    documents = items("documents", documents)
    instruction = kind.instruction if instruction is None else instruction
    named = {f"documents[{place}]": document for place, document in enumerate(documents)}
    for name, text in {"instruction": instruction, "query": query, **named}.items():
        if not isinstance(text, str):
            raise TypeError(f"{name} must be text, not {text!r:.100}")
        check_unicode(text, name)
    prompt = RerankPrompt(processor.control, kind.pieces, instruction, query)
    limit = min(_MAX_TOKENS, kind.max_tokens or _MAX_TOKENS, engine.context)
    room = limit - len(prompt.after_ids)
    if len(prompt.ids("")) >= room:
        raise ContextError(
            f"the query and its instruction leave no room for a document in {limit:,} tokens; "
            "shorten them"
        )
    texts, num_cut = list[list[int]](), 0
    for name, document in named.items():
        ids = prompt.ids(document)
        num_cut += len(ids) > room
        texts.append(ids[:room] + prompt.after_ids)
        refuse_unknown_tokens(name, texts[-1], model.config.vocab_size, processor.tokenizer)
    if num_cut:
        _log.warning("%d documents were cut at their end, to prompts of %d tokens", num_cut, limit)
    # What all prompts begin with, which is all but the documents, is read once.
    common = min((common_prefix(texts[0], ids) for ids in texts[1:]), default=0)
    shared = min([common, *(len(ids) - 1 for ids in texts)])  # each has a last token of its own
    finish = partial(_of_score, model)
    if model.config.output != SCORE:
        answers = kind.answers or _answers(processor.tokenizer)
        refuse_unknown_tokens("the score", answers, model.config.vocab_size, processor.tokenizer)
        finish = partial(_of_answers, model, answers)
    own = [ids[shared:] for ids in texts]
    prefix = texts[0][:shared] if texts else []
    return PreparedTexts(own, 1, finish, prefix, num_cut)


def _check_kind(kind: Kind, scoring: str | None) -> None:
    if scoring not in (None, _YES_NO):
        raise ValueError(f"scoring must be {_YES_NO!r}, not {scoring!r}")
    if scoring:
        return
    if kind.name != RERANKER:
        raise KindError(
            f"this checkpoint is {kind.described}, not a reranker; load one such as "
            f'Qwen/Qwen3-Reranker-0.6B; scoring="{_YES_NO}" scores by its "yes" and "no" all the '
            "same",
            RERANKER,
        )
    if kind.problem:
        raise Qwen3Error(f"this checkpoint cannot rerank as its files say: {kind.problem}")


def _answers(tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the ids of "no" and "yes".

    Raises:
        Qwen3Error: they are not one token each.
    """
    no, yes = (tokenizer.encode_plain(word) for word in ("no", "yes"))
    if len(no) != 1 or len(yes) != 1:
        raise Qwen3Error('this checkpoint cannot score: "no" and "yes" are not one token each')
    return no[0], yes[0]


def _of_answers(model: Qwen3, answers: tuple[int, int], hidden: mx.array) -> mx.array:
    no, yes = mx.split(model.logits_of(answers, hidden), 2, axis=-1)
    return mx.sigmoid(yes - no)  # [N, 1]


def _of_score(model: Qwen3, hidden: mx.array) -> mx.array:
    return mx.sigmoid(model.score(hidden))[:, None]  # [N, 1]
