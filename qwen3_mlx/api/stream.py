"""Replies: streams of events for threads and for asyncio, and whole replies collected from them."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from threading import Event as Flag
from typing import Any, Self

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

StreamItem = Event | BaseException | None
"""An item of the queue between engine and stream; None marks a stream that has been read."""


@dataclass(frozen=True, slots=True)
class StartedReply:
    """A reply that has been submitted to the engine.

    Attributes:
        prompt_tokens: the number of tokens of the prompt.
        room: the most tokens of the reply.
        finish_thinking: closes the thinking within a step; may be called from any thread.
        continued: the message that the reply continues, if any.
    """

    prompt_tokens: int
    room: int
    finish_thinking: Callable[[], None]
    continued: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply.

    Attributes:
        text: the answer.
        reasoning: the thinking.
        finish_reason: "stop", "length", "tool_calls" or "cancelled".
        usage: token counts, a `Usage`.
        details: more about the end, such as the stop string that ended the text, or warnings.
        tool_calls: the calls that the model requests.
        messages: the messages to append to the conversation: the reply itself, and for `LLM.run`
            all calls and tool results before it. With `continue_last` the first of them replaces
            the continued message, of which `text` is only the rest.
        parsed: with `schema`, the answer as data or as an object of the pydantic model; None if
            the text is incomplete.
        logprobs: with `logprobs`, the log probabilities of the answer's tokens.
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


class EventStream:
    """Base of `Stream` and `AsyncStream`: the end of a reply, and how to bring it about."""

    def __init__(self, cancelled: Flag, owner: object, started: StartedReply) -> None:
        """Create the stream of a reply; `owner` is kept alive until the last event."""
        self.prompt_tokens = started.prompt_tokens
        self.continued = started.continued
        self._cancelled = cancelled
        self._owner: object = owner
        self._finish_thinking = started.finish_thinking

    def finish_thinking(self) -> None:
        """Close the thinking within a step, so that the answer follows; from any thread."""
        self._finish_thinking()

    def _received(self, item: StreamItem, put: Callable[[None], None]) -> Event | None:
        """Return the event, or None if the stream is at its end; `put` marks the end for others.

        Raises the error that has ended the reply. A StopIteration from a callback is wrapped:
        raised in an iterator, it would end a loop silently.
        """
        if item is None or isinstance(item, Finish | BaseException):
            put(None)  # for others that read this stream
            self._owner = None
        if isinstance(item, StopIteration | StopAsyncIteration):
            raise RuntimeError(f"a callback raised {type(item).__name__}") from item
        if isinstance(item, BaseException):
            raise item
        return item

    def __del__(self) -> None:
        self._cancelled.set()


class Stream(EventStream, Iterator[Event]):
    """The events of one reply, as an iterator; created by `LLM.stream` and `Conversation.stream`.

    Yields `Reasoning`, `Text`, `ToolCallDelta` and `ToolCall` events; `Finish` is the last. An
    error that ends the reply is raised by the iterator. Closing the stream, leaving its `with`
    block or dropping the last reference to it ends the generation.

    Attributes:
        prompt_tokens: the number of tokens of the prompt.
        continued: the message that the reply continues, if any.
    """

    def __init__(
        self,
        events: "SimpleQueue[StreamItem]",
        cancelled: Flag,
        owner: object,
        started: StartedReply,
        *,
        wait: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Read `events`; `owner` is kept alive until the last event.

        `wait` returns the context in which to wait for events. It raises on the worker thread,
        where no event could ever arrive.
        """
        super().__init__(cancelled, owner, started)
        self._events = events
        self._wait = wait

    def __next__(self) -> Event:
        with self._wait():
            item = self._events.get()
        if (event := self._received(item, self._events.put)) is None:
            raise StopIteration
        return event

    def close(self) -> None:
        """End the generation within a step; the stream then ends with a `Finish`."""
        self._cancelled.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncStream(EventStream, AsyncIterator[Event]):
    """The events of one reply, as an asynchronous iterator; created by `LLM.astream`.

    Works like `Stream`. Cancelling the task that reads it also ends the generation.
    """

    def __init__(
        self,
        events: "asyncio.Queue[StreamItem]",
        cancelled: Flag,
        owner: object,
        started: StartedReply,
    ) -> None:
        """Read `events`; `owner` is kept alive until the last event."""
        super().__init__(cancelled, owner, started)
        self._events = events

    @classmethod
    def of(
        cls, submit: Callable[[Callable[[StreamItem], None], Flag], StartedReply], owner: object
    ) -> "AsyncStream":
        """Submit a reply, and create the stream of its events for the event loop that runs."""
        loop, cancelled = asyncio.get_running_loop(), Flag()
        events: asyncio.Queue[StreamItem] = asyncio.Queue()

        def deliver(event: StreamItem) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the event loop is closed, so no reader is left
                cancelled.set()

        return cls(events, cancelled, owner, submit(deliver, cancelled))

    async def __anext__(self) -> Event:
        try:
            item = await self._events.get()
        except asyncio.CancelledError:
            self._cancelled.set()
            raise
        if (event := self._received(item, self._events.put_nowait)) is None:
            raise StopAsyncIteration
        return event

    async def aclose(self) -> None:
        """End the generation within a step; the stream then ends with a `Finish`."""
        self._cancelled.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class ReplyBuilder:
    """Accumulates the events of a reply; `continued` is the message that the reply continues."""

    def __init__(self, continued: Mapping[str, Any] | None = None) -> None:
        self.ended = self.failed = False
        self.prompt: PromptTokens | None = None
        self._continued = continued or {}
        self.logprobs: list[TokenLogprob] = []
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self.tool_calls: list[ToolCall] = []

    def add(self, event: Event | BaseException) -> None:
        """Add the next event, or the error that ended the reply."""
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
        """Return the reply as an assistant's message in OpenAI's format.

        The message has `reasoning_content` if there was thinking. It also has it, empty, if the
        answer contains the closing tag as text: templates would otherwise split the answer there.
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
    """Read a stream to its end and return the whole reply."""
    reply = ReplyBuilder(stream.continued)
    with stream:
        for event in stream:
            reply.add(event)
            if isinstance(event, Finish):
                return Reply(
                    reply.text,
                    reply.reasoning,
                    event.reason,
                    event.usage,
                    event.details,
                    reply.tool_calls,
                    [reply.message()],
                    logprobs=reply.logprobs,
                )
    raise AssertionError("a stream ends with Finish")


def with_parsed(reply: Reply, schema: Any) -> Reply:
    """Return the reply with `parsed` set to its text as data or as a pydantic object."""
    if schema is None or reply.tool_calls:
        return reply
    try:
        data = json.loads(reply.text)
        validate = getattr(schema, "model_validate", None)
        return replace(reply, parsed=validate(data) if validate else data)
    except ValueError:  # incomplete JSON; pydantic's validation errors are ValueErrors, too
        return reply
