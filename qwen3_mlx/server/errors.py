"""Errors of requests, as status and message; each protocol has its own form of them."""

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError

from qwen3_mlx.errors import CheckpointError, ClusterError, ContextError, Qwen3Error

_SENTENCES = {
    404: "there is nothing at this address",
    405: "this address does not take this method",
}
_MAX_ERRORS = 20  # validation errors that are examined, of each request
_MAX_MESSAGE = 2000  # characters: a message may quote what the client sent
# Pydantic names Python's types, where a client knows JSON's.
_DICT = re.compile(r"a valid dictionary(?: or instance of \w+)?")
_EXPECTED = "Input should be "
# Calls that the library suggests, and where clients find the same.
_ADDRESSES = {
    "embed()": "/v1/embeddings",
    "rerank()": "/v1/rerank",
    "complete()": "/v1/completions",
}
_CALL = re.compile("|".join(map(re.escape, _ADDRESSES)))
_TYPES = ("str", "int", "float", "bool", "none")


class ApiError(Exception):
    """An error response: HTTP status and message, and where known the code and the field."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= _MAX_MESSAGE else f"{message[:_MAX_MESSAGE]}..."
        self.code = code
        self.param = param
        self.headers = headers

    @classmethod
    def of(cls, error: BaseException) -> "ApiError":
        """Convert an error of the library: 4xx if the request caused it, otherwise 5xx."""
        if isinstance(error, ApiError):
            return error
        message = _CALL.sub(lambda found: _ADDRESSES[found[0]], str(error))
        if isinstance(error, ContextError):
            return cls(400, message, code="context_length_exceeded", param="messages")
        if isinstance(error, ValueError | TypeError):
            return cls(400, message)
        if isinstance(error, CheckpointError):  # not a 503: a retry cannot succeed
            return cls(500, message, code="internal")
        if isinstance(error, Qwen3Error):
            return cls(503, message, code="unavailable")
        return cls(500, f"{type(error).__name__}: {message} (a bug?)", code="internal")


def as_client_error(error: BaseException) -> ApiError:
    """Convert an error raised before the reply began; a 503 becomes 400: the request caused it.

    It stays one if a machine that computes is gone.
    """
    converted = ApiError.of(error)
    if converted.status != 503 or isinstance(error, ClusterError):
        return converted
    return ApiError(400, converted.message)


def from_status(status: int, detail: object, headers: Mapping[str, str] | None) -> ApiError:
    """Convert an error of the framework; a bare status phrase becomes a sentence."""
    message = str(detail)
    if message == HTTPStatus(status).phrase or status == 405:
        message = _SENTENCES.get(status, message)
    return ApiError(status, message, headers=headers)


def from_validation(error: ValidationError) -> ApiError:
    """Convert a validation error: the message names one wrong field and its allowed values."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    # A field of a union type has one error for each member. Those of a member that is for another
    # `type` say nothing, unless all are. The deepest error is the likeliest, and of these one of a
    # member whose type fits; if none fits, the message lists all types.
    first = _path(found[0]["loc"])
    same = [error for error in found[:_MAX_ERRORS] if _path(error["loc"])[: len(first)] == first]
    mistyped = [
        error for error in same if error["loc"][-1] == "type" and error["type"] == "literal_error"
    ]
    others = [error["loc"][:-1] for error in mistyped]
    meant = [
        error
        for error in same
        if len(_path(error["loc"])) > len(first)
        and not any(error["loc"][: len(member)] == member for member in others)
    ]
    likely = (meant or mistyped) if mistyped else same
    furthest = max(likely, key=lambda error: (len(_path(error["loc"])), not _is_type_error(error)))
    path = _path(furthest["loc"])
    message = furthest["msg"].removeprefix("Value error, ")
    if _is_type_error(furthest):
        types = (
            _DICT.sub("an object", error["msg"].removeprefix(_EXPECTED))
            for error in same
            if _path(error["loc"]) == path
        )
        message = _EXPECTED + " or ".join(dict.fromkeys(types))
    return ApiError(400, f"{'.'.join(path)}: {message}", param=".".join(path))


def _is_type_error(error: Any) -> bool:
    """Return whether a value lacks the type of a union member, or is none of its literals."""
    return bool(error["msg"].startswith(_EXPECTED)) and error["type"].endswith(
        ("type", "literal_error")
    )


def _path(location: Sequence[str | int]) -> list[str]:
    """Return the field names of a location, without the names of union members."""
    parts = [str(part) for part in location]
    return [part for part in parts if "[" not in part and part[:1].islower() and part not in _TYPES]
