"""A reply as it comes: streams of events for threads and for asyncio, and the whole at once."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from threading import Event as Flag
from typing import Any, NoReturn, Self

from qwen3_mlx.text.events import (
    Event,
    Finish,
    PromptTokens,
    Reasoning,
    Text,
    TokenLogprob,
    ToolCall,
    Usage,
)
from qwen3_mlx.text.messages import END_THINK, think_block

Said = Event | BaseException | None
"""What a generation puts into its queue; None stands for the end, once that has been read."""


@dataclass(frozen=True, slots=True)
class StartedReply:
    """A reply of at most `room` tokens, sent to the engine; perhaps to continue a message."""

    prompt_tokens: int
    room: int
    finish_thinking: Callable[[], None]
    continued: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply: what a stream said, collected.

    `messages` are those to add to the conversation: the reply itself, and of `LLM.run` all calls
    and answers of tools before it. With `continue_last` the first of them takes the place of the
    message that was continued, of which the text here is the rest. `parsed` is what a `schema` was
    asked for: data, or an object of its pydantic model; None where the text is not whole.
    `logprobs` are those of the answer's tokens, if they were asked for.
    """

    text: str
    reasoning: str
    finish_reason: str
    usage: Usage
    details: dict[str, str] = field(default_factory=dict)
    tool_calls: list[ToolCall] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    parsed: Any = None
    logprobs: Sequence[TokenLogprob] = ()


class Stream(Iterator[Event]):
    """The events of one generation as they come; `Finish` is the last.

    `prompt_tokens` are what is read before the first token comes. Closing it, leaving its `with`
    block or dropping it ends the generation.
    """

    def __init__(
        self,
        events: "SimpleQueue[Said]",
        cancelled: Flag,
        owner: object,
        started: StartedReply,
        *,
        wait: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Read `events`; `owner` is kept alive until the last of them.

        `wait` gives the context to wait in for events; it raises where they would never come.
        """
        self._events = events
        self._cancelled = cancelled
        self._owner: object = owner
        self.prompt_tokens = started.prompt_tokens
        self.continued = started.continued
        self._finish_thinking = started.finish_thinking
        self._wait = wait

    def __next__(self) -> Event:
        with self._wait():
            event = self._events.get()
        if event is None:
            self._events.put(None)  # for whoever else reads this stream
            raise StopIteration
        if isinstance(event, Finish | BaseException):
            self._events.put(None)
            self._owner = None
        if isinstance(event, BaseException):
            _raise(event)
        return event

    def finish_thinking(self) -> None:
        """Have the answer follow now: the thinking is closed within a step; from any thread."""
        self._finish_thinking()

    def close(self) -> None:
        """End the generation within a step; what is left to read is a `Finish`."""
        self._cancelled.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class AsyncStream(AsyncIterator[Event]):
    """The same for asyncio; cancelling the task that reads it ends the generation, too."""

    def __init__(
        self,
        events: "asyncio.Queue[Said]",
        cancelled: Flag,
        owner: object,
        started: StartedReply,
    ) -> None:
        """Read `events`; `owner` is kept alive until the last of them."""
        self._events = events
        self._cancelled = cancelled
        self._owner: object = owner
        self.prompt_tokens = started.prompt_tokens
        self._finish_thinking = started.finish_thinking

    async def __anext__(self) -> Event:
        try:
            event = await self._events.get()
        except asyncio.CancelledError:
            self._cancelled.set()
            raise
        if event is None:
            self._events.put_nowait(None)
            raise StopAsyncIteration
        if isinstance(event, Finish | BaseException):
            self._events.put_nowait(None)
            self._owner = None
        if isinstance(event, BaseException):
            _raise(event)
        return event

    def finish_thinking(self) -> None:
        """Have the answer follow now: the thinking is closed within a step; from any thread."""
        self._finish_thinking()

    async def aclose(self) -> None:
        """End the generation within a step; what is left to read is a `Finish`."""
        self._cancelled.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._cancelled.set()


def _raise(error: BaseException) -> NoReturn:
    """Raise an error that ended a reply; one that would pass for the end of a loop is wrapped."""
    if isinstance(error, StopIteration | StopAsyncIteration):
        raise RuntimeError(f"a callback raised {type(error).__name__}") from error
    raise error


class ReplyBuilder:
    """All that a reply said, as far as it came; `continued` is the message that it goes on from."""

    def __init__(self, continued: Mapping[str, Any] | None = None) -> None:
        self.ended = self.failed = False
        self.prompt: PromptTokens | None = None
        self._continued = continued or {}
        self.logprobs: list[TokenLogprob] = []
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self.tool_calls: list[ToolCall] = []

    def add(self, event: Event | BaseException) -> None:
        """Take the next event, or the error that ended the reply."""
        if isinstance(event, Text):
            self._text.append(event.text)
            self.logprobs += event.tokens
        elif isinstance(event, Reasoning):
            self._reasoning.append(event.text)
        elif isinstance(event, ToolCall):
            self.tool_calls.append(event)
        elif isinstance(event, PromptTokens):
            self.prompt = event
        elif isinstance(event, Finish | BaseException):
            self.ended, self.failed = True, isinstance(event, BaseException)

    @property
    def text(self) -> str:
        """The answer."""
        return "".join(self._text)

    @property
    def reasoning(self) -> str:
        """The thinking."""
        return "".join(self._reasoning)

    def message(self) -> dict[str, Any]:
        """Give it as an assistant's message, as templates and clients have them.

        An answer that mentions the tags of thinking says so, or templates would take it apart.
        """
        text = self._continued.get("content", "") + self.text
        reasoning = (self._continued.get("reasoning_content") or "") + self.reasoning
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if reasoning or (END_THINK in text and not think_block(self._continued)):
            message["reasoning_content"] = reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.raw_arguments},
                }
                for call in self.tool_calls
            ]
        return message


def collect(stream: Stream) -> Reply:
    """Read a stream to its end."""
    said = ReplyBuilder(stream.continued)
    with stream:
        for event in stream:
            said.add(event)
            if isinstance(event, Finish):
                return Reply(
                    said.text,
                    said.reasoning,
                    event.reason,
                    event.usage,
                    event.details,
                    said.tool_calls,
                    [said.message()],
                    logprobs=said.logprobs,
                )
    raise AssertionError("a stream ends with Finish")


def with_parsed(reply: Reply, schema: Any) -> Reply:
    """Add what the text of a reply is as data, or as an object of a pydantic model."""
    if schema is None or reply.tool_calls:
        return reply
    try:
        data = json.loads(reply.text)
        validate = getattr(schema, "model_validate", None)
        return replace(reply, parsed=validate(data) if validate else data)
    except ValueError:  # cut off; pydantic's errors are of this kind, too
        return reply
