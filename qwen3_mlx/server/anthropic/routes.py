"""Routes of Anthropic's API."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qwen3_mlx.server.anthropic.endpoints import MessageCompletion, TokenCount
from qwen3_mlx.server.anthropic.protocol import PROTOCOL
from qwen3_mlx.server.anthropic.schema import (
    AnthropicMessageOut,
    CountOut,
    MessagesRequest,
    PromptBody,
)
from qwen3_mlx.server.endpoint import EVENTS, answer_request
from qwen3_mlx.server.openapi import route_schema
from qwen3_mlx.server.service import Service


def routes(service: Service) -> APIRouter:
    """Create the routes of this protocol."""
    router = PROTOCOL.router("/v1/messages")

    @router.post("", **route_schema(MessagesRequest, AnthropicMessageOut, EVENTS))
    async def messages(request: Request) -> Response:
        """Create a message, complete or as a stream of events."""
        return await answer_request(service, request, MessagesRequest, MessageCompletion)

    @router.post("/count_tokens", **route_schema(PromptBody, CountOut))
    async def count_tokens(request: Request) -> Response:
        """Count the tokens of a prompt, without generating a reply."""
        return await answer_request(service, request, PromptBody, TokenCount)

    return router
