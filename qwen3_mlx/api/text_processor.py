"""The text side of a checkpoint: chat template, end tokens and sampling defaults."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3_mlx.engine.sampling_params import SamplingParams, sampling_defaults, stated_sampling
from qwen3_mlx.errors import CheckpointError, Qwen3Error
from qwen3_mlx.files import read_json
from qwen3_mlx.model.config import LOGITS, ModelConfig
from qwen3_mlx.text.grammar_compiler import GrammarCompiler
from qwen3_mlx.text.kind import CHAT, EMBEDDING, Kind
from qwen3_mlx.text.prompt import ControlTokens
from qwen3_mlx.text.rerank_prompt import drops_user
from qwen3_mlx.text.template import ChatTemplate, read_tokenizer_config, special_tokens
from qwen3_mlx.text.thinking import Thinking
from qwen3_mlx.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
_ANSWER = "xq7wanswer"  # a text to find in what a template renders


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """The sampling parameters of a checkpoint, for replies with and without thinking, and text."""

    thinking: SamplingParams
    direct: SamplingParams
    text: SamplingParams

    @classmethod
    def of(cls, stated: Mapping[str, Any], *, hybrid: bool) -> "SamplingDefaults":
        """Create the defaults from what the checkpoint states."""
        return cls(
            sampling_defaults(stated, thinking=True, hybrid=hybrid),
            sampling_defaults(stated, thinking=False, hybrid=hybrid),
            sampling_defaults(stated, thinking=False, hybrid=False),
        )


@dataclass(frozen=True, slots=True)
class TextProcessor:
    """The text side of a checkpoint: tokenizer, chat template, thinking mode, sampling defaults.

    Tokens in `end_ids` end any reply; those in `turn_end_ids` also end a reply to a conversation.
    `prefix_id` stands before a text without context. If `template` is None, `no_template` is the
    error message that says why.
    If `template` is None, `no_template` is the error message that says why. If the checkpoint is
    not for chat although there is a template, `no_chat` is that message; `no_text` if it generates
    no text at all.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    control: ControlTokens
    thinking: Thinking
    sampling: SamplingDefaults
    end_ids: frozenset[int]
    turn_end_ids: frozenset[int]
    prefix_id: int | None
    grammars: GrammarCompiler
    kind: Kind
    no_template: str = ""
    no_chat: str = ""
    no_text: str = ""


def load_text_processor(
    folder: Path, config: Mapping[str, Any], tokenizer: Tokenizer
) -> TextProcessor:
    """Read the text side of the checkpoint in `folder`, whose config.json is `config`."""
    output = ModelConfig.from_dict(config).output
    generation = folder / "generation_config.json"
    generation_config = read_json(generation) if generation.is_file() else {}
    sampling, complaints = stated_sampling(generation_config)
    for complaint in complaints:
        _log.warning("%s: %s", generation.name, complaint)
    # Some conversions drop generation_config.json, which states the second of Qwen3's end tokens.
    end_ids = {*_end_ids(config, "config.json"), *_end_ids(generation_config, generation.name)}
    if (end_of_text := tokenizer.id_of("<|endoftext|>")) is not None:
        end_ids.add(end_of_text)
    end_ids |= _named_end(folder, tokenizer)
    grammars = GrammarCompiler(tokenizer, frozenset(end_ids))
    template, no_template = (
        None,
        "this checkpoint has no chat template; take one that has, such as Qwen/Qwen3-8B, "
        "or continue raw text with complete()",
    )
    try:
        template = ChatTemplate.from_folder(folder)
    except CheckpointError as error:
        _log.warning("there is no chat, only raw text: %s", error)
        no_template = str(error)
    kind = Kind.of(folder, tokenizer, template, output)
    no_chat = _no_chat(kind, template)
    thinking = Thinking.of(template, tokenizer)
    return TextProcessor(
        tokenizer,
        template,
        ControlTokens(tokenizer, template.source if template else ""),
        thinking,
        SamplingDefaults.of(sampling, hybrid=thinking.hybrid),
        frozenset(end_ids),
        _turn_end(template, tokenizer) if template else frozenset(),
        _prefix_id(folder, tokenizer),
        grammars,
        kind,
        no_template,
        no_chat,
        no_chat if kind.name == EMBEDDING or output != LOGITS else "",
    )


def _no_chat(kind: Kind, template: ChatTemplate | None) -> str:
    """Return why the checkpoint is not for chat although there may be a template; "" if it is."""
    chat = "load a chat model such as Qwen/Qwen3-8B"
    if kind.name != CHAT:
        use = "compute vectors with embed()" if kind.name == EMBEDDING else "score with rerank()"
        return f"this checkpoint is {kind.described}; {chat}, or {use}"
    if template and drops_user(template):
        return f"this checkpoint's chat template leaves out what the user says; {chat}"
    return ""


def _named_end(folder: Path, tokenizer: Tokenizer) -> set[int]:
    """Return the id of tokenizer_config's `eos_token`; many fine-tunes change it there only."""
    config = read_tokenizer_config(folder)
    token = tokenizer.id_of(special_tokens(config).get("eos_token", ""))
    if token is not None:
        return {token}
    if stated := config.get("eos_token"):
        _log.warning("tokenizer_config.json: its eos_token %r is no token; it ends nothing", stated)
    return set()


def _prefix_id(folder: Path, tokenizer: Tokenizer) -> int | None:
    """Return the id of tokenizer_config's `bos_token`, which Qwen3 lacks, or `eos_token`."""
    named = special_tokens(read_tokenizer_config(folder))
    return tokenizer.id_of(named.get("bos_token") or named.get("eos_token", ""))


def _turn_end(template: ChatTemplate, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the id of the special token that the template writes after an assistant's turn.

    A conversation with a known answer is rendered, and the text after that answer examined. Empty
    if there is no such token.
    """
    turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    for messages in (turn, [{"role": "system", "content": "?"}, *turn]):
        try:
            rendered = template.render(messages, add_generation_prompt=False)
        except Qwen3Error:  # some templates demand a system turn
            continue
        after = rendered.partition(_ANSWER)[2].lstrip()
        for name, is_special in tokenizer.added_tokens.items():
            token = tokenizer.id_of(name)
            if is_special and token is not None and after.startswith(name):
                return frozenset([token])
    return frozenset()


def _end_ids(config: Mapping[str, Any], where: str) -> list[int]:
    stated = config.get("eos_token_id")
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if any(type(token) is not int or token < 0 for token in ids):
        raise CheckpointError(f"{where}: eos_token_id is {stated!r}, not one or more token ids")
    return ids
