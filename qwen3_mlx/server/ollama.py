"""Ollama's API: chat, generate, and what its clients want to know of the model."""

import time
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from qwen3_mlx import __version__
from qwen3_mlx.asking import Options
from qwen3_mlx.engine.params import SamplingParams
from qwen3_mlx.server.entry import answered, takes
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.places import Place
from qwen3_mlx.server.service import LiveResponse, Running, Service
from qwen3_mlx.server.thinking import Wish
from qwen3_mlx.server.wire import (
    Json,
    Messages,
    Parts,
    Posted,
    Tools,
    Wire,
    check_unknown,
    ends_with_words,
    json_bytes,
    warnings_header,
)
from qwen3_mlx.text.events import Event, Finish, Reasoning, Text, ToolCall

_LINES = "application/x-ndjson"
_NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {"logprobs": (), "top_logprobs": (0,)}
_HARMLESS = frozenset(("keep_alive",))  # the model stays in any case
_OPTIONS_WITHOUT_EFFECT = frozenset(
    ("num_gpu", "num_thread", "num_batch", "use_mmap", "use_mlock", "low_vram", "numa", "main_gpu")
)
_WHOLE = frozenset(("num_predict", "top_k", "seed", "num_ctx", "repeat_last_n"))
_OPTIONS = _WHOLE | {
    *("temperature", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty"),
    "stop",
}


class CalledFunction(Wire):
    """A call as an assistant made it."""

    name: str
    arguments: Any = {}
    index: int | None = None


class Called(Wire):
    """A call in the history."""

    id: str | None = None
    type: str | None = None
    function: CalledFunction


class OllamaMessage(Wire):
    """A message of the conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: Parts[Any] | None = None
    tool_calls: Parts[Called] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaRequest(Posted):
    """`POST /api/chat`."""

    model: str | None = None
    messages: Annotated[Messages[OllamaMessage], Field(min_length=1)]
    stream: bool | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    format: Literal["json", ""] | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    tools: Tools[dict[str, Any]] | None = None


class OllamaMessageOut(Wire):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    thinking: str | None = None
    tool_calls: list[Called] | None = None


class OllamaOut(Wire):
    """The response without a stream, and the last line of one; times are in nanoseconds."""

    model: str
    created_at: str
    message: OllamaMessageOut
    done: bool
    done_reason: str
    total_duration: int
    load_duration: int
    prompt_eval_count: int
    prompt_eval_duration: int
    eval_count: int
    eval_duration: int


class ErrorOut(Wire):
    """Any response that is not the one asked for."""

    error: str


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorOut} for status in (400, 401, 403, 404, 413, 429, 503)
}
_STREAM: dict[str, Any] = {"content": {_LINES: {}}}


def routes(service: Service) -> APIRouter:
    """Make the routes of this protocol."""
    router = APIRouter(prefix="/api", tags=["Ollama"], responses=_ERRORS)

    @router.post(
        "/chat", response_model=OllamaOut, responses={200: _STREAM}, **takes(OllamaRequest)
    )
    async def chat(request: Request) -> Response:
        return await answered(service, request, OllamaRequest, _OllamaChat)

    @router.get("/tags")
    async def tags() -> dict[str, Any]:
        return {"models": [_model(service)]}

    @router.get("/ps")
    async def loaded() -> dict[str, Any]:
        return {"models": [{**_model(service), "context_length": service.context}]}

    @router.post("/show")
    async def show() -> dict[str, Any]:
        thinks = ["thinking"] if service.llm.thinking.can_think else []
        family = service.llm.config.model_type
        return {
            **_model(service),
            "capabilities": ["completion", "tools", *thinks],
            "model_info": {
                "general.architecture": family,
                f"{family}.context_length": service.context,
            },
        }

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    return router


def _model(service: Service) -> dict[str, Any]:
    name = service.settings.model
    family = service.llm.config.model_type
    return {
        "name": name,
        "model": name,
        "modified_at": _when(service.created),
        "size": 0,
        "digest": "",
        "details": {"format": "safetensors", "family": family, "families": [family]},
    }


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


class _OllamaChat:
    """A reply to messages."""

    def __init__(self, service: Service, asked: OllamaRequest) -> None:
        self._service = service
        self._streams = asked.stream is not False
        try:
            self._warnings = service.another_model(asked.model)
            self._warnings += check_unknown(asked, _NOT_SUPPORTED, _HARMLESS)
            known = _OPTIONS | _OPTIONS_WITHOUT_EFFECT
            self._warnings += [
                f"unknown option {name!r} was ignored"
                for name in asked.options or {}
                if name not in known
            ]
            self._messages = [_library_message(message) for message in asked.messages]
            self._options: Options = {
                **service.options(_wish(asked.think), self._warnings),
                **_sampled(asked.options or {}, service.context),
                "schema": {"type": "object"} if asked.format == "json" else asked.format or None,
                "tools": asked.tools or None,
                "continue_last": ends_with_words(self._messages),
                "idle": True,
            }
        except (ValueError, TypeError) as error:
            raise ApiError(400, str(error)) from error

    async def respond(self, request: Request, place: Place) -> Response:
        """Answer the request."""
        prepare = partial(self._service.llm.prepare, self._messages, **self._options)
        running = await self._service.run(request, place, [prepare])
        headers = warnings_header(self._warnings + running.warnings)
        if self._streams:
            return LiveResponse(running, self._lines(running), _LINES, headers)
        await running.complete(request)
        said = running.said[0]
        message = {"role": "assistant", "content": said.text}
        if said.reasoning:
            message["thinking"] = said.reasoning
        calls = {"tool_calls": [_call(call) for call in said.tool_calls]} if said.tool_calls else {}
        return Json(self._last(running, {**message, **calls}), headers=headers)

    async def _lines(self, running: Running) -> AsyncIterator[bytes]:
        try:
            async for events in running.batches(self._service.settings.keep_alive):
                lines = [self._line(event) for _, event in events if not isinstance(event, Finish)]
                if lines:
                    yield b"".join(lines)
            yield json_bytes(self._last(running, {"role": "assistant", "content": ""})) + b"\n"
        except ApiError as error:
            yield json_bytes(error.body("/api/chat")) + b"\n"

    def _line(self, event: Event) -> bytes:
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        if isinstance(event, Text):
            message["content"] = event.text
        elif isinstance(event, Reasoning):
            message["thinking"] = event.text
        elif isinstance(event, ToolCall):
            message["tool_calls"] = [_call(event)]
        return json_bytes({**self._head(), "message": message, "done": False}) + b"\n"

    def _head(self) -> dict[str, Any]:
        return {"model": self._service.settings.model, "created_at": _when(time.time())}

    def _last(self, running: Running, message: Mapping[str, Any]) -> dict[str, Any]:
        finish, timings = running.finishes[0], running.timings
        assert finish
        reading, making = (int(timings[name] * 1e6) for name in ("prompt_ms", "predicted_ms"))
        return {
            **self._head(),
            "message": message,
            "done": True,
            "done_reason": "length" if finish.reason == "length" else "stop",
            "total_duration": reading + making,
            "load_duration": 0,
            "prompt_eval_count": finish.usage.prompt_tokens,
            "prompt_eval_duration": reading,
            "eval_count": finish.usage.completion_tokens,
            "eval_duration": making,
        }


def _wish(think: bool | str | None) -> Wish:
    if isinstance(think, str):
        return Wish(effort=think, effort_name="think")
    return Wish(([("think", think)],))


def _library_message(message: OllamaMessage) -> dict[str, Any]:
    if message.images:
        raise ValueError("images cannot be read: Qwen3 reads text only")
    made: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.thinking:
        made["reasoning_content"] = message.thinking
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "type": "function",
                "function": call.function.model_dump(include={"name", "arguments"}),
            }
            for call in message.tool_calls
        ]
    return made


def _sampled(options: Mapping[str, Any], context: int) -> Options:
    for name in _OPTIONS - {"stop"}:
        value = options.get(name)
        whole = name in _WHOLE
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise ValueError(f"options.{name} must be a {'whole ' * whole}number, not {value!r}")
    if (options.get("num_ctx") or 0) > context:
        raise ValueError(
            f"options.num_ctx={options['num_ctx']} is more than the context of {context:,} tokens "
            "that this server was started with"
        )
    most = options.get("num_predict")
    return {
        "sampling": SamplingParams(
            temperature=options.get("temperature"),
            top_p=options.get("top_p"),
            top_k=options.get("top_k"),
            min_p=options.get("min_p"),
            repetition_penalty=options.get("repeat_penalty"),
            presence_penalty=options.get("presence_penalty"),
            frequency_penalty=options.get("frequency_penalty"),
        ),
        "max_tokens": None if most is None or most < 0 else most,
        "seed": options.get("seed"),
        "stop": options.get("stop"),
    }


def _call(call: ToolCall) -> dict[str, Any]:
    return {"function": {"name": call.name, "arguments": call.arguments}}
