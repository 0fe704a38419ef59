"""Routes of Anthropic's API: messages, and token counts."""

import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qwen3_mlx.api.options import Options
from qwen3_mlx.api.stream import ReplyBuilder
from qwen3_mlx.engine.sampling_params import SamplingParams
from qwen3_mlx.server.admission import Slot
from qwen3_mlx.server.anthropic.protocol import PROTOCOL
from qwen3_mlx.server.anthropic.schema import (
    HARMLESS,
    NOT_SUPPORTED,
    CountOut,
    MessageOut,
    MessagesRequest,
    PromptBody,
)
from qwen3_mlx.server.completion import EVENTS, stop_strings
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.openapi import body_schema
from qwen3_mlx.server.request_body import answer_request
from qwen3_mlx.server.response import ActiveRequest, EventStreamResponse
from qwen3_mlx.server.service import Service
from qwen3_mlx.server.wire import (
    Json,
    check_unknown,
    ends_with_assistant_text,
    json_bytes,
    warnings_header,
)
from qwen3_mlx.text.events import (
    Event,
    Finish,
    Reasoning,
    Text,
    ToolCall,
    ToolCallDelta,
    Usage,
)

_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {EVENTS: {}}}}
# Clients require a signature, and send it back with the thinking; it is not verified here.
_SIGNATURE = "qwen3-mlx"


def routes(service: Service) -> APIRouter:
    """Create the routes of this protocol."""
    router = PROTOCOL.router("/v1/messages")

    @router.post("", response_model=MessageOut, responses=_STREAM, **body_schema(MessagesRequest))
    async def messages(request: Request) -> Response:
        """Create a message, complete or as a stream of events."""
        return await answer_request(service, request, MessagesRequest, _Messages)

    @router.post("/count_tokens", response_model=CountOut, **body_schema(PromptBody))
    async def count_tokens(request: Request) -> Response:
        """Count the tokens of a prompt, without generating a reply."""
        return await answer_request(service, request, PromptBody, _Count)

    return router


def _prompt(service: Service, asked: PromptBody) -> tuple[list[dict[str, Any]], Options, list[str]]:
    """Return the messages of a prompt, the options that it depends on, and warnings.

    Raises:
        TypeError, ValueError: the prompt is invalid or not supported.
    """
    warnings = service.model_warnings(asked.model)
    warnings += check_unknown(asked, NOT_SUPPORTED, HARMLESS)
    messages = asked.library_messages()
    choice = asked.tool_choice
    if choice and (choice.type == "tool") != bool(choice.name):
        raise ValueError("tool_choice of type tool needs a name, and no other type has one")
    modes = {"auto": "auto", "any": "required", "none": "none"}
    options: Options = {
        **service.options(asked.thinking_request(), warnings),
        "tools": asked.library_tools() or None,
        "tool_choice": (choice.name or modes[choice.type]) if choice else "auto",
        "parallel_tool_calls": not (choice and choice.disable_parallel_tool_use),
        "continue_last": ends_with_assistant_text(messages),
    }
    return messages, options, warnings


class _Count:
    """Answers a request for the number of tokens of a prompt."""

    def __init__(self, service: Service, asked: PromptBody) -> None:
        self._service = service
        try:
            self._messages, self._options, self._warnings = _prompt(service, asked)
        except (ValueError, TypeError) as error:
            raise ApiError(400, str(error)) from error

    async def respond(self, request: Request, place: Slot) -> Response:
        """Return the response."""
        count = partial(self._service.llm.count_tokens, self._messages, **self._options)
        do = self._service.preparing.do
        counted = await do(request, place.cancelled, lambda _: count())
        return Json({"input_tokens": counted}, headers=warnings_header(self._warnings))


class _Messages:
    """Answers a request for a message."""

    def __init__(self, service: Service, asked: MessagesRequest) -> None:
        self._service = service
        self._asked = asked
        self._id = f"msg_{secrets.token_hex(12)}"
        form = asked.output_config.format if asked.output_config else None
        try:
            self._messages, options, self._warnings = _prompt(service, asked)
            self._options: Options = {
                **options,
                "sampling": SamplingParams(
                    temperature=asked.temperature,
                    top_p=asked.top_p,
                    top_k=0 if asked.top_k == -1 else asked.top_k,
                ),
                "max_tokens": asked.max_tokens,
                "stop": stop_strings(asked.stop_sequences),
                "schema": form.schema_ if form else None,
                "partial_calls": bool(asked.stream),
                "prefetch_next_turn": True,
            }
        except (ValueError, TypeError) as error:
            raise ApiError(400, str(error)) from error

    async def respond(self, request: Request, place: Slot) -> Response:
        """Return the response, complete or as a stream."""
        prepare = partial(self._service.llm.prepare, self._messages, **self._options)
        running = await self._service.run(request, place, [prepare])
        headers = warnings_header(self._warnings + running.warnings)
        if self._asked.stream:
            return EventStreamResponse(running, self._events(running), EVENTS, headers)
        await running.complete(request)
        reply, finish = running.replies[0], running.finishes[0]
        assert finish
        usage = _usage(finish.usage)
        end = self._end(finish)
        content = list(_blocks(reply))
        return Json({**self._head(), "content": content, **end, "usage": usage}, headers=headers)

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._service.settings.model,
        }

    def _end(self, finish: Finish) -> dict[str, Any]:
        """Return the stop reason and the stop sequence."""
        stop = finish.details.get("stop")
        reason = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[
            finish.reason
        ]
        generated = finish.usage.completion_tokens
        full = finish.usage.prompt_tokens + generated >= self._service.context
        if reason == "max_tokens" and full and generated < self._asked.max_tokens:
            reason = "model_context_window_exceeded"
        return {"stop_reason": "stop_sequence" if stop else reason, "stop_sequence": stop}

    async def _events(self, running: ActiveRequest) -> AsyncIterator[bytes]:
        start = Usage(running.prompt_tokens, 0, 0, 0)
        yield _event(
            "message_start",
            message={
                **self._head(),
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": _usage(start),
            },
        )
        writer = _Writer()
        try:
            async for events in running.batches(self._service.settings.keep_alive):
                if events:
                    yield b"".join(part for _, event in events for part in writer.write(event))
                else:
                    yield _event("ping")
            finish = running.finishes[0]
            assert finish
            yield _event("message_delta", delta=self._end(finish), usage=_usage(finish.usage))
            yield _event("message_stop")
        except ApiError as error:
            yield _event("error", **PROTOCOL.error_body(error))


class _Writer:
    """Writes the content blocks of a stream, one open at a time."""

    def __init__(self) -> None:
        self._index = 0
        self._open: str | None = None

    def write(self, event: Event) -> Iterator[bytes]:
        """Yield the server-sent events for an event of the reply."""
        if isinstance(event, Reasoning):
            yield from self._write_delta("thinking", event.text, {"thinking": "", "signature": ""})
        elif isinstance(event, Text):
            yield from self._write_delta("text", event.text, {"text": ""})
        elif isinstance(event, ToolCallDelta):
            if self._open != event.id:
                yield from self._close()
                yield self._start({"type": "tool_use", **_tool(event), "input": {}})
                self._open = event.id
            yield self._delta(type="input_json_delta", partial_json=event.text)
        else:
            yield from self._close()

    def _write_delta(self, kind: str, text: str, empty: Mapping[str, str]) -> Iterator[bytes]:
        if self._open != kind:
            yield from self._close()
            yield self._start({"type": kind, **empty})
            self._open = kind
        yield self._delta(type=f"{kind}_delta", **{kind: text})

    def _close(self) -> Iterator[bytes]:
        if self._open is None:
            return
        if self._open == "thinking":
            yield self._delta(type="signature_delta", signature=_SIGNATURE)
        yield _event("content_block_stop", index=self._index)
        self._open = None
        self._index += 1

    def _start(self, block: Mapping[str, Any]) -> bytes:
        return _event("content_block_start", index=self._index, content_block=block)

    def _delta(self, **delta: str) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)


def _blocks(reply: ReplyBuilder) -> Iterator[dict[str, Any]]:
    """Yield the content blocks of a complete reply."""
    if reply.reasoning:
        yield {"type": "thinking", "thinking": reply.reasoning, "signature": _SIGNATURE}
    if reply.text:
        yield {"type": "text", "text": reply.text}
    for call in reply.tool_calls:
        yield {"type": "tool_use", **_tool(call), "input": call.arguments}


def _tool(call: ToolCall | ToolCallDelta) -> dict[str, str]:
    return {"id": f"toolu_{call.id.removeprefix('call_')}", "name": call.name}


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
    }


def _event(kind: str, **data: Any) -> bytes:
    return f"event: {kind}\ndata: ".encode() + json_bytes({"type": kind, **data}) + b"\n\n"
