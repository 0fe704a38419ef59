"""Routes of OpenAI's Responses API: create, retrieve and delete responses."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qwen3_mlx.server.endpoint import EVENTS, answer_request
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.openai.protocol import PROTOCOL
from qwen3_mlx.server.openapi import route_schema
from qwen3_mlx.server.responses.endpoint import ModelResponse
from qwen3_mlx.server.responses.schema import DeletedOut, ResponseOut, ResponsesRequest
from qwen3_mlx.server.responses.store import ResponseStore
from qwen3_mlx.server.service import Service
from qwen3_mlx.server.wire import Json


def routes(service: Service) -> APIRouter:
    """Create the routes, and the store of the responses."""
    router = PROTOCOL.router("/v1/responses")
    store = ResponseStore()

    @router.post("", **route_schema(ResponsesRequest, ResponseOut, EVENTS))
    async def create(request: Request) -> Response:
        """Create a response, complete or as a stream of events."""
        owner = _owner(request)
        return await answer_request(
            service, request, ResponsesRequest, ModelResponse, store=store, owner=owner
        )

    @router.get("/{response_id}", response_model=ResponseOut)
    async def retrieve(request: Request, response_id: str) -> Response:
        """Return a stored response."""
        if request.query_params.get("stream", "false").lower() not in ("false", "0"):
            raise ApiError(400, "a stored response is not streamed again; leave stream out")
        stored = store.get(_owner(request), response_id)
        if stored is None:
            raise _not_found(response_id)
        return Json(stored.response)

    @router.delete("/{response_id}", response_model=DeletedOut)
    async def delete(request: Request, response_id: str) -> dict[str, Any]:
        """Delete a stored response."""
        if not store.delete(_owner(request), response_id):
            raise _not_found(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    return router


def _owner(request: Request) -> str:
    return str(request.scope.get("owner", ""))


def _not_found(response_id: str) -> ApiError:
    return ApiError(404, f"Response with id '{response_id:.200}' not found.", param="response_id")
