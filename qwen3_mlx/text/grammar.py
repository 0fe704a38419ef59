"""Answers in a form: JSON schema, regular expression, choice or Lark grammar, by llguidance.

A grammar says after each token which may come next; the library does that for a whole vocabulary in
much less than a millisecond.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from decimal import Decimal
from functools import cached_property, lru_cache
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen3_mlx.text.tokenizer import Tokenizer
from qwen3_mlx.text.tool_schema import (
    kinds_of,
    on_its_own,
    parameters_of,
    parts_of,
    properties_of,
)

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from numpy.typing import NDArray

# JSON as Python writes it. Free whitespace would let a weak model emit blanks for ever.
_JSON: Any = {
    "whitespace_flexible": False,
    "key_separator": ": ",
    "item_separator": ", ",
}
# Of a tool's schema what is not supported is left out, with a warning: the model can call it still.
_TOOL_JSON: Any = {**_JSON, "lenient": True, "coerce_one_of": True}
# Bounds what a regular expression may unfold to: (a{1000}){1000} takes 0.7 s and 50 MB with the
# published vocabulary, and lists of 20,000 words still fit.
_LEXER_FUEL = 300_000
# Intersected patterns take time exponential in their number, before llguidance counts any fuel:
# 16 take 0.2 s, 20 take 8 s and 24 more memory than there is.
_MOST_INTERSECTED = 16
# A multiple of 100,003 takes 0.2 s and 20 MB, one of 3,000,017 takes 77 s and 1.8 GB.
_MOST_REMAINDERS = 100_000
# Each takes four of the 2,000 items that llguidance follows; 10,000 take 12 s to compile.
_MOST_OPTIONAL = 500
_COMBINING = frozenset(("$ref", "allOf", "anyOf", "oneOf"))
_HOLDING = frozenset(
    ("pattern", "properties", "patternProperties", "additionalProperties", "items", "prefixItems")
)
_LARK_LITERAL = re.compile(r'"(?:[^"\\\n]|\\.)*"|/(?:[^/\\\n]|\\.)+/|//.*')
_MOST_CLOSING = 400  # tokens
_MOST_PROBED = 100  # tokens
_TEXT = r"text[lazy]: /((.|\n)*\n)?<\/parameter>\n/"
_SHOWN = re.compile(
    r"\n<|\n +\d+ \| |; following special tokens|; consider making|; try avoiding|: \(And "
)
_SIMPLER = "try a simpler one, with fewer alternatives, optional parts or repetitions"
_LONGEST_LINE = 300  # characters
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
        self._checked = lru_cache(maxsize=1024)(self._check)

    @cached_property
    def _vocabulary(self) -> "LLTokenizer":
        # Imported and made where it is first needed: Qwen3's vocabulary takes more than a second.
        from llguidance import LLTokenizer

        # Added tokens go by names that no text has: theirs in a form are text like any other. Those
        # that are words of the vocabulary, too, cannot be renamed, and are text already.
        text = self._tokenizer.to_json()
        start = text.index("[", text.index('"added_tokens":'))
        tokens, end = json.JSONDecoder().raw_decode(text, start)
        for token in tokens:
            if not self._tokenizer.is_word(token["content"]):
                token |= {"content": f"\uffff{token['id']}", "special": True}
        return LLTokenizer(
            text[:start] + json.dumps(tokens) + text[end:],
            n_vocab=len(self._tokenizer),
            eos_token=self._end_ids,
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
        found = schema_of(schema)
        return self._made("schema", lambda matcher: _schema_grammar(matcher, found))

    def regex(self, pattern: str) -> "Grammar":
        """Give that of the texts which match a pattern as a whole.

        Raises:
            ValueError: it is no pattern, or not supported.
        """
        return self._made("regex", lambda matcher: matcher.grammar_from_regex(pattern))

    def choice(self, choices: Collection[str]) -> "Grammar":
        """Give that of a few texts.

        Raises:
            ValueError: there is none.
        """
        if (
            isinstance(choices, str)
            or not isinstance(choices, Collection)
            or not choices
            or not all(isinstance(c, str) and c for c in choices)
        ):
            raise ValueError(f"choice must be one or more non-empty strings, not {choices!r}")
        texts = " | ".join(json.dumps(choice) for choice in choices)
        return self.lark(f"start: ONE\nONE: {texts}", "choice")  # a terminal holds thousands

    def lark(self, text: str, name: str = "grammar") -> "Grammar":
        """Give that of a grammar in Lark's syntax, whose first rule is `start`.

        Raises:
            ValueError: it is none, or not supported.
        """
        return self._made(name, lambda matcher: _lark_grammar(matcher, text))

    def call(self, tools: Sequence[Mapping[str, Any]]) -> "Grammar":
        """Give that of what stands between the tags of a Hermes call to one of the tools.

        What is not supported of a tool's schema is not enforced; the grammar's `warnings` say so.
        """
        return self._of_tools(tools, _hermes_rules)

    def coder_call(self, tools: Sequence[Mapping[str, Any]]) -> "Grammar":
        """Give that of what stands between the tags of a Qwen3-Coder call to one of the tools.

        Parameters come in any order. What may be a string is any text up to the closing tag; all
        else is JSON of its schema, as far as that is supported.
        """
        return self._of_tools(tools, _coder_rules)

    def _of_tools(self, tools: Sequence[Mapping[str, Any]], write: "_Write") -> "Grammar":
        warnings: list[str] = []

        def held(name: str, schema: Mapping[str, Any], fallback: Mapping[str, Any]) -> str:
            document = _document(schema)
            refusal, unsupported = self._checked(document)
            if fallback is _OBJECT and schema.get("type") != "object":
                refusal = "the arguments of a tool are an object"
            if refusal:
                warnings.append(f"the schema of the tool {name} is not enforced: {refusal}")
                return _document(fallback)
            if unsupported:
                warnings.append(f"the schema of the tool {name} is enforced in part: {unsupported}")
            return document

        def free(_: str, __: Mapping[str, Any], fallback: Mapping[str, Any]) -> str:
            return _document(fallback)

        def spare() -> Grammar:
            return self._made("tools", lambda m: m.grammar_from_lark(write(tools, free)))

        try:
            grammar = self._made("tools", lambda m: m.grammar_from_lark(write(tools, held)))
        except ValueError as error:  # each alone is supported, all together are too much
            warnings = [f"the schemas of the tools are not enforced: {error}"]
            grammar = spare()
        grammar.warnings = list(dict.fromkeys(warnings))
        grammar.spare = spare
        return grammar

    def _check(self, document: str) -> tuple[str, str]:
        """Return why a tool's JSON schema cannot be enforced, and which parts of it are not."""
        try:
            made = self._made(
                "schema", lambda matcher: _schema_grammar(matcher, json.loads(document), _TOOL_JSON)
            )
            made.probe()
        except ValueError as error:
            return str(error), ""
        return "", "; ".join(made.unsupported())

    def _made(self, name: str, write: "Callable[[type[LLMatcher]], str]") -> "Grammar":
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(initial_lexer_fuel=_LEXER_FUEL, verbose_errors=False)
        try:
            grammar = write(LLMatcher)
            matcher = LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{name}: {_line(str(error))}") from error
        if matcher.is_error():
            raise ValueError(f"{name}: {_line(matcher.get_error())}")
        made = Grammar(matcher, len(self._tokenizer), self._byte_ids, name=name)
        made.mask()  # raises an error where no text matches at all
        return made


_OBJECT = {"type": "object"}
_PLAIN = frozenset(
    ("type", "properties", "required", "title", "description", "$schema", "$defs", "definitions")
)
_Held = Callable[[str, Mapping[str, Any], Mapping[str, Any]], str]
_Write = Callable[[Sequence[Mapping[str, Any]], _Held], str]


def _hermes_rules(tools: Sequence[Mapping[str, Any]], held: _Held) -> str:
    """Write the grammar of a Hermes call; the arguments of each tool are a document of their own,
    so that references within its schema find their place.
    """
    rules = []
    for number, tool in enumerate(tools):
        function = tool["function"]
        name = json.dumps(function["name"], ensure_ascii=False)
        begin = json.dumps(f'{{"name": {name}, "arguments": ')
        document = held(function["name"], _arguments(parameters_of(function)), _OBJECT)
        rules += [f'c{number}: {begin} a{number} "}}"', f"a{number}: %json {document}"]
    calls = " | ".join(f"c{number}" for number in range(len(tools)))
    return "\n".join([f'start: "\\n" ({calls}) "\\n"', *rules])


def _coder_rules(tools: Sequence[Mapping[str, Any]], held: _Held) -> str:
    """Write the grammar of a Qwen3-Coder call."""
    rules = [_TEXT, r"other: /<parameter=[^>\n]+>\n/ text"]
    for number, tool in enumerate(tools):
        function, parameters = tool["function"], list[str]()
        root = parameters_of(function)
        if (kinds := kinds_of(root, root)) and "object" not in kinds:
            held(function["name"], root, _OBJECT)  # which warns
            parameters.append("other")
        for place, (name, schema) in enumerate(properties_of(root).items()):
            rule = f"p{number}_{place}"
            parameters.append(rule)
            begin = json.dumps(f"<parameter={name}>\n")
            kinds = kinds_of(schema, root)
            if kinds and "string" not in kinds:
                own = on_its_own(schema, root)
                document = held(function["name"], own, {"type": sorted(kinds)})
                rules.append(f'{rule}: {begin} j{rule} "\\n</parameter>\\n"')
                rules.append(f"j{rule}: %json {document}")
            else:
                rules.append(f"{rule}: {begin} text")
        some = f"({' | '.join(parameters)})*" if parameters else ""
        begin = json.dumps(f"<function={function['name']}>\n")
        rules.append(f'f{number}: {begin} {some} "</function>"')
    calls = " | ".join(f"f{number}" for number in range(len(tools)))
    return "\n".join([f'start: "\\n" ({calls}) "\\n"', *rules])


def _document(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": _TOOL_JSON})


def _arguments(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema of a tool with what goes without saying: it is of an object.

    Arguments that a plain schema does not name are ruled out, where it does not speak of others.
    """
    if schema.keys() <= _PLAIN:
        schema = {**schema, "additionalProperties": False}
    kinds = kinds_of(schema, schema)
    return {**schema, "type": "object"} if not kinds or "object" in kinds else schema


def _schema_grammar(matcher: "type[LLMatcher]", schema: Any, options: Any = _JSON) -> str:
    _check_costs(schema)
    return matcher.grammar_from_json_schema(json.dumps(schema), overrides=options)


def _lark_grammar(matcher: "type[LLMatcher]", text: str) -> str:
    for place in re.finditer(r"%json\s*", text):
        try:
            schema = json.JSONDecoder().raw_decode(text, place.end())[0]
        except json.JSONDecodeError:
            continue  # llguidance says where
        _check_costs(schema)
    rules = _LARK_LITERAL.sub("", text)
    if "<[" in rules:
        raise ValueError("tokens cannot be named by their numbers (<[...]>); write their text")
    if rules.count("&") >= _MOST_INTERSECTED:
        raise ValueError(f"at most {_MOST_INTERSECTED} expressions can be intersected (&)")
    return matcher.grammar_from_lark(text)


def _check_costs(schema: Any) -> None:
    """Raise a ValueError where llguidance would take a schema, for too much time or memory."""
    _check_patterns(schema)
    _check_multiples(schema)
    _check_properties(schema)


def _check_properties(schema: Any) -> None:
    """Raise a ValueError where an object has more optional properties than can be followed."""
    for part in parts_of(schema):
        properties, required = part.get("properties"), part.get("required")
        if isinstance(properties, Mapping) and len(properties) > _MOST_OPTIONAL:
            count = len(properties.keys() - (required if isinstance(required, list) else []))
            if count > _MOST_OPTIONAL:
                raise ValueError(
                    f"an object can have at most {_MOST_OPTIONAL} optional properties, "
                    f"not {count:,}"
                )


def _check_multiples(schema: Any) -> None:
    """Raise a ValueError where counting the remainders of a number would take too many states."""
    found = 1
    for part in parts_of(schema):
        number = part.get("multipleOf")
        if isinstance(number, int | float) and math.isfinite(number) and number > 0:
            digits = Decimal(str(number)).normalize().as_tuple().digits
            found = math.lcm(found, int("".join(map(str, digits))))
    if found > _MOST_REMAINDERS:
        raise ValueError(
            f"multipleOf is supported up to {_MOST_REMAINDERS:,} (the least common multiple of "
            f"all in a schema, without the zeros at its ends), not {found:,}"
        )


def _check_patterns(schema: Any) -> None:
    """Raise a ValueError where more patterns may hold for one value than can be intersected."""
    patterns, combined = set(), False
    for part in parts_of(schema):
        if isinstance(pattern := part.get("pattern"), str):
            patterns.add(pattern)
        keys = part.keys()
        several = isinstance(every := part.get("allOf"), list) and len(every) > 1
        combined |= several or (bool(keys & _COMBINING) and len(keys & (_COMBINING | _HOLDING)) > 1)
    if combined and len(patterns) > _MOST_INTERSECTED:
        raise ValueError(
            f"it combines schemas and has {len(patterns)} patterns, and at most "
            f"{_MOST_INTERSECTED} can be intersected"
        )


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
    """Where a text stands in its grammar; met by the engine through `Steering`.

    What fails at run time, such as an expression that unfolds to too much, is a ValueError: it ends
    the reply. If the grammar has a `spare`, the text goes on in that, with a warning.
    """

    def __init__(
        self,
        matcher: "LLMatcher",
        vocabulary: int,
        byte_ids: Mapping[int, int],
        *,
        name: str,
    ) -> None:
        self.warnings: list[str] = []  # what it does not enforce
        self.spare: Callable[[], Grammar] | None = None
        self._taken: list[int] = []  # tokens
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._byte_ids = byte_ids
        self._name = name

    def copy(self, warnings: list[str]) -> "Grammar":
        """Return this grammar where it stands; what fails from there on is added to `warnings`."""
        made = Grammar(self._matcher.deep_copy(), self._vocabulary, self._byte_ids, name=self._name)
        made.spare, made.warnings, made._taken = self.spare, warnings, self._taken[:]
        return made

    @property
    def read(self) -> int:
        """How many tokens were taken."""
        return len(self._taken)

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
            self._taken.append(token)
            self._matcher.consume_token(token)
            self._recover()

    def rewind(self, read: int) -> None:
        """Go back to where `read` tokens had been taken."""
        if self.read > read:
            self._matcher.rollback(self.read - read)
            del self._taken[read:]

    def forced(self) -> list[int]:
        """Give the tokens that alone can come next."""
        ids = [] if self.complete else list(self._matcher.compute_ff_tokens())
        return self.forced() if self._recover() else ids

    def mask(self) -> "NDArray[np.uint32]":
        """Give the ids that may come next, 32 to a word; end tokens where the text may end."""
        mask = _mask_of(self._matcher, self._vocabulary)
        return self.mask() if self._recover() else mask

    def unsupported(self) -> list[str]:
        """Return what of a schema is not enforced; an unknown `format` is but an annotation."""
        found = map(_line, self._matcher.get_grammar_warnings())
        return [words for words in found if not words.startswith("Unknown format")]

    def probe(self) -> None:
        """Raise the ValueError that the likeliest way to an end of the text runs into, if any."""
        probed = self.copy([])
        probed._walk(_MOST_PROBED)
        probed._recover()

    def _recover(self) -> bool:
        """Go on in the spare grammar if this one has failed, and say whether it has.

        Raises:
            ValueError: it has, and there is no spare, or none in which the text goes on.
        """
        if not self._matcher.is_error():
            return False
        words = f"{_line(self._matcher.get_error())}; {_SIMPLER}"
        if words.startswith("NoExtension"):
            words = "no text matches it"
        place = f" (seen after {self.read} tokens)" if self.read else ""
        complaint = f"{self._name}: {words}{place}"
        if self.spare is None:
            raise ValueError(complaint)
        self._matcher, self.spare = self.spare()._matcher, None
        self._matcher.consume_tokens(self._taken)
        self.warnings.append(f"the schema of a tool was not enforced in a call: {complaint}")
        return self._recover() or True

    def closing(self, most: int = _MOST_CLOSING) -> list[int] | None:
        """Give tokens that end the text soon, at most `most`, or None if none were found."""
        walked = self.copy([])
        return walked._walk(most)

    def _walk(self, most: int) -> list[int] | None:
        """Go on to an end of the text that is near; return the tokens as `closing` says."""
        matcher, ids = self._matcher, list[int]()
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
    """Return the sentence of an error of llguidance, without the sources and states it shows."""
    return shorten(_SHOWN.split(text)[0], _LONGEST_LINE, placeholder=" ...")


def allows(mask: "NDArray[np.uint32]", token: int) -> bool:
    """Say whether a mask allows a token."""
    return bool(mask[token // 32] >> token % 32 & 1)


def _mask_of(matcher: "LLMatcher", vocabulary: int) -> "NDArray[np.uint32]":
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

    bits = allocate_token_bitmask(1, vocabulary)
    fill_next_token_bitmask(matcher, bits, 0)
    words: NDArray[np.uint32] = bits[0].view(np.uint32)
    return words
