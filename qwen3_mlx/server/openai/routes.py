"""Routes of OpenAI's API: chat completions, text completions, embeddings, models."""

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qwen3_mlx.server.endpoint import EVENTS, answer_request
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.openai.chat import ChatCompletion
from qwen3_mlx.server.openai.embeddings import Embeddings
from qwen3_mlx.server.openai.protocol import PROTOCOL
from qwen3_mlx.server.openai.response_models import (
    ChatOut,
    EmbeddingsOut,
    ModelOut,
    ModelsOut,
    TextOut,
)
from qwen3_mlx.server.openai.schema import ChatRequest, EmbeddingRequest, TextRequest
from qwen3_mlx.server.openai.text import TextCompletion
from qwen3_mlx.server.openapi import route_schema
from qwen3_mlx.server.service import Service


def routes(service: Service) -> APIRouter:
    """Create the routes of this protocol."""
    router = PROTOCOL.router("/v1")

    @router.post("/chat/completions", **route_schema(ChatRequest, ChatOut, EVENTS))
    async def chat_completions(request: Request) -> Response:
        """Create a chat completion, complete or as a stream of events."""
        return await answer_request(service, request, ChatRequest, ChatCompletion)

    @router.post("/completions", **route_schema(TextRequest, TextOut, EVENTS))
    async def completions(request: Request) -> Response:
        """Continue raw text, without a chat template."""
        return await answer_request(service, request, TextRequest, TextCompletion)

    @router.post("/embeddings", **route_schema(EmbeddingRequest, EmbeddingsOut))
    async def embeddings(request: Request) -> Response:
        """Compute the vectors of texts with an embedding model."""
        return await answer_request(service, request, EmbeddingRequest, Embeddings)

    @router.get("/models", response_model=ModelsOut)
    async def models() -> dict[str, Any]:
        """List the one model that is served."""
        model = _model(service)
        ends = {"first_id": model["id"], "last_id": model["id"], "has_more": False}
        return {"object": "list", "data": [model], **ends}

    @router.get("/models/{name:path}", response_model=ModelOut)
    async def model(name: str) -> dict[str, Any]:
        """Return the served model, by its name or as `default`."""
        if name not in ("default", service.settings.model):
            raise ApiError(
                404,
                f"there is no model {name!r} here; {service.settings.model} is served",
                code="model_not_found",
            )
        return _model(service)

    return router


def _model(service: Service) -> dict[str, Any]:
    """Return the served model, with the fields of OpenAI's and of Anthropic's API."""
    return {
        "id": service.settings.model,
        "object": "model",
        "type": "model",
        "display_name": service.settings.model,
        "created": service.created,
        "created_at": datetime.fromtimestamp(service.created, UTC).isoformat(),
        "owned_by": "qwen3-mlx",
        "context_length": service.context,
        "max_input_tokens": service.context,
        "vocab_size": service.llm.config.vocab_size,
        "kind": service.llm.kind,
        "thinking": _modes(service),
    }


def _modes(service: Service) -> str:
    """Return whether the served model thinks."""
    thinking = service.llm.thinking
    if not (service.chats and thinking.can_think):
        return "never"
    return "hybrid" if thinking.hybrid else "always"
