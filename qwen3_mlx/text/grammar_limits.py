"""Limits on the cost of grammars: known cases are refused before llguidance sees them.

Each has an error message of its own; a trial (`grammar_trial`) stops all other cases.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from qwen3_mlx.text.tool_schema import parameters_of, parts_of, properties_of

MAX_TOOLS = 1_000
MAX_PARAMETERS = 5_000  # of all tools
MAX_CHOICES = 50_000
MAX_CHARACTERS = 1_000_000
"""Limit for the text of a grammar, or for all tools; more would not fit a context window either."""

# Intersecting patterns takes time exponential in their number, before llguidance counts any fuel:
# 16 take 0.2 s, 20 take 8 s and 24 more memory than there is.
_MAX_INTERSECTED = 16
# A multiple of 100,003 takes 0.2 s and 20 MB, one of 3,000,017 takes 77 s and 1.8 GB.
_MAX_REMAINDERS = 100_000
# Each takes four of the 2,000 items that llguidance follows; 10,000 take 12 s to compile.
_MAX_OPTIONAL = 500
_COMBINING = frozenset(("$ref", "allOf", "anyOf", "oneOf"))
_NESTING = frozenset(
    ("pattern", "properties", "patternProperties", "additionalProperties", "items", "prefixItems")
)
# An unclosed literal ends with its line: a search for its end from each quote would take too long.
_LARK_LITERAL = re.compile(r'"(?:[^"\\\n]|\\.)*+"?|/(?:[^/\\\n]|\\.)++/?|//.*')


def check_size(name: str, value: Any) -> None:
    """Check that a JSON value has at most `MAX_CHARACTERS` characters.

    Raises:
        ValueError: it has more.
    """
    rest, size = [value], 0
    while rest and size <= MAX_CHARACTERS:
        part = rest.pop()
        size += 1
        if isinstance(part, str):
            size += len(part)
        elif isinstance(part, Mapping):
            size += sum(len(str(key)) for key in part)
            rest += part.values()
        elif isinstance(part, list | tuple):
            rest += part
    if size > MAX_CHARACTERS:
        raise ValueError(f"{name} may have at most {MAX_CHARACTERS:,} characters; this has more")


def check_tools(tools: Sequence[Mapping[str, Any]]) -> None:
    """Check that the schemas of all tools are not too large and have not too many parameters.

    Raises:
        ValueError: they are too large, or have too many.
    """
    check_size("all tools together", tools)
    count = sum(len(properties_of(parameters_of(tool["function"]))) for tool in tools)
    if count > MAX_PARAMETERS:
        raise ValueError(
            f"all tools together may have at most {MAX_PARAMETERS:,} parameters, not {count:,}"
        )


def check_lark(text: str) -> None:
    """Check the cost of a grammar in Lark's syntax.

    Raises:
        ValueError: it is too high, or the grammar names tokens by number.
    """
    check_size("a grammar", text)
    for place in re.finditer(r"%json\s*", text):
        try:
            schema = json.JSONDecoder().raw_decode(text, place.end())[0]
        except json.JSONDecodeError:
            continue  # llguidance reports the place
        check_schema(schema)
    rules = _LARK_LITERAL.sub("", text)
    if "<[" in rules:
        raise ValueError("tokens cannot be named by their numbers (<[...]>); write their text")
    if rules.count("&") >= _MAX_INTERSECTED:
        raise ValueError(f"at most {_MAX_INTERSECTED} expressions can be intersected (&)")


def check_schema(schema: Any) -> None:
    """Check the cost of a JSON schema.

    Raises:
        ValueError: it would take llguidance too much time or memory.
    """
    check_size("a schema", schema)
    _check_patterns(schema)
    _check_multiples(schema)
    _check_properties(schema)


def _check_properties(schema: Any) -> None:
    """Raise a ValueError if an object has more optional properties than llguidance can follow."""
    for part in parts_of(schema):
        properties, required = part.get("properties"), part.get("required")
        if isinstance(properties, Mapping) and len(properties) > _MAX_OPTIONAL:
            count = len(properties.keys() - (required if isinstance(required, list) else []))
            if count > _MAX_OPTIONAL:
                raise ValueError(
                    f"an object can have at most {_MAX_OPTIONAL} optional properties, not {count:,}"
                )


def _check_multiples(schema: Any) -> None:
    """Raise a ValueError if counting the remainders of a number would take too many states."""
    found = 1
    for part in parts_of(schema):
        number = part.get("multipleOf")
        if isinstance(number, int | float) and math.isfinite(number) and number > 0:
            digits = Decimal(str(number)).normalize().as_tuple().digits
            found = math.lcm(found, int("".join(map(str, digits))))
        if found > _MAX_REMAINDERS:
            raise ValueError(
                f"multipleOf is supported up to {_MAX_REMAINDERS:,} (the least common multiple of "
                f"all in a schema, without the zeros at its ends), not {found:,}"
            )


def _check_patterns(schema: Any) -> None:
    """Raise a ValueError if more patterns may apply to one value than can be intersected."""
    patterns, combined = set(), False
    for part in parts_of(schema):
        if isinstance(pattern := part.get("pattern"), str):
            patterns.add(pattern)
        keys = part.keys()
        several = isinstance(every := part.get("allOf"), list) and len(every) > 1
        combined |= several or (bool(keys & _COMBINING) and len(keys & (_COMBINING | _NESTING)) > 1)
    if combined and len(patterns) > _MAX_INTERSECTED:
        raise ValueError(
            f"it combines schemas and has {len(patterns)} patterns, and at most "
            f"{_MAX_INTERSECTED} can be intersected"
        )
