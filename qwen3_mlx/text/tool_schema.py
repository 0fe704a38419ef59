"""JSON schemas of tools: what may be an argument, found through references and alternatives."""

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
_NAMES = frozenset(_KINDS.values())
_MOST_VISITED = 2_000  # parts of a schema, for the types of one value
_IMPLIED = {"properties": "object", "items": "array"}


def parameters_of(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema of a tool's arguments: any object, where the client sent none."""
    parameters = function.get("parameters")
    if not isinstance(parameters, Mapping) or not parameters:
        return {"type": "object"}
    return {key: value for key, value in parameters.items() if value is not None}


def properties_of(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schemas of a tool's arguments by name, as far as it names any."""
    found: dict[str, list[Any]] = {}
    rest, followed = [parameters], set()
    for part in rest:  # which grows
        if not isinstance(part, Mapping):
            continue
        if isinstance(properties := part.get("properties"), Mapping):
            for name, schema in properties.items():
                found.setdefault(name, []).append(schema)
        if isinstance(ref := part.get("$ref"), str) and ref not in followed:
            followed.add(ref)
            rest.append(_referred(ref, parameters))
        for key in ("allOf", "anyOf", "oneOf"):
            rest += parts if isinstance(parts := part.get(key), list) else ()
    return {name: each[0] if len(each) == 1 else {"anyOf": each} for name, each in found.items()}


def kind_of(value: Any) -> str:
    """Return the JSON type of a value; Python's own types have none, which is ""."""
    return _KINDS.get(type(value), "")


def kinds_of(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """Return the JSON types that a value of `schema` may have; none where it does not say.

    They are gathered through references into `root` and through alternatives; "number" comes with
    "integer".
    """
    return Kinds(root).of(schema)


class Kinds:
    """Does as `kinds_of` for many values; each reference into `root` is followed once for all."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._known: dict[str, frozenset[str]] = {}
        self._left = 0

    def of(self, schema: Any) -> frozenset[str]:
        """Return the types that a value may have."""
        self._left = _MOST_VISITED
        try:
            return self._of(schema)
        except RecursionError:  # there is too much to be looked at
            return frozenset()

    def _of(self, schema: Any) -> frozenset[str]:
        self._left -= 1
        if self._left < 0:
            raise RecursionError
        if not isinstance(schema, Mapping):
            return frozenset()
        said: list[frozenset[str]] = []
        kind = schema.get("type")
        if isinstance(kind, str | list):
            kinds = _NAMES.intersection([kind] if isinstance(kind, str) else map(str, kind))
            said.append(kinds | {"null"} if kinds and schema.get("nullable") is True else kinds)
        else:
            said += [frozenset((kind,)) for key, kind in _IMPLIED.items() if key in schema]
        if isinstance(values := schema.get("enum"), list):
            said.append(frozenset(map(kind_of, values)))
        if "const" in schema:
            said.append(frozenset((kind_of(schema["const"]),)))
        if isinstance(ref := schema.get("$ref"), str):
            said.append(self._of_reference(ref))
        for key in ("anyOf", "oneOf"):
            if isinstance(parts := schema.get(key), list):
                alternatives = [self._of(part) for part in parts]
                said.append(frozenset().union(*alternatives) if all(alternatives) else frozenset())
        if isinstance(parts := schema.get("allOf"), list):
            said += [self._of(part) for part in parts]
        said = [kinds | {"integer"} if "number" in kinds else kinds for kinds in said if kinds]
        return frozenset.intersection(*said) if said else frozenset()

    def _of_reference(self, ref: str) -> frozenset[str]:
        if ref not in self._known:
            self._known[ref] = frozenset()  # it says nothing of itself, while it is followed
            self._known[ref] = self._of(_referred(ref, self._root))
        return self._known[ref]


def _referred(ref: str, root: Mapping[str, Any]) -> Any:
    """Return what a reference such as `#/$defs/Unit` points at in `root`, or None."""
    found: Any = root
    for step in unquote(ref).split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and step.isdecimal() and int(step) < len(found):
            found = found[int(step)]
        else:
            found = found.get(step) if isinstance(found, Mapping) else None
    return found if ref.startswith("#") else None


def on_its_own(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema of an argument as a document in which references into `root` hold."""
    if not any("$ref" in part for part in parts_of(schema)):
        return schema
    moved: Mapping[str, Any] = _moved(schema)
    return {**moved, "$defs": {"tool": _moved(root)}}


def _moved(value: Any) -> Any:
    """Return a schema whose references lead to where `on_its_own` puts the tool's."""
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
