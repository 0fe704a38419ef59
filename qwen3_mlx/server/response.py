"""The replies to one request, on their way from the engine's thread to the client."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from qwen3_mlx.api.llm import LLM
from qwen3_mlx.api.prepared_request import PreparedRequest
from qwen3_mlx.api.stream import ReplyBuilder
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.server.access_log import reason_of
from qwen3_mlx.server.admission import Slot
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.preparing import wait_for_disconnect
from qwen3_mlx.server.settings import Settings
from qwen3_mlx.text.events import Event, Finish, Reasoning, Text, Usage

_MAX_UNREAD = 1 << 16  # pieces of a reply that a slow client has not read: some 13 MB
_MAX_BATCH = 512  # pieces that are written at once


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """Tokens of a prompt that have been prefilled, of how many in total."""

    done: int
    total: int


Delivered = Event | PrefillProgress | BaseException
"""What the engine's thread has for a reply."""

StreamItem = Event | PrefillProgress | ApiError
"""The same on the event loop."""


class EventBridge:
    """Carries events to the event loop: all of a step at once, since waking the loop is costly."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._pending: list[tuple[ActiveRequest, int, Delivered]] = []

    def put(self, running: "ActiveRequest", index: int, event: Delivered) -> None:
        """Queue an event of reply `index` of `running`; called on the engine's thread."""
        self._pending.append((running, index, event))
        if len(self._pending) == 1:
            try:
                self.llm.call_soon(self._send)
            except Qwen3Error:  # the engine is being closed: these are the last events
                self._send()

    def _send(self) -> None:
        pending, self._pending = self._pending, []
        if not pending:  # `put` has sent them already, while the engine was being closed
            return
        loop = pending[0][0].loop
        try:
            loop.call_soon_threadsafe(_dispatch, pending)
        except RuntimeError:  # the loop is closed: no client is left to read
            for running, _, _ in pending:
                running.cancelled.set()


def _dispatch(pending: list[tuple["ActiveRequest", int, Delivered]]) -> None:
    for running, index, event in pending:
        running.receive(index, event)


class EventQueue:
    """The events of a request that its client has not read, each with the number of its reply."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[tuple[int, StreamItem]] = asyncio.Queue()
        self._size = 0  # pieces

    @property
    def is_too_large(self) -> bool:
        """True if the client has left more unread than it may."""
        return self._size > _MAX_UNREAD

    def put(self, index: int, event: StreamItem) -> None:
        """Add an event."""
        self._queue.put_nowait((index, event))
        self._size += _weight(event)

    async def get(self, patience: float) -> list[tuple[int, StreamItem]]:
        """Return what is ready, at most one batch; nothing if it takes more than `patience` s."""
        received = []
        if self._queue.empty():
            try:
                async with asyncio.timeout(patience):
                    received = [await self._queue.get()]
            except TimeoutError:
                return []
        size = sum(_weight(event) for _, event in received)
        while not self._queue.empty() and size < _MAX_BATCH:
            received.append(self._queue.get_nowait())
            size += _weight(received[-1][1])
        self._size -= size
        if not self._queue.empty():  # a slow client has a backlog: let other tasks run first
            await asyncio.sleep(0)
        return received


def _weight(event: StreamItem) -> int:
    """Return the memory that an event takes, in pieces: logprobs count one by one."""
    tokens = event.tokens if isinstance(event, Text | Reasoning) else ()
    return 1 + sum(1 + len(token.top) for token in tokens)


class ActiveRequest:
    """The replies to one request, numbered from 0, until `close`."""

    def __init__(self, bridge: EventBridge, settings: Settings, slot: Slot, choices: int) -> None:
        """Expect the replies that `slot` counts, `choices` of them to each prompt."""
        count = slot.count
        slot.kept = True
        self.replies = [ReplyBuilder() for _ in range(count)]
        self.finishes: list[Finish | None] = [None] * count
        self.prompt_tokens = 0
        self.warnings: list[str] = []  # of the preparation
        self.prefill: PrefillProgress | None = None
        self.started = time.perf_counter()
        self.first_token_at: float | None = None  # time of the first token
        self.has_events = False  # True after the first event
        self.cancelled = slot.cancelled
        self.count = count
        self._choices = choices
        self._bridge = bridge
        self._settings = settings
        self._slot = slot
        self._record = slot.record
        self.loop = asyncio.get_running_loop()
        self._queue = EventQueue()
        self._sent = self._ends = 0  # replies submitted to the engine, and those that have ended
        self._failed = self._closed = self._released = False
        self.ended_by: ApiError | None = None  # why the server has cancelled the replies
        timeout = settings.request_timeout
        self._timer = self.loop.call_later(timeout, self._on_timeout) if timeout else None

    def begin(self, prepared: Sequence[PreparedRequest]) -> None:
        """Submit the prepared replies to the engine; callable from any thread."""
        try:
            for index, reply in enumerate(prepared):
                self._submit(index, reply)
        finally:
            # A reply may end before `_sent` counts it, and the client may leave meanwhile.
            self.loop.call_soon_threadsafe(self._release_if_done)

    def _submit(self, index: int, reply: PreparedRequest) -> None:
        options = replace(reply.options, progress=partial(self._on_prefill, index))
        reply = replace(reply, options=options, client=self._slot.client)
        deliver = partial(self._bridge.put, self, index)
        started = self._bridge.llm.submit(reply, deliver, self.cancelled)
        self._sent += 1
        self.prompt_tokens = started.prompt_tokens
        if options.max_tokens is not None and started.room < options.max_tokens:
            warning = (
                f"max_tokens={options.max_tokens:,} was shortened to {started.room:,}: after "
                f"{started.prompt_tokens:,} tokens of prompt the context has room for no more"
            )
            if warning not in self.warnings:  # every choice has the same warning
                self.warnings.append(warning)

    def _on_prefill(self, index: int, done: int, total: int) -> None:
        """Report the progress of a prompt; called on the engine's thread."""
        if done == total and self.first_token_at is None:  # reported with the first token
            self.first_token_at = time.perf_counter()
        self._bridge.put(self, index, PrefillProgress(done, total))

    def receive(self, index: int, event: Delivered) -> None:
        """Queue an event of a reply; called on the event loop.

        The last event of all replies frees the slot for other requests: the slot does not wait for
        the client to read them. A client that leaves too much unread has its replies cancelled.
        """
        item = ApiError.of(event) if isinstance(event, BaseException) else event
        if not self._closed:
            self._queue.put(index, item)
        if self._queue.is_too_large:
            self._cancel_for(ApiError(408, "the client read the reply too slowly"))
        if isinstance(item, ApiError):
            # Ends the other replies. The reason counts where some are still being submitted.
            self._cancel_for(item)
        if isinstance(item, Finish):
            self._slot.spend(item.usage)
        if isinstance(item, Finish | ApiError):
            self._ends += 1
            self._release_if_done()

    def _release_if_done(self) -> None:
        done = self._ends == self._sent and (self._closed or self._sent == self.count)
        if done and not self._released:
            self._released = True
            if self._timer:
                self._timer.cancel()
            self._slot.release(time.perf_counter() - self.started)

    def _on_timeout(self) -> None:
        seconds = f"{self._settings.request_timeout:g}"
        self._cancel_for(
            ApiError(
                504,
                f"the reply had no token after {seconds} s (--request-timeout); send a shorter "
                "prompt, or try again when the server is less busy",
                code="timeout",
            )
        )

    def _cancel_for(self, reason: ApiError) -> None:
        if not self.ended_by:
            self.ended_by = reason
            self.cancelled.set()

    def _end_of(self, finish: Finish) -> Finish:
        """Return how a reply ends; one cut off by the timeout ends with "length".

        Raises:
            ApiError: it was cancelled for another reason, or before its first token.
        """
        if finish.reason != "cancelled":
            return finish
        reason = self.ended_by or ApiError(503, "the server is shutting down", code="unavailable")
        if reason.status != 504 or self.first_token_at is None:
            raise reason
        return replace(finish, reason="length", details={**finish.details, "ended_by": "timeout"})

    async def batches(self, patience: float) -> AsyncIterator[list[tuple[int, Event]]]:
        """Yield the events in batches of all that are ready; an empty one after `patience` seconds.

        Raises:
            ApiError: a reply failed or was cancelled by the server.
        """
        while not all(self.finishes):
            received = await self._queue.get(patience)
            try:
                accepted = [(index, self._accept(index, item)) for index, item in received]
            except ApiError as error:
                self._record.setdefault("error", reason_of(error))
                raise
            yield [(index, event) for index, event in accepted if event]

    def _accept(self, index: int, item: StreamItem) -> Event | None:
        """Add an event to its reply, and return it; return None for progress."""
        if isinstance(item, PrefillProgress):
            self.prefill = item
            return None
        if isinstance(item, ApiError):
            self._failed = True
            raise item
        self.has_events = True
        event = item
        if isinstance(item, Finish):
            event = self.finishes[index] = self._end_of(item)
        self.replies[index].add(event)
        return event

    async def complete(
        self, request: Request, receive: Callable[[Sequence[tuple[int, Event]]], None]
    ) -> None:
        """Pass on the events until all replies are complete; cancel them if the client disconnects.

        Raises:
            ApiError: a reply failed or was cancelled, or the client disconnected (499).
        """

        async def cancel_on_disconnect() -> None:
            await wait_for_disconnect(request)
            self.cancelled.set()

        watching = asyncio.create_task(cancel_on_disconnect())
        try:
            async for events in self.batches(self._settings.keep_alive):
                receive(events)
        except ApiError as error:
            if self.cancelled.is_set() and watching.done():
                raise ApiError(499, "the client went away") from error
            raise
        finally:
            watching.cancel()
            self.close()

    @property
    def completed(self) -> list[tuple[ReplyBuilder, Finish]]:
        """The replies that are complete."""
        pairs = zip(self.replies, self.finishes, strict=True)
        return [(reply, finish) for reply, finish in pairs if finish]

    @property
    def usage(self) -> Usage:
        """Token counts of all replies together; the prompt of several choices counts once."""
        ends = [finish.usage for finish in self.finishes if finish]
        firsts = [finish.usage for finish in self.finishes[:: self._choices] if finish]
        return Usage(
            sum(usage.prompt_tokens for usage in firsts),
            sum(usage.cached_tokens for usage in firsts),
            sum(usage.completion_tokens for usage in ends),
            sum(usage.reasoning_tokens for usage in ends),
        )

    @property
    def timings(self) -> dict[str, float]:
        """Durations in milliseconds, and rates, under the names of llama.cpp's server."""
        now = time.perf_counter()
        first, usage = self.first_token_at or now, self.usage
        prefilled, decoded = usage.prompt_tokens - usage.cached_tokens, usage.completion_tokens
        prefill, decode = first - self.started, now - first  # seconds
        after_first = max(decoded - self.count, 0)  # the first of each reply belongs to prefill
        return {
            "prompt_n": prefilled,
            "prompt_ms": round(prefill * 1e3, 1),
            "prompt_per_second": round(prefilled / max(prefill, 1e-9), 1),
            "predicted_n": decoded,
            "predicted_ms": round(decode * 1e3, 1),
            "predicted_per_second": round(after_first / decode, 1) if decode else 0.0,
        }

    def close(self) -> None:
        """Cancel what still runs, free the slot, complete the log record; may be called twice."""
        if self._closed:
            return
        self._closed = True
        self.cancelled.set()
        if self._sent:
            unfinished = "error" if self._failed else "cancelled"
            self._record["finish"] = [end.reason if end else unfinished for end in self.finishes]
            if not all(self.finishes):
                self._record.setdefault("error", "the client went away")
        if self.first_token_at:
            self._record["first_ms"] = round((self.first_token_at - self.started) * 1e3, 1)
            self._record["tokens_per_second"] = self.timings["predicted_per_second"]
        if all(self.finishes):  # otherwise the counts are incomplete
            self._record |= asdict(self.usage)
        if self._settings.log_content:
            self._record["replies"] = [reply.message() for reply in self.replies]
        self._release_if_done()


class EventStreamResponse(StreamingResponse):
    """A streamed response. However it ends, what produces it is closed with it."""

    def __init__(
        self,
        close: Callable[[], None],
        content: AsyncIterator[bytes],
        media_type: str,
        headers: Mapping[str, str],
    ) -> None:
        all_headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        super().__init__(content, media_type=media_type, headers=all_headers)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, then call `close`."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()
