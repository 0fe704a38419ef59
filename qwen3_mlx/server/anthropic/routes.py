"""Routes of Anthropic's API."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qwen3_mlx.server.anthropic.endpoints import Messages, TokenCount
from qwen3_mlx.server.anthropic.protocol import PROTOCOL
from qwen3_mlx.server.anthropic.schema import CountOut, MessageOut, MessagesRequest, PromptBody
from qwen3_mlx.server.endpoint import EVENTS, answer_request
from qwen3_mlx.server.openapi import body_schema
from qwen3_mlx.server.service import Service

_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {EVENTS: {}}}}


def routes(service: Service) -> APIRouter:
    """Create the routes of this protocol."""
    router = PROTOCOL.router("/v1/messages")

    @router.post("", response_model=MessageOut, responses=_STREAM, **body_schema(MessagesRequest))
    async def messages(request: Request) -> Response:
        """Create a message, complete or as a stream of events."""
        return await answer_request(service, request, MessagesRequest, Messages)

    @router.post("/count_tokens", response_model=CountOut, **body_schema(PromptBody))
    async def count_tokens(request: Request) -> Response:
        """Count the tokens of a prompt, without generating a reply."""
        return await answer_request(service, request, PromptBody, TokenCount)

    return router
