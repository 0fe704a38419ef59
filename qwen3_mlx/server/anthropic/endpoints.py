"""Endpoints of Anthropic's API: messages, and token counts."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from qwen3_mlx.api.options import Options
from qwen3_mlx.api.stream import ReplyBuilder
from qwen3_mlx.engine.sampling_params import SamplingParams
from qwen3_mlx.server.admission import Slot
from qwen3_mlx.server.anthropic.protocol import PROTOCOL
from qwen3_mlx.server.anthropic.schema import (
    HARMLESS,
    NOT_SUPPORTED,
    MessagesRequest,
    PromptBody,
)
from qwen3_mlx.server.endpoint import Endpoint, ReplyEndpoint
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.response import ActiveRequest
from qwen3_mlx.server.service import ModelService
from qwen3_mlx.server.wire import (
    Json,
    check_unknown,
    ends_with_assistant_text,
    json_bytes,
    stop_strings,
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

# Clients require a signature, and send it back with the thinking; it is not verified here.
_SIGNATURE = "qwen3-mlx"


class TokenCount(Endpoint[PromptBody]):
    """The number of tokens of a prompt."""

    def __init__(self, service: ModelService, body: PromptBody) -> None:
        super().__init__(service, body)
        messages, options = _prompt(service, body, self.warnings)
        self._count = partial(service.llm.count_tokens, messages, **options)

    async def respond(self, request: Request, slot: Slot) -> Response:
        """Return the response."""
        run = self.service.preparing.run
        counted = await run(request, slot.cancelled, lambda _: self._count())
        return Json({"input_tokens": counted}, headers=warnings_header(self.warnings))


class MessageCompletion(ReplyEndpoint[MessagesRequest]):
    """A message of the assistant."""

    def __init__(self, service: ModelService, body: MessagesRequest) -> None:
        super().__init__(service, body)
        self.streams = bool(body.stream)
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": service.name,
        }
        self._writer = _StreamWriter()
        messages, options = _prompt(service, body, self.warnings)
        output_format = body.output_config.format if body.output_config else None
        options |= {
            "sampling": SamplingParams(
                temperature=body.temperature,
                top_p=body.top_p,
                top_k=0 if body.top_k == -1 else body.top_k,
            ),
            "max_tokens": body.max_tokens,
            "stop": stop_strings(body.stop_sequences),
            "schema": output_format.schema_ if output_format else None,
            "partial_calls": self.streams,
            "prefetch_next_turn": True,
        }
        self.prepares = [partial(service.llm.prepare, messages, **options)]

    def complete(self, running: ActiveRequest) -> bytes:
        """Return the message."""
        [(reply, finish)] = running.completed
        content = {"content": list(_blocks(reply))}
        return json_bytes(self._head | content | self._end(finish) | _usage(finish.usage))

    def stream_start(self, running: ActiveRequest) -> bytes:
        """Return the message without its content."""
        usage = _usage(Usage(running.prompt_tokens, 0, 0, 0))
        empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        return _event("message_start", message=self._head | empty | usage)

    def stream_events(self, events: Sequence[tuple[int, Event]]) -> bytes:
        """Return the deltas of the content blocks."""
        return b"".join(part for _, event in events for part in self._writer.write(event))

    def stream_keepalive(self, running: ActiveRequest) -> bytes:
        """Return a ping."""
        return _event("ping")

    def stream_end(self, running: ActiveRequest) -> bytes:
        """Return the stop reason and the token counts."""
        [(_, finish)] = running.completed
        end = _event("message_delta", delta=self._end(finish), **_usage(finish.usage))
        return end + _event("message_stop")

    def stream_error(self, error: ApiError) -> bytes:
        """Return an error, which is the last event."""
        return _event("error", **PROTOCOL.error_body(error))

    def _end(self, finish: Finish) -> dict[str, Any]:
        """Return the stop reason and the stop sequence."""
        stop = finish.details.get("stop")
        reason = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[
            finish.reason
        ]
        generated = finish.usage.completion_tokens
        full = finish.usage.prompt_tokens + generated >= self.service.context
        if reason == "max_tokens" and full and generated < self.body.max_tokens:
            reason = "model_context_window_exceeded"
        return {"stop_reason": "stop_sequence" if stop else reason, "stop_sequence": stop}


def _prompt(
    service: ModelService, body: PromptBody, warnings: list[str]
) -> tuple[list[dict[str, Any]], Options]:
    """Return the messages of a prompt and the options that it depends on, and append warnings.

    Raises:
        TypeError, ValueError: the prompt is invalid or not supported.
    """
    warnings += service.model_warnings(body)
    warnings += check_unknown(body, NOT_SUPPORTED, HARMLESS)
    messages = body.library_messages()
    choice = body.tool_choice
    if choice and (choice.type == "tool") != bool(choice.name):
        raise ValueError("tool_choice of type tool needs a name, and no other type has one")
    modes = {"auto": "auto", "any": "required", "none": "none"}
    options: Options = {
        **service.thinking_options(body.thinking_request(), warnings),
        "tools": body.library_tools() or None,
        "tool_choice": (choice.name or modes[choice.type]) if choice else "auto",
        "parallel_tool_calls": not (choice and choice.disable_parallel_tool_use),
        "continue_last": ends_with_assistant_text(messages),
    }
    return messages, options


class _StreamWriter:
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


def _usage(usage: Usage) -> dict[str, Any]:
    counts = {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
    }
    return {"usage": counts}


def _event(kind: str, **data: Any) -> bytes:
    return f"event: {kind}\ndata: ".encode() + json_bytes({"type": kind, **data}) + b"\n\n"
