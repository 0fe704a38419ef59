"""What OpenAI's two kinds of completion share: being answered whole or as a stream."""

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
from qwen3_mlx.server.openai.schema import SamplingFields
from qwen3_mlx.server.response import ActiveRequest, EventStreamResponse
from qwen3_mlx.server.service import Prepare, Service
from qwen3_mlx.server.wire import json_bytes, warnings_header
from qwen3_mlx.text.events import Event, Finish, Usage
from qwen3_mlx.version import __version__

EVENTS = "text/event-stream"
_MOST_DIGITS = 18  # of a token's id
_TOKEN = 64  # bytes that a token may take in a reply, or many more, if there are logprobs


class Completion(ABC):
    """What both kinds have in common: how they are answered, whole or as a stream."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, service: Service, asked: SamplingFields) -> None:
        self.service = service
        self.warnings = service.another_model(asked.model)
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
        """Give what lays out the first reply to each prompt; the seeds of the others follow."""

    @abstractmethod
    def opening_chunk(self, index: int) -> Mapping[str, Any] | None:
        """Give the choice that a stream begins with."""

    @abstractmethod
    def chunks_for(self, index: int, event: Event) -> Sequence[Mapping[str, Any]]:
        """Give the choices of the chunks that tell of an event."""

    @abstractmethod
    def choice(self, index: int, said: ReplyBuilder, finish: Finish) -> Mapping[str, Any]:
        """Give a whole reply."""

    async def respond(self, request: Request, place: Slot) -> Response:
        """Answer the request."""
        running = await self.service.run(request, place, self.prepare_all(), choices=self.choices)
        headers = warnings_header(self.warnings + running.warnings)
        if self._streams:
            return EventStreamResponse(running, self._chunks(running), EVENTS, headers)
        await running.complete(request)
        echoed = sum(len(said.prompt.others) for said in running.said if said.prompt)
        size = (running.usage.completion_tokens + echoed) * _TOKEN
        content = await self.service.aside(size, partial(self._whole, running))
        return Response(content, media_type="application/json", headers=headers)

    def _whole(self, running: ActiveRequest) -> bytes:
        """Write the replies, each by itself: other threads wait while one is written."""
        choices = (
            self.written(self.choice(index, said, finish))
            for index, (said, finish) in enumerate(zip(running.said, running.finishes, strict=True))
            if finish
        )
        end = json_bytes({"usage": usage_of(running.usage), "timings": running.timings})
        before = json_bytes(self.head)[:-1] + b',"choices":['
        return before + b",".join(choices) + b"]," + end[1:]

    def written(self, choice: Mapping[str, Any]) -> bytes:
        """Write a reply."""
        return json_bytes(choice)

    async def _chunks(self, running: ActiveRequest) -> AsyncIterator[bytes]:
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
            yield _data(error.body(""))


def sampling_options(asked: SamplingFields) -> Options:
    """Give how tokens are to be chosen as the library has it; a ValueError if it cannot be."""
    bias = {}
    for token, value in (asked.logit_bias or {}).items():
        if not token.isdecimal() or not token.isascii() or len(token) > _MOST_DIGITS:
            raise ValueError(f"logit_bias maps token ids to numbers; {token!r:.60} is no token id")
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
    return {"sampling": sampling, "stop": stops(asked.stop), "seed": seed_of(asked.seed)}


def stops(said: str | Sequence[str] | None) -> list[str] | None:
    """Give the strings to stop at; empty ones, which some clients send for none, say nothing."""
    strings = [said] if isinstance(said, str) else said or ()
    return [one for one in strings if one] or None


def seed_of(seed: int | None) -> int | None:
    """Give the seed that was sent; -1 is local servers' word for a random one."""
    return None if seed == -1 else seed


def usage_of(usage: Usage) -> dict[str, Any]:
    """Give the counts by OpenAI's names."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def sign_of_life(running: ActiveRequest) -> bytes:
    """Give a comment, which clients pass over, with how much of the prompt has been read."""
    if running.spoken:
        return b": keepalive\n\n"
    read = running.read
    done, total = (read.done, read.total) if read else (0, running.prompt_tokens)
    return f": keepalive {done}/{total}\n\n".encode()


def _data(chunk: Mapping[str, Any]) -> bytes:
    return b"data: " + json_bytes(chunk) + b"\n\n"


def token_text(token: bytes) -> str:
    """Give a token as text; what is no whole character is replaced."""
    return token.decode("utf-8", "replace")
