"""Converts text to token ids and back; the `tokenizers` library does the work."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import tokenizers

from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.text.splitting import PIECE, can_be_cut, pieces

_MAX_NFC_SHRINK = (
    3  # times the bytes of its normal form that a text may have: 9 bytes of Hangul become 3
)
_LONG_TEXT = 4 * PIECE  # characters; a longer text is counted before a template renders it in vain
_MAX_MERGED = 2  # tokens that a text may lose by merging with the text around it
_SETTINGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token


class Prompt(str):
    """A rendered prompt: the text, and its parts, some of them encoded without control tokens.

    `parts` are (text, is_plain) and joined are the whole text; `Tokenizer.encode` follows them.
    """

    parts: Sequence[tuple[str, bool]]

    def __new__(cls, parts: Sequence[tuple[str, bool]]) -> "Prompt":
        """Create the prompt from its parts."""
        prompt = super().__new__(cls, "".join(text for text, _ in parts))
        prompt.parts = tuple(parts)
        return prompt

    def __getnewargs__(self) -> tuple[Any]:  # for copy and pickle
        return (self.parts,)


class TooLong(ValueError):
    """The text has more tokens than allowed: at least `min_tokens`."""

    def __init__(self, min_tokens: int) -> None:
        super().__init__(f"the text has {min_tokens:,} tokens or more")
        self.min_tokens = min_tokens


class Tokenizer:
    """The byte-level BPE tokenizer of a checkpoint."""

    def __init__(self, path: Path) -> None:
        """Read a tokenizer.json, and the tokens that only the files beside it add.

        Raises:
            CheckpointError: it is missing, broken or not byte-level, or a token that another file
                adds has a different id there than here.
        """
        if not path.is_file():
            raise CheckpointError(f"{path.parent} has no {path.name}, so text cannot be tokenized")
        try:
            self._inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
        if not isinstance(self._inner.decoder, tokenizers.decoders.ByteLevel):
            raise CheckpointError(
                f"{path} is not a byte-level tokenizer; all Qwen3 checkpoints have one"
            )
        # Its threads would take CPU time from the engine, and it warns about them after a fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._inner.no_truncation()  # a setting saved in the file must not cut prompts short
        self._inner.no_padding()
        self._add_tokens(path.parent)
        self._added = {
            token: added.content.encode()
            for token, added in self._inner.get_added_tokens_decoder().items()
        }
        self._bytes_of = {text: byte for byte, text in _byte_alphabet().items()}
        self.token_bytes = lru_cache(maxsize=None)(self._token_bytes)

    def __len__(self) -> int:
        """Return the greatest id in use plus one; the model's embedding may have more rows."""
        count: int = self._inner.get_vocab_size(with_added_tokens=True)
        if self._inner.id_to_token(count - 1) is None:  # there are gaps between the ids
            count = 1 + max(self._inner.get_vocab(with_added_tokens=True).values())
        return count

    def knows_all_of(self, other: "Tokenizer") -> bool:
        """Return whether each token of another tokenizer has the same id here."""
        own, others = (
            tokenizer._inner.get_vocab(with_added_tokens=True) for tokenizer in (self, other)
        )
        return bool(others.items() <= own.items())

    def encode(self, text: str, max_tokens: int | None = None) -> list[int]:
        """Return the ids of `text`; the names of control tokens in it become those tokens.

        In a `Prompt` returned by `LLM.render`, only the names written by the template do.

        Raises:
            TooLong: there are more than `max_tokens`; the total is not counted.
            ValueError: the text is not valid Unicode, for example decoded from other than UTF-8.
        """
        parts = text.parts if isinstance(text, Prompt) else [(text, False)]
        ids: list[int] = []
        if max_tokens is not None and len(text) > max_tokens:
            if (lower_bound := self._min_by_bytes(text)) > max_tokens:
                raise TooLong(lower_bound)
        for part, is_plain in parts:
            inner = self._plain if is_plain else self._inner
            for encoding in self._encoded(inner, part, max_tokens):
                ids += encoding.ids
                if max_tokens is not None and len(ids) > max_tokens:
                    raise TooLong(len(ids))
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of `text` without any control token; raises the errors of `encode`."""
        encodings = self._encoded(self._plain, text)
        return [token for encoding in encodings for token in encoding.ids]

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """Ids that the post-processor puts before and after a text; `encode` adds none of them.

        Those of the embedding models append <|endoftext|>.
        """
        bare, whole = (
            self._inner.encode("a", add_special_tokens=special).ids for special in (False, True)
        )
        start = next(n for n in range(len(whole)) if whole[n : n + len(bare)] == bare)
        return whole[:start], whole[start + len(bare) :]

    def min_tokens(self, text: str, enough: int) -> int:
        """Return a lower bound of the number of tokens in `text`.

        The bound comes from the bytes; long texts are encoded, until more than `enough` are found.

        Raises:
            ValueError: a long text is not valid Unicode.
        """
        lower_bound, found = self._min_by_bytes(text), 0
        if lower_bound > enough or len(text) < _LONG_TEXT:
            return lower_bound
        try:
            for encoding in self._encoded(self._plain, text, enough):
                found += len(encoding)
                if found > enough + _MAX_MERGED:
                    break
        except TooLong as error:
            found = error.min_tokens
        return max(lower_bound, found - _MAX_MERGED)

    def added_spans(self, text: str) -> list[tuple[int, int]]:
        """Return the places of added tokens in a text, as (start, stop) in characters."""
        if not any(first in text for first in self._first_characters):
            return []
        spans, place, window = list[tuple[int, int]](), 0, self._window
        while True:
            part = text[place : place + window] if window else text
            found = self._finder.encode_batch([part], add_special_tokens=False)[0].offsets
            if place + len(part) == len(text):
                return [*spans, *((place + start, place + stop) for start, stop in found)]
            # Tokens that begin before this are complete within the part.
            sure = len(part) - max(map(len, self.added_tokens))
            found = [span for span in found if span[0] < sure]
            spans += ((place + start, place + stop) for start, stop in found)
            place += max(sure, found[-1][1] if found else 0)

    def _encoded(
        self, tokenizer: tokenizers.Tokenizer, text: str, max_tokens: int | None = None
    ) -> Iterator[tokenizers.Encoding]:
        """Yield the encodings of the pieces; only batch calls, here of size 1, release the GIL."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text is not valid Unicode at character {error.start}; is it UTF-8?"
            ) from error
        for piece in pieces(text) if len(text) > 2 * PIECE and self.can_be_cut else [text]:
            if max_tokens is not None and len(piece) > 2 * PIECE:
                self._check_uncut(tokenizer, piece, max_tokens)
            yield tokenizer.encode_batch_fast([piece], add_special_tokens=False)[0]

    @staticmethod
    def _check_uncut(tokenizer: tokenizers.Tokenizer, text: str, max_tokens: int) -> None:
        """Raise TooLong if a long text without a safe cut has far too many tokens, cut anywhere."""
        found = 0
        for start in range(0, len(text), PIECE):
            piece = text[start : start + PIECE]
            found += len(tokenizer.encode_batch_fast([piece], add_special_tokens=False)[0])
            if found > 2 * max_tokens:  # cuts add a few tokens, never as many as the text has
                raise TooLong(found // 2)

    def _min_by_bytes(self, text: str) -> int:
        size = (
            len(text)
            if text.isascii()
            else len(text.encode("utf-8", "surrogatepass")) // _MAX_NFC_SHRINK
        )
        return -(-size // self._max_token_bytes)

    @cached_property
    def _max_token_bytes(self) -> int:
        """Bytes of the longest token; in the vocabulary each byte is written as a character."""
        words = self._inner.get_vocab(with_added_tokens=False)
        return max(1, *map(len, words), *map(len, self._added.values()))

    @cached_property
    def can_be_cut(self) -> bool:
        """True if text cut before a space that follows no white space has the same ids."""
        return can_be_cut(self._inner)

    def is_word(self, token: str) -> bool:
        """Return whether a token is in the vocabulary itself, not only added to it."""
        return self._inner.model.token_to_id(token) is not None

    @cached_property
    def added_tokens(self) -> dict[str, bool]:
        """Added tokens: name to whether the token is special."""
        added = self._inner.get_added_tokens_decoder().values()
        return {token.content: token.special for token in added}

    @cached_property
    def _first_characters(self) -> frozenset[str]:
        return frozenset(name[:1] for name in self.added_tokens)

    @cached_property
    def _window(self) -> int | None:
        """Characters of a text that are searched for added tokens at once; None for all."""
        added = self._inner.get_added_tokens_decoder().values()
        # Whether one of these matches depends on the text around it, perhaps far away.
        bound = any(t.lstrip or t.rstrip or t.single_word or t.normalized for t in added)
        return None if bound or any(len(t.content) > PIECE // 2 for t in added) else PIECE

    @cached_property
    def _finder(self) -> tokenizers.Tokenizer:
        """A tokenizer with the added tokens alone; it skips the text between them."""
        added = list(self._inner.get_added_tokens_decoder().values())
        finder = tokenizers.Tokenizer(tokenizers.models.BPE())
        if self._inner.normalizer and any(token.normalized for token in added):
            finder.normalizer = self._inner.normalizer
        finder.add_tokens(added)
        return finder

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer without added tokens; the vocabulary is shared."""
        plain = tokenizers.Tokenizer(self._inner.model)
        for step in ("normalizer", "pre_tokenizer"):
            if (part := getattr(self._inner, step)) is not None:
                setattr(plain, step, part)
        return plain

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`, special tokens included; invalid bytes become U+FFFD."""
        text: str = self._inner.decode(ids, skip_special_tokens=False)
        return text

    def to_json(self) -> str:
        """Return the whole tokenizer in the form of tokenizer.json."""
        text: str = self._inner.to_str()
        return text

    def id_of(self, token: str) -> int | None:
        """Return the id of one token by its text, or None."""
        found: int | None = self._inner.token_to_id(token)
        return found

    def _add_tokens(self, folder: Path) -> None:
        """Add tokens of tokenizer_config.json and added_tokens.json that tokenizer.json lacks."""
        present = {added.content for added in self._inner.get_added_tokens_decoder().values()}
        for file, token, added in sorted(_added_elsewhere(folder), key=lambda entry: entry[1]):
            if added.content not in present:  # gets the next free id, or its id in the vocabulary
                self._inner.add_tokens([added])
                present.add(added.content)
            if (found := self.id_of(added.content)) != token:
                raise CheckpointError(
                    f"{file} has {added.content!r} as token {token}, and by tokenizer.json it is "
                    f"{found}; these files do not belong to one checkpoint"
                )

    def _token_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token]
        text = self._inner.id_to_token(token)
        return b"" if text is None else bytes(self._bytes_of[char] for char in text)


def _added_elsewhere(folder: Path) -> Iterator[tuple[str, int, tokenizers.AddedToken]]:
    """Yield the file, id and settings of the tokens that a tokenizer's other files add."""
    config, plain = folder / "tokenizer_config.json", folder / "added_tokens.json"
    if config.is_file():
        listed = _object(read_json_file(config), config).get("added_tokens_decoder")
        for token, added in _object(listed, config).items():
            settings = dict(_object(added, config))
            content = settings.pop("content", None)
            settings = {name: bool(settings[name]) for name in settings if name in _SETTINGS}
            if not token.isdecimal() or not isinstance(content, str):
                raise CheckpointError(f"{config}: added_tokens_decoder has {token!r}: {added!r}")
            yield config.name, int(token), tokenizers.AddedToken(content, **settings)
    if plain.is_file():
        for content, token in _object(read_json_file(plain), plain).items():
            if type(token) is not int:
                raise CheckpointError(
                    f"{plain} has {content!r}: {token!r}, which is not a token id"
                )
            yield plain.name, token, tokenizers.AddedToken(content, normalized=False)


def read_json_file(file: Path) -> Any:
    """Read a JSON file of any content.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error


def _object(value: object, file: Path) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise CheckpointError(f"{file} has {value!r} where an object is needed")
    return value or {}


def _byte_alphabet() -> dict[int, str]:
    """Return the printable character that stands for each byte in byte-level BPE (GPT-2).

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100 onwards.
    """
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = (byte for byte in range(256) if byte not in itself)
    return {byte: chr(byte) for byte in itself} | {
        byte: chr(0x100 + place) for place, byte in enumerate(moved)
    }
