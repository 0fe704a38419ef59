"""Endpoints of Ollama's API: chat and generate."""

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response

from qwen3_mlx.api.options import Options
from qwen3_mlx.server.admission import Slot
from qwen3_mlx.server.endpoint import ReplyEndpoint
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.models import ServedModel
from qwen3_mlx.server.ollama.model import keep_alive_warnings, timestamp, unloaded
from qwen3_mlx.server.ollama.protocol import PROTOCOL
from qwen3_mlx.server.ollama.schema import (
    LINES,
    NOT_FOR_CHAT,
    NOT_FOR_GENERATE,
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaMessage,
    OllamaRequest,
    read_options,
    with_ollama_names,
)
from qwen3_mlx.server.response import ActiveRequest
from qwen3_mlx.server.service import ModelService, Prepare, Service
from qwen3_mlx.server.thinking import ThinkingRequest
from qwen3_mlx.server.wire import (
    Json,
    check_unknown,
    ends_with_assistant_text,
    json_bytes,
    logprob_entries,
    warnings_header,
)
from qwen3_mlx.text.events import Event, Finish, Reasoning, Text, TokenLogprob, ToolCall

_COUNT_FIELDS = (
    *("total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration"),
    *("eval_count", "eval_duration"),
)

OllamaBody = TypeVar("OllamaBody", bound=OllamaRequest)


class _OllamaEndpoint(ReplyEndpoint[OllamaBody]):
    """Base of chat and generate; without a prompt the model is only loaded or unloaded."""

    media_type = LINES
    strict = True  # since its clients check whether a model exists
    unsupported: Mapping[str, tuple[Any, ...]]
    rename_fields = staticmethod(with_ollama_names)

    def __init__(self, service: ModelService, body: OllamaBody) -> None:
        super().__init__(service, body)
        self.streams = body.stream is not False
        self.warnings += check_unknown(body, self.unsupported, frozenset())
        options, warnings = read_options(body.options or {}, service.context)
        self.warnings += warnings + body.not_honoured()
        self.warnings += keep_alive_warnings(service.model, body)
        if body.top_logprobs and not body.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        self._options: Options = {
            **options,
            "schema": {"type": "object"} if body.format == "json" else body.format or None,
            "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        }

    def _prepare(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> Prepare:
        """Return the function that prepares the reply to messages."""
        options: Options = {
            **self._options,
            **self.service.thinking_options(_thinking_request(self.body.think), self.warnings),
            "tools": [*tools] or None,
            "continue_last": ends_with_assistant_text(messages),
            "prefetch_next_turn": True,
        }
        return partial(self.service.llm.prepare, messages, **options)

    @classmethod
    def answer_unloaded(
        cls, service: Service, model: ServedModel, body: OllamaBody
    ) -> Response | None:
        """Return the response to a request to unload the model; None if it asks for a reply."""
        name = model.source.shown_name(body.model)
        return unloaded(service.models, model, body, cls._end(name, "unload", {}))

    @staticmethod
    @abstractmethod
    def _part(text: str = "", thinking: str = "", calls: Sequence[ToolCall] = ()) -> dict[str, Any]:
        """Return the fields of a response for text, thinking and tool calls."""

    async def respond(self, request: Request, slot: Slot) -> Response:
        """Return the response, complete or as a stream of lines."""
        if self.prepares:
            return await super().respond(request, slot)
        content = self._end(self.service.name, "load", {})
        return Json(content, headers=warnings_header(self.warnings))

    def complete(self, running: ActiveRequest) -> bytes:
        """Return the response."""
        [(reply, finish)] = running.completed
        content = self._part(reply.text, reply.reasoning, reply.tool_calls)
        return json_bytes(
            self._last(finish, running.timings) | content | self._logprobs(reply.logprobs)
        )

    def stream_events(self, events: Sequence[tuple[int, Event]]) -> bytes:
        """Return a line for each event; the last line takes the place of `Finish`."""
        lines = (self._line(event) for _, event in events if not isinstance(event, Finish))
        return b"".join(lines)

    def stream_end(self, running: ActiveRequest) -> bytes:
        """Return the last line, with the counts."""
        [(_, finish)] = running.completed
        return json_bytes(self._last(finish, running.timings)) + b"\n"

    @classmethod
    def comment(cls, model: str, text: str) -> bytes:
        """Return a line without text for the reader; its `status` is a word as of /api/pull."""
        return json_bytes({**_head(model), **cls._part(), "done": False, "status": text}) + b"\n"

    @classmethod
    def early_error(cls, body: bytes) -> bytes:
        """Return an error, which is the last line."""
        return body + b"\n"

    def stream_error(self, error: ApiError) -> bytes:
        """Return an error, which is the last line."""
        return json_bytes(PROTOCOL.error_body(error)) + b"\n"

    def _line(self, event: Event) -> bytes:
        part = self._part()
        if isinstance(event, Text):
            part = self._part(event.text) | self._logprobs(event.tokens)
        elif isinstance(event, Reasoning):
            part = self._part(thinking=event.text)
        elif isinstance(event, ToolCall):
            part = self._part(calls=[event])
        return json_bytes({**_head(self.service.name), **part, "done": False}) + b"\n"

    def _last(self, finish: Finish, timings: Mapping[str, float]) -> dict[str, Any]:
        # Milliseconds to nanoseconds.
        prefill, decode = (int(timings[name] * 1e6) for name in ("prompt_ms", "predicted_ms"))
        counts = {
            "total_duration": prefill + decode,
            "prompt_eval_count": finish.usage.prompt_tokens,
            "prompt_eval_duration": prefill,
            "eval_count": finish.usage.completion_tokens,
            "eval_duration": decode,
        }
        reason = "length" if finish.reason == "length" else "stop"
        return self._end(self.service.name, reason, counts)

    @classmethod
    def _end(cls, name: str, reason: str, counts: Mapping[str, int]) -> dict[str, Any]:
        head = {**_head(name), **cls._part(), "done": True, "done_reason": reason}
        return {**head, **dict.fromkeys(_COUNT_FIELDS, 0), **counts}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {"logprobs": logprob_entries(tokens)} if self.body.logprobs else {}


class Chat(_OllamaEndpoint[OllamaChatRequest]):
    """A message of the assistant."""

    unsupported = NOT_FOR_CHAT

    def __init__(self, service: ModelService, body: OllamaChatRequest) -> None:
        super().__init__(service, body)
        messages = [_library_message(message) for message in body.messages or ()]
        tools = [tool.library_tool() for tool in body.tools or ()]
        self.prepares = [self._prepare(messages, tools)] if messages else []

    @staticmethod
    def _part(text: str = "", thinking: str = "", calls: Sequence[ToolCall] = ()) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if thinking:
            message["thinking"] = thinking
        if calls:
            message["tool_calls"] = [
                {"function": {"name": call.name, "arguments": call.arguments}} for call in calls
            ]
        return {"message": message}


class Generate(_OllamaEndpoint[OllamaGenerateRequest]):
    """The reply to a prompt, or its continuation as raw text with `raw`."""

    unsupported = NOT_FOR_GENERATE

    def __init__(self, service: ModelService, body: OllamaGenerateRequest) -> None:
        super().__init__(service, body)
        if body.prompt:
            prepare = self._prepare_raw if body.raw else self._prepare_turn
            self.prepares = [prepare(body.prompt)]

    def _prepare_turn(self, prompt: str) -> Prepare:
        system = [{"role": "system", "content": self.body.system}] if self.body.system else []
        return self._prepare([*system, {"role": "user", "content": prompt}])

    def _prepare_raw(self, prompt: str) -> Prepare:
        for name, value in (("system", self.body.system), ("think", self.body.think)):
            if value:
                raise ValueError(f"{name} needs the chat template, which raw switches off")
        options: Options = {**self._options, "loop_guard": False}
        return partial(self.service.llm.prepare_text, prompt, **options)

    @staticmethod
    def _part(text: str = "", thinking: str = "", calls: Sequence[ToolCall] = ()) -> dict[str, Any]:
        return {"response": text} | ({"thinking": thinking} if thinking else {})


def _head(name: str) -> dict[str, Any]:
    return {"model": name, "created_at": timestamp(time.time())}


def _thinking_request(think: bool | str | None) -> ThinkingRequest:
    if isinstance(think, str):
        return ThinkingRequest(effort=think, effort_name="think")
    return ThinkingRequest(([("think", think)],))


def _library_message(message: OllamaMessage) -> dict[str, Any]:
    if message.images:
        raise ValueError("images cannot be read: Qwen3 reads text only")
    converted: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.thinking:
        converted["reasoning_content"] = message.thinking
    if message.tool_call_id:
        converted["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        converted["tool_calls"] = [
            {
                "type": "function",
                "function": call.function.model_dump(include={"name", "arguments"}),
            }
            for call in message.tool_calls
        ]
    return converted
