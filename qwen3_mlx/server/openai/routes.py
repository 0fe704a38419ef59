"""Routes of OpenAI's API: chat completions, text completions, embeddings, models."""

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qwen3_mlx.server.endpoint import EVENTS, answer_request
from qwen3_mlx.server.models import ServedModel
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
from qwen3_mlx.text.kind import CHAT


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
        """List the served models, loaded or not."""
        found = [
            _described(model, name)
            for model in service.models.models
            for name in model.source.names
        ]
        ends = {"first_id": found[0]["id"], "last_id": found[-1]["id"], "has_more": False}
        return {"object": "list", "data": found, **ends}

    @router.get("/models/{name:path}", response_model=ModelOut)
    async def model(name: str) -> dict[str, Any]:
        """Return a served model by its name; the first one is also called `default`."""
        found = service.models.find(name, strict=True)
        return _described(found, found.source.shown_name(name))

    return router


def _described(model: ServedModel, name: str) -> dict[str, Any]:
    """Return a served model, with the fields of OpenAI's, Anthropic's and LM Studio's API."""
    return {
        "id": name,
        "object": "model",
        "type": "model",
        "display_name": name,
        "created": model.created,
        "created_at": datetime.fromtimestamp(model.created, UTC).isoformat(),
        "owned_by": "qwen3-mlx",
        "kind": model.kind,
        "state": model.state,
        "context_length": model.context,
        "max_input_tokens": model.context,
        "vocab_size": model.source.config.vocab_size,
        "thinking": _modes(model),
    }


def _modes(model: ServedModel) -> str | None:
    """Return whether a model thinks; None before it is first loaded."""
    if model.kind != CHAT:
        return "never"
    if model.thinking is None:
        return None
    fixed = "always" if model.thinking.can_think else "never"
    return "hybrid" if model.thinking.hybrid else fixed
