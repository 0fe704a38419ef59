"""Routes of Ollama's API."""

from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qwen3_mlx.server.endpoint import answer_request
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.ollama.endpoints import Chat, Generate
from qwen3_mlx.server.ollama.model import loaded_models, model_details, model_entries
from qwen3_mlx.server.ollama.protocol import PROTOCOL
from qwen3_mlx.server.ollama.pull import answer_pull
from qwen3_mlx.server.ollama.schema import (
    API_VERSION,
    LINES,
    OllamaChatOut,
    OllamaChatRequest,
    OllamaEmbeddingsOut,
    OllamaEmbeddingsRequest,
    OllamaEmbedOut,
    OllamaEmbedRequest,
    OllamaGenerateOut,
    OllamaGenerateRequest,
    OllamaPullOut,
    OllamaPullRequest,
    OllamaShowRequest,
)
from qwen3_mlx.server.ollama.vectors import Embed, Embeddings
from qwen3_mlx.server.openapi import route_schema
from qwen3_mlx.server.request_body import parse_body
from qwen3_mlx.server.service import Service
from qwen3_mlx.server.wire import Json, check_unknown, warnings_header
from qwen3_mlx.version import __version__

_UNSUPPORTED_ROUTES = {
    "/push": ("POST", "uploads none"),
    "/create": ("POST", "makes no others"),
    "/copy": ("POST", "copies none"),
    "/delete": ("DELETE", "deletes none"),
}


def routes(service: Service) -> APIRouter:
    """Create the routes of this protocol."""
    router = PROTOCOL.router("/api")

    @router.post("/chat", **route_schema(OllamaChatRequest, OllamaChatOut, LINES))
    async def chat(request: Request) -> Response:
        """Create a chat message, complete or as a stream of lines."""
        return await answer_request(service, request, OllamaChatRequest, Chat)

    @router.post("/generate", **route_schema(OllamaGenerateRequest, OllamaGenerateOut, LINES))
    async def generate(request: Request) -> Response:
        """Answer a prompt, or continue it as raw text with `raw`."""
        return await answer_request(service, request, OllamaGenerateRequest, Generate)

    @router.head("/tags", include_in_schema=False)
    @router.get("/tags")
    async def tags() -> dict[str, Any]:
        """List the served models, loaded or not."""
        return {"models": model_entries(service.models)}

    @router.get("/ps")
    async def loaded() -> dict[str, Any]:
        """List the loaded models."""
        return {"models": loaded_models(service.models)}

    @router.post("/show", **route_schema(OllamaShowRequest))
    async def show(request: Request) -> Response:
        """Describe a served model and its capabilities."""
        sent = await request.body()
        parse = partial(parse_body, sent, OllamaShowRequest, service.models.context)
        body = await service.run_sized(len(sent), parse)
        name = body.model or body.name
        model = service.models.find(name, strict=True)
        headers = warnings_header(check_unknown(body, {}, frozenset()))
        return Json(model_details(model, model.source.shown_name(name)), headers=headers)

    @router.post("/pull", **route_schema(OllamaPullRequest, OllamaPullOut, LINES))
    async def pull(request: Request) -> Response:
        """Download a model to this machine, if the server was started with --allow-pull."""
        return await answer_pull(service, request)

    @router.head("/version", include_in_schema=False)
    @router.get("/version")
    async def version() -> dict[str, str]:
        """Return the version of Ollama's API, which clients compare, and that of this server."""
        return {"version": API_VERSION, "qwen3_mlx": __version__}

    _add_vectors(router, service)
    for path, (method, reason) in _UNSUPPORTED_ROUTES.items():
        refuse = _refusal(f"/api{path}", reason)
        router.add_api_route(path, refuse, methods=[method], include_in_schema=False)
    return router


def _add_vectors(router: APIRouter, service: Service) -> None:
    @router.post("/embed", **route_schema(OllamaEmbedRequest, OllamaEmbedOut))
    async def embed(request: Request) -> Response:
        """Compute the vectors of texts with an embedding model."""
        return await answer_request(service, request, OllamaEmbedRequest, Embed)

    @router.post("/embeddings", **route_schema(OllamaEmbeddingsRequest, OllamaEmbeddingsOut))
    async def embeddings(request: Request) -> Response:
        """Compute the vector of one text; the older form of `/api/embed`."""
        return await answer_request(service, request, OllamaEmbeddingsRequest, Embeddings)


def _refusal(path: str, reason: str) -> Callable[[], Response]:
    def refuse() -> Response:
        raise ApiError(501, f"{path} is not supported: this server {reason}")

    return refuse
