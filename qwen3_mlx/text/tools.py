"""Tools: what a model is told of them, and the calls that it writes.

Two ways of writing are known, told apart by the checkpoint's template: Hermes, a JSON object
between `<tool_call>` tags, and Qwen3-Coder's tags for the function and each parameter.
"""

import inspect
import json
import re
import secrets
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from qwen3_mlx.text.arguments import Arguments, CoderArguments, HermesArguments
from qwen3_mlx.text.events import ToolCall
from qwen3_mlx.text.grammar import Grammar, Grammars
from qwen3_mlx.text.template import ChatTemplate
from qwen3_mlx.text.tokenizer import Tokenizer

Tool = Callable[..., Any] | Mapping[str, Any]
"""A Python function, or its description: OpenAI's, or its `function` part alone."""

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>\n?(.*?)\s*(?:</function>\s*)?", re.DOTALL)
_PARAMETER = re.compile(
    r"<parameter=([^>\n]+)>\n?(.*?)(?:\n?</parameter>|(?=<parameter=)|\Z)", re.DOTALL
)


# --- what the model is told ---------------------------------------------------------------------


def describe(tool: Tool) -> dict[str, Any]:
    """Give a tool's description as templates and clients have it.

    Of a function that is its name, its docstring, and its parameters by their type hints; what the
    docstring says of a parameter (in an `Args:` section or as `:param name:`) goes with it.

    Raises:
        TypeError: it is neither, or a parameter's type cannot be written as JSON schema.
        ValueError: the description has no name.
    """
    if isinstance(tool, Mapping):
        function = tool.get("function", tool)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"a tool's description needs a function with a name, unlike {tool!r}")
        empty = {"type": "object", "properties": {}}
        return {"type": "function", "function": {"parameters": empty, **function}}
    if not callable(tool):
        raise TypeError(f"a tool must be a function or a description, not {tool!r}")
    words, about = _read_docstring(inspect.getdoc(tool) or "")
    hints = get_type_hints(tool, include_extras=True)
    properties, required = {}, []
    for name, parameter in inspect.signature(tool).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"the tool {_name(tool)} takes *{name}: a model needs named parameters")
        properties[name] = _schema_of(hints.get(name, str), f"{_name(tool)}({name})")
        if name in about:
            properties[name].setdefault("description", about[name])
        if parameter.default is parameter.empty:
            required.append(name)
    return {
        "type": "function",
        "function": {
            "name": _name(tool),
            "description": words,
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }


def listed(tools: Sequence[Tool] | None) -> list[Tool]:
    """Give the tools as a list.

    Raises:
        TypeError: they are something else, a single one perhaps.
    """
    if tools is None:
        return []
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        raise TypeError(f"tools must be a list of functions or descriptions, not {tools!r}")
    return list(tools)


def _name(tool: Callable[..., Any]) -> str:
    return str(getattr(tool, "__name__", type(tool).__name__))


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Give what a docstring says first, and of each parameter."""
    about = {name: words.strip() for name, words in re.findall(r":param (\w+):\s*(.*)", text)}
    words, _, rest = re.split(r"(?m)^:param ", text)[0].partition("\nArgs:\n")
    for line in rest.splitlines():
        if line and not line[0].isspace():
            break
        if match := re.match(r"\s+(\w+)(?: \([^)]*\))?:\s*(.*)", line):
            about[match[1]] = match[2]
    return " ".join(words.split()), about


def _schema_of(hint: Any, where: str) -> dict[str, Any]:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        words = next((extra for extra in inner[1:] if isinstance(extra, str)), None)
        return _schema_of(inner[0], where) | ({"description": words} if words else {})
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (Union, types.UnionType):
        kinds = [_schema_of(one, where) for one in inner if one is not type(None)]
        return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    if hint is list or origin in (list, Sequence, tuple, set):
        return {"type": "array", "items": _schema_of(inner[0], where) if inner else {}}
    if hint is dict or origin in (dict, Mapping):
        return {"type": "object"}
    if hint is Any:
        return {}
    if callable(made := getattr(hint, "model_json_schema", None)):  # a pydantic model
        return dict(made())
    raise TypeError(f"{where} is of type {hint!r}, which cannot be written as JSON schema")


# --- what the model writes ----------------------------------------------------------------------


class CallFormat(Protocol):
    """How a checkpoint writes calls."""

    @property
    def bare(self) -> str | None:
        """Text that begins a call of which the tag was left out."""

    def read(self, text: str, *, whole: bool) -> tuple[str, dict[str, Any], str] | None:
        """Give name, arguments and their text, of what stands between the tags, or None.

        What is not `whole` lacks its closing tag, and may have been cut off.
        """

    def follow(self) -> Arguments:
        """Return what follows the arguments of one call while it is written."""


@dataclass(frozen=True, slots=True)
class Calls:
    """What a parser needs to know of calls: the tags' ids, and how to read what is between.

    With `partial` their arguments are streamed as they are written.
    """

    open_id: int
    close_id: int
    format: CallFormat
    partial: bool = False

    @classmethod
    def of(
        cls,
        template: ChatTemplate | None,
        tokenizer: Tokenizer,
        tools: Sequence[Mapping[str, Any]],
        *,
        partial: bool = False,
    ) -> "Calls | None":
        """Find out how a checkpoint writes calls, or give None where it has no tags for them."""
        open_id, close_id = tokenizer.id_of(OPEN), tokenizer.id_of(CLOSE)
        if template is None or open_id is None or close_id is None:
            return None
        coder = "<function=" in template.source
        return cls(open_id, close_id, CoderCalls(tools) if coder else HermesCalls(), partial)

    def grammar(self, grammars: Grammars, tools: Sequence[Mapping[str, Any]]) -> Grammar:
        """Make the grammar that holds what stands between the tags to the tools' schemas."""
        if isinstance(self.format, CoderCalls):
            return grammars.coder_call(tools)
        return grammars.call(tools)

    def read(self, text: str, *, whole: bool) -> ToolCall | None:
        """Make a call of what stands between the tags, or give None."""
        found = self.format.read(text, whole=whole)
        if found is None:
            return None
        name, arguments, written = found
        return ToolCall(f"call_{secrets.token_hex(12)}", name, arguments, written)


class HermesCalls:
    """`{"name": ..., "arguments": {...}}`."""

    bare: str | None = None

    def read(self, text: str, *, whole: bool) -> tuple[str, dict[str, Any], str] | None:
        """Do as `CallFormat` says; slips that can mean one thing only are mended."""
        for candidate in _mended(text.strip()) if whole else [text.strip()]:
            try:
                call = json.loads(candidate, strict=False)  # a raw line break in a string is fine
                arguments = call.get("arguments", {})
                if isinstance(arguments, str):
                    arguments = json.loads(arguments, strict=False)
            except (ValueError, AttributeError, RecursionError):
                continue
            if isinstance(call.get("name"), str) and isinstance(arguments, dict):
                return call["name"], arguments, _arguments_text(candidate, arguments)
        return None

    def follow(self) -> Arguments:
        """Do as `CallFormat` says."""
        return HermesArguments()


def _mended(text: str) -> Iterator[str]:
    """Give the text, and then the text with the slips mended that models make at its end."""
    yield text
    yield text.rstrip(",")
    yield text + "}"
    try:
        _, end = json.JSONDecoder(strict=False).raw_decode(text)
    except ValueError:
        return
    if not text[end:].strip("} \n"):
        yield text[:end]


def _arguments_text(call: str, arguments: dict[str, Any]) -> str:
    """Give the arguments as they were written, so that they can be rendered as they were."""
    match = re.search(r'"arguments"\s*:\s*', call)
    if match:
        try:
            value, end = json.JSONDecoder(strict=False).raw_decode(call, match.end())
        except ValueError:
            pass
        else:
            if value == arguments:
                return call[match.end() : end]
    return json.dumps(arguments, ensure_ascii=False)


class CoderCalls:
    """`<function=NAME>` with a `<parameter=NAME>` for each argument, typed by the schema."""

    bare: str | None = "<function="

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """Take the described tools."""
        functions = [tool["function"] for tool in tools]
        self._properties = {
            function["name"]: function["parameters"].get("properties", {}) for function in functions
        }

    def read(self, text: str, *, whole: bool) -> tuple[str, dict[str, Any], str] | None:
        """Do as `CallFormat` says."""
        match = _FUNCTION.fullmatch(text)
        if not match or not (whole or _is_closed(text)):
            return None
        called = match[1].strip()
        arguments = [
            (name.strip(), self._value(called, name.strip(), value))
            for name, value in _PARAMETER.findall(match[2])
        ]
        # A parameter that comes twice stays so in the text, as it was streamed; the last counts.
        written = ", ".join(f"{_written(name)}: {_written(value)}" for name, value in arguments)
        return called, dict(arguments), f"{{{written}}}"

    def follow(self) -> Arguments:
        """Do as `CallFormat` says."""
        return CoderArguments(self._value)

    def _value(self, function: str, parameter: str, text: str) -> Any:
        """Read the value of a parameter."""
        return _typed(text, self._properties.get(function, {}).get(parameter, {}))


def _is_closed(text: str) -> bool:
    """Say whether a call ends with the tag of its function, outside of any value."""
    before, tag, after = text.rpartition("</function>")
    return bool(tag and not after.strip()) and (
        before.rfind("<parameter=") <= before.rfind("</parameter>")
    )


def _typed(text: str, schema: Mapping[str, Any]) -> Any:
    """Read a value as its schema says; text that is nothing of the kind stays text."""
    kinds = schema.get("type", "string" if "enum" not in schema else None)
    kinds = kinds if isinstance(kinds, list) else [kinds]
    try:
        value = json.loads(text.strip() if kinds != ["boolean"] else text.strip().lower())
    except ValueError:
        return text
    if "string" in kinds and not (value is None and "null" in kinds):
        return text
    return value


# --- executing ----------------------------------------------------------------------------------


def functions_of(tools: Sequence[Tool] | None) -> dict[str, Callable[..., Any]]:
    """Give the functions by their names.

    Raises:
        TypeError: one of the tools is only described, or there is none.
    """
    if not all(map(callable, described := listed(tools))) or not described:
        raise TypeError("to run tools they must be functions: descriptions cannot be called")
    return {_name(tool): tool for tool in described if callable(tool)}


def answer(call: ToolCall, functions: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """Do what a call asks for, and give the message that tells the model what came of it."""
    function = functions.get(call.name)
    if function is None:
        said = f"Error: there is no tool {call.name}; there are {', '.join(functions) or 'none'}"
    else:
        try:
            result = function(**call.arguments)
            said = result if isinstance(result, str) else _written(result)
        except Exception as error:  # noqa: BLE001 - the model may do better
            said = f"Error: {type(error).__name__}: {error}"
    return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": said}


def _written(result: Any) -> str:
    return json.dumps(result, ensure_ascii=False, default=str)
