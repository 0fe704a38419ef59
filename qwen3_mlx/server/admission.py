"""Admission: limits the replies in progress, counted before a body is read."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Event as Flag
from typing import Any

from qwen3_mlx.engine.moving_average import MovingAverage
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.keys import Key
from qwen3_mlx.text.events import Usage

_MAX_RETRY_AFTER = 60  # seconds
_SECONDS_DECAY = 0.8  # weight of the old value when a new duration arrives


class Slot:
    """The place of one request among those in progress, until `release`; counts its replies."""

    def __init__(
        self, admission: "Admission", record: dict[str, Any], client: str, key: Key | None
    ) -> None:
        self.client = client
        self.key = key
        self.count = 1  # until the body has been parsed
        self.record = record
        self.cancelled = Flag()
        self.kept = False  # True if running replies hold the slot; they release it when they end
        self.resources = ExitStack()  # freed with the slot
        self._admission = admission

    def widen(self, count: int) -> None:
        """Count `count` replies instead of one.

        Raises:
            ApiError: there is no room for so many.
        """
        if count > 1:
            self._admission.check_room(count, self.client, beside=self)
            self.count = count

    def spend(self, usage: Usage) -> None:
        """Report the tokens of a reply that has ended, however it did."""
        self._admission.spent(self, usage)

    def release(self, seconds: float | None = None) -> None:
        """Free the slot, whose replies took `seconds`; may be called twice."""
        self._admission.release(self, seconds)
        self.resources.close()


class Admission:
    """All slots in use. Not thread-safe: only the event loop uses it."""

    def __init__(
        self,
        max_replies: int,
        max_replies_per_client: int,
        spent: Callable[[Slot, Usage], None],
    ) -> None:
        """Limit the replies in progress; `spent` is called with what each took."""
        self.spent = spent
        self._max_replies = max_replies
        self._max_per_client = max_replies_per_client
        self._slots: set[Slot] = set()
        self._seconds = MovingAverage(_SECONDS_DECAY, 1.0)  # that a request takes

    @property
    def active(self) -> int:
        """Number of replies that run or wait."""
        return sum(slot.count for slot in self._slots)

    @contextmanager
    def one(self, record: dict[str, Any], client: str, key: Key | None = None) -> Iterator[Slot]:
        """Admit a request of a client; free its slot at the end, unless running replies hold it.

        Raises:
            ApiError: there are too many requests already.
        """
        self.check_room(1, client)
        slot = Slot(self, record, client, key)
        self._slots.add(slot)
        try:
            yield slot
        finally:
            if not slot.kept:
                slot.release()

    def check_room(self, count: int, client: str, beside: Slot | None = None) -> None:
        """Check that there is room for `count` replies of a client, not counting `beside`.

        Raises:
            ApiError: there is no room; 400 if there can never be, otherwise 429.
        """
        if count > self._max_replies:
            raise ApiError(
                400,
                f"{count:,} replies are requested, and at most {self._max_replies} are possible",
            )
        if count > self._max_per_client:
            raise ApiError(
                400,
                f"{count:,} replies are requested, and one client can have at most "
                f"{self._max_per_client} (--max-per-client)",
            )
        others = [slot for slot in self._slots if slot is not beside]
        active = sum(slot.count for slot in others)
        if active + count > self._max_replies:
            raise self._too_many(
                f"the server has {active} of at most {self._max_replies}",
                count,
            )
        own = sum(slot.count for slot in others if slot.client == client)
        if own + count > self._max_per_client:
            raise self._too_many(f"this client has {own} of its {self._max_per_client}", count)

    def _too_many(self, what: str, count: int) -> ApiError:
        wait = min(max(1, round(self._seconds.value)), _MAX_RETRY_AFTER)
        return ApiError(
            429,
            f"{what} replies, and {count} more are requested; try again in {wait} s",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(wait)},
        )

    def release(self, slot: Slot, seconds: float | None) -> None:
        """Free a slot, whose replies took `seconds`."""
        self._slots.discard(slot)
        if seconds is not None:
            self._seconds.add(seconds)

    def cancel_all(self) -> None:
        """Cancel all requests in progress."""
        for slot in self._slots:
            slot.cancelled.set()
