"""Tools: their descriptions for the model, the formats of its calls, and running the calls.

There are two call formats, and the checkpoint's template shows which it uses: Hermes, a JSON object
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
from qwen3_mlx.text.described_tool import DescribedTool, with_unique_names
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
"""A Python function, or its description in OpenAI's form, or the `function` part of that."""

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_MAX_SHOWN = 60  # characters of a name


# --- descriptions -------------------------------------------------------------------------------


def tool_schema(tool: Tool) -> dict[str, Any]:
    """Return a tool's description in the form that templates and clients use.

    For a function, that is its name, its docstring, and its parameters by their type hints, with
    their descriptions in the docstring (an `Args:` section or `:param name:`). For a pydantic
    model, the parameters are its schema.

    Raises:
        TypeError: `tool` is neither a function nor a description, or the type of a parameter cannot
            be written as JSON schema.
        ValueError: it has no name, or the name has characters that are not allowed.
    """
    described = _description(tool)
    name = described["function"]["name"]
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        shown = name if len(name) <= _MAX_SHOWN else f"{name[:_MAX_SHOWN]}..."
        raise ValueError(
            f"a tool's name has letters (A-Z), digits, '_', '-' and '.' only, not {shown!r}"
        )
    return described


def _description(tool: Tool) -> dict[str, Any]:
    if isinstance(tool, Mapping):
        function = tool.get("function", tool)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"a tool's description needs a function with a name, unlike {tool!r}")
        whole = tool if "function" in tool and "type" in tool else {"type": "function"}
        return {**whole, "function": {**function}}  # complete, in the given order
    if isinstance(tool, DescribedTool):
        described = {"name": tool.name, "description": tool.description}
        return {"type": "function", "function": {**described, "parameters": tool.parameters}}
    if not callable(tool):
        raise TypeError(f"a tool must be a function or a description, not {tool!r}")
    words, about = _read_docstring(inspect.getdoc(_underlying(tool)) or "")
    if callable(model_schema := getattr(tool, "model_json_schema", None)):
        model = {"name": tool_name(tool), "description": words, "parameters": model_schema()}
        return {"type": "function", "function": model}
    parameters = _parameters(tool)
    hints = {name: _hint(parameter) for name, parameter in parameters.items()}
    properties, shared = _schemas(hints, tool_name(tool))
    for name, hint in hints.items():
        notes = [note for note in getattr(hint, "__metadata__", ()) if isinstance(note, str)]
        if description := next(iter(notes), about.get(name)):
            properties[name].setdefault("description", description)
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    schema["required"] = [
        name for name, parameter in parameters.items() if parameter.default is parameter.empty
    ]
    return {
        "type": "function",
        "function": {"name": tool_name(tool), "description": words, "parameters": schema | shared},
    }


def as_tool_list(tools: Sequence[Tool] | None) -> list[Tool]:
    """Return the tools as a list, empty for None; those of servers with names that are unique.

    Raises:
        TypeError: `tools` is not a list, for example a single tool.
    """
    if tools is None:
        return []
    if isinstance(tools, str) or not isinstance(tools, Sequence):
        raise TypeError(f"tools must be a list of functions or descriptions, not {tools!r}")
    described = [tool for tool in tools if isinstance(tool, DescribedTool)]
    if not described:
        return list(tools)
    others = [tool_name(tool) for tool in tools if not isinstance(tool, DescribedTool)]
    unique = with_unique_names(described, others)
    return [next(unique) if isinstance(tool, DescribedTool) else tool for tool in tools]


def _underlying(tool: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function whose name and docstring describe a tool: that inside a `partial`."""
    return _underlying(tool.func) if isinstance(tool, partial) else tool


def tool_name(tool: Tool) -> str:
    """Return the name by which the model calls a tool."""
    if isinstance(tool, Mapping):
        return str(_description(tool)["function"]["name"])
    if isinstance(tool, DescribedTool):
        return tool.name
    tool = _underlying(tool)
    return str(getattr(tool, "__name__", type(tool).__name__))


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return the summary of a docstring and the descriptions of its parameters."""
    about = {name: words.strip() for name, words in re.findall(r":param (\w+):\s*(.*)", text)}
    words, _, rest = re.split(r"(?m)^:param ", text)[0].partition("\nArgs:\n")
    for line in rest.splitlines():
        if line and not line[0].isspace():
            break
        if match := re.match(r"\s+(\w+)(?: \([^)]*\))?:\s*(.*)", line):
            about[match[1]] = match[2]
    return " ".join(words.split()), about


def _parameters(tool: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a function with resolved annotations.

    Raises:
        TypeError: an annotation cannot be resolved, or a parameter cannot be passed by name.
    """
    try:
        parameters = inspect.signature(tool, eval_str=True).parameters
    except (NameError, AttributeError, TypeError, ValueError) as error:
        raise TypeError(
            f"the parameters of the tool {tool_name(tool)} cannot be determined: {error}"
        ) from error
    for name, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(
                f"the tool {tool_name(tool)} takes *{name}: a model needs named parameters"
            )
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise TypeError(
                f"the tool {tool_name(tool)} takes {name} by position only, not by name"
            )
    return parameters


def _hint(parameter: inspect.Parameter) -> Any:
    """Return the type of an argument for the model: without None if that is only the default."""
    hint = str if parameter.annotation is parameter.empty else parameter.annotation
    if parameter.default is None and get_origin(hint) in (Union, types.UnionType):
        return Union[tuple(arg for arg in get_args(hint) if arg is not type(None))]  # noqa: UP007
    return hint


def _schemas(
    hints: Mapping[str, Any], name: str
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return the JSON schema of each parameter by name, and the `$defs` that they share.

    Raises:
        TypeError: the type of a parameter cannot be written as JSON schema.
    """
    from pydantic import TypeAdapter
    from pydantic.errors import PydanticUserError
    from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

    class AsWritten(GenerateJsonSchema):
        def sort(self, value: JsonSchemaValue, parent_key: str | None = None) -> JsonSchemaValue:
            return value  # unsorted, so that `type` stays first

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


# --- calls --------------------------------------------------------------------------------------


class CallFormat(Protocol):
    """The format in which a checkpoint writes tool calls."""

    @property
    def bare(self) -> tuple[str, ...]:
        """Texts that begin a call without its opening tag; each starts with `<`."""

    def read(self, text: str, *, whole: bool) -> tuple[str, dict[str, Any], str] | None:
        """Parse the text between the tags into name, arguments and their JSON text, or None.

        A call that is not `whole` lacks its closing tag and may have been cut off.
        """

    def follow(self) -> PartialArguments:
        """Create the follower of the arguments of one call while it is generated."""


@dataclass(frozen=True, slots=True)
class ToolCallSyntax:
    """The syntax of tool calls: the ids of the tags, and the format of the text between them.

    With `partial` the arguments are streamed while they are generated.
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
        """Detect the call syntax of a checkpoint; return None if it has no tags for calls."""
        open_id, close_id = tokenizer.id_of(OPEN), tokenizer.id_of(CLOSE)
        if template is None or open_id is None or close_id is None:
            return None
        coder = "<function=" in template.source
        return cls(open_id, close_id, CoderCalls(tools) if coder else HermesCalls(), partial)

    def grammar(
        self, grammars: GrammarCompiler, tools: Sequence[Mapping[str, Any]]
    ) -> GrammarState:
        """Compile the grammar of the text between the tags, by the schemas of the tools."""
        if isinstance(self.format, CoderCalls):
            return grammars.coder_call(tools)
        return grammars.hermes_call(tools)

    def read(self, text: str, *, whole: bool) -> ToolCall | None:
        """Parse the text between the tags into a call with a new id, or return None."""
        found = self.format.read(text, whole=whole)
        if found is None:
            return None
        name, arguments, raw = found
        return ToolCall(f"call_{secrets.token_hex(12)}", name, arguments, raw)


class HermesCalls:
    """The Hermes format: `{"name": ..., "arguments": {...}}`."""

    bare: tuple[str, ...] = ()

    def read(self, text: str, *, whole: bool) -> tuple[str, dict[str, Any], str] | None:
        """Parse a call; see `CallFormat.read`. Errors that can mean only one thing are repaired."""
        for candidate in _repaired(text.strip()) if whole else [text.strip()]:
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
        """Create the follower of a call; see `CallFormat.follow`."""
        return HermesPartialArguments()


def _repaired(text: str) -> Iterator[str]:
    """Yield the text, then variants that repair the errors that models make at its end."""
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
    """Return the arguments as generated, so that a template can render them unchanged."""
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
    """Qwen3-Coder's format: `<function=NAME>`, then `<parameter=NAME>` for each argument."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """Create the format for the described tools."""
        # An answer may mention `<function=`: only a known tool with its next tag begins a call.
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
        """Parse a call; see `CallFormat.read`."""
        found = coder_parameters(text, whole=whole)
        if found is None:
            return None
        called, parameters = found
        arguments = [(name, self._value(called, name, value)) for name, value in parameters]
        # A repeated parameter is repeated in the text, as it was streamed; the last value counts.
        raw = ", ".join(f"{_to_json(name)}: {_to_json(value)}" for name, value in arguments)
        return called, dict(arguments), f"{{{raw}}}"

    def follow(self) -> PartialArguments:
        """Create the follower of a call; see `CallFormat.follow`."""
        return CoderPartialArguments(self._value)

    def _value(self, function: str, parameter: str, text: str) -> Any:
        """Convert the value of a parameter by the schema of the tool."""
        return _typed(text, self._kinds.get(function, {}).get(parameter, frozenset()))


def _typed(text: str, kinds: frozenset[str]) -> Any:
    """Convert a value to one of the JSON types that it may have; other text stays a string."""
    others = kinds - {"string"}
    if not others:
        return text
    word = text.strip()
    if "boolean" in others and word.lower() in ("true", "false"):
        word = word.lower()  # models write Python's True and False, too
    try:
        value = json.loads(word)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return text
    return text if "string" in kinds and kind_of(value) not in others else value


# --- executing ----------------------------------------------------------------------------------


def tool_functions(tools: Sequence[Tool] | None) -> dict[str, Callable[..., Any]]:
    """Return the functions by name.

    Raises:
        TypeError: there is no tool, or one is only a description, or does not return its result
            when it is called.
    """
    if not (listed := as_tool_list(tools)):
        raise TypeError("run needs tools: functions that the model may call; chat() needs none")
    if not all(map(callable, listed)):
        raise TypeError("to run tools they must be functions: descriptions cannot be called")
    functions = {tool_name(tool): tool for tool in listed if callable(tool)}
    for name, function in functions.items():
        refuse_deferred(name, function)
    return functions


def run_tool(call: ToolCall, functions: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """Run a tool call, and return the message with its result, or its error, for the model."""
    function = functions.get(call.name)
    if function is None:
        content = f"Error: there is no tool {call.name}; there are {', '.join(functions) or 'none'}"
    else:
        try:
            result = function(**_converted(call.arguments, function))
            content = result if isinstance(result, str) else _to_json(result)
        except Exception as error:  # noqa: BLE001 - the model can correct its call
            content = f"Error: {type(error).__name__}: {error}"
    content = content.encode(errors="backslashreplace").decode()  # lone surrogates are not text
    return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": content}


def _converted(arguments: Mapping[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
    """Return the arguments converted to the types of the function's annotations.

    Raises:
        TypeError: an argument cannot be converted to its type.
    """
    from pydantic import TypeAdapter, ValidationError

    converted = dict(arguments)
    if isinstance(function, DescribedTool):
        return converted  # its server checks them
    for name, parameter in _parameters(function).items():
        if name not in arguments or parameter.annotation is parameter.empty:
            continue
        try:
            converted[name] = TypeAdapter(parameter.annotation).validate_python(arguments[name])
        except ValidationError as error:
            messages = (
                f"{'.'.join(map(str, (name, *entry['loc'])))}: {entry['msg']}"
                for entry in error.errors()
            )
            raise TypeError("; ".join(messages)) from error
    return converted


def _to_json(result: Any) -> str:
    return json.dumps(result, ensure_ascii=False, default=str)
