"""A response of the model: converts requests for the library, and its replies for clients."""

import re
import secrets
import time
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import count
from typing import Any

from qwen3_mlx.api.options import Options
from qwen3_mlx.api.stream import ReplyBuilder
from qwen3_mlx.server.endpoint import ReplyEndpoint
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.openai.completion import sampling_options, thinking_options
from qwen3_mlx.server.openai.schema import HARMLESS
from qwen3_mlx.server.response import ActiveRequest
from qwen3_mlx.server.responses.items import Message, library_messages, with_references, with_system
from qwen3_mlx.server.responses.output import Output, StreamEvent
from qwen3_mlx.server.responses.schema import HINTS, LOGPROBS, NOT_SUPPORTED, ResponsesRequest
from qwen3_mlx.server.responses.store import ResponseStore, StoredResponse
from qwen3_mlx.server.service import ModelService
from qwen3_mlx.server.thinking import UNLIMITED
from qwen3_mlx.server.wire import check_unknown, ends_with_assistant_text, json_bytes
from qwen3_mlx.text.events import Event, Usage

_LIMIT = re.compile(r"\bmax_tokens\b")


class ModelResponse(ReplyEndpoint[ResponsesRequest]):
    """A response of the model, complete or as the events that build it."""

    param = "input"

    def __init__(
        self, service: ModelService, body: ResponsesRequest, *, store: ResponseStore, owner: str
    ) -> None:
        """Convert a request of the `owner` of stored responses, among which its own will be."""
        super().__init__(service, body)
        self.streams = bool(body.stream)
        self._store, self._owner = store, owner
        self._numbers = count()
        self.warnings += service.model_warnings(body)
        self.warnings += check_unknown(body, NOT_SUPPORTED, HARMLESS, HINTS)
        self.warnings += body.not_honoured()
        conversation = self._conversation()
        continues = ends_with_assistant_text(conversation)
        logprobs = LOGPROBS in (body.include or ()) or body.top_logprobs is not None
        options: Options = {
            **sampling_options(body),
            **thinking_options(service, body, self.warnings),
            "max_tokens": None if body.max_output_tokens == UNLIMITED else body.max_output_tokens,
            "logprobs": (body.top_logprobs or 0) if logprobs else None,
            "schema": body.answer_schema(),
            "tools": body.library_tools() or None,
            "tool_choice": body.library_tool_choice(),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "partial_calls": True,  # without a stream, too: both have the same items
            "continue_last": continues,
            "prefetch_next_turn": True,
        }
        messages = with_system(body.instructions, conversation)
        self.prepares = [partial(service.llm.prepare, messages, **options)]
        # The message that the reply continues is replaced by the whole of it.
        self._reply = ReplyBuilder(conversation.pop() if continues else None)
        self._messages = conversation
        hidden = body.hides_reasoning or service.settings.reasoning_field == "none"
        self._output = Output(reasoning=not hidden, logprobs=logprobs)
        self._head = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": service.name,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "output": [],
            "usage": None,
            **body.described(),
        }

    @staticmethod
    def rename_fields(message: str) -> str:
        """Return a message of the library with the names of this protocol."""
        return _LIMIT.sub("max_output_tokens", message)

    def _conversation(self) -> list[Message]:
        """Return the messages of the previous response, then those of the input.

        Raises:
            ApiError: there is no such response (404).
            ValueError: an item cannot be converted.
        """
        items, previous_id = self.body.input, self.body.previous_response_id
        before: Sequence[Message] = ()
        if previous_id is not None:
            if (previous := self._store.get(self._owner, previous_id)) is None:
                raise ApiError(
                    404,
                    f"Previous response with id '{previous_id:.200}' not found.",
                    code="previous_response_not_found",
                    param="previous_response_id",
                )
            before = previous.messages
        if isinstance(items, str):
            return [*before, {"role": "user", "content": items}]
        if any(item.type == "item_reference" for item in items):
            items = with_references(items, self._store.items(self._owner))
        return [*before, *library_messages(items, before)]

    def receive_events(self, events: Sequence[tuple[int, Event]]) -> None:
        """Add the events to the response."""
        for _, event in events:
            self._add(event)

    def complete(self, running: ActiveRequest) -> bytes:
        """Return the response, which is stored unless the request forbids it."""
        return json_bytes(self._ended(running))

    def stream_start(self, running: ActiveRequest) -> bytes:
        """Return the events with the response without its output."""
        begun = {"response": self._head}
        return self._written([("response.created", begun), ("response.in_progress", begun)])

    def stream_events(self, events: Sequence[tuple[int, Event]]) -> bytes:
        """Return the events that build the items."""
        return b"".join(self._written(self._add(event)) for _, event in events)

    def stream_end(self, running: ActiveRequest) -> bytes:
        """Return the event with the whole response."""
        response = self._ended(running)
        return self._written([(f"response.{response['status']}", {"response": response})])

    def stream_error(self, error: ApiError) -> bytes:
        """Return the end of the open item, and the event with what there is of the response."""
        closing = [*self._output.close("incomplete")]
        failed = {
            "status": "failed",
            "error": {"code": "server_error", "message": error.message},
            "output": self._output.items,
        }
        response = {"response": self._head | failed}
        return self._written([*closing, ("response.failed", response)])

    def _add(self, event: Event) -> list[StreamEvent]:
        self._reply.add(event)
        return [*self._output.add(event)]

    def _ended(self, running: ActiveRequest) -> dict[str, Any]:
        """Return the whole response, and store it unless the request forbids it."""
        [(_, finish)] = running.completed
        cut = finish.reason == "length"
        response = self._head | {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self._output.items,
            "usage": _usage(finish.usage),
        }
        if finish.details:
            response["finish_details"] = finish.details
        if self.body.store is not False:
            messages = [*self._messages, self._reply.message()]
            self._store.put(self._owner, StoredResponse(response, messages))
        return response

    def _written(self, events: Iterable[StreamEvent]) -> bytes:
        return b"".join(
            f"event: {kind}\ndata: ".encode()
            + json_bytes({"type": kind, "sequence_number": next(self._numbers), **data})
            + b"\n\n"
            for kind, data in events
        )


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
