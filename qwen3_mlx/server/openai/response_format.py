"""Structured output: reads the constraint of an answer from the fields that may name one."""

from collections.abc import Iterator
from typing import Any, cast

from qwen3_mlx.api.options import Options
from qwen3_mlx.server.openai.schema import ChatRequest, ResponseFormat, StructuredOutputs

_Constraint = tuple[str, str, Any]  # the request's field, the library's keyword, its value
_ANY_JSON = {"type": "object"}


def constraint_option(body: ChatRequest) -> Options:
    """Return the option that constrains the answer, or none.

    Raises:
        ValueError: a field is incomplete, or two fields differ.
    """
    constraints = list(_constraints(body))
    # "Any JSON object" adds nothing to a schema, so it does not contradict one.
    specific = [constraint for constraint in constraints if constraint[2] != _ANY_JSON]
    if any(keyword == "schema" for _, keyword, _ in specific):
        constraints = specific
    for field, *option in constraints[1:]:
        if option != list(constraints[0][1:]):
            raise ValueError(f"an answer can have one form, not {constraints[0][0]} and {field}")
    return cast(Options, {keyword: value for _, keyword, value in constraints[:1]})


def _constraints(body: ChatRequest) -> Iterator[_Constraint]:
    if body.response_format:
        yield from _from_response_format(body.response_format)
    if body.structured_outputs:
        yield from _from_structured_outputs(body.structured_outputs)
    if body.json_schema is not None:
        yield "json_schema", "schema", body.json_schema
    if body.format not in (None, ""):
        yield "format", "schema", _ANY_JSON if body.format == "json" else body.format


def _from_response_format(spec: ResponseFormat) -> Iterator[_Constraint]:
    schema = spec.json_schema.schema_ if spec.json_schema else spec.schema_
    if spec.json_schema and spec.schema_ not in (None, schema):
        raise ValueError("response_format has two schemas; send json_schema alone")
    if spec.type == "text":
        if schema is not None:
            raise ValueError("response_format of type text has no schema; json_schema has one")
        return
    if spec.type == "json_schema" and schema is None:
        raise ValueError("response_format of type json_schema needs json_schema")
    yield "response_format", "schema", _ANY_JSON if schema is None else schema


def _from_structured_outputs(spec: StructuredOutputs) -> Iterator[_Constraint]:
    if spec.json_object:
        yield "json_object", "schema", _ANY_JSON
    if spec.json_ is not None:
        yield "json", "schema", spec.json_
    for name in ("regex", "choice", "grammar"):
        if (value := getattr(spec, name)) is not None:
            yield name, name, value
