"""Shared part of OpenAI's chat and text completions: complete responses and streams."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from qwen3_mlx.api.options import Options
from qwen3_mlx.api.stream import ReplyBuilder
from qwen3_mlx.engine.sampling_params import SamplingParams
from qwen3_mlx.server.admission import Slot
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.openai.protocol import PROTOCOL
from qwen3_mlx.server.openai.schema import SamplingFields
from qwen3_mlx.server.response import ActiveRequest, EventStreamResponse
from qwen3_mlx.server.service import Prepare, Service
from qwen3_mlx.server.wire import json_bytes, warnings_header
from qwen3_mlx.text.events import Event, Finish, Usage
from qwen3_mlx.version import __version__

EVENTS = "text/event-stream"
_MAX_DIGITS = 18  # of a token's id
_TOKEN_BYTES = 64  # JSON that a token may take in a response; many more with logprobs


class Completion(ABC):
    """Base of both kinds of completion: a complete response, or a stream."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, service: Service, asked: SamplingFields) -> None:
        self.service = service
        self.warnings = service.model_warnings(asked.model)
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
    def prepare_all(self) -> Sequence[Prepare]:
        """Return one function for each prompt that prepares its first reply."""

    @abstractmethod
    def opening_chunk(self, index: int) -> Mapping[str, Any] | None:
        """Return the choice that a stream begins with, if any."""

    @abstractmethod
    def chunks_for(self, index: int, event: Event) -> Sequence[Mapping[str, Any]]:
        """Return the choices of the chunks for an event."""

    @abstractmethod
    def choice(self, index: int, reply: ReplyBuilder, finish: Finish) -> Mapping[str, Any]:
        """Return a complete choice."""

    async def respond(self, request: Request, place: Slot) -> Response:
        """Return the response, complete or as a stream."""
        running = await self.service.run(request, place, self.prepare_all(), choices=self.choices)
        headers = warnings_header(self.warnings + running.warnings)
        if self._streams:
            return EventStreamResponse(running, self._chunks(running), EVENTS, headers)
        await running.complete(request)
        echoed = sum(len(reply.prompt.others) for reply in running.replies if reply.prompt)
        size = (running.usage.completion_tokens + echoed) * _TOKEN_BYTES
        content = await self.service.run_sized(size, partial(self._complete_response, running))
        return Response(content, media_type="application/json", headers=headers)

    def _complete_response(self, running: ActiveRequest) -> bytes:
        """Return the response as JSON, one choice at a time, since json.dumps holds the GIL."""
        choices = (
            self.serialise(self.choice(index, reply, finish))
            for index, (reply, finish) in enumerate(
                zip(running.replies, running.finishes, strict=True)
            )
            if finish
        )
        end = json_bytes({"usage": usage_of(running.usage), "timings": running.timings})
        before = json_bytes(self.head)[:-1] + b',"choices":['
        return before + b",".join(choices) + b"]," + end[1:]

    def serialise(self, choice: Mapping[str, Any]) -> bytes:
        """Return a choice as JSON."""
        return json_bytes(choice)

    async def _chunks(self, running: ActiveRequest) -> AsyncIterator[bytes]:
        with_usage = bool(self._stream_options and self._stream_options.include_usage)
        # The constant part of all chunks is serialised once.
        before = b"data: " + json_bytes(self.head)[:-1] + b',"choices":['
        after = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"
        begun = False
        try:
            async for events in running.batches(self.service.settings.keep_alive):
                if not events:
                    yield keepalive_comment(running)
                    continue
                chunks = (
                    [] if begun else [self.opening_chunk(index) for index in range(running.count)]
                )
                begun = True
                for index, event in events:
                    chunks += self.chunks_for(index, event)
                yield b"".join(before + json_bytes(chunk) + after for chunk in chunks if chunk)
            end = {"usage": usage_of(running.usage), "timings": running.timings}
            if with_usage:
                yield _data({**self.head, "choices": [], **end})
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield _data(PROTOCOL.error_body(error))


def sampling_options(asked: SamplingFields) -> Options:
    """Return sampling parameters, stop strings and seed for the library.

    Raises:
        ValueError: a value is out of its range.
    """
    bias = {}
    for token, value in (asked.logit_bias or {}).items():
        if not token.isdecimal() or not token.isascii() or len(token) > _MAX_DIGITS:
            raise ValueError(
                f"logit_bias maps token ids to numbers; {token!r:.60} is not a token id"
            )
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
    return {"sampling": sampling, "stop": stop_strings(asked.stop), "seed": seed_of(asked.seed)}


def stop_strings(given: str | Sequence[str] | None) -> list[str] | None:
    """Return the stop strings without empty ones, which some clients send for none."""
    strings = [given] if isinstance(given, str) else given or ()
    return [string for string in strings if string] or None


def seed_of(seed: int | None) -> int | None:
    """Return the seed; -1 means a random seed, as on other local servers."""
    return None if seed == -1 else seed


def usage_of(usage: Usage) -> dict[str, Any]:
    """Return the token counts under OpenAI's names."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def keepalive_comment(running: ActiveRequest) -> bytes:
    """Return an SSE comment, which clients ignore, with the prefilled tokens of the prompt."""
    if running.has_events:
        return b": keepalive\n\n"
    progress = running.read
    done, total = (progress.done, progress.total) if progress else (0, running.prompt_tokens)
    return f": keepalive {done}/{total}\n\n".encode()


def _data(chunk: Mapping[str, Any]) -> bytes:
    return b"data: " + json_bytes(chunk) + b"\n\n"


def token_text(token: bytes) -> str:
    """Return a token as text; incomplete characters are replaced by U+FFFD."""
    return token.decode("utf-8", "replace")
