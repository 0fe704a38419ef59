"""The demo model's tokenizer: byte-level BPE with Qwen3's special tokens, trained on the tasks."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import demo_conversations
import demo_tasks
import demo_words
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from qwen3_mlx.text.template import ChatTemplate

VOCABULARY = 1280  # with the added tokens; a multiple of 64
SPACED_WORDS = 120  # of the vocabulary: words of fixed phrases with the space before them

# Qwen3's added tokens, in their order. Those from `<tool_call>` on are text, not "special".
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|>"
).split()
ADDED = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> "
    "<|repo_name|> <|file_sep|> <tool_response> </tool_response> <think> </think>"
).split()
# Qwen's pre-tokenizer: contractions, words, single digits, punctuation, line ends, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# The same with words alone, without a space or a mark before them.
WORDS_ALONE = r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(template: ChatTemplate, seed: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer on the text of the curriculum.

    A word has the same tokens after a space, after a quote and at the start of a line, so that a
    copy of it is a copy of its tokens: the merges are learned from words without the character
    before them. The commonest words of the fixed phrases are merged with their space at the end.
    """
    texts = list(_corpus(template, seed))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - SPACED_WORDS - len(SPECIAL) - len(ADDED),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learned = _new_tokenizer(WORDS_ALONE, [], {})
    learned.train_from_iterator(texts, trainer)
    model = json.loads(learned.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    vocabulary: dict[str, int] = model["vocab"]
    for word in _spaced_words(texts, vocabulary):
        merges.append(("Ġ", word))
        vocabulary[f"Ġ{word}"] = len(vocabulary)
    tokenizer = _new_tokenizer(SPLIT, merges, vocabulary)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in ADDED])
    return tokenizer


def _new_tokenizer(
    split: str, merges: list[tuple[str, str]], vocabulary: dict[str, int]
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocabulary, merges) if vocabulary else models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level: dict[str, Any] = {"add_prefix_space": False, "use_regex": False}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(trim_offsets=False, **byte_level),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False, **byte_level)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _spaced_words(texts: Sequence[str], vocabulary: dict[str, int]) -> list[str]:
    """Return the words, each one token, that follow a space most often; no items of lists."""
    items = {*demo_words.WORDS, *demo_words.MORE_WORDS, *demo_words.NAMES, *demo_words.LETTERS}
    counts = Counter(word for text in texts for word in re.findall(r" ([^\W\d_]+)", text))
    common = [word for word, _ in counts.most_common() if word in vocabulary and word not in items]
    return common[:SPACED_WORDS]


def _corpus(template: ChatTemplate, seed: int) -> Iterator[str]:
    rng = Random(f"{seed}/tokenizer")
    texts = list(demo_tasks.PARAGRAPHS) * 20
    texts += [" ".join(demo_words.WORDS + demo_words.MORE_WORDS + demo_words.NAMES)] * 40
    for _ in range(6000):
        talk = demo_conversations.make_conversation(rng)
        close = talk.close if talk.cut is not None else ""
        texts.append(f"{render_prompt(template, talk)}{talk.reasoning or ''}{close}{talk.answer}")
    for text in texts:
        for token in (*SPECIAL, *ADDED):
            text = text.replace(token, "\0")
        yield from filter(None, text.split("\0"))


def render_prompt(template: ChatTemplate, talk: demo_conversations.Conversation) -> str:
    """Render a conversation up to the assistant's turn."""
    if talk.raw:
        return ""
    return template.render(talk.messages, thinking=talk.thinking, tools=talk.tools)
