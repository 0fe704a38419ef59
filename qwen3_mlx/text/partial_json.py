"""Streams the arguments of a tool call while it is generated: the JSON that is already certain.

The result is a proper prefix of the call's arguments (`ToolCall.raw_arguments`): the closing brace
is held back until the call is complete, so that a cut call can never be parsed as JSON.
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
# The text that may come between parameters, complete or not: a parameter's tag or the call's end.
_BETWEEN_PARAMETERS = re.compile(r"\s*(?:</function>|<parameter=[^\n]*\Z|<(?:/[a-z]*|[a-z]*)\Z|\Z)")
_FUNCTION_END = re.compile(r"\s*</function>\s*\Z")
# A value extends from the line break after its tag to this; see `GrammarCompiler.coder_call`.
_VALUE_END = "\n</parameter>\n"
# Other ends of a last value, accepted where the call is closed by a tag of its own.
_LAST_VALUE_END = re.compile(r"\n?(?:</parameter>\s*)?</function>\s*\Z|\n</parameter>\s*\Z")
# Text that may turn out not to belong to a value: such an end, complete or not.
_POSSIBLE_END = re.compile(r"\n?(?:</parameter>\s*)?(?:</function>\s*|<(?:/[a-z]*)?)?\Z")

_TYPE_PROBES = ("0", "0.5", "true", "null", "[]", "{}", '""', " a\n")


class PartialArguments(Protocol):
    """Follows the text of one call and returns the certain part of its arguments."""

    @property
    def name(self) -> str | None:
        """Name of the tool; None until its arguments begin."""

    @property
    def broken(self) -> bool:
        """True if no continuation can make the text a complete call."""

    def add(self, text: str) -> str:
        """Append the next text of the call, and return the JSON that it makes certain."""


class HermesPartialArguments:
    """Follows `{"name": ..., "arguments": {...}}`; other calls yield no arguments."""

    broken = False  # the call's own tag ends it; whether it can be read is decided there

    def __init__(self) -> None:
        self.name: str | None = None
        self._before = ""  # text before the arguments
        self._depth = 0
        self._in_string = self._escaped = False
        self._done = False

    def add(self, text: str) -> str:
        """Append text; see `PartialArguments.add`."""
        if self.name is None and not self._done:
            self._before += text
            if (begin := _HERMES.match(self._before)) is None:
                return ""
            text = self._before[begin.end() :]
            try:
                self.name = json.loads(begin[1], strict=False)
            except ValueError:
                self._done = True
        return "" if self._done else text[: self._certain(text)]

    def _certain(self, text: str) -> int:
        """Return the number of characters before the brace that closes the arguments."""
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
                    self._done = True
                    return place
        return len(text)


def coder_parameters(text: str, *, whole: bool) -> tuple[str, list[tuple[str, str]]] | None:
    """Return the function and the parameters, in order, of a call in Qwen3-Coder's tags, or None.

    A call is `whole` if its own closing tag ends it. In any other call nothing may be missing: it
    could have been cut off within a value that contains these tags as text.
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
    """Follows Qwen3-Coder's tags; strings are streamed, any other value comes once it is complete.

    `typed(name, parameter, text)` converts a value by the schema of the tool that is called.
    """

    def __init__(self, typed: Callable[[str, str, str], Any]) -> None:
        self.name: str | None = None
        self.broken = False
        self._typed = typed
        self._rest = ""  # text that is not consumed yet
        self._parameter: str | None = None  # name of the open parameter
        self._at_start = False  # True until a part of its value is returned
        self._searched = 0  # characters of `_rest` known to hold no end of a value
        self._is_text = False
        self._between = "{"

    def add(self, text: str) -> str:
        """Append text; see `PartialArguments.add`."""
        self._rest += text
        if self.name is None:
            if (begin := _FUNCTION.match(self._rest)) is None:
                return ""
            self.name = begin[1].strip()
            self._rest = self._rest[begin.end() :]
        certain = ""
        while True:
            if self._parameter is None:
                if (begin := _PARAMETER.match(self._rest)) is None:
                    self.broken = not _BETWEEN_PARAMETERS.match(self._rest)
                    return certain
                certain += self._open_parameter(begin[1].strip())
                self._rest = self._rest[begin.end() :]
            if (end := self._rest.find(_VALUE_END, self._searched)) < 0:
                return certain + self._text_so_far()
            certain += self._whole_value(self._rest[self._at_start : end])
            self._rest = self._rest[end + len(_VALUE_END) :]

    def _open_parameter(self, parameter: str) -> str:
        """Open a parameter, and return the JSON before its value."""
        self._parameter, self._at_start, self._searched = parameter, True, 0
        # A parameter is streamed only if its value stays a string, whatever its text looks like.
        self._is_text = all(self._value(probe) == probe for probe in _TYPE_PROBES)
        before, self._between = self._between, ", "
        return f"{before}{_json(parameter)}: " + '"' * self._is_text

    def _text_so_far(self) -> str:
        """Return the certain part of a value without an end in `_rest`; "" if not a string."""
        if not self._is_text:
            self._searched = max(0, len(self._rest) - len(_VALUE_END) + 1)
            return ""
        unsure = _POSSIBLE_END.search(self._rest)
        certain = self._rest[: unsure.start()] if unsure else self._rest
        if not certain:
            return ""
        self._rest = self._rest[len(certain) :]
        at_start, self._at_start = self._at_start, False
        return _json(certain[at_start:])[1:-1]

    def _whole_value(self, text: str) -> str:
        """Return the JSON of a complete value, or of the part that was not returned yet."""
        rest = _json(text)[1:] if self._is_text else _json(self._value(text))
        self._parameter = None
        return rest

    def _value(self, text: str) -> Any:
        assert self.name is not None and self._parameter is not None
        return self._typed(self.name, self._parameter, text)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
