"""Base of chat and text completions."""

import secrets
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from qwen3_mlx.api.options import Options
from qwen3_mlx.api.stream import ReplyBuilder
from qwen3_mlx.engine.sampling_params import SamplingParams
from qwen3_mlx.server.endpoint import ReplyEndpoint
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.openai.protocol import PROTOCOL
from qwen3_mlx.server.openai.schema import CompletionFields, SamplingFields, ThinkingFields
from qwen3_mlx.server.response import ActiveRequest
from qwen3_mlx.server.service import ModelService
from qwen3_mlx.server.wire import json_bytes, stop_strings
from qwen3_mlx.text.events import Event, Finish
from qwen3_mlx.version import __version__

_MAX_DIGITS = 18  # of a token's id
_RANDOM = -1  # this seed means a random one, as on other local servers

CompletionBody = TypeVar("CompletionBody", bound=CompletionFields)


class Completion(ReplyEndpoint[CompletionBody]):
    """Base of both kinds of completion: choices, in one response or in the chunks of a stream."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, service: ModelService, body: CompletionBody) -> None:
        super().__init__(service, body)
        self.warnings += service.model_warnings(body)
        self.streams = bool(body.stream)
        self.choices = body.n or 1
        if body.stream_options and not body.stream:
            raise ApiError(400, "stream_options is for streams; set stream", param="stream_options")
        self._with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "object": self.chunk_kind if body.stream else self.kind,
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": f"qwen3-mlx-{__version__}",
        }
        # The response and all chunks begin with it: it is serialised once.
        self._before_choices = json_bytes(self._head)[:-1] + b',"choices":['
        self._opened = False

    @abstractmethod
    def opening_chunk(self, index: int) -> Mapping[str, Any] | None:
        """Return the choice that a stream begins with, if any."""

    @abstractmethod
    def chunks_for(self, index: int, event: Event) -> Sequence[Mapping[str, Any]]:
        """Return the choices of the chunks for an event."""

    @abstractmethod
    def choice(self, index: int, reply: ReplyBuilder, finish: Finish) -> Mapping[str, Any]:
        """Return a complete choice."""

    def serialise(self, choice: Mapping[str, Any]) -> bytes:
        """Return a choice as JSON."""
        return json_bytes(choice)

    def complete(self, running: ActiveRequest) -> bytes:
        """Return the response as JSON, one choice at a time, since json.dumps holds the GIL."""
        choices = (
            self.serialise(self.choice(index, *reply))
            for index, reply in enumerate(running.completed)
        )
        end = json_bytes(_counts(running))
        return self._before_choices + b",".join(choices) + b"]," + end[1:]

    def stream_events(self, events: Sequence[tuple[int, Event]]) -> bytes:
        """Return the chunks of events; the opening chunks of all choices come before the first."""
        chunks: list[Mapping[str, Any] | None] = []
        if not self._opened:
            self._opened = True
            chunks += [self.opening_chunk(index) for index in range(self.body.replies)]
        for index, event in events:
            chunks += self.chunks_for(index, event)
        before = b"data: " + self._before_choices
        after = b'],"usage":null}\n\n' if self._with_usage else b"]}\n\n"
        return b"".join(before + json_bytes(chunk) + after for chunk in chunks if chunk)

    def stream_end(self, running: ActiveRequest) -> bytes:
        """Return the token counts, if requested, and the mark of the end."""
        counts = {**self._head, "choices": [], **_counts(running)}
        return (_data(counts) if self._with_usage else b"") + b"data: [DONE]\n\n"

    def stream_error(self, error: ApiError) -> bytes:
        """Return an error, which is the last event."""
        return _data(PROTOCOL.error_body(error))


def sampling_options(body: SamplingFields) -> Options:
    """Return sampling parameters, stop strings and seed for the library.

    Raises:
        ValueError: a value is out of its range.
    """
    bias = {}
    for token, value in (body.logit_bias or {}).items():
        if not token.isdecimal() or not token.isascii() or len(token) > _MAX_DIGITS:
            raise ValueError(
                f"logit_bias maps token ids to numbers; {token!r:.60} is not a token id"
            )
        bias[int(token)] = value
    sampling = SamplingParams(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=0 if body.top_k == -1 else body.top_k,
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=bias or None,
    )
    seed = None if body.seed == _RANDOM else body.seed
    return {"sampling": sampling, "stop": stop_strings(body.stop), "seed": seed}


def thinking_options(service: ModelService, body: ThinkingFields, warnings: list[str]) -> Options:
    """Return the library's options for the thinking of a request, and append warnings.

    Raises:
        ValueError: fields contradict each other.
    """
    options = service.thinking_options(body.thinking_request(), warnings)
    thinks = options["thinking"]
    thinks = service.llm.thinking.can_think if thinks is None else thinks
    if body.thinking_budget_message is not None and not thinks:
        warnings.append("thinking_budget_message was ignored: the reply does not think")
    return {**options, "thinking_budget_message": body.thinking_budget_message}


def _counts(running: ActiveRequest) -> dict[str, Any]:
    """Return token counts under OpenAI's names, and timings."""
    usage = running.usage
    counts = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }
    return {"usage": counts, "timings": running.timings}


def _data(chunk: Mapping[str, Any]) -> bytes:
    return b"data: " + json_bytes(chunk) + b"\n\n"
