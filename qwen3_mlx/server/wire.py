"""What the requests and responses of all protocols share: models, warnings and JSON."""

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

from qwen3_mlx.text.events import TokenLogprob
from qwen3_mlx.text.messages import normalise, without_empty_end

_MAX_HEADER = 1000  # characters
_MAX_NAMED = 10  # unknown fields that warnings name
_MAX_UNKNOWN = 1000  # unknown fields in one object

# Lists that a client sends: validation stops at the first error, and the length is limited.
T = TypeVar("T")
FailFast = Annotated[list[T], Field(fail_fast=True)]
Messages = Annotated[list[T], Field(fail_fast=True, max_length=20_000)]
Parts = Annotated[list[T], Field(fail_fast=True, max_length=10_000)]
Tools = Annotated[list[T], Field(fail_fast=True, max_length=1000)]
Stops = Annotated[list[str], Field(fail_fast=True, max_length=64)]


class WireModel(BaseModel):
    """An object that a client sends. Unknown fields are kept, for warnings."""

    model_config = ConfigDict(extra="allow", strict=True)

    def unknown(self, prefix: str = "") -> Iterator[str]:
        """Yield the paths of unknown fields, nested ones too, except those that are null.

        Raises:
            ValueError: one object has more than 1,000.
        """
        extra = self.model_extra or {}
        if len(extra) > _MAX_UNKNOWN:
            raise ValueError(
                f"{prefix.rstrip('.') or 'the request'} has {len(extra):,} fields that are not "
                f"known, and at most {_MAX_UNKNOWN:,} are ignored"
            )
        yield from (prefix + name for name, value in extra.items() if value is not None)
        for name in type(self).model_fields:
            value = getattr(self, name)
            for index, item in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(item, WireModel):
                    suffix = f"[{index}]" if isinstance(value, list) else ""
                    yield from item.unknown(f"{prefix}{name}{suffix}.")


class RequestModel(WireModel):
    """The body of a request, which may name a model."""

    model: str | None = None

    @property
    def replies(self) -> int:
        """Number of replies that the request wants."""
        return 1

    @property
    def streamed(self) -> bool:
        """True if the request wants the reply as a stream of events."""
        return False

    @property
    def model_seconds(self) -> float | None:
        """Seconds that the model stays loaded after the request; None if it does not say."""
        return None


class OrderedModel(WireModel):
    """An object that the model sees as the client wrote it, with its keys in their order."""

    _sent: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, sent: Any, check: ModelWrapValidatorHandler[Self]) -> Self:
        model = check(sent)
        if isinstance(sent, Mapping):
            model._sent = {name: value for name, value in sent.items() if value is not None}
        return model

    @property
    def sent(self) -> dict[str, Any]:
        """The fields as they were sent, without those that are null."""
        return self._sent


def check_unknown(
    request: WireModel,
    unsupported: Mapping[str, tuple[Any, ...]],
    harmless: frozenset[str],
    hints: Mapping[str, tuple[Any, ...]] = MappingProxyType({}),
) -> list[str]:
    """Refuse unsupported fields, and return warnings of hints without effect and unknown fields.

    `unsupported` and `hints` map a field to the values that have no effect, which are accepted.

    Raises:
        ValueError: an unsupported field has another value.
    """
    sent = request.model_extra or {}
    for name, neutral in unsupported.items():
        value = sent.get(name)
        off = value is False and not any(accepted is True for accepted in neutral)
        if value is not None and not off and value not in neutral and value != []:
            hint = f"; it may be {', '.join(map(repr, neutral))}" if neutral else "; leave it out"
            raise ValueError(f"{name} is not supported{hint}")
    warnings = [
        f"{name} has no effect here" for name in hints if sent.get(name) not in (None, *hints[name])
    ]
    known = harmless | unsupported.keys() | hints.keys()
    names = (name for name in request.unknown() if name not in known)
    warnings += [f"unknown field {name!r} was ignored" for name in islice(names, _MAX_NAMED)]
    if more := sum(1 for _ in names):
        warnings.append(f"and {more:,} more unknown fields")
    return warnings


def ends_with_assistant_text(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the last message is a non-empty one of the assistant, to be continued."""
    last = without_empty_end(normalise(messages))[-1]
    text = last.get("content") or last.get("reasoning_content")
    return last["role"] == "assistant" and bool(text) and not last.get("tool_calls")


def warnings_header(warnings: list[str]) -> dict[str, str]:
    """Return the `warnings` header, or no header without warnings."""
    if not warnings:
        return {}
    text = "; ".join(warning[:_MAX_HEADER] for warning in warnings)[:_MAX_HEADER]
    text = text.encode("ascii", "backslashreplace").decode()
    return {"warnings": "".join(c if c.isprintable() else "?" for c in text)[:_MAX_HEADER].strip()}


def json_bytes(data: Any) -> bytes:
    """Return data as JSON; lone surrogates, which JSON can express, become question marks."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


class Json(JSONResponse):
    """A JSON response."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return json_bytes(content)


def stop_strings(given: str | Sequence[str] | None) -> list[str] | None:
    """Return the stop strings without empty ones, which some clients send for none."""
    strings = [given] if isinstance(given, str) else given or ()
    return [string for string in strings if string] or None


def token_text(token: bytes) -> str:
    """Return a token as text; incomplete characters are replaced by U+FFFD."""
    return token.decode("utf-8", "replace")


def logprob_entries(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Return tokens and their alternatives with text, log probability and bytes."""
    return [
        _logprob(token.token, token.logprob)
        | {"top_logprobs": [_logprob(*top) for top in token.top]}
        for token in tokens
    ]


def _logprob(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token_text(token), "logprob": logprob, "bytes": list(token)}
