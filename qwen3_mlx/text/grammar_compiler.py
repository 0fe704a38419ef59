"""Compiles grammars with llguidance: JSON schema, regular expression, choice, Lark, tool calls."""

import copy
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from qwen3_mlx.text.fair_queue import LOCAL_CALLER, Caller
from qwen3_mlx.text.grammar import GrammarState, line_of
from qwen3_mlx.text.grammar_limits import MAX_CHOICES, check_lark, check_schema, check_size
from qwen3_mlx.text.grammar_trial import ResultCache, TrialCompiler
from qwen3_mlx.text.tokenizer import Tokenizer
from qwen3_mlx.text.tool_grammar import (
    ANSWER_JSON,
    ANY_OBJECT,
    TOOL_JSON,
    Schema,
    WriteRules,
    coder_rules,
    document_of,
    hermes_rules,
)

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

SchemaLike = Mapping[str, Any] | type | bool
"""A JSON schema: a dictionary or a pydantic model."""

_MAX_WRITTEN = 4_000_000  # characters of all tools' documents; each may repeat all references
_MAX_CHECKED = 1024  # schemas of tools whose check is remembered
_MAX_SHOWN = 200  # characters of a wrong value


class GrammarCompiler:
    """Compiles grammars for a checkpoint's vocabulary.

    Compiling any grammar comes to an end, or is refused with a ValueError.
    """

    def __init__(self, tokenizer: Tokenizer, end_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._end_ids = sorted(token for token in end_ids if token < len(tokenizer))
        self._compiler = TrialCompiler(self._vocabulary)
        self._checked: ResultCache[tuple[str, str]] = ResultCache(_MAX_CHECKED)
        self._caller = LOCAL_CALLER

    def for_caller(self, caller: Caller) -> "GrammarCompiler":
        """Return the same compiler for a caller that may disconnect while it waits."""
        made = copy.copy(self)
        made._caller = caller
        return made

    def load(self) -> None:
        """Build the vocabulary before the first grammar: Qwen3's takes more than a second."""
        self._compiler.vocabulary()

    def _vocabulary(self) -> "LLTokenizer":
        from llguidance import LLTokenizer  # imported where it is first needed

        # Added tokens get names that no text contains, so that their own names in a grammar are
        # plain text. Those that are also words of the vocabulary cannot be renamed, and are plain
        # text already.
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
        """Token id of each single byte."""
        tokens = range(len(self._tokenizer))
        pieces = ((token, self._tokenizer.token_bytes(token)) for token in tokens)
        return {piece[0]: token for token, piece in pieces if len(piece) == 1}

    def schema(self, schema: SchemaLike) -> GrammarState:
        """Compile a JSON schema.

        Raises:
            ValueError: it is not a schema, or has unsupported keywords, which the message names.
        """
        found = schema_of(schema)
        return self._compile("schema", lambda matcher: _schema_grammar(matcher, found))

    def regex(self, pattern: str) -> GrammarState:
        """Compile a regular expression that must match the full text.

        Raises:
            ValueError: it is not a regular expression, or not supported.
        """
        check_size("regex", pattern)
        return self._compile("regex", lambda matcher: matcher.grammar_from_regex(pattern))

    def choice(self, choices: Collection[str]) -> GrammarState:
        """Compile a choice of strings.

        Raises:
            ValueError: there is no string, or there are too many.
        """
        if (
            isinstance(choices, str)
            or not isinstance(choices, Collection)
            or not choices
            or not all(isinstance(c, str) and c for c in choices)
        ):
            shown = shorten(repr(choices), _MAX_SHOWN, placeholder=" ...")
            raise ValueError(f"choice must be one or more non-empty strings, not {shown}")
        if len(choices) > MAX_CHOICES:
            raise ValueError(f"choice may have at most {MAX_CHOICES:,} texts, not {len(choices):,}")
        check_size("choice", list(choices))
        texts = " | ".join(json.dumps(choice) for choice in choices)
        return self.lark(f"start: ONE\nONE: {texts}", "choice")  # a terminal holds thousands

    def lark(self, text: str, name: str = "grammar") -> GrammarState:
        """Compile a grammar in Lark's syntax, whose first rule is `start`.

        Raises:
            ValueError: it is not a grammar, or not supported.
        """

        def write(matcher: "type[LLMatcher]") -> str:
            check_lark(text)
            return matcher.grammar_from_lark(text)

        return self._compile(name, write)

    def hermes_call(self, tools: Sequence[Mapping[str, Any]]) -> GrammarState:
        """Compile the text between the tags of a Hermes call to one of the tools.

        Unsupported parts of a tool's schema are not enforced; the grammar's `warnings` list them.
        """
        return self._tool_grammar(tools, hermes_rules)

    def coder_call(self, tools: Sequence[Mapping[str, Any]]) -> GrammarState:
        """Compile the text between the tags of a Qwen3-Coder call to one of the tools.

        Parameters come in any order. A value that may be a string is any text up to the closing
        tag; any other value is JSON of its schema, as far as the schema is supported.
        """
        return self._tool_grammar(tools, coder_rules)

    def _tool_grammar(self, tools: Sequence[Mapping[str, Any]], write: WriteRules) -> GrammarState:
        warnings: list[str] = []
        room = _MAX_WRITTEN

        def write_schema(name: str, schema: Callable[[], Schema], fallback: Schema) -> str:
            nonlocal room
            self._caller.check()
            # Each schema is compiled alone first: one that fails is replaced, and the others hold.
            document, refusal, unsupported = "", "all schemas together are too large", ""
            if room > 0:
                stated = schema()
                document = document_of(stated)
                room -= len(document)
                refusal, unsupported = self._check(document)
                if fallback is ANY_OBJECT and stated.get("type") != "object":
                    refusal = "the arguments of a tool are an object"
            if refusal:
                warnings.append(f"the schema of the tool {name} is not enforced: {refusal}")
                return document_of(fallback)
            if unsupported:
                warnings.append(f"the schema of the tool {name} is enforced in part: {unsupported}")
            return document

        def free(_: str, __: Callable[[], Schema], fallback: Schema) -> str:
            return document_of(fallback)

        def spare() -> GrammarState:
            # Compiled within a step of the engine, so it must not wait for a trial. Without the
            # tools' schemas it is harmless.
            grammar = LLMatcher.grammar_from_lark(write(tools, free))
            return self._state_of(self._compiler.compile_trusted(grammar), "tools")

        from llguidance import LLMatcher

        try:
            grammar = self._compile(
                "tools", lambda m: m.grammar_from_lark(write(tools, write_schema))
            )
        except ValueError as error:  # each schema is supported alone, but all together are too much
            warnings = [f"the schemas of the tools are not enforced: {error}"]
            grammar = spare()
        grammar.warnings = list(dict.fromkeys(warnings))
        grammar.spare = spare
        return grammar

    def _check(self, document: str) -> tuple[str, str]:
        """Return why a tool's schema cannot be enforced, and which parts are not; "" if neither."""
        if found := self._checked.get(document):
            return found
        try:
            made = self._compile(
                "schema", lambda matcher: _schema_grammar(matcher, json.loads(document), TOOL_JSON)
            )
            made.probe()
            found = "", "; ".join(made.unsupported())
        except ValueError as error:
            found = str(error), ""
        self._checked.put(document, found)
        return found

    def _compile(self, name: str, write: "Callable[[type[LLMatcher]], str]") -> GrammarState:
        from llguidance import LLMatcher

        try:
            matcher = self._compiler.compile(write(LLMatcher), self._caller)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{name}: {line_of(str(error))}") from error
        return self._state_of(matcher, name)

    def _state_of(self, matcher: "LLMatcher", name: str) -> GrammarState:
        made = GrammarState(matcher, len(self._tokenizer), self._byte_ids, name=name)
        made.mask()  # raises ValueError if no text matches at all
        return made


def _schema_grammar(matcher: "type[LLMatcher]", schema: Any, options: Any = ANSWER_JSON) -> str:
    check_schema(schema)
    return matcher.grammar_from_json_schema(json.dumps(schema), overrides=options)


def schema_of(form: SchemaLike) -> Any:
    """Return the JSON schema of a dictionary or pydantic model.

    Raises:
        TypeError: `form` is neither.
    """
    if callable(made := getattr(form, "model_json_schema", None)):
        return made()
    if isinstance(form, Mapping):
        return dict(form)
    raise TypeError(f"schema must be a JSON schema or a pydantic model, not {form!r:.200}")
