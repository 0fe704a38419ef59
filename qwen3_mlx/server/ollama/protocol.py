"""Ollama's protocol: its paths, and the form of its errors."""

from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.protocol import Protocol
from qwen3_mlx.server.wire import WireModel


class OllamaError(WireModel):
    """An error response."""

    error: str


def _error_body(error: ApiError) -> dict[str, str]:
    return {"error": error.message}


PROTOCOL = Protocol(name="Ollama", paths="/api/", error_model=OllamaError, error_body=_error_body)
