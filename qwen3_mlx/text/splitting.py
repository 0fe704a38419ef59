"""Splits long text into pieces that together have the same tokens as the whole.

Encoding takes much memory and cannot be interrupted, so long texts are encoded piece by piece. A
cut is safe where the pre-tokenizer always ends a word. For the published pre-tokenizer that is
before a space or a digit that follows a character other than white space.
"""

import json
import re
from collections.abc import Iterator

import tokenizers

# Qwen2's and Qwen3's: a digit is a word of its own, and only white space joins a space after it.
_PRETOKENIZER_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PIECE = 1 << 16  # characters
_CUT = re.compile(r"[ 0-9](?<=\S[ 0-9])")


def can_be_cut(tokenizer: tokenizers.Tokenizer) -> bool:
    """Return whether text is split as by the published tokenizer and no added token spans a cut."""
    steps = tokenizer.pre_tokenizer and json.loads(tokenizer.pre_tokenizer.__getstate__())
    normalizer = tokenizer.normalizer and json.loads(tokenizer.normalizer.__getstate__())
    published_model_config = {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": _PRETOKENIZER_PATTERN},
                "behavior": "Isolated",
                "invert": False,
            },
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": False,
                "use_regex": False,
            },
        ],
    }
    added = tokenizer.get_added_tokens_decoder().values()
    return (
        steps == published_model_config
        and normalizer in (None, {"type": "NFC"})
        and not any(_CUT.search(f".{token.content}") or token.rstrip for token in added)
    )


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """Yield a text in pieces of about `size` characters; longer ones where it cannot be cut."""
    start = look = 0
    while len(text) - look > 2 * size:
        look += size
        if found := _CUT.search(text, look, look + size):  # not beyond: the search holds the GIL
            yield text[start : found.start()]
            start = look = found.start()
    yield text[start:] if start else text
