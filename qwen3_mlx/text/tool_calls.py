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
from functools import partial
from typing import Any, Protocol, Union, get_args, get_origin

from qwen3_mlx.arguments import refuse_deferred
from qwen3_mlx.text.events import ToolCall
from qwen3_mlx.text.grammar import GrammarState
from qwen3_mlx.text.grammar_compiler import GrammarCompiler
from qwen3_mlx.text.partial_json import (
    CoderPartialArguments,
    HermesPartialArguments,
    PartialArguments,
    coder_parameters,
)
from qwen3_mlx.text.template import ChatTemplate
from qwen3_mlx.text.tokenizer import Tokenizer
from qwen3_mlx.text.tool_schema import Kinds, kind_of, parameters_of, properties_of

Tool = Callable[..., Any] | Mapping[str, Any]
"""A Python function, or its description: OpenAI's, or its `function` part alone."""

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_LONGEST_SHOWN = 60  # characters of a name


# --- what the model is told ---------------------------------------------------------------------


def tool_schema(tool: Tool) -> dict[str, Any]:
    """Give a tool's description as templates and clients have it.

    Of a function that is its name, its docstring, and its parameters by their type hints; what the
    docstring says of a parameter (in an `Args:` section or as `:param name:`) goes with it. The
    parameters of a pydantic model are its schema.

    Raises:
        TypeError: it is neither, or a parameter's type cannot be written as JSON schema.
        ValueError: it has no name, or one with other characters than names of tools have.
    """
    described = _described(tool)
    name = described["function"]["name"]
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        shown = name if len(name) <= _LONGEST_SHOWN else f"{name[:_LONGEST_SHOWN]}..."
        raise ValueError(
            f"a tool's name has letters (A-Z), digits, '_', '-' and '.' only, not {shown!r}"
        )
    return described


def _described(tool: Tool) -> dict[str, Any]:
    if isinstance(tool, Mapping):
        function = tool.get("function", tool)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"a tool's description needs a function with a name, unlike {tool!r}")
        whole = tool if "function" in tool and "type" in tool else {"type": "function"}
        return {**whole, "function": {**function}}  # all of it, in the order in which it was given
    if not callable(tool):
        raise TypeError(f"a tool must be a function or a description, not {tool!r}")
    words, about = _read_docstring(inspect.getdoc(_underlying(tool)) or "")
    if callable(model_schema := getattr(tool, "model_json_schema", None)):
        model = {"name": _name(tool), "description": words, "parameters": model_schema()}
        return {"type": "function", "function": model}
    parameters = _parameters(tool)
    hints = {name: _hint(parameter) for name, parameter in parameters.items()}
    properties, shared = _schemas(hints, _name(tool))
    for name, hint in hints.items():
        said = [one for one in getattr(hint, "__metadata__", ()) if isinstance(one, str)]
        if description := next(iter(said), about.get(name)):
            properties[name].setdefault("description", description)
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    schema["required"] = [
        name for name, parameter in parameters.items() if parameter.default is parameter.empty
    ]
    return {
        "type": "function",
        "function": {"name": _name(tool), "description": words, "parameters": schema | shared},
    }


def as_tool_list(tools: Sequence[Tool] | None) -> list[Tool]:
    """Give the tools as a list.

    Raises:
        TypeError: they are something else, a single one perhaps.
    """
    if tools is None:
        return []
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        raise TypeError(f"tools must be a list of functions or descriptions, not {tools!r}")
    return list(tools)


def _underlying(tool: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function whose name and words a tool has: of a `partial`, what it calls."""
    return _underlying(tool.func) if isinstance(tool, partial) else tool


def _name(tool: Callable[..., Any]) -> str:
    tool = _underlying(tool)
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


def _parameters(tool: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a function, whose annotations are resolved.

    Raises:
        TypeError: they cannot be, or a model cannot give one of them by its name.
    """
    try:
        parameters = inspect.signature(tool, eval_str=True).parameters
    except (NameError, AttributeError, TypeError, ValueError) as error:
        raise TypeError(
            f"the parameters of the tool {_name(tool)} are not known: {error}"
        ) from error
    for name, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"the tool {_name(tool)} takes *{name}: a model needs named parameters")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise TypeError(
                f"the tool {_name(tool)} takes {name} by its position only, not by name"
            )
    return parameters


def _hint(parameter: inspect.Parameter) -> Any:
    """Return the type that a model is to give: without None where that means to leave it out."""
    hint = str if parameter.annotation is parameter.empty else parameter.annotation
    if parameter.default is None and get_origin(hint) in (Union, types.UnionType):
        return Union[tuple(one for one in get_args(hint) if one is not type(None))]  # noqa: UP007
    return hint


def _schemas(
    hints: Mapping[str, Any], name: str
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return the JSON schema of each parameter by name, and `$defs` that they share.

    Raises:
        TypeError: the type of one cannot be written as JSON schema.
    """
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticUserError
    from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

    class AsWritten(GenerateJsonSchema):
        def sort(self, value: JsonSchemaValue, parent_key: str | None = None) -> JsonSchemaValue:
            return value  # `type` comes first

        def dict_schema(self, schema: Any) -> JsonSchemaValue:
            made = super().dict_schema(schema)
            return {key: value for key, value in made.items() if value is not True}

    properties, shared = {}, dict[str, Any]()
    for parameter, hint in hints.items():
        try:
            schema = TypeAdapter(hint).json_schema(schema_generator=AsWritten)
        except (PydanticUserError, NameError) as error:
            raise TypeError(
                f"{name}({parameter}) is of type {hint!r}, which cannot be written as JSON schema"
            ) from error
        for kind, definition in schema.pop("$defs", {}).items():
            if shared.setdefault(kind, definition) != definition:
                raise TypeError(f"{name} takes two types called {kind}: rename one of them")
        properties[parameter] = schema
    return properties, {"$defs": shared} if shared else {}


# --- what the model writes ----------------------------------------------------------------------


class CallFormat(Protocol):
    """How a checkpoint writes calls."""

    @property
    def bare(self) -> tuple[str, ...]:
        """The texts that begin a call of which the tag was left out, each with `<` first."""

    def read(self, text: str, *, whole: bool) -> tuple[str, dict[str, Any], str] | None:
        """Give name, arguments and their text, of what stands between the tags, or None.

        What is not `whole` lacks its closing tag, and may have been cut off.
        """

    def follow(self) -> PartialArguments:
        """Return what follows the arguments of one call while it is written."""


@dataclass(frozen=True, slots=True)
class ToolCallSyntax:
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
    ) -> "ToolCallSyntax | None":
        """Find out how a checkpoint writes calls, or give None where it has no tags for them."""
        open_id, close_id = tokenizer.id_of(OPEN), tokenizer.id_of(CLOSE)
        if template is None or open_id is None or close_id is None:
            return None
        coder = "<function=" in template.source
        return cls(open_id, close_id, CoderCalls(tools) if coder else HermesCalls(), partial)

    def grammar(
        self, grammars: GrammarCompiler, tools: Sequence[Mapping[str, Any]]
    ) -> GrammarState:
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

    bare: tuple[str, ...] = ()

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

    def follow(self) -> PartialArguments:
        """Do as `CallFormat` says."""
        return HermesPartialArguments()


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

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """Take the described tools."""
        # An answer may speak of `<function=`: only a known tool and what follows it make a call.
        self.bare = tuple(
            f"<function={tool['function']['name']}>{after}"
            for tool in tools
            for after in ("\n<parameter=", "\n</function>", "</function>")
        )
        self._kinds: dict[str, dict[str, frozenset[str]]] = {}
        for tool in tools:
            root = parameters_of(tool["function"])
            known = Kinds(root)
            self._kinds[tool["function"]["name"]] = {
                name: known.of(schema) for name, schema in properties_of(root).items()
            }

    def read(self, text: str, *, whole: bool) -> tuple[str, dict[str, Any], str] | None:
        """Do as `CallFormat` says."""
        found = coder_parameters(text, whole=whole)
        if found is None:
            return None
        called, parameters = found
        arguments = [(name, self._value(called, name, value)) for name, value in parameters]
        # A parameter that comes twice stays so in the text, as it was streamed; the last counts.
        written = ", ".join(f"{_written(name)}: {_written(value)}" for name, value in arguments)
        return called, dict(arguments), f"{{{written}}}"

    def follow(self) -> PartialArguments:
        """Do as `CallFormat` says."""
        return CoderPartialArguments(self._value)

    def _value(self, function: str, parameter: str, text: str) -> Any:
        """Read the value of a parameter."""
        return _typed(text, self._kinds.get(function, {}).get(parameter, frozenset()))


def _typed(text: str, kinds: frozenset[str]) -> Any:
    """Read a value as one of the JSON types that it may have; text that is none stays text."""
    others = kinds - {"string"}
    if not others:
        return text
    word = text.strip()
    if "boolean" in others and word.lower() in ("true", "false"):
        word = word.lower()  # models write Python's, too
    try:
        value = json.loads(word)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return text
    return text if "string" in kinds and kind_of(value) not in others else value


# --- executing ----------------------------------------------------------------------------------


def tool_functions(tools: Sequence[Tool] | None) -> dict[str, Callable[..., Any]]:
    """Give the functions by their names.

    Raises:
        TypeError: one of the tools is only described, or does not return a result when it is
            called, or there is none.
    """
    if not (given := as_tool_list(tools)):
        raise TypeError("run needs tools: functions that the model may call; chat() needs none")
    if not all(map(callable, given)):
        raise TypeError("to run tools they must be functions: descriptions cannot be called")
    functions = {_name(tool): tool for tool in given if callable(tool)}
    for name, function in functions.items():
        refuse_deferred(name, function)
    return functions


def run_tool(call: ToolCall, functions: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """Do what a call asks for, and give the message that tells the model what came of it."""
    function = functions.get(call.name)
    if function is None:
        said = f"Error: there is no tool {call.name}; there are {', '.join(functions) or 'none'}"
    else:
        try:
            result = function(**_converted(call.arguments, function))
            said = result if isinstance(result, str) else _written(result)
        except Exception as error:  # noqa: BLE001 - the model may do better
            said = f"Error: {type(error).__name__}: {error}"
    said = said.encode(errors="backslashreplace").decode()  # lone surrogates are no text
    return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": said}


def _converted(arguments: Mapping[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """Return arguments as the function's annotations have them: objects of its own types.

    Raises:
        TypeError: one cannot be read as its type.
    """
    from pydantic import TypeAdapter, ValidationError

    converted = dict(arguments)
    for name, parameter in _parameters(function).items():
        if name not in arguments or parameter.annotation is parameter.empty:
            continue
        try:
            converted[name] = TypeAdapter(parameter.annotation).validate_python(arguments[name])
        except ValidationError as error:
            said = (
                f"{'.'.join(map(str, (name, *one['loc'])))}: {one['msg']}" for one in error.errors()
            )
            raise TypeError("; ".join(said)) from error
    return converted


def _written(result: Any) -> str:
    return json.dumps(result, ensure_ascii=False, default=str)
