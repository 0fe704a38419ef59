"""OpenAI's API: chat completions, text completions, models."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qwen3_mlx import __version__
from qwen3_mlx.asking import Options
from qwen3_mlx.engine.params import SamplingParams
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.openai_wire import (
    HARMLESS,
    NOT_FOR_CHAT,
    NOT_FOR_TEXT,
    ChatOut,
    ChatRequest,
    ErrorOut,
    Message,
    ModelOut,
    ModelsOut,
    NamedTool,
    Sampled,
    TextOut,
    TextRequest,
)
from qwen3_mlx.server.service import LiveResponse, Prepare, Running, Service
from qwen3_mlx.server.wire import Json, check_unknown, json_bytes, warnings_header
from qwen3_mlx.streams import Collected
from qwen3_mlx.text.events import Event, Finish, Reasoning, Text, TokenLogprob, ToolCall, Usage

EVENTS = "text/event-stream"
_FIELDS = {
    "both": ("reasoning_content", "reasoning"),
    "reasoning_content": ("reasoning_content",),
    "reasoning": ("reasoning",),
    "none": (),
}
_FEW = 16  # tokens of a text completion for which no number is named, as OpenAI's API has it
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorOut} for status in (400, 401, 403, 404, 413, 429, 503)
}
_STREAM: dict[str, Any] = {"content": {EVENTS: {}}}


def routes(service: Service) -> APIRouter:
    """Make the routes of this protocol."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"], responses=ERRORS)

    @router.post("/chat/completions", response_model=ChatOut, responses={200: _STREAM})
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        return await _Chat(service, asked).respond(request)

    @router.post("/completions", response_model=TextOut, responses={200: _STREAM})
    async def completions(asked: TextRequest, request: Request) -> Response:
        return await _TextCompletion(service, asked).respond(request)

    @router.get("/models", response_model=ModelsOut)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @router.get("/models/{name:path}", response_model=ModelOut)
    async def model(name: str) -> dict[str, Any]:
        if name != service.settings.model:
            raise ApiError(
                404,
                f"there is no model {name!r} here; there is {service.settings.model}",
                code="model_not_found",
            )
        return _model(service)

    return router


def _model(service: Service) -> dict[str, Any]:
    thinking = service.llm.thinking
    only = "always" if thinking.can_think else "never"
    return {
        "id": service.settings.model,
        "object": "model",
        "created": service.created,
        "owned_by": "qwen3-mlx",
        "context_length": service.context,
        "thinking": "hybrid" if thinking.hybrid else only,
    }


def another_model(service: Service, name: str | None) -> list[str]:
    """Warn of a model that is asked for and is not the one that answers."""
    if name in (None, "", "default", service.settings.model):
        return []
    return [f"there is no model {name!r} here; {service.settings.model} answers"]


class _Completion(ABC):
    """What both kinds have in common: how they are answered, whole or as a stream."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, service: Service, asked: Sampled) -> None:
        self.service = service
        self.warnings = another_model(service, asked.model)
        self.choices = asked.n or 1
        self._streams = bool(asked.stream)
        self._stream_options = asked.stream_options
        if asked.stream_options and not asked.stream:
            raise ApiError(400, "stream_options is for streams; set stream", param="stream_options")
        self.head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "object": self.chunk_kind if asked.stream else self.kind,
            "created": int(time.time()),
            "model": service.settings.model,
            "system_fingerprint": f"qwen3-mlx-{__version__}",
        }

    @abstractmethod
    def prepares(self) -> Sequence[Prepare]:
        """Give what lays out each of the replies."""

    @abstractmethod
    def first(self, index: int) -> Mapping[str, Any] | None:
        """Give the choice that a stream begins with."""

    @abstractmethod
    def told(self, index: int, event: Event) -> Sequence[Mapping[str, Any]]:
        """Give the choices of the chunks that tell of an event."""

    @abstractmethod
    def choice(self, index: int, said: Collected, finish: Finish) -> Mapping[str, Any]:
        """Give a whole reply."""

    async def respond(self, request: Request) -> Response:
        """Answer the request."""
        running = await self.service.run(request, self.prepares(), choices=self.choices)
        headers = warnings_header(self.warnings)
        if self._streams:
            return LiveResponse(running, self._chunks(running), EVENTS, headers)
        await running.complete(request)
        choices = [
            self.choice(index, said, finish)
            for index, (said, finish) in enumerate(zip(running.said, running.finishes, strict=True))
            if finish
        ]
        end = {"usage": usage_of(running.usage), "timings": running.timings}
        return Json({**self.head, "choices": choices, **end}, headers=headers)

    async def _chunks(self, running: Running) -> AsyncIterator[bytes]:
        with_usage = bool(self._stream_options and self._stream_options.include_usage)
        # What all chunks have in common is written once.
        before = b"data: " + json_bytes(self.head)[:-1] + b',"choices":['
        after = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"
        begun = False
        try:
            async for events in running.batches(self.service.settings.keep_alive):
                if not events:
                    yield sign_of_life(running)
                    continue
                chunks = [] if begun else [self.first(index) for index in range(running.count)]
                begun = True
                for index, event in events:
                    chunks += self.told(index, event)
                yield b"".join(before + json_bytes(chunk) + after for chunk in chunks if chunk)
            end = {"usage": usage_of(running.usage), "timings": running.timings}
            if with_usage:
                yield _data({**self.head, "choices": [], **end})
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield _data(error.body(""))


class _Chat(_Completion):
    """A chat completion."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, service: Service, asked: ChatRequest) -> None:
        super().__init__(service, asked)
        self._asked = asked
        self._calls = [0] * self.choices
        hidden = asked.include_reasoning is False or (asked.reasoning and asked.reasoning.exclude)
        self._fields = () if hidden else _FIELDS[service.settings.reasoning_field]
        try:
            self.warnings += check_unknown(asked, NOT_FOR_CHAT, HARMLESS)
            self._options: Options = {**_chat_options(asked), **service.options(asked.wish())}
        except (ValueError, TypeError) as error:
            raise ApiError(400, str(error)) from error

    def prepares(self) -> Sequence[Prepare]:
        """Give one for each of the replies, whose seeds follow each other."""
        messages = [library_message(message) for message in self._asked.messages]
        count, seed = self.choices, self._asked.seed
        options: Options = {**self._options, "idle": count == 1}
        each: list[Options] = [{**options, "seed": _seed(seed, index)} for index in range(count)]
        return [partial(self.service.llm.prepare, messages, **options) for options in each]

    def first(self, index: int) -> Mapping[str, Any]:
        """Give the role."""
        return _chunk(index, {"role": "assistant", "content": ""})

    def told(self, index: int, event: Event) -> Sequence[Mapping[str, Any]]:
        """Give what an event adds to the message."""
        if isinstance(event, Text):
            return [_chunk(index, {"content": event.text}, self._logprobs(event.tokens))]
        if isinstance(event, Reasoning):
            delta = dict.fromkeys(self._fields, event.text)
            return [_chunk(index, delta)] if delta else []
        if isinstance(event, ToolCall):
            place = self._calls[index]
            self._calls[index] += 1
            named = {
                "index": place,
                "id": event.id,
                "type": "function",
                "function": {"name": event.name, "arguments": ""},
            }
            written = {"index": place, "function": {"arguments": event.written}}
            return [_chunk(index, {"tool_calls": [part]}) for part in (named, written)]
        return [_chunk(index, {}, finish=event)]

    def choice(self, index: int, said: Collected, finish: Finish) -> Mapping[str, Any]:
        """Give the whole message, with null for an answer only where there is none but calls."""
        message = said.message()
        thinking = message.pop("reasoning_content", None)
        if thinking is not None:
            message |= dict.fromkeys(self._fields, thinking)
        if said.tool_calls and not said.text:
            message["content"] = None
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(said.logprobs),
            "finish_reason": finish.reason,
            **_details(finish),
        }

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._asked.logprobs:
            return None
        return {
            "content": [
                _logprob(token.token, token.logprob)
                | {"top_logprobs": [_logprob(text, chance) for text, chance in token.top]}
                for token in tokens
            ],
            "refusal": None,
        }


class _TextCompletion(_Completion):
    """A continuation of raw text."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, service: Service, asked: TextRequest) -> None:
        super().__init__(service, asked)
        self._asked = asked
        self._prompts = _prompts(asked.prompt)
        if not self._prompts:
            raise ApiError(400, "prompt is empty; give some text", param="prompt")
        if asked.echo and asked.logprobs is not None:
            raise ApiError(400, "logprobs of a prompt (echo) are not supported", param="logprobs")
        self._offsets = [0] * len(self._prompts) * self.choices
        try:
            self.warnings += check_unknown(asked, NOT_FOR_TEXT, HARMLESS)
            self._options: Options = {
                **_sampled(asked),
                "max_tokens": asked.max_tokens or _FEW,
                "logprobs": asked.logprobs,
                "loop_guard": False,
            }
        except (ValueError, TypeError) as error:
            raise ApiError(400, str(error)) from error

    def prepares(self) -> Sequence[Prepare]:
        """Give one for each prompt and each of its `n` continuations."""
        seeds = [_seed(self._asked.seed, number) for number in range(self.choices)]
        each: list[Options] = [{**self._options, "seed": seed} for seed in seeds]
        return [
            partial(self.service.llm.prepare_text, prompt, **options)
            for prompt in self._prompts
            for options in each
        ]

    def first(self, index: int) -> Mapping[str, Any] | None:
        """Give the prompt, if it is to be repeated."""
        return self._choice(index, self._prompt(index)) if self._asked.echo else None

    def told(self, index: int, event: Event) -> Sequence[Mapping[str, Any]]:
        """Give what an event adds to the text."""
        if isinstance(event, Text):
            return [self._choice(index, event.text, event.tokens)]
        assert isinstance(event, Finish)
        return [self._choice(index, "", finish=event)]

    def choice(self, index: int, said: Collected, finish: Finish) -> Mapping[str, Any]:
        """Give the whole text."""
        text = (self._prompt(index) if self._asked.echo else "") + said.text
        return self._choice(index, text, said.logprobs, finish)

    def _prompt(self, index: int) -> str:
        prompt = self._prompts[index // self.choices]
        return prompt if isinstance(prompt, str) else self.service.llm.tokenizer.decode(prompt)

    def _choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[TokenLogprob] = (),
        finish: Finish | None = None,
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, tokens),
            "finish_reason": finish.reason if finish else None,
        }

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._asked.logprobs is None:
            return None
        texts = [_shown(token.token) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {_shown(text): chance for text, chance in token.top} for token in tokens
            ],
            "text_offset": offsets,
        }


# --- requests -----------------------------------------------------------------------------------


def library_message(message: Message) -> dict[str, Any]:
    """Give a message as the library has it."""
    content = message.content
    parts = content if isinstance(content, str) or content is None else _parts(content)
    role = "system" if message.role == "developer" else message.role
    made: dict[str, Any] = {"role": role, "content": parts}
    if thinking := message.reasoning_content or message.reasoning:
        made["reasoning_content"] = thinking
    if message.tool_calls:
        made["tool_calls"] = [call.model_dump(exclude_none=True) for call in message.tool_calls]
    if message.tool_call_id:
        made["tool_call_id"] = message.tool_call_id
    return made


def _parts(content: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        {"type": part.type} | ({} if part.text is None else {"text": part.text}) for part in content
    ]


def _sampled(asked: Sampled) -> Options:
    bias = {}
    for token, value in (asked.logit_bias or {}).items():
        if not token.isdecimal() or not token.isascii():
            raise ValueError(f"logit_bias maps token ids to numbers; {token!r} is no token id")
        bias[int(token)] = value
    sampling = SamplingParams(
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=0 if asked.top_k == -1 else asked.top_k,
        min_p=asked.min_p,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        repetition_penalty=asked.repetition_penalty,
        logit_bias=bias or None,
    )
    return {"sampling": sampling, "stop": asked.stop, "seed": asked.seed}


def _seed(seed: int | None, number: int) -> int | None:
    return None if seed is None else seed + number


def _chat_options(asked: ChatRequest) -> Options:
    most = {asked.max_tokens, asked.max_completion_tokens} - {None}
    if len(most) > 1:
        raise ValueError(
            f"max_tokens={asked.max_tokens} and max_completion_tokens="
            f"{asked.max_completion_tokens} contradict each other; send one of them"
        )
    if asked.top_logprobs is not None and not asked.logprobs:
        raise ValueError("top_logprobs needs logprobs=true")
    choice = asked.tool_choice or "auto"
    return {
        **_sampled(asked),
        **_form(asked),
        "max_tokens": most.pop() if most else None,
        "logprobs": (asked.top_logprobs or 0) if asked.logprobs else None,
        "tools": [tool.model_dump(exclude_none=True) for tool in asked.tools or ()] or None,
        "tool_choice": choice.function.name if isinstance(choice, NamedTool) else choice,
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "thinking_budget_message": asked.thinking_budget_message,
    }


def _form(asked: ChatRequest) -> Options:
    """Give the form that the answer is to have, by either way to say it."""
    form: Options = {}
    if (wish := asked.response_format) and wish.type != "text":
        if wish.type == "json_schema" and wish.json_schema is None:
            raise ValueError("response_format of type json_schema needs json_schema")
        form["schema"] = wish.json_schema.schema_ if wish.json_schema else {"type": "object"}
    if outputs := asked.structured_outputs:
        if outputs.json_object:
            form["schema"] = {"type": "object"}
        if outputs.json_ is not None:
            form["schema"] = outputs.json_
        form |= {"regex": outputs.regex, "choice": outputs.choice, "grammar": outputs.grammar}
    return form


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [[token for token in prompt if isinstance(token, int)]]
    return [one for one in prompt if not isinstance(one, int)]


# --- responses ----------------------------------------------------------------------------------


def usage_of(usage: Usage) -> dict[str, Any]:
    """Give the counts by OpenAI's names."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def sign_of_life(running: Running) -> bytes:
    """Give a comment, which clients pass over, with how much of the prompt has been read."""
    if running.first is not None:
        return b": keepalive\n\n"
    read = running.read
    done, total = (read.done, read.total) if read else (0, running.prompt_tokens)
    return f": keepalive {done}/{total}\n\n".encode()


def _data(chunk: Mapping[str, Any]) -> bytes:
    return b"data: " + json_bytes(chunk) + b"\n\n"


def _chunk(
    index: int,
    delta: Mapping[str, Any],
    logprobs: Mapping[str, Any] | None = None,
    finish: Finish | None = None,
) -> dict[str, Any]:
    return {
        "index": index,
        "delta": delta,
        "logprobs": logprobs,
        "finish_reason": finish.reason if finish else None,
        **(_details(finish) if finish else {}),
    }


def _details(finish: Finish) -> dict[str, Any]:
    return {"finish_details": finish.details} if finish.details else {}


def _shown(token: bytes) -> str:
    return token.decode("utf-8", "replace")


def _logprob(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _shown(token), "logprob": logprob, "bytes": list(token)}
