"""The grammar of tool calls, in Lark's syntax: rules for calls of Hermes and of Qwen3-Coder."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from qwen3_mlx.text.tool_schema import Kinds, kinds_of, parameters_of, properties_of, standalone

# JSON as json.dumps writes it. With free whitespace a weak model could emit blanks forever.
ANSWER_JSON: Any = {
    "whitespace_flexible": False,
    "key_separator": ": ",
    "item_separator": ", ",
}
# Unsupported parts of a tool's schema are left out with a warning, so the tool can still be called.
TOOL_JSON: Any = {**ANSWER_JSON, "lenient": True, "coerce_one_of": True}
_TEXT_RULE = r"text[lazy]: /((.|\n)*\n)?<\/parameter>\n/"
ANY_OBJECT = {"type": "object"}
_PLAIN_KEYWORDS = frozenset(
    ("type", "properties", "required", "title", "description", "$schema", "$defs", "definitions")
)
Schema = Mapping[str, Any]
WriteSchema = Callable[[str, Callable[[], Schema], Schema], str]
WriteRules = Callable[[Sequence[Mapping[str, Any]], WriteSchema], str]


def hermes_rules(tools: Sequence[Mapping[str, Any]], write_schema: WriteSchema) -> str:
    """Write the rules of a Hermes call in Lark's syntax.

    The arguments of each tool are a document of their own, so that references within it resolve.
    """
    rules = []
    for number, tool in enumerate(tools):
        function = tool["function"]
        name = json.dumps(function["name"], ensure_ascii=False)
        begin = json.dumps(f'{{"name": {name}, "arguments": ')
        arguments = partial(_arguments, parameters_of(function))
        document = write_schema(function["name"], arguments, ANY_OBJECT)
        rules += [f'c{number}: {begin} a{number} "}}"', f"a{number}: %json {document}"]
    calls = " | ".join(f"c{number}" for number in range(len(tools)))
    return "\n".join([f'start: "\\n" ({calls}) "\\n"', *rules])


def coder_rules(tools: Sequence[Mapping[str, Any]], write_schema: WriteSchema) -> str:
    """Write the rules of a Qwen3-Coder call in Lark's syntax."""
    rules = [_TEXT_RULE, r"other: /<parameter=[^>\n]+>\n/ text"]
    for number, tool in enumerate(tools):
        function, parameters = tool["function"], list[str]()
        root = parameters_of(function)
        known = Kinds(root)
        if (kinds := known.of(root)) and "object" not in kinds:
            write_schema(function["name"], partial(dict, root), ANY_OBJECT)  # adds the warning
            parameters.append("other")
        for place, (name, schema) in enumerate(properties_of(root).items()):
            rule = f"p{number}_{place}"
            parameters.append(rule)
            begin = json.dumps(f"<parameter={name}>\n")
            kinds = known.of(schema)
            if kinds and "string" not in kinds:
                own = partial(standalone, schema, root)
                document = write_schema(function["name"], own, {"type": sorted(kinds)})
                rules.append(f'{rule}: {begin} j{rule} "\\n</parameter>\\n"')
                rules.append(f"j{rule}: %json {document}")
            else:
                rules.append(f"{rule}: {begin} text")
        some = f"({' | '.join(parameters)})*" if parameters else ""
        begin = json.dumps(f"<function={function['name']}>\n")
        rules.append(f'f{number}: {begin} {some} "</function>"')
    calls = " | ".join(f"f{number}" for number in range(len(tools)))
    return "\n".join([f'start: "\\n" ({calls}) "\\n"', *rules])


def document_of(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": TOOL_JSON})


def _arguments(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema of a tool's arguments with its implied parts: the type is object.

    A plain schema, without keywords for other properties, allows no arguments but those it names.
    """
    if schema.keys() <= _PLAIN_KEYWORDS:
        schema = {**schema, "additionalProperties": False}
    kinds = kinds_of(schema, schema)
    return {**schema, "type": "object"} if not kinds or "object" in kinds else schema
