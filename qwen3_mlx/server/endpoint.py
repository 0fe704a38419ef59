"""Endpoints: what answers one request, in one shape for all protocols.

A body is parsed once its request has a slot. The endpoint that is created from it converts the
request for the library, and then responds: `ReplyEndpoint` with replies, complete or as a stream.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any, Generic

from fastapi import Request
from fastapi.responses import Response

from qwen3_mlx.server.admission import Slot
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.request_body import Body, parse_body
from qwen3_mlx.server.response import ActiveRequest, EventStreamResponse
from qwen3_mlx.server.service import Prepare, Service
from qwen3_mlx.server.wire import warnings_header
from qwen3_mlx.text.events import Event

EVENTS = "text/event-stream"
_TOKEN_BYTES = 64  # JSON that a token may take in a response; many more with logprobs


class Endpoint(ABC, Generic[Body]):
    """Base of all endpoints; a ValueError or TypeError of `__init__` is the request's fault."""

    def __init__(self, service: Service, body: Body) -> None:
        self.service = service
        self.body = body
        self.warnings: list[str] = []

    @staticmethod
    def rename_fields(message: str) -> str:
        """Return an error or a warning of the library with the names that the protocol uses."""
        return message

    @abstractmethod
    async def respond(self, request: Request, slot: Slot) -> Response:
        """Return the response; the slot is freed whatever is returned or raised."""


class ReplyEndpoint(Endpoint[Body]):
    """Base of the endpoints that generate replies.

    The `__init__` of a subclass sets `prepares`, for each prompt a function that prepares its first
    reply, and where they differ `choices`, the number of replies to each prompt, and `streams`.
    """

    media_type = EVENTS
    prepares: Sequence[Prepare] = ()
    choices = 1
    streams = False

    async def respond(self, request: Request, slot: Slot) -> Response:
        """Return the response, complete or as a stream."""
        try:
            running = await self.service.run(request, slot, self.prepares, choices=self.choices)
        except ApiError as error:
            error.message = self.rename_fields(error.message)
            raise
        headers = warnings_header([*self.warnings, *map(self.rename_fields, running.warnings)])
        if self.streams:
            return EventStreamResponse(
                running.close, self._stream(running), self.media_type, headers
            )
        await running.complete(request, self.receive_events)
        echoed = sum(len(reply.prompt.others) for reply in running.replies if reply.prompt)
        size = (running.usage.completion_tokens + echoed) * _TOKEN_BYTES
        content = await self.service.run_sized(size, partial(self.complete, running))
        return Response(content, media_type="application/json", headers=headers)

    async def _stream(self, running: ActiveRequest) -> AsyncIterator[bytes]:
        try:
            yield self.stream_start(running)
            async for events in running.batches(self.service.settings.keep_alive):
                yield self.stream_events(events) if events else self.stream_keepalive(running)
            yield self.stream_end(running)
        except ApiError as error:
            yield self.stream_error(error)

    def receive_events(self, events: Sequence[tuple[int, Event]]) -> None:
        """Receive the events of a complete response, in their order across text and calls."""

    @abstractmethod
    def complete(self, running: ActiveRequest) -> bytes:
        """Return the complete response as JSON."""

    def stream_start(self, running: ActiveRequest) -> bytes:
        """Return what a stream begins with, before the first event."""
        return b""

    @abstractmethod
    def stream_events(self, events: Sequence[tuple[int, Event]]) -> bytes:
        """Return what a stream has for events, each with the number of its reply."""

    def stream_keepalive(self, running: ActiveRequest) -> bytes:
        """Return what a stream has while there are no events."""
        return b""

    @abstractmethod
    def stream_end(self, running: ActiveRequest) -> bytes:
        """Return what a stream ends with when all replies are complete."""

    @abstractmethod
    def stream_error(self, error: ApiError) -> bytes:
        """Return what a stream ends with when it fails."""


def progress_comment(running: ActiveRequest) -> bytes:
    """Return an SSE comment, which clients ignore, with the prefilled tokens of the prompt."""
    if running.has_events:
        return b": keepalive\n\n"
    progress = running.prefill
    done, total = (progress.done, progress.total) if progress else (0, running.prompt_tokens)
    return f": keepalive {done}/{total}\n\n".encode()


async def answer_request(
    service: Service,
    request: Request,
    body: type[Body],
    endpoint: type[Endpoint[Body]],
    **more: Any,
) -> Response:
    """Answer a request with the endpoint that is created from its body, perhaps on a thread.

    The endpoint gets the keywords in `more`.

    Raises:
        ApiError: the body cannot be read, or there are too many requests.
    """
    coding = request.headers.get("content-encoding", "")
    if coding.strip().lower() not in ("", "identity"):
        raise ApiError(415, f"a body in {coding!r:.100} is not supported; send it uncompressed")
    sent = await request.body()
    record = request.scope.setdefault("record", {})
    record["model"] = service.settings.model
    caller, key = request.scope.get("caller", ""), request.scope.get("key")
    with service.admission.one(record, caller, key) as slot:
        parse = partial(parse_body, sent, body, service.context)
        parsed = await service.run_sized(len(sent), parse)
        slot.widen(parsed.replies)
        create = partial(_create, endpoint, service, parsed, more)
        created = await service.run_sized(len(sent), create)
        return await created.respond(request, slot)


def _create(
    endpoint: type[Endpoint[Body]], service: Service, body: Body, more: Mapping[str, Any]
) -> Endpoint[Body]:
    try:
        return endpoint(service, body, **more)
    except (ValueError, TypeError) as error:
        raise ApiError(400, endpoint.rename_fields(str(error))) from error
