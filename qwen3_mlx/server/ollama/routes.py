"""Routes of Ollama's API: chat, generate, and the description of the model."""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qwen3_mlx.api.options import Options
from qwen3_mlx.server.admission import Slot
from qwen3_mlx.server.completion import token_text
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.ollama.protocol import PROTOCOL
from qwen3_mlx.server.ollama.schema import (
    API_VERSION,
    NOT_FOR_CHAT,
    NOT_FOR_GENERATE,
    OllamaChatOut,
    OllamaChatRequest,
    OllamaGenerateOut,
    OllamaGenerateRequest,
    OllamaMessage,
    OllamaRequest,
    OllamaShowRequest,
    read_options,
    seconds_of,
    with_ollama_names,
)
from qwen3_mlx.server.openapi import body_schema
from qwen3_mlx.server.request_body import answer_request, parse_body
from qwen3_mlx.server.response import ActiveRequest, EventStreamResponse
from qwen3_mlx.server.service import Prepare, Service
from qwen3_mlx.server.thinking import ThinkingRequest
from qwen3_mlx.server.wire import (
    Json,
    check_unknown,
    ends_with_assistant_text,
    json_bytes,
    warnings_header,
)
from qwen3_mlx.text.events import Event, Finish, Reasoning, Text, TokenLogprob, ToolCall
from qwen3_mlx.version import __version__

_LINES = "application/x-ndjson"
_NEVER = "9999-12-31T23:59:59Z"  # expiry of the model, which stays loaded
_STREAM: dict[str, Any] = {"content": {_LINES: {}}}
_COUNT_FIELDS = (
    *("total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration"),
    *("eval_count", "eval_duration"),
)
_UNSUPPORTED_ROUTES = {
    "/embed": ("POST", "makes no embeddings"),
    "/embeddings": ("POST", "makes no embeddings"),
    "/pull": ("POST", "fetches no others"),
    "/push": ("POST", "uploads none"),
    "/create": ("POST", "makes no others"),
    "/copy": ("POST", "copies none"),
    "/delete": ("DELETE", "deletes none"),
}


def routes(service: Service) -> APIRouter:
    """Create the routes of this protocol."""
    router = PROTOCOL.router("/api")

    @router.post(
        "/chat",
        response_model=OllamaChatOut,
        responses={200: _STREAM},
        **body_schema(OllamaChatRequest),
    )
    async def chat(request: Request) -> Response:
        """Create a chat message, complete or as a stream of lines."""
        return await answer_request(service, request, OllamaChatRequest, _Chat)

    @router.post(
        "/generate",
        response_model=OllamaGenerateOut,
        responses={200: _STREAM},
        **body_schema(OllamaGenerateRequest),
    )
    async def generate(request: Request) -> Response:
        """Answer a prompt, or continue it as raw text with `raw`."""
        return await answer_request(service, request, OllamaGenerateRequest, _Generate)

    @router.head("/tags", include_in_schema=False)
    @router.get("/tags")
    async def tags() -> dict[str, Any]:
        """List the names of the served model."""
        return {"models": [_model(service, name) for name in _names(service)]}

    @router.get("/ps")
    async def loaded() -> dict[str, Any]:
        """List the loaded model."""
        model = _model(service, service.settings.model)
        more = {"expires_at": _NEVER, "size_vram": 0, "context_length": service.context}
        return {"models": [{**model, **more}]}

    @router.post("/show", **body_schema(OllamaShowRequest))
    async def show(request: Request) -> Response:
        """Describe the served model and its capabilities."""
        sent = await request.body()
        parse = partial(parse_body, sent, OllamaShowRequest, service.context)
        body = await service.run_sized(len(sent), parse)
        _check_model(service, body.model or body.name)
        return Json(
            _description(service), headers=warnings_header(check_unknown(body, {}, frozenset()))
        )

    @router.head("/version", include_in_schema=False)
    @router.get("/version")
    async def version() -> dict[str, str]:
        """Return the version of Ollama's API, which clients compare, and that of this server."""
        return {"version": API_VERSION, "qwen3_mlx": __version__}

    for path, (method, reason) in _UNSUPPORTED_ROUTES.items():
        refuse = _refusal(f"/api{path}", service.settings.model, reason)
        router.add_api_route(path, refuse, methods=[method], include_in_schema=False)
    return router


def _refusal(path: str, model: str, reason: str) -> Callable[[], Response]:
    def refuse() -> Response:
        raise ApiError(
            501, f"{path} is not supported: this server has one model, {model}, and {reason}"
        )

    return refuse


def _names(service: Service) -> list[str]:
    """Return the names of the served model."""
    return [*dict.fromkeys((service.settings.model, "default"))]


def _check_model(service: Service, name: str | None) -> None:
    """Check that a name is one of the served model's; no name stands for it, too.

    Raises:
        ApiError: the name is another model's (404).
    """
    names = _names(service)
    if name and name.lower().removesuffix(":latest") not in [own.lower() for own in names]:
        raise ApiError(404, f"model {name!r:.200} not found; there is {' or '.join(names)}")


def _model(service: Service, name: str) -> dict[str, Any]:
    family = service.llm.config.model_type
    return {
        "name": name,
        "model": name,
        "modified_at": _timestamp(service.created),
        "size": 0,
        "digest": sha256(name.encode()).hexdigest(),  # Ollama's command line shows a part of it
        "details": {
            "parent_model": "",
            "format": "safetensors",
            "family": family,
            "families": [family],
            "parameter_size": "",
            "quantization_level": "",
        },
    }


def _description(service: Service) -> dict[str, Any]:
    thinking = ["thinking"] if service.llm.thinking.can_think else []
    family = service.llm.config.model_type
    return {
        **_model(service, service.settings.model),
        "capabilities": ["completion", "tools", *thinking],
        "model_info": {
            "general.architecture": family,
            f"{family}.context_length": service.context,
        },
    }


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


class _Reply(ABC):
    """Base of the answers to chat and generate."""

    def __init__(
        self, service: Service, asked: OllamaRequest, unsupported: Mapping[str, tuple[Any, ...]]
    ) -> None:
        _check_model(service, asked.model)
        self._service = service
        self._streams = asked.stream is not False
        self._with_logprobs = bool(asked.logprobs)
        try:
            self._keep_alive_seconds = seconds_of(asked.keep_alive)
            self._warnings = check_unknown(asked, unsupported, frozenset())
            sampling_options, warnings = read_options(asked.options or {}, service.context)
            self._warnings += warnings + asked.not_honoured()
            if asked.top_logprobs and not asked.logprobs:
                raise ValueError("top_logprobs needs logprobs=true")
            self._options: Options = {
                **sampling_options,
                "schema": {"type": "object"} if asked.format == "json" else asked.format or None,
                "logprobs": (asked.top_logprobs or 0) if asked.logprobs else None,
            }
            self._prepare = self._make_prepare()
        except (ValueError, TypeError) as error:
            raise ApiError(400, with_ollama_names(str(error))) from error

    @abstractmethod
    def _make_prepare(self) -> Prepare | None:
        """Return the function that prepares the reply; None if the model is only to be loaded."""

    @abstractmethod
    def _part(
        self, text: str = "", thinking: str = "", calls: Sequence[ToolCall] = ()
    ) -> dict[str, Any]:
        """Return the fields of a response for text, thinking and tool calls."""

    async def respond(self, request: Request, place: Slot) -> Response:
        """Return the response, complete or as a stream of lines."""
        if self._prepare is None:
            reason = "unload" if self._keep_alive_seconds == 0 else "load"
            return Json(self._end(reason, {}), headers=warnings_header(self._warnings))
        try:
            running = await self._service.run(request, place, [self._prepare])
        except ApiError as error:
            error.message = with_ollama_names(error.message)
            raise
        headers = warnings_header(self._warnings + [*map(with_ollama_names, running.warnings)])
        if self._streams:
            return EventStreamResponse(running, self._lines(running), _LINES, headers)
        await running.complete(request)
        reply = running.replies[0]
        content = self._part(reply.text, reply.reasoning, reply.tool_calls)
        return Json(
            {**self._last(running), **content, **self._logprobs(reply.logprobs)}, headers=headers
        )

    async def _lines(self, running: ActiveRequest) -> AsyncIterator[bytes]:
        try:
            async for events in running.batches(self._service.settings.keep_alive):
                lines = [self._line(event) for _, event in events if not isinstance(event, Finish)]
                if lines:
                    yield b"".join(lines)
            yield json_bytes(self._last(running)) + b"\n"
        except ApiError as error:
            yield json_bytes(PROTOCOL.error_body(error)) + b"\n"

    def _line(self, event: Event) -> bytes:
        part = self._part()
        if isinstance(event, Text):
            part = self._part(event.text) | self._logprobs(event.tokens)
        elif isinstance(event, Reasoning):
            part = self._part(thinking=event.text)
        elif isinstance(event, ToolCall):
            part = self._part(calls=[event])
        return json_bytes({**self._head(), **part, "done": False}) + b"\n"

    def _head(self) -> dict[str, Any]:
        return {"model": self._service.settings.model, "created_at": _timestamp(time.time())}

    def _last(self, running: ActiveRequest) -> dict[str, Any]:
        finish, timings = running.finishes[0], running.timings
        assert finish
        # Milliseconds to nanoseconds.
        prefill, decode = (int(timings[name] * 1e6) for name in ("prompt_ms", "predicted_ms"))
        counts = {
            "total_duration": prefill + decode,
            "prompt_eval_count": finish.usage.prompt_tokens,
            "prompt_eval_duration": prefill,
            "eval_count": finish.usage.completion_tokens,
            "eval_duration": decode,
        }
        return self._end("length" if finish.reason == "length" else "stop", counts)

    def _end(self, reason: str, counts: Mapping[str, int]) -> dict[str, Any]:
        head = {**self._head(), **self._part(), "done": True, "done_reason": reason}
        return {**head, **dict.fromkeys(_COUNT_FIELDS, 0), **counts}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        if not self._with_logprobs:
            return {}
        logprobs = [
            _logprob(token.token, token.logprob)
            | {"top_logprobs": [_logprob(*top) for top in token.top]}
            for token in tokens
        ]
        return {"logprobs": logprobs}


class _Chat(_Reply):
    """Answers a chat request."""

    def __init__(self, service: Service, asked: OllamaChatRequest) -> None:
        self._asked = asked
        super().__init__(service, asked, NOT_FOR_CHAT)

    def _make_prepare(self) -> Prepare | None:
        asked = self._asked
        if not asked.messages:
            return None
        messages = [_library_message(message) for message in asked.messages]
        options: Options = {
            **self._options,
            **self._service.options(_thinking_request(asked.think), self._warnings),
            "tools": [tool.library_tool() for tool in asked.tools or ()] or None,
            "continue_last": ends_with_assistant_text(messages),
            "prefetch_next_turn": True,
        }
        return partial(self._service.llm.prepare, messages, **options)

    def _part(
        self, text: str = "", thinking: str = "", calls: Sequence[ToolCall] = ()
    ) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if thinking:
            message["thinking"] = thinking
        if calls:
            message["tool_calls"] = [
                {"function": {"name": call.name, "arguments": call.arguments}} for call in calls
            ]
        return {"message": message}


class _Generate(_Reply):
    """Answers a generate request: replies to a prompt, or continues it with `raw`."""

    def __init__(self, service: Service, asked: OllamaGenerateRequest) -> None:
        self._asked = asked
        super().__init__(service, asked, NOT_FOR_GENERATE)

    def _make_prepare(self) -> Prepare | None:
        asked, llm = self._asked, self._service.llm
        if not asked.prompt:
            return None
        if not asked.raw:
            system = [{"role": "system", "content": asked.system}] if asked.system else []
            messages = [*system, {"role": "user", "content": asked.prompt}]
            thinking = self._service.options(_thinking_request(asked.think), self._warnings)
            turn: Options = {**self._options, **thinking, "prefetch_next_turn": True}
            return partial(llm.prepare, messages, **turn)
        for name, value in (("system", asked.system), ("think", asked.think)):
            if value:
                raise ValueError(f"{name} needs the chat template, which raw switches off")
        text: Options = {**self._options, "loop_guard": False}
        return partial(llm.prepare_text, asked.prompt, **text)

    def _part(
        self, text: str = "", thinking: str = "", calls: Sequence[ToolCall] = ()
    ) -> dict[str, Any]:
        return {"response": text} | ({"thinking": thinking} if thinking else {})


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


def _logprob(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token_text(token), "logprob": logprob, "bytes": list(token)}
