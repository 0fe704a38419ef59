"""Ollama's API: chat, generate, and what its clients want to know of the model."""

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
from qwen3_mlx.server.ollama.schema import (
    API_VERSION,
    NOT_FOR_CHAT,
    NOT_FOR_GENERATE,
    ErrorOut,
    OllamaChatOut,
    OllamaChatRequest,
    OllamaGenerateOut,
    OllamaGenerateRequest,
    OllamaMessage,
    OllamaRequest,
    OllamaShowRequest,
    in_their_words,
    read_options,
    seconds_of,
)
from qwen3_mlx.server.request_body import answered, parsed, takes
from qwen3_mlx.server.response import ActiveRequest, EventStreamResponse
from qwen3_mlx.server.service import Prepare, Service
from qwen3_mlx.server.thinking import ThinkingRequest
from qwen3_mlx.server.wire import (
    Json,
    check_unknown,
    ends_with_words,
    json_bytes,
    warnings_header,
)
from qwen3_mlx.text.events import Event, Finish, Reasoning, Text, TokenLogprob, ToolCall
from qwen3_mlx.version import __version__

_LINES = "application/x-ndjson"
_NEVER = "9999-12-31T23:59:59Z"  # when the model is unloaded
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorOut} for status in (400, 401, 403, 404, 413, 429, 503)
}
_STREAM: dict[str, Any] = {"content": {_LINES: {}}}
_COUNTS = (
    *("total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration"),
    *("eval_count", "eval_duration"),
)
_NOT_HERE = {
    "/embed": ("POST", "makes no embeddings"),
    "/embeddings": ("POST", "makes no embeddings"),
    "/pull": ("POST", "fetches no others"),
    "/push": ("POST", "uploads none"),
    "/create": ("POST", "makes no others"),
    "/copy": ("POST", "copies none"),
    "/delete": ("DELETE", "deletes none"),
}


def routes(service: Service) -> APIRouter:
    """Make the routes of this protocol."""
    router = APIRouter(prefix="/api", tags=["Ollama"], responses=_ERRORS)

    @router.post(
        "/chat", response_model=OllamaChatOut, responses={200: _STREAM}, **takes(OllamaChatRequest)
    )
    async def chat(request: Request) -> Response:
        return await answered(service, request, OllamaChatRequest, _Chat)

    @router.post(
        "/generate",
        response_model=OllamaGenerateOut,
        responses={200: _STREAM},
        **takes(OllamaGenerateRequest),
    )
    async def generate(request: Request) -> Response:
        return await answered(service, request, OllamaGenerateRequest, _Generate)

    @router.head("/tags", include_in_schema=False)
    @router.get("/tags")
    async def tags() -> dict[str, Any]:
        return {"models": [_model(service, name) for name in _names(service)]}

    @router.get("/ps")
    async def loaded() -> dict[str, Any]:
        model = _model(service, service.settings.model)
        more = {"expires_at": _NEVER, "size_vram": 0, "context_length": service.context}
        return {"models": [{**model, **more}]}

    @router.post("/show", **takes(OllamaShowRequest))
    async def show(request: Request) -> Response:
        sent = await request.body()
        read = partial(parsed, sent, OllamaShowRequest, service.context)
        asked = await service.aside(len(sent), read)
        _check_model(service, asked.model or asked.name)
        return Json(
            _described(service), headers=warnings_header(check_unknown(asked, {}, frozenset()))
        )

    @router.head("/version", include_in_schema=False)
    @router.get("/version")
    async def version() -> dict[str, str]:
        """Give the version of Ollama whose API this is, which clients compare, and our own."""
        return {"version": API_VERSION, "qwen3_mlx": __version__}

    for path, (method, why) in _NOT_HERE.items():
        refuse = _refusal(f"/api{path}", service.settings.model, why)
        router.add_api_route(path, refuse, methods=[method], include_in_schema=False)
    return router


def _refusal(path: str, model: str, why: str) -> Callable[[], Response]:
    def refuse() -> Response:
        raise ApiError(
            501, f"{path} is not supported: this server has one model, {model}, and {why}"
        )

    return refuse


def _names(service: Service) -> list[str]:
    """Give the names that the model has here."""
    return [*dict.fromkeys((service.settings.model, "default"))]


def _check_model(service: Service, name: str | None) -> None:
    """Check that a model is the one that is here; no name is its name, too.

    Raises:
        ApiError: it is another.
    """
    names = _names(service)
    if name and name.lower().removesuffix(":latest") not in [known.lower() for known in names]:
        raise ApiError(404, f"model {name!r:.200} not found; there is {' or '.join(names)}")


def _model(service: Service, name: str) -> dict[str, Any]:
    family = service.llm.config.model_type
    return {
        "name": name,
        "model": name,
        "modified_at": _when(service.created),
        "size": 0,
        "digest": sha256(name.encode()).hexdigest(),  # of which Ollama's command shows a part
        "details": {
            "parent_model": "",
            "format": "safetensors",
            "family": family,
            "families": [family],
            "parameter_size": "",
            "quantization_level": "",
        },
    }


def _described(service: Service) -> dict[str, Any]:
    thinks = ["thinking"] if service.llm.thinking.can_think else []
    family = service.llm.config.model_type
    return {
        **_model(service, service.settings.model),
        "capabilities": ["completion", "tools", *thinks],
        "model_info": {
            "general.architecture": family,
            f"{family}.context_length": service.context,
        },
    }


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


class _Reply(ABC):
    """What chat and generate have in common."""

    def __init__(
        self, service: Service, asked: OllamaRequest, unsupported: Mapping[str, tuple[Any, ...]]
    ) -> None:
        _check_model(service, asked.model)
        self._service = service
        self._streams = asked.stream is not False
        self._noting = bool(asked.logprobs)
        try:
            self._stays = seconds_of(asked.keep_alive)
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
            self._prepare = self._lay_out()
        except (ValueError, TypeError) as error:
            raise ApiError(400, in_their_words(str(error))) from error

    @abstractmethod
    def _lay_out(self) -> Prepare | None:
        """Give what lays out the reply, or None where the model is to be loaded alone."""

    @abstractmethod
    def _part(
        self, text: str = "", thinking: str = "", calls: Sequence[ToolCall] = ()
    ) -> dict[str, Any]:
        """Give what was said as a part of a response."""

    async def respond(self, request: Request, place: Slot) -> Response:
        """Answer the request."""
        if self._prepare is None:
            reason = "unload" if self._stays == 0 else "load"
            return Json(self._end(reason, {}), headers=warnings_header(self._warnings))
        try:
            running = await self._service.run(request, place, [self._prepare])
        except ApiError as error:
            error.message = in_their_words(error.message)
            raise
        headers = warnings_header(self._warnings + [*map(in_their_words, running.warnings)])
        if self._streams:
            return EventStreamResponse(running, self._lines(running), _LINES, headers)
        await running.complete(request)
        said = running.said[0]
        whole = self._part(said.text, said.reasoning, said.tool_calls)
        return Json(
            {**self._last(running), **whole, **self._logprobs(said.logprobs)}, headers=headers
        )

    async def _lines(self, running: ActiveRequest) -> AsyncIterator[bytes]:
        try:
            async for events in running.batches(self._service.settings.keep_alive):
                lines = [self._line(event) for _, event in events if not isinstance(event, Finish)]
                if lines:
                    yield b"".join(lines)
            yield json_bytes(self._last(running)) + b"\n"
        except ApiError as error:
            yield json_bytes(error.body("/api/")) + b"\n"

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
        return {"model": self._service.settings.model, "created_at": _when(time.time())}

    def _last(self, running: ActiveRequest) -> dict[str, Any]:
        finish, timings = running.finishes[0], running.timings
        assert finish
        reading, making = (int(timings[name] * 1e6) for name in ("prompt_ms", "predicted_ms"))
        counts = {
            "total_duration": reading + making,
            "prompt_eval_count": finish.usage.prompt_tokens,
            "prompt_eval_duration": reading,
            "eval_count": finish.usage.completion_tokens,
            "eval_duration": making,
        }
        return self._end("length" if finish.reason == "length" else "stop", counts)

    def _end(self, reason: str, counts: Mapping[str, int]) -> dict[str, Any]:
        head = {**self._head(), **self._part(), "done": True, "done_reason": reason}
        return {**head, **dict.fromkeys(_COUNTS, 0), **counts}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        if not self._noting:
            return {}
        noted = [
            _logprob(token.token, token.logprob)
            | {"top_logprobs": [_logprob(*one) for one in token.top]}
            for token in tokens
        ]
        return {"logprobs": noted}


class _Chat(_Reply):
    """A reply to messages."""

    def __init__(self, service: Service, asked: OllamaChatRequest) -> None:
        self._asked = asked
        super().__init__(service, asked, NOT_FOR_CHAT)

    def _lay_out(self) -> Prepare | None:
        asked = self._asked
        if not asked.messages:
            return None
        messages = [_library_message(message) for message in asked.messages]
        options: Options = {
            **self._options,
            **self._service.options(_wish(asked.think), self._warnings),
            "tools": [tool.library_tool() for tool in asked.tools or ()] or None,
            "continue_last": ends_with_words(messages),
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
    """A reply to a prompt, which with `raw` goes on from it."""

    def __init__(self, service: Service, asked: OllamaGenerateRequest) -> None:
        self._asked = asked
        super().__init__(service, asked, NOT_FOR_GENERATE)

    def _lay_out(self) -> Prepare | None:
        asked, llm = self._asked, self._service.llm
        if not asked.prompt:
            return None
        if not asked.raw:
            system = [{"role": "system", "content": asked.system}] if asked.system else []
            messages = [*system, {"role": "user", "content": asked.prompt}]
            thinking = self._service.options(_wish(asked.think), self._warnings)
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


def _wish(think: bool | str | None) -> ThinkingRequest:
    if isinstance(think, str):
        return ThinkingRequest(effort=think, effort_name="think")
    return ThinkingRequest(([("think", think)],))


def _library_message(message: OllamaMessage) -> dict[str, Any]:
    if message.images:
        raise ValueError("images cannot be read: Qwen3 reads text only")
    made: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.thinking:
        made["reasoning_content"] = message.thinking
    if message.tool_call_id:
        made["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "type": "function",
                "function": call.function.model_dump(include={"name", "arguments"}),
            }
            for call in message.tool_calls
        ]
    return made


def _logprob(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": token_text(token), "logprob": logprob, "bytes": list(token)}
