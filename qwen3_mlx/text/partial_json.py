"""The arguments of a call while it is being written: what of their JSON is certain already.

What is given is a prefix of the call's arguments (`ToolCall.raw_arguments`) and never all of them:
the brace that closes them is held back until the call is whole, so that no cut call can be parsed.
"""

import json
import re
from collections.abc import Callable
from typing import Any, Protocol

_HERMES = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)', re.DOTALL
)
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>\n")
_PARAMETER = re.compile(r"\s*<parameter=(.*?)>(?=\n)")
# What may stand where a parameter, or the end of the call, is to begin, as far as it is written.
_BETWEEN = re.compile(r"\s*(?:</function>|<parameter=[^\n]*\Z|<(?:/[a-z]*|[a-z]*)\Z|\Z)")
_FUNCTION_END = re.compile(r"\s*</function>\s*\Z")
# A value stands between the line break after its tag and this; see `Grammars.coder_call`.
_VALUE_END = "\n</parameter>\n"
# The ends that a last value may have instead, where the call is closed by a tag of its own.
_LAST_VALUE_END = re.compile(r"\n?(?:</parameter>\s*)?</function>\s*\Z|\n</parameter>\s*\Z")
# What may turn out to be no part of a value: such an end as far as it is written.
_UNSURE = re.compile(r"\n?(?:</parameter>\s*)?(?:</function>\s*|<(?:/[a-z]*)?)?\Z")

_OF_EACH_TYPE = ("0", "0.5", "true", "null", "[]", "{}", '""', " a\n")


class PartialArguments(Protocol):
    """Follows the text of one call."""

    @property
    def name(self) -> str | None:
        """The name of the tool, once the first of its arguments is given."""

    @property
    def broken(self) -> bool:
        """Whether nothing that could follow makes a whole call of the text."""

    def add(self, text: str) -> str:
        """Take the next text of the call, and return what it makes certain of the arguments."""


class HermesPartialArguments:
    """Follows `{"name": ..., "arguments": {...}}`; a call of another form gives nothing."""

    broken = False  # the call's own tag says where it ends, and it is read there

    def __init__(self) -> None:
        self.name: str | None = None
        self._before = ""  # what stands before the arguments
        self._depth = 0
        self._in_string = self._escaped = False
        self._over = False

    def add(self, text: str) -> str:
        """Do as `PartialArguments` says."""
        if self.name is None and not self._over:
            self._before += text
            if (begin := _HERMES.match(self._before)) is None:
                return ""
            text = self._before[begin.end() :]
            try:
                self.name = json.loads(begin[1], strict=False)
            except ValueError:
                self._over = True
        return "" if self._over else text[: self._certain(text)]

    def _certain(self, text: str) -> int:
        """Return how many of the characters stand before the brace that closes the arguments."""
        for place, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = char == "\\", char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._over = True
                    return place
        return len(text)


def coder_parameters(text: str, *, whole: bool) -> tuple[str, list[tuple[str, str]]] | None:
    """Return the function and the parameters, in order, of a call in Qwen3-Coder's tags, or None.

    Of a call that is not `whole`, which its own closing tag does not end, nothing may be missing:
    it could have been cut off within a value that speaks of these tags.
    """
    if (begin := _FUNCTION.match(text)) is None:
        return None
    function, place, parameters = begin[1].strip(), begin.end(), list[tuple[str, str]]()
    while not _FUNCTION_END.match(text, place):
        if (begin := _PARAMETER.match(text, place)) is None:
            return (function, parameters) if whole and not text[place:].strip() else None
        start = begin.end() + 1
        if (end := text.find(_VALUE_END, start - 1)) >= 0:
            place = end + len(_VALUE_END)
        elif whole and (last := _LAST_VALUE_END.search(text, start - 1)):
            end, place = last.start(), len(text)
        else:
            return None
        parameters.append((begin[1].strip(), text[start:end]))
        if place == len(text):
            return (function, parameters) if whole else None
    return function, parameters


class CoderPartialArguments:
    """Follows Qwen3-Coder's tags; a text comes as it is written, any other value once it is whole.

    `typed(name, parameter, text)` reads a value by the schema of the tool that is called.
    """

    def __init__(self, typed: Callable[[str, str, str], Any]) -> None:
        self.name: str | None = None
        self.broken = False
        self._typed = typed
        self._rest = ""  # what has not been made use of yet
        self._parameter: str | None = None  # the one that is being written
        self._at_start = False  # whether nothing of its value is given
        self._searched = 0  # how much of the rest has no end of a value
        self._is_text = False
        self._between = "{"

    def add(self, text: str) -> str:
        """Do as `PartialArguments` says."""
        self._rest += text
        if self.name is None:
            if (begin := _FUNCTION.match(self._rest)) is None:
                return ""
            self.name = begin[1].strip()
            self._rest = self._rest[begin.end() :]
        given = ""
        while True:
            if self._parameter is None:
                if (begin := _PARAMETER.match(self._rest)) is None:
                    self.broken = not _BETWEEN.match(self._rest)
                    return given
                given += self._begin(begin[1].strip())
                self._rest = self._rest[begin.end() :]
            if (end := self._rest.find(_VALUE_END, self._searched)) < 0:
                return given + self._text_so_far()
            given += self._whole_value(self._rest[self._at_start : end])
            self._rest = self._rest[end + len(_VALUE_END) :]

    def _begin(self, parameter: str) -> str:
        """Begin a parameter, and return what stands before its value."""
        self._parameter, self._at_start, self._searched = parameter, True, 0
        self._is_text = all(self._value(probe) == probe for probe in _OF_EACH_TYPE)
        before, self._between = self._between, ", "
        return f"{before}{_json(parameter)}: " + '"' * self._is_text

    def _text_so_far(self) -> str:
        """Return what is certain of a text, none of which ends in the rest."""
        if not self._is_text:
            self._searched = max(0, len(self._rest) - len(_VALUE_END) + 1)
            return ""
        unsure = _UNSURE.search(self._rest)
        certain = self._rest[: unsure.start()] if unsure else self._rest
        if not certain:
            return ""
        self._rest = self._rest[len(certain) :]
        at_start, self._at_start = self._at_start, False
        return _json(certain[at_start:])[1:-1]

    def _whole_value(self, text: str) -> str:
        """Return the value of the parameter, or what is left of it."""
        given = _json(text)[1:] if self._is_text else _json(self._value(text))
        self._parameter = None
        return given

    def _value(self, text: str) -> Any:
        assert self.name is not None and self._parameter is not None
        return self._typed(self.name, self._parameter, text)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
