"""Endpoints: what answers one request, in one shape for all protocols.

A body is parsed once its request has a slot. The endpoint that is created from it converts the
request for the library, and then responds: `ReplyEndpoint` with replies, complete or as a stream.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Generic

from fastapi import Request
from fastapi.responses import Response

from qwen3_mlx.server.access_log import reason_of
from qwen3_mlx.server.admission import Slot
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.models import Lease, ServedModel
from qwen3_mlx.server.registry import protocol_of
from qwen3_mlx.server.request_body import Body, parse_body
from qwen3_mlx.server.response import ActiveRequest, EventStreamResponse
from qwen3_mlx.server.service import ModelService, Prepare, Service
from qwen3_mlx.server.waiting import check_cancelled, wait_for
from qwen3_mlx.server.wire import json_bytes, warnings_header
from qwen3_mlx.text.events import Event

EVENTS = "text/event-stream"
_TOKEN_BYTES = 64  # JSON that a token may take in a response; many more with logprobs


class Endpoint(ABC, Generic[Body]):
    """Base of all endpoints; a ValueError or TypeError of `__init__` is the request's fault."""

    strict = False  # True if a sole model answers to its own names only
    param = "messages"  # the field that an error about the context window names

    def __init__(self, service: ModelService, body: Body) -> None:
        self.service = service
        self.body = body
        self.warnings: list[str] = []

    @classmethod
    def answer_unloaded(cls, service: Service, model: ServedModel, body: Body) -> Response | None:
        """Return the response to a request that needs no loaded model; None if it needs one."""
        return None

    @staticmethod
    def rename_fields(message: str) -> str:
        """Return an error or a warning of the library with the names that the protocol uses."""
        return message

    @classmethod
    def rename(cls, error: ApiError) -> None:
        """Put an error of the library into the protocol's names."""
        error.message = cls.rename_fields(error.message)
        error.param = cls.param if error.param else None

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
        running = await self.start(request, slot)
        headers = warnings_header(self.all_warnings(running))
        if self.streams:
            return EventStreamResponse(
                running.close, self.stream(running), self.media_type, headers
            )
        await running.complete(request, self.receive_events)
        echoed = sum(len(reply.prompt.others) for reply in running.replies if reply.prompt)
        size = (running.usage.completion_tokens + echoed) * _TOKEN_BYTES
        content = await self.service.run_sized(size, partial(self.complete, running))
        return Response(content, media_type="application/json", headers=headers)

    async def start(self, request: Request, slot: Slot) -> ActiveRequest:
        """Start the replies; the caller closes the result."""
        try:
            return await self.service.run(request, slot, self.prepares, choices=self.choices)
        except ApiError as error:
            self.rename(error)
            raise

    def all_warnings(self, running: ActiveRequest) -> list[str]:
        """Return the warnings of the request and of its preparation."""
        return [*self.warnings, *map(self.rename_fields, running.warnings)]

    async def stream(self, running: ActiveRequest) -> AsyncIterator[bytes]:
        """Yield the stream; an error of a reply is its end."""
        try:
            yield self.stream_start(running)
            async for events in running.batches(self.service.settings.keep_alive):
                yield self.stream_events(events) if events else self.stream_keepalive(running)
            yield self.stream_end(running)
        except ApiError as error:
            yield self.stream_error(error)

    @classmethod
    def comment(cls, model: str, text: str) -> bytes:
        """Return a piece of a stream that its clients ignore: an SSE comment."""
        return f": {text}\n\n".encode()

    @classmethod
    def early_error(cls, body: bytes) -> bytes:
        """Return the end of a stream that fails before its reply begins; `body` is JSON."""
        return b"event: error\ndata: " + body + b"\n\n"

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
        """Return what a stream has while there are no events: a comment with the progress."""
        progress = running.prefill
        done, total = (progress.done, progress.total) if progress else (0, running.prompt_tokens)
        text = "keepalive" if running.has_events else f"keepalive {done}/{total}"
        return self.comment(self.service.name, text)

    @abstractmethod
    def stream_end(self, running: ActiveRequest) -> bytes:
        """Return what a stream ends with when all replies are complete."""

    @abstractmethod
    def stream_error(self, error: ApiError) -> bytes:
        """Return what a stream ends with when it fails."""


@asynccontextmanager
async def admitted(
    service: Service, request: Request, body: type[Body]
) -> AsyncIterator[tuple[Slot, Body, int]]:
    """Admit a request for the block; yield its slot, its body, and the bytes of that.

    Raises:
        ApiError: the body cannot be read, or there are too many requests.
    """
    coding = request.headers.get("content-encoding", "")
    if coding.strip().lower() not in ("", "identity"):
        raise ApiError(415, f"a body in {coding!r:.100} is not supported; send it uncompressed")
    sent = await request.body()
    record = request.scope.setdefault("record", {})
    caller, key = request.scope.get("caller", ""), request.scope.get("key")
    with service.admission.one(record, caller, key) as slot:
        parse = partial(parse_body, sent, body, service.models.context)
        parsed = await service.run_sized(len(sent), parse)
        slot.widen(parsed.replies)
        yield slot, parsed, len(sent)


async def answer_request(
    service: Service,
    request: Request,
    body: type[Body],
    endpoint: type[Endpoint[Body]],
    **more: Any,
) -> Response:
    """Answer a request with the endpoint that is created from its body, perhaps on a thread.

    The endpoint gets the keywords in `more`. The model that the request names is loaded if it is
    not; a stream that waits for that begins with comments.

    Raises:
        ApiError: the body cannot be read, there are too many requests, there is no such model, or
            it cannot be loaded.
    """
    async with admitted(service, request, body) as (slot, parsed, size):
        model = service.models.find(parsed.model, strict=endpoint.strict)
        slot.record["model"] = model.source.shown_name(parsed.model)
        with client_errors(endpoint.rename_fields):
            keep_alive = parsed.model_seconds
        if response := endpoint.answer_unloaded(service, model, parsed):
            return response
        lease = service.models.lease(model, keep_alive)
        slot.resources.callback(lease.release)

        async def create() -> Endpoint[Body]:
            created = partial(
                _create, endpoint, ModelService(service, model, parsed.model), parsed, more
            )
            return await service.run_sized(size, created)

        patience = service.settings.keep_alive if parsed.streamed else None
        if await wait_for(lease.ready, request, slot, patience):
            with service.models.suggesting(model):
                return await (await create()).respond(request, slot)
        slot.kept = True
        assert issubclass(endpoint, ReplyEndpoint)
        waiting = WaitingStream(service, request, slot, lease, endpoint, create)
        return EventStreamResponse(waiting.close, waiting.stream(), endpoint.media_type, {})


def _create(
    endpoint: type[Endpoint[Body]], service: ModelService, body: Body, more: Mapping[str, Any]
) -> Endpoint[Body]:
    with client_errors(endpoint.rename_fields):
        return endpoint(service, body, **more)


@contextmanager
def client_errors(rename_fields: Callable[[str], str]) -> Iterator[None]:
    """Raise the ValueErrors and TypeErrors of the block as the request's fault."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ApiError(400, rename_fields(str(error))) from error


class WaitingStream(Generic[Body]):
    """A stream of events that begins before its model is loaded, and so with the status 200."""

    def __init__(
        self,
        service: Service,
        request: Request,
        slot: Slot,
        lease: Lease,
        endpoint: type[ReplyEndpoint[Body]],
        create: Callable[[], Awaitable[Endpoint[Body]]],
    ) -> None:
        self._service = service
        self._request = request
        self._slot = slot
        self._lease = lease
        self._endpoint = endpoint
        self._create = create
        self._running: ActiveRequest | None = None

    def close(self) -> None:
        """End the wait or the replies; may be called twice."""
        if self._running:
            self._running.close()  # which frees the slot once the engine is done
        else:
            self._slot.release()

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield comments until the model is loaded, then the stream of the endpoint."""
        model, comment = self._lease.model, partial(self._endpoint.comment, self._lease.model.name)
        try:
            while not self._lease.ready.done():
                done, total = model.progress
                yield comment(f"loading {done}/{total}")
                check_cancelled(self._slot)
                patience = self._service.settings.keep_alive
                await asyncio.wait([self._lease.ready], timeout=patience)
            self._lease.ready.result()
            with self._service.models.suggesting(model):
                endpoint = await self._create()
                assert isinstance(endpoint, ReplyEndpoint)
                running = self._running = await endpoint.start(self._request, self._slot)
            for name, value in warnings_header(endpoint.all_warnings(running)).items():
                yield comment(f"{name}: {value}")
            async for part in endpoint.stream(running):
                yield part
        except ApiError as error:
            self._slot.record.setdefault("error", reason_of(error))
            body = json_bytes(protocol_of(self._request.url.path).error_body(error))
            yield self._endpoint.early_error(body)
