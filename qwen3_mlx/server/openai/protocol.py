"""OpenAI's protocol: its form of errors, which is also that of paths of no protocol."""

from typing import Any

from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.protocol import Protocol
from qwen3_mlx.server.wire import WireModel


class OpenAIErrorDetails(WireModel):
    """Message and type of an error, with the field and the code where known."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(WireModel):
    """An error response."""

    error: OpenAIErrorDetails


def _error_body(error: ApiError) -> dict[str, Any]:
    kind = "rate_limit_error" if error.status == 429 else "invalid_request_error"
    kind = kind if error.status < 500 else "server_error"
    details = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return {"error": details}


PROTOCOL = Protocol(name="OpenAI", paths="", error_model=OpenAIError, error_body=_error_body)
