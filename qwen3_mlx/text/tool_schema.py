"""Reads the JSON schemas of tools: the arguments and their types, through references."""

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

_KINDS = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
    list: "array",
    dict: "object",
}
_KIND_NAMES = frozenset(_KINDS.values())
_MAX_VISITED = 2_000  # parts of a schema that are visited to find the types of one value
_IMPLIED = {"properties": "object", "items": "array"}


def parameters_of(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema of a tool's arguments: any object if the client sent none."""
    parameters = function.get("parameters")
    if not isinstance(parameters, Mapping) or not parameters:
        return {"type": "object"}
    return {key: value for key, value in parameters.items() if value is not None}


def properties_of(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schemas of a tool's named arguments, through references and alternatives."""
    found: dict[str, list[Any]] = {}
    rest, followed = [parameters], set()
    for part in rest:  # the list grows while it is read
        if not isinstance(part, Mapping):
            continue
        if isinstance(properties := part.get("properties"), Mapping):
            for name, schema in properties.items():
                found.setdefault(name, []).append(schema)
        if isinstance(ref := part.get("$ref"), str) and ref not in followed:
            followed.add(ref)
            rest.append(_resolve(ref, parameters))
        for key in ("allOf", "anyOf", "oneOf"):
            rest += parts if isinstance(parts := part.get(key), list) else ()
    return {name: each[0] if len(each) == 1 else {"anyOf": each} for name, each in found.items()}


def kind_of(value: Any) -> str:
    """Return the JSON type of a value; "" for a type that JSON does not have."""
    return _KINDS.get(type(value), "")


def kinds_of(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """Return the JSON types that a value of `schema` may have; empty if the schema does not say.

    They are collected through references into `root` and through alternatives; "number" implies
    "integer".
    """
    return Kinds(root).of(schema)


class Kinds:
    """`kinds_of` for many values; each reference into `root` is followed only once."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._known: dict[str, frozenset[str]] = {}
        self._left = 0

    def of(self, schema: Any) -> frozenset[str]:
        """Return the JSON types that a value of `schema` may have; see `kinds_of`."""
        self._left = _MAX_VISITED
        try:
            return self._of(schema)
        except RecursionError:  # the schema is too deep or too large
            return frozenset()

    def _of(self, schema: Any) -> frozenset[str]:
        self._left -= 1
        if self._left < 0:
            raise RecursionError
        if not isinstance(schema, Mapping):
            return frozenset()
        constraints: list[frozenset[str]] = []
        kind = schema.get("type")
        if isinstance(kind, str | list):
            kinds = _KIND_NAMES.intersection([kind] if isinstance(kind, str) else map(str, kind))
            constraints.append(
                kinds | {"null"} if kinds and schema.get("nullable") is True else kinds
            )
        else:
            constraints += [frozenset((kind,)) for key, kind in _IMPLIED.items() if key in schema]
        if isinstance(values := schema.get("enum"), list):
            constraints.append(frozenset(map(kind_of, values)))
        if "const" in schema:
            constraints.append(frozenset((kind_of(schema["const"]),)))
        if isinstance(ref := schema.get("$ref"), str):
            constraints.append(self._of_ref(ref))
        for key in ("anyOf", "oneOf"):
            if isinstance(parts := schema.get(key), list):
                alternatives = [self._of(part) for part in parts]
                constraints.append(
                    frozenset().union(*alternatives) if all(alternatives) else frozenset()
                )
        if isinstance(parts := schema.get("allOf"), list):
            constraints += [self._of(part) for part in parts]
        constraints = [
            kinds | {"integer"} if "number" in kinds else kinds for kinds in constraints if kinds
        ]
        return frozenset.intersection(*constraints) if constraints else frozenset()

    def _of_ref(self, ref: str) -> frozenset[str]:
        if ref not in self._known:
            self._known[ref] = frozenset()  # a reference to itself adds no types
            self._known[ref] = self._of(_resolve(ref, self._root))
        return self._known[ref]


def _resolve(ref: str, root: Mapping[str, Any]) -> Any:
    """Return the part of `root` that a reference such as `#/$defs/Unit` points to, or None."""
    found: Any = root
    for step in unquote(ref).split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        else:
            found = found.get(step) if isinstance(found, Mapping) else None
    return found if ref.startswith("#") else None


def standalone(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema of an argument as a document in which references into `root` resolve."""
    if not any("$ref" in part for part in parts_of(schema)):
        return schema
    moved: Mapping[str, Any] = _moved(schema)
    return {**moved, "$defs": {"tool": _moved(root)}}


def _moved(value: Any) -> Any:
    """Return a schema with its references changed to where `standalone` puts the root."""
    if isinstance(value, list):
        return [_moved(part) for part in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: f"#/$defs/tool{part[1:]}"
        if key == "$ref" and isinstance(part, str) and part.startswith("#")
        else _moved(part)
        for key, part in value.items()
    }


def parts_of(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Yield all objects within a JSON value."""
    rest = [schema]
    while rest:
        value = rest.pop()
        if isinstance(value, Mapping):
            yield value
            rest += value.values()
        elif isinstance(value, list):
            rest += value
