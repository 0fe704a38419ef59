"""The output items of a response, and the events of the stream that build them.

A response without a stream has the items that the events of a stream add up to.
"""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwen3_mlx.server.wire import logprob_entries
from qwen3_mlx.text.events import (
    Event,
    Finish,
    Reasoning,
    Text,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
)

StreamEvent = tuple[str, dict[str, Any]]
"""Type and fields of an event."""


class Output:
    """The items of a response: thinking, messages and calls, in the order in which they begin.

    A call that was cut off stays an item, with the status `incomplete`; its arguments are not JSON.

    Attributes:
        items: the items that have ended.
    """

    def __init__(self, *, reasoning: bool, logprobs: bool) -> None:
        """Create the output; without `reasoning` the thinking is left out."""
        self.items: list[dict[str, Any]] = []
        self._reasoning = reasoning
        self._logprobs = logprobs
        self._open: _OpenItem | None = None

    def add(self, event: Event) -> Iterator[StreamEvent]:
        """Yield the events of the stream for an event of the reply."""
        if isinstance(event, Reasoning):
            if self._reasoning:
                yield from self._write("reasoning", event.text)
        elif isinstance(event, Text):
            # Tokens without text, such as the end, have a place in a message only.
            if event.text or (self._open and self._open.key == "message"):
                yield from self._write("message", event.text, event.tokens)
        elif isinstance(event, ToolCallDelta):
            yield from self._write(event.id, event.text, name=event.name)
        elif isinstance(event, ToolCall):
            yield from self.close("completed")
        elif isinstance(event, Finish):
            yield from self._leave("incomplete" if event.reason == "length" else "completed")

    def close(self, status: str) -> Iterator[StreamEvent]:
        """Yield the events that end the open item, if one is open."""
        if self._open:
            self.items.append(self._open.whole(status))
            yield from self._open.closing(status)
            self._open = None

    def _leave(self, status: str) -> Iterator[StreamEvent]:
        """End the open item where another follows, or none; a call ends with `ToolCall` alone."""
        left_call = self._open is not None and self._open.is_call
        yield from self.close("incomplete" if left_call else status)

    def _write(
        self, key: str, text: str, tokens: Sequence[TokenLogprob] = (), name: str = ""
    ) -> Iterator[StreamEvent]:
        if self._open is None or self._open.key != key:
            yield from self._leave("completed")
            self._open = _OpenItem(key, len(self.items), name)
            yield from self._open.opening()
        yield self._open.write(text, logprob_entries(tokens) if self._logprobs else [])


class _OpenItem:
    """An item that is being written: `key` is its type, or the id of a call."""

    def __init__(self, key: str, index: int, name: str) -> None:
        """Begin an item; a call has the `name` of its function."""
        self.key = key
        self.is_call = bool(name)
        self._head = _head(key, name)
        self._index = index
        self._place = {"item_id": self._head["id"], "output_index": index}
        if not self.is_call:
            self._place["content_index"] = 0
        self._event = {"reasoning": "reasoning_text", "message": "output_text"}.get(
            key, "function_call_arguments"
        )
        self._pieces: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def opening(self) -> Iterator[StreamEvent]:
        """Yield the events that begin the item."""
        empty: dict[str, Any] = {"arguments": ""} if self.is_call else {"content": []}
        item = {**self._head, "status": "in_progress", **empty}
        yield "response.output_item.added", {"output_index": self._index, "item": item}
        if not self.is_call:
            yield "response.content_part.added", {**self._place, "part": self._part()}

    def write(self, text: str, logprobs: list[dict[str, Any]]) -> StreamEvent:
        """Add a piece of text, and return its event."""
        self._pieces.append(text)
        self._logprobs += logprobs
        more = {"logprobs": logprobs} if self.key == "message" else {}
        return f"response.{self._event}.delta", {**self._place, "delta": text, **more}

    def closing(self, status: str) -> Iterator[StreamEvent]:
        """Yield the events that end the item."""
        done, text = f"response.{self._event}.done", "".join(self._pieces)
        if self.is_call:
            yield done, {**self._place, "arguments": text, "name": self._head["name"]}
        else:
            part = self._part()
            more = {"logprobs": self._logprobs} if self.key == "message" else {}
            yield done, {**self._place, "text": text, **more}
            yield "response.content_part.done", {**self._place, "part": part}
        whole = self.whole(status)
        yield "response.output_item.done", {"output_index": self._index, "item": whole}

    def whole(self, status: str) -> dict[str, Any]:
        """Return the item with all of its text."""
        text = "".join(self._pieces)
        content = {"arguments": text} if self.is_call else {"content": [self._part()]}
        return {**self._head, "status": status, **content}

    def _part(self) -> Mapping[str, Any]:
        text = "".join(self._pieces)
        more = {"annotations": [], "logprobs": [*self._logprobs]} if self.key == "message" else {}
        return {"type": self._event, "text": text, **more}


def _head(key: str, name: str) -> dict[str, Any]:
    """Return the fields of an item that do not change."""
    unique = secrets.token_hex(12)
    if key == "reasoning":
        # Thinking is not summarised: it is the content.
        return {"id": f"rs_{unique}", "type": key, "summary": [], "encrypted_content": None}
    if key == "message":
        return {"id": f"msg_{unique}", "type": key, "role": "assistant"}
    return {"id": f"fc_{unique}", "type": "function_call", "call_id": key, "name": name}
