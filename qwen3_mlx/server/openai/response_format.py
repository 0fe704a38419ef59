"""The form of an answer, by any field in which OpenAI's clients name one."""

from collections.abc import Iterator
from typing import Any, cast

from qwen3_mlx.api.options import Options
from qwen3_mlx.server.openai.schema import ChatRequest, ResponseFormat, StructuredOutputs

_Form = tuple[str, str, Any]  # the field, the library's keyword, and its value
_ANY_JSON = {"type": "object"}


def form_of(asked: ChatRequest) -> Options:
    """Give the form that the answer is to have as the library has it.

    Raises:
        ValueError: it is not whole, or two are named.
    """
    named = list(_named(asked))
    # That it is JSON goes without saying where a schema is named, too.
    others = [one for one in named if one[2] != _ANY_JSON]
    found = others if any(keyword == "schema" for _, keyword, _ in others) else named
    for field, *form in found[1:]:
        if form != list(found[0][1:]):
            raise ValueError(f"an answer can have one form, not {found[0][0]} and {field}")
    return cast(Options, {keyword: value for _, keyword, value in found[:1]})


def _named(asked: ChatRequest) -> Iterator[_Form]:
    if asked.response_format:
        yield from _of_response(asked.response_format)
    if asked.structured_outputs:
        yield from _of_outputs(asked.structured_outputs)
    if asked.json_schema is not None:
        yield "json_schema", "schema", asked.json_schema
    if asked.format not in (None, ""):
        yield "format", "schema", _ANY_JSON if asked.format == "json" else asked.format


def _of_response(wish: ResponseFormat) -> Iterator[_Form]:
    schema = wish.json_schema.schema_ if wish.json_schema else wish.schema_
    if wish.json_schema and wish.schema_ not in (None, schema):
        raise ValueError("response_format has two schemas; send json_schema alone")
    if wish.type == "text":
        if schema is not None:
            raise ValueError("response_format of type text has no schema; json_schema has one")
        return
    if wish.type == "json_schema" and schema is None:
        raise ValueError("response_format of type json_schema needs json_schema")
    yield "response_format", "schema", _ANY_JSON if schema is None else schema


def _of_outputs(wish: StructuredOutputs) -> Iterator[_Form]:
    if wish.json_object:
        yield "json_object", "schema", _ANY_JSON
    if wish.json_ is not None:
        yield "json", "schema", wish.json_
    for name in ("regex", "choice", "grammar"):
        if (value := getattr(wish, name)) is not None:
            yield name, name, value
