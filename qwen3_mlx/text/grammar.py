"""Answers in a form: JSON schema, regular expression, choice or Lark grammar, by llguidance.

A grammar says after each token which may come next; the library does that for a whole vocabulary in
much less than a millisecond.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen3_mlx.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from numpy.typing import NDArray

# JSON as Python writes it. Free whitespace would let a weak model emit blanks for ever.
_JSON: Any = {
    "whitespace_flexible": False,
    "key_separator": ": ",
    "item_separator": ", ",
}
_MOST_CLOSING = 400  # tokens
_TEXT = r"text[lazy]: /(.|\n)*\n<\/parameter>\n/"
_FEW = 16  # bytes that may come next and are tried
# What ends a value, or begins the shortest; any byte serves where none of these may come.
_CLOSERS = b'"}],0/' + b"nulltruefalse" + b": -." + bytes(range(97, 123)) + bytes(range(256))

Form = Mapping[str, Any] | type | bool
"""A JSON schema: as a dictionary, or a pydantic model."""


class Grammars:
    """Makes grammars for a checkpoint's vocabulary."""

    def __init__(self, tokenizer: Tokenizer, end_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._end_ids = sorted(token for token in end_ids if token < len(tokenizer))

    @cached_property
    def _vocabulary(self) -> "LLTokenizer":
        # Imported and made where it is first needed: Qwen3's vocabulary takes more than a second.
        from llguidance import LLTokenizer

        return LLTokenizer(
            self._tokenizer.to_json(), n_vocab=len(self._tokenizer), eos_token=self._end_ids
        )

    @cached_property
    def _byte_ids(self) -> dict[int, int]:
        """The token of each single byte."""
        tokens = range(len(self._tokenizer))
        pieces = ((token, self._tokenizer.token_bytes(token)) for token in tokens)
        return {piece[0]: token for token, piece in pieces if len(piece) == 1}

    def schema(self, schema: Form) -> "Grammar":
        """Give the grammar of JSON that fits a schema.

        Raises:
            ValueError: it is no schema, or has keywords that are not supported: they are named.
        """
        text = json.dumps(schema_of(schema))
        return self._made(
            "schema", lambda matcher: matcher.grammar_from_json_schema(text, overrides=_JSON)
        )

    def regex(self, pattern: str) -> "Grammar":
        """Give that of the texts which match a pattern as a whole.

        Raises:
            ValueError: it is no pattern, or not supported.
        """
        return self._made("regex", lambda matcher: matcher.grammar_from_regex(pattern))

    def choice(self, choices: Sequence[str]) -> "Grammar":
        """Give that of a few texts.

        Raises:
            ValueError: there is none.
        """
        if (
            isinstance(choices, str)
            or not choices
            or not all(isinstance(c, str) and c for c in choices)
        ):
            raise ValueError(f"choice must be one or more non-empty strings, not {choices!r}")
        return self.lark(f"start: {' | '.join(json.dumps(choice) for choice in choices)}", "choice")

    def lark(self, text: str, name: str = "grammar") -> "Grammar":
        """Give that of a grammar in Lark's syntax, whose first rule is `start`.

        Raises:
            ValueError: it is none, or not supported.
        """
        return self._made(name, lambda matcher: matcher.grammar_from_lark(text))

    def call(self, tools: Sequence[Mapping[str, Any]]) -> "Grammar":
        """Give that of what stands between the tags of a Hermes call to one of the tools.

        Where a tool's schema has keywords that are not supported, its arguments are any object.
        """
        calls = []
        for tool in tools:
            function = tool["function"]
            arguments = _closed(function["parameters"] or {"type": "object"})
            try:
                self.schema(arguments)
            except ValueError:
                arguments = {"type": "object"}
            calls.append(
                {
                    "type": "object",
                    "properties": {"name": {"const": function["name"]}, "arguments": arguments},
                    "required": ["name", "arguments"],
                    "additionalProperties": False,
                }
            )
        form = json.dumps({"x-guidance": _JSON, "anyOf": calls})
        return self.lark(f'start: "\\n" call "\\n"\ncall: %json {form}')

    def coder_call(self, tools: Sequence[Mapping[str, Any]]) -> "Grammar":
        """Give that of what stands between the tags of a Qwen3-Coder call to one of the tools.

        Parameters come in any order. What is a string is any text up to the closing tag; all else
        is JSON of its schema, if that is supported.
        """
        rules, calls = [_TEXT], []
        for number, tool in enumerate(tools):
            function, parameters = tool["function"], []
            properties = (function["parameters"] or {}).get("properties", {})
            for place, (name, schema) in enumerate(properties.items()):
                rule = f"p{number}_{place}"
                parameters.append(rule)
                begin = json.dumps(f"<parameter={name}>\n")
                if self._is_json(schema):
                    form = json.dumps({"x-guidance": _JSON, **schema})
                    rules.append(f'{rule}: {begin} j{rule} "\\n</parameter>\\n"')
                    rules.append(f"j{rule}: %json {form}")
                else:
                    rules.append(f"{rule}: {begin} text")
            some = f"({' | '.join(parameters)})*" if parameters else ""
            begin = json.dumps(f"<function={function['name']}>\n")
            rules.append(f'f{number}: {begin} {some} "</function>"')
            calls.append(f"f{number}")
        return self.lark("\n".join([f'start: "\\n" ({" | ".join(calls)}) "\\n"', *rules]))

    def _is_json(self, schema: Any) -> bool:
        """Say whether a parameter is written as JSON, and its schema is supported."""
        kind = schema.get("type") if isinstance(schema, Mapping) else None
        kinds = kind if isinstance(kind, list) else [kind]
        if kind is None or "string" in kinds:
            return False
        try:
            self.schema(schema)
        except ValueError:
            return False
        return True

    def _made(self, name: str, write: "Callable[[type[LLMatcher]], str]") -> "Grammar":
        from llguidance import LLMatcher

        try:
            grammar = write(LLMatcher)
            matcher = LLMatcher(self._vocabulary, grammar)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {_line(str(error))}") from error
        if matcher.is_error():
            raise ValueError(f"{name}: {_line(matcher.get_error())}")
        return Grammar(matcher, len(self._tokenizer), self._byte_ids)


def _closed(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rule out arguments that a plain schema does not name, where it does not speak of others."""
    plain = {"type", "properties", "required", "title", "description", "$schema", "$defs"}
    if arguments.get("properties") and arguments.keys() <= plain:
        return {**arguments, "additionalProperties": False}
    return arguments


def schema_of(form: Form) -> Any:
    """Give a JSON schema of what a caller may say it by.

    Raises:
        TypeError: it is neither a dictionary nor a pydantic model.
    """
    if callable(made := getattr(form, "model_json_schema", None)):
        return made()
    if isinstance(form, Mapping):
        return dict(form)
    raise TypeError(f"schema must be a JSON schema or a pydantic model, not {form!r}")


class Grammar:
    """Where a text stands in its grammar; met by the engine through `Steering`."""

    def __init__(self, matcher: "LLMatcher", vocabulary: int, byte_ids: Mapping[int, int]) -> None:
        self.read = 0  # tokens taken
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._byte_ids = byte_ids

    @property
    def complete(self) -> bool:
        """Whether nothing can come after what is there."""
        return bool(self._matcher.is_stopped())

    @property
    def may_end(self) -> bool:
        """Whether what is there is a whole."""
        return bool(self._matcher.is_accepting())

    def advance(self, token: int) -> None:
        """Take the next token, one that may come."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
            self.read += 1

    def rewind(self, read: int) -> None:
        """Go back to where `read` tokens had been taken."""
        if self.read > read:
            self._matcher.rollback(self.read - read)
            self.read = read

    def forced(self) -> list[int]:
        """Give the tokens that alone can come next."""
        return [] if self.complete else list(self._matcher.compute_ff_tokens())

    def mask(self) -> "NDArray[np.uint32]":
        """Give the ids that may come next, 32 to a word; end tokens where the text may end."""
        return _mask_of(self._matcher, self._vocabulary)

    def closing(self, most: int = _MOST_CLOSING) -> list[int] | None:
        """Give tokens that end the text soon, at most `most`, or None if none were found."""
        matcher, ids = self._matcher.deep_copy(), list[int]()
        while not matcher.is_accepting():
            if len(ids) >= most or matcher.is_error():
                return None
            if not (more := list(matcher.compute_ff_tokens())):
                more = self._towards_the_end(matcher)
            if not more:
                return None
            matcher.consume_tokens(more)
            ids += more
        return ids

    def _towards_the_end(self, matcher: "LLMatcher") -> list[int]:
        """Give the byte that ends the text, or else the likeliest to bring its end near."""
        mask = _mask_of(matcher, self._vocabulary)
        near = [self._byte_ids[byte] for byte in _CLOSERS if byte in self._byte_ids]
        possible = [token for token in dict.fromkeys(near) if allows(mask, token)]
        for token in possible if len(possible) <= _FEW else ():
            after = matcher.deep_copy()
            after.consume_token(token)
            if after.is_accepting():
                return [token]
        return possible[:1]


def _line(text: str) -> str:
    return " ".join(text.split())


def allows(mask: "NDArray[np.uint32]", token: int) -> bool:
    """Say whether a mask allows a token."""
    return bool(mask[token // 32] >> token % 32 & 1)


def _mask_of(matcher: "LLMatcher", vocabulary: int) -> "NDArray[np.uint32]":
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

    bits = allocate_token_bitmask(1, vocabulary)
    fill_next_token_bitmask(matcher, bits, 0)
    words: NDArray[np.uint32] = bits[0].view(np.uint32)
    return words
