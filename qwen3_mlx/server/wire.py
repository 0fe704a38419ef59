"""What all protocols share of their requests: strict types, and names that are not known."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Annotated, Any, Self, TypeVar

from fastapi.responses import JSONResponse
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    model_validator,
)

from qwen3_mlx.text.messages import normalise, without_empty_end

_MOST_HEADER = 1000  # characters
_MOST_NAMED = 10  # unknown fields
_MOST_UNKNOWN = 1000  # fields in one object

# Lists that a client sends: they fail at the first thing that is wrong, and have an end.
T = TypeVar("T")
FailFast = Annotated[list[T], Field(fail_fast=True)]
Messages = Annotated[list[T], Field(fail_fast=True, max_length=20_000)]
Parts = Annotated[list[T], Field(fail_fast=True, max_length=10_000)]
Tools = Annotated[list[T], Field(fail_fast=True, max_length=1000)]
Stops = Annotated[list[str], Field(fail_fast=True, max_length=64)]


class WireModel(BaseModel):
    """Something that a client sends. What it does not know it keeps, to be warned of."""

    model_config = ConfigDict(extra="allow", strict=True)

    def unknown(self, prefix: str = "") -> Iterator[str]:
        """Name the fields that are not known, in here and below; null asks for nothing.

        Raises:
            ValueError: they are absurdly many.
        """
        extra = self.model_extra or {}
        if len(extra) > _MOST_UNKNOWN:
            raise ValueError(
                f"{prefix.rstrip('.') or 'the request'} has {len(extra):,} fields that are not "
                f"known, and at most {_MOST_UNKNOWN:,} are ignored"
            )
        yield from (prefix + name for name, value in extra.items() if value is not None)
        for name in type(self).model_fields:
            value = getattr(self, name)
            for place, one in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(one, WireModel):
                    index = f"[{place}]" if isinstance(value, list) else ""
                    yield from one.unknown(f"{prefix}{name}{index}.")


class RequestModel(WireModel):
    """The body of a request."""

    @property
    def replies(self) -> int:
        """How many replies are asked for."""
        return 1


class OrderedModel(WireModel):
    """Something that a model is shown as the client wrote it: its keys in their order."""

    _sent: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, sent: Any, check: ModelWrapValidatorHandler[Self]) -> Self:
        made = check(sent)
        if isinstance(sent, Mapping):
            made._sent = {name: value for name, value in sent.items() if value is not None}
        return made

    @property
    def sent(self) -> dict[str, Any]:
        """The fields as they were sent, without null."""
        return self._sent


def check_unknown(
    request: WireModel,
    unsupported: Mapping[str, tuple[Any, ...]],
    harmless: frozenset[str],
    hints: Mapping[str, tuple[Any, ...]] = MappingProxyType({}),
) -> list[str]:
    """Refuse what is known and cannot be had, and return warnings of hints and what is not known.

    `unsupported` and `hints` have, by name, the values that ask for nothing.

    Raises:
        ValueError: something cannot be had.
    """
    sent = request.model_extra or {}
    for name, idle in unsupported.items():
        value = sent.get(name)
        off = value is False and not any(one is True for one in idle)
        if value is not None and not off and value not in idle and value != []:
            hint = f"; it may be {', '.join(map(repr, idle))}" if idle else "; leave it out"
            raise ValueError(f"{name} is not supported{hint}")
    warnings = [
        f"{name} has no effect here" for name in hints if sent.get(name) not in (None, *hints[name])
    ]
    known = harmless | unsupported.keys() | hints.keys()
    names = (name for name in request.unknown() if name not in known)
    warnings += [f"unknown field {name!r} was ignored" for name in islice(names, _MOST_NAMED)]
    if more := sum(1 for _ in names):
        warnings.append(f"and {more:,} more unknown fields")
    return warnings


def ends_with_words(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last message is one of the assistant's that says something: it is continued."""
    last = without_empty_end(normalise(messages))[-1]
    said = last.get("content") or last.get("reasoning_content")
    return last["role"] == "assistant" and bool(said) and not last.get("tool_calls")


def warnings_header(warnings: list[str]) -> dict[str, str]:
    """Give the header that tells of them, if there are any."""
    if not warnings:
        return {}
    text = "; ".join(warning[:_MOST_HEADER] for warning in warnings)[:_MOST_HEADER]
    text = text.encode("ascii", "backslashreplace").decode()
    return {"warnings": "".join(c if c.isprintable() else "?" for c in text)[:_MOST_HEADER].strip()}


def json_bytes(data: Any) -> bytes:
    """Write data as JSON; halves of characters, which JSON can name, become question marks."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


class Json(JSONResponse):
    """A response in JSON."""

    def render(self, content: Any) -> bytes:
        """Write it."""
        return json_bytes(content)
