"""Anthropic's protocol: its paths, and the form of its errors."""

from typing import Any, Literal

from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.protocol import Protocol
from qwen3_mlx.server.wire import WireModel

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class AnthropicErrorDetails(WireModel):
    """Type and message of an error."""

    type: str
    message: str


class AnthropicError(WireModel):
    """An error response."""

    type: Literal["error"]
    error: AnthropicErrorDetails


def _error_body(error: ApiError) -> dict[str, Any]:
    fallback = "invalid_request_error" if error.status < 500 else "api_error"
    kind = _TYPES.get(error.status, fallback)
    return {"type": "error", "error": {"type": kind, "message": error.message}}


PROTOCOL = Protocol(
    name="Anthropic",
    paths="/v1/messages",
    error_model=AnthropicError,
    error_body=_error_body,
    request_id_header="request-id",
)
