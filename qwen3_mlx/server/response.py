"""The replies to one request, from the engine's thread to the client."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from qwen3_mlx.api.generation import PreparedRequest
from qwen3_mlx.api.llm import LLM
from qwen3_mlx.api.stream import ReplyBuilder
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.server.admission import Slot
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.guard import reason_of
from qwen3_mlx.server.preparing import gone
from qwen3_mlx.server.settings import Settings
from qwen3_mlx.text.events import Event, Finish, Reasoning, Text, Usage

_MOST_UNREAD = 1 << 16  # pieces of a reply that a client has not taken: some 13 MB
_AT_A_TIME = 512  # of those, written at once


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """How much of a prompt has been read."""

    done: int
    total: int


Heard = Event | PrefillProgress | BaseException


class EventBridge:
    """Carries what is heard to the event loop: all of a step at once, for waking it costs more."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._letters: list[tuple[ActiveRequest, int, Heard]] = []

    def put(self, running: "ActiveRequest", index: int, heard: Heard) -> None:
        """Take what a reply of `running` says; on the thread that owns the network."""
        self._letters.append((running, index, heard))
        if len(self._letters) == 1:
            try:
                self.llm.call_soon(self._send)
            except Qwen3Error:  # it is being closed: this is the end of all replies
                self._send()

    def _send(self) -> None:
        letters, self._letters = self._letters, []
        if not letters:  # sent already, when this was asked for at the very end
            return
        loop = letters[0][0].loop
        try:
            loop.call_soon_threadsafe(_sort, letters)
        except RuntimeError:  # the loop is closed: nobody reads this any more
            for running, _, _ in letters:
                running.cancelled.set()


def _sort(letters: list[tuple["ActiveRequest", int, Heard]]) -> None:
    for running, index, heard in letters:
        running.hear(index, heard)


def _weight(heard: Heard) -> int:
    """Count the pieces that an event takes in memory."""
    tokens = heard.tokens if isinstance(heard, Text | Reasoning) else ()
    return 1 + sum(1 + len(token.top) for token in tokens)


class ActiveRequest:
    """The replies to one request, numbered from 0, until `close`."""

    def __init__(
        self, mailbox: "EventBridge", settings: Settings, place: Slot, choices: int
    ) -> None:
        """Prepare for the replies that `place` counts: so many `choices` to each prompt."""
        count = place.count
        place.kept = True
        self.said = [ReplyBuilder() for _ in range(count)]
        self.finishes: list[Finish | None] = [None] * count
        self.prompt_tokens = 0
        self.warnings: list[str] = []  # of the request, once it has been prepared
        self.read: PrefillProgress | None = None
        self.started = time.perf_counter()
        self.first: float | None = None  # when the first token was chosen
        self.spoken = False  # whether an event came
        self.cancelled = place.cancelled
        self.count = count
        self._choices = choices
        self._mailbox = mailbox
        self._settings = settings
        self._place = place
        self._record = place.record
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[tuple[int, Heard]] = asyncio.Queue()
        self._unread = 0  # pieces in the queue
        self._sent = self._ends = 0  # replies that the engine was given, and those it has ended
        self._failed = self._closed = self._left = False
        self.ended_by: ApiError | None = None  # what the server has cancelled the replies for
        timeout = settings.request_timeout
        self._timer = self.loop.call_later(timeout, self._time_is_up) if timeout else None

    def begin(self, tasks: Sequence[PreparedRequest]) -> None:
        """Send the tasks to the engine; from any thread."""
        try:
            self._begin(tasks)
        finally:
            # A reply may end before it has been counted here, and the client may go meanwhile.
            self.loop.call_soon_threadsafe(self._leave_if_done)

    def _begin(self, tasks: Sequence[PreparedRequest]) -> None:
        for index, task in enumerate(tasks):
            deliver = partial(self._mailbox.put, self, index)

            def tell(done: int, total: int, deliver: Callable[[Heard], None] = deliver) -> None:
                if done == total and self.first is None:  # told so with the first token
                    self.first = time.perf_counter()
                deliver(PrefillProgress(done, total))

            asked = replace(task.asked, progress=tell)
            begun = replace(task, asked=asked, shortens=True, client=self._place.client)
            started = self._mailbox.llm.begin(begun, deliver, self.cancelled)
            self._sent += 1
            self.prompt_tokens = started.prompt_tokens
            if asked.max_tokens is not None and started.room < asked.max_tokens:
                warning = (
                    f"max_tokens={asked.max_tokens:,} was shortened to {started.room:,}: after "
                    f"{started.prompt_tokens:,} tokens of prompt the context has room for no more"
                )
                if warning not in self.warnings:  # each choice has the same
                    self.warnings.append(warning)

    def hear(self, index: int, heard: Heard) -> None:
        """Take what a reply says. The last that the engine says makes room for other requests.

        How long a client takes to read the rest is its own affair, within bounds.
        """
        if not self._closed:
            self.queue.put_nowait((index, heard))
            self._unread += _weight(heard)
        if self._unread > _MOST_UNREAD:
            self._cancel_for(ApiError(408, "the client took too little of the reply for too long"))
        if isinstance(heard, BaseException):
            self.cancelled.set()  # the other replies to the same request
        if isinstance(heard, Finish | BaseException):
            self._ends += 1
            self._leave_if_done()

    def _leave_if_done(self) -> None:
        done = self._ends == self._sent and (self._closed or self._sent == self.count)
        if done and not self._left:
            self._left = True
            if self._timer:
                self._timer.cancel()
            self._place.release(time.perf_counter() - self.started)

    def _time_is_up(self) -> None:
        seconds = f"{self._settings.request_timeout:g}"
        self._cancel_for(
            ApiError(
                504,
                f"the reply had not begun after {seconds} s, and is not waited for any longer "
                "(--request-timeout); ask for less, or when the server has less to do",
                code="timeout",
            )
        )

    def _cancel_for(self, reason: ApiError) -> None:
        if not self.ended_by:
            self.ended_by = reason
            self.cancelled.set()

    def _end_of(self, finish: Finish) -> Finish:
        """Return how a reply ends: what time has cut off is as long as it may be.

        Raises:
            ApiError: it was cancelled for another reason, or before it had begun.
        """
        if finish.reason != "cancelled":
            return finish
        reason = self.ended_by or ApiError(503, "the server is shutting down", code="unavailable")
        if reason.status != 504 or self.first is None:
            raise reason
        return replace(finish, reason="length", details={**finish.details, "ended_by": "timeout"})

    async def batches(self, patience: float) -> AsyncIterator[list[tuple[int, Event]]]:
        """Give the events as they come, all that are there at once; none when time is up.

        Raises:
            ApiError: a reply failed, or the server is being shut down.
        """
        open_replies = self.count
        while open_replies:
            heard = await self._waiting(patience)
            events: list[tuple[int, Event]] = []
            for index, event in heard:
                self._unread -= _weight(event)
                if isinstance(event, BaseException):
                    self._failed = True
                    raise self._noted(ApiError.of(event))
                if isinstance(event, PrefillProgress):
                    self.read = event
                    continue
                self.spoken = True
                if isinstance(event, Finish):
                    try:
                        event = self._end_of(event)
                    except ApiError as error:
                        raise self._noted(error) from None
                    self.finishes[index] = event
                    open_replies -= 1
                self.said[index].add(event)
                events.append((index, event))
            yield events

    def _noted(self, error: ApiError) -> ApiError:
        self._record.setdefault("error", reason_of(error))
        return error

    async def _waiting(self, patience: float) -> list[tuple[int, Heard]]:
        heard = []
        if self.queue.empty():
            try:
                async with asyncio.timeout(patience):
                    heard = [await self.queue.get()]
            except TimeoutError:
                return []
        size = sum(_weight(event) for _, event in heard)
        while not self.queue.empty() and size < _AT_A_TIME:
            heard.append(self.queue.get_nowait())
            size += _weight(heard[-1][1])
        if not self.queue.empty():  # of what a slow client has left: others have their turn, too
            await asyncio.sleep(0)
        return heard

    async def complete(self, request: Request) -> None:
        """Wait for all to be said; end the replies if the client goes away before.

        Raises:
            ApiError: a reply failed, or nobody waits for it any more.
        """

        async def end_with_client() -> None:
            await gone(request)
            self.cancelled.set()

        watching = asyncio.create_task(end_with_client())
        try:
            async for _ in self.batches(self._settings.keep_alive):
                pass
        except ApiError as error:
            if self.cancelled.is_set() and watching.done():
                raise ApiError(499, "the client went away") from error
            raise
        finally:
            watching.cancel()
            self.close()

    @property
    def usage(self) -> Usage:
        """What the replies took together; a prompt counts once."""
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
        """How long it took, by the names that llama.cpp's clients know; in milliseconds."""
        now = time.perf_counter()
        first, usage = self.first or now, self.usage
        read, made = usage.prompt_tokens - usage.cached_tokens, usage.completion_tokens
        reading, making = first - self.started, now - first
        return {
            "prompt_n": read,
            "prompt_ms": round(reading * 1e3, 1),
            "prompt_per_second": round(read / max(reading, 1e-9), 1),
            "predicted_n": made,
            "predicted_ms": round(making * 1e3, 1),
            "predicted_per_second": round(max(made - self.count, 0) / making, 1) if making else 0.0,
        }

    def close(self) -> None:
        """End what still runs, make room for others, and leave a record; may be called twice."""
        if self._closed:
            return
        self._closed = True
        self.cancelled.set()
        if self._sent:
            other = "error" if self._failed else "cancelled"
            self._record["finish"] = [end.reason if end else other for end in self.finishes]
            if not all(self.finishes):
                self._record.setdefault("error", "the client went away")
        if self.first:
            self._record["first_ms"] = round((self.first - self.started) * 1e3, 1)
            self._record["tokens_per_second"] = self.timings["predicted_per_second"]
        if all(self.finishes):  # or the counts are not known
            self._record |= asdict(self.usage)
        if self._settings.log_content:
            self._record["replies"] = [said.message() for said in self.said]
        self._leave_if_done()


class EventStreamResponse(StreamingResponse):
    """A stream of what is being said. However it ends, the replies end with it."""

    def __init__(
        self,
        running: ActiveRequest,
        content: AsyncIterator[bytes],
        media_type: str,
        headers: Mapping[str, str],
    ) -> None:
        told = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        super().__init__(content, media_type=media_type, headers=told)
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.close()
