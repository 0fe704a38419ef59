"""Errors as the clients of each protocol know them."""

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError

from qwen3_mlx.errors import CheckpointError, ContextError, Qwen3Error
from qwen3_mlx.server.wire import Json

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_OPENAI_TYPES = {429: "rate_limit_error"}
_PLAIN = {
    404: "there is nothing at this address",
    405: "this address does not take this method",
}
_FIRST = 20  # errors of a request that are looked at
_MOST_SAID = 2000  # characters, where a message repeats what was sent
_CLASS = re.compile(r"a valid dictionary(?: or instance of \w+)?")  # which are Python's words
_SHOULD = "Input should be "
_KINDS = ("str", "int", "float", "bool", "none")


class ApiError(Exception):
    """What is answered in place of a reply."""

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
        self.message = message if len(message) <= _MOST_SAID else f"{message[:_MOST_SAID]}..."
        self.code = code
        self.param = param
        self.headers = headers

    @classmethod
    def of(cls, error: BaseException) -> "ApiError":
        """Say what an error of the library is to a client: its own fault, or ours."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, ContextError):
            return cls(400, str(error), code="context_length_exceeded", param="messages")
        if isinstance(error, ValueError | TypeError):
            return cls(400, str(error))
        if isinstance(error, CheckpointError):  # which no second try will mend
            return cls(500, str(error), code="internal")
        if isinstance(error, Qwen3Error):
            return cls(503, str(error), code="unavailable")
        return cls(500, f"{type(error).__name__}: {error} (a bug?)", code="internal")

    def body(self, path: str) -> dict[str, Any]:
        """Give it in the form of the protocol to which `path` belongs."""
        message = self.message
        if path.startswith("/v1/messages"):
            fallback = "invalid_request_error" if self.status < 500 else "api_error"
            kind = _ANTHROPIC_TYPES.get(self.status, fallback)
            return {"type": "error", "error": {"type": kind, "message": message}}
        if path.startswith("/api/"):
            return {"error": message}
        kind = _OPENAI_TYPES.get(self.status, "invalid_request_error")
        kind = kind if self.status < 500 else "server_error"
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, path: str) -> Json:
        """Give it as a whole response."""
        return Json(self.body(path), self.status, headers=dict(self.headers or {}))


def as_client_error(error: BaseException) -> ApiError:
    """Say what an error means that came before anything was begun: the request cannot be had."""
    known = ApiError.of(error)
    return ApiError(400, known.message) if known.status == 503 else known


def from_status(status: int, detail: object, headers: Mapping[str, str] | None) -> ApiError:
    """Say in a sentence what the framework knows by a number."""
    said = str(detail)
    if said == HTTPStatus(status).phrase or status == 405:
        said = _PLAIN.get(status, said)
    return ApiError(status, said, headers=headers)


def from_validation(error: ValidationError) -> ApiError:
    """Name the field that is wrong, and what it may be."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    # Of a field that may be of several kinds there is an error for each: the furthest is meant, and
    # of these one that has the right kind; where none has, all kinds are told.
    first = _path(found[0]["loc"])
    same = [one for one in found[:_FIRST] if _path(one["loc"])[: len(first)] == first]
    furthest = max(same, key=lambda one: (len(_path(one["loc"])), not _of_kind(one)))
    path = _path(furthest["loc"])
    said = furthest["msg"].removeprefix("Value error, ")
    if _of_kind(furthest):
        kinds = (one["msg"].removeprefix(_SHOULD) for one in same if _path(one["loc"]) == path)
        said = _SHOULD + _CLASS.sub("an object", " or ".join(dict.fromkeys(kinds)))
    return ApiError(400, f"{'.'.join(path)}: {said}", param=".".join(path))


def _of_kind(error: Any) -> bool:
    """Return whether an error is of the kind of a value, of several that may be right."""
    return bool(error["msg"].startswith(_SHOULD)) and error["type"].endswith(
        ("type", "literal_error")
    )


def _path(place: Sequence[str | int]) -> list[str]:
    """Give the names of the fields in a place, without those of types."""
    parts = [str(part) for part in place]
    return [part for part in parts if "[" not in part and part[:1].islower() and part not in _KINDS]
