"""The JSON schema that an answer must fit, as it is stated on the command line."""

import json
import re
from pathlib import Path
from typing import Any

_TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
_FIELD = re.compile(r"\s*(\w+)(?:\s+(\w+))?\s*(?::\s*(.+?))?\s*", re.DOTALL)


def schema_from(stated: str) -> dict[str, Any]:
    """Return the schema in a JSON file, in a JSON text, or in the short syntax 'a int, b str: why'.

    The fields of the short syntax are separated by commas, or by lines; the type is str where none
    is stated. All of them are required, and there are no others.

    Raises:
        ValueError: it is none of these.
    """
    if stated.lstrip().startswith("{"):
        return _parsed(stated, "--schema")
    if stated.endswith(".json") or (len(stated) < 256 and Path(stated).is_file()):
        try:
            return _parsed(Path(stated).read_text("utf-8"), stated)
        except OSError as error:
            raise ValueError(f"--schema: {stated} cannot be read: {error.strerror}") from error
    fields = [
        field for field in re.split(r"\n" if "\n" in stated else ",", stated) if field.strip()
    ]
    if not fields:
        raise ValueError(
            "--schema is empty; it takes a JSON file or fields, such as 'a int, b str'"
        )
    properties = dict(map(_property, fields))
    if len(properties) < len(fields):
        raise ValueError(f"--schema names a field twice: {stated.strip()!r}")
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _property(field: str) -> tuple[str, dict[str, str]]:
    match = _FIELD.fullmatch(field)
    if not match or (match[2] or "str") not in _TYPES:
        raise ValueError(
            f"--schema takes a JSON file or fields of the types {', '.join(_TYPES)}, such as "
            f"'a int, b str', not {field.strip()!r}"
        )
    description = {"description": match[3]} if match[3] else {}
    return match[1], {"type": _TYPES[match[2] or "str"], **description}


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise ValueError(f"{where} is not a JSON schema: it must be an object")
    return schema
