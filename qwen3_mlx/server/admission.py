"""Who is let in: the places that requests take, from before their bodies are read."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event as Flag
from typing import Any

from qwen3_mlx.server.errors import ApiError

_LONGEST_WAIT = 60  # seconds that a client is told to stay away
_MEMORY = 0.8  # how much a new measurement leaves of the old


class Slot:
    """A request among the others, until `release`; counts as many as the replies it wants."""

    def __init__(self, places: "Admission", record: dict[str, Any], client: str) -> None:
        self.client = client
        self.count = 1  # as far as is known
        self.record = record
        self.cancelled = Flag()
        self.kept = False  # by replies that run, and leave it when they end
        self._places = places

    def widen(self, count: int) -> None:
        """Count for so many replies.

        Raises:
            ApiError: there are too many.
        """
        if count > 1:
            self._places.check_room(count, self.client, beside=self)
            self.count = count

    def release(self, took: float | None = None) -> None:
        """Make room for others, after so many seconds of replies; may be called twice."""
        self._places.release(self, took)


class Admission:
    """All places that are taken; for the event loop alone."""

    def __init__(self, most: int, most_per_client: int) -> None:
        self._most = most
        self._most_per_client = most_per_client
        self._taken: set[Slot] = set()
        self._pace = 1.0  # seconds that a request takes, lately

    @property
    def active(self) -> int:
        """The replies that run or wait."""
        return sum(place.count for place in self._taken)

    @contextmanager
    def one(self, record: dict[str, Any], client: str) -> Iterator[Slot]:
        """Let a client's request in; unless replies that run keep its place, it leaves it at last.

        Raises:
            ApiError: there are too many already.
        """
        self.check_room(1, client)
        place = Slot(self, record, client)
        self._taken.add(place)
        try:
            yield place
        finally:
            if not place.kept:
                place.release()

    def check_room(self, count: int, client: str, beside: Slot | None = None) -> None:
        """Check that there is room for a client's replies, without what `beside` counts already.

        Raises:
            ApiError: there is not.
        """
        if count > self._most:
            raise ApiError(400, f"{count:,} replies are asked for, and at most {self._most} can be")
        if count > self._most_per_client:
            raise ApiError(
                400,
                f"{count:,} replies are asked for, and one client can have at most "
                f"{self._most_per_client} (--max-per-client)",
            )
        others = [place for place in self._taken if place is not beside]
        active = sum(place.count for place in others)
        if active + count > self._most:
            raise self._too_many(
                f"the server answers or keeps waiting {active} of at most {self._most}", count
            )
        own = sum(place.count for place in others if place.client == client)
        if own + count > self._most_per_client:
            raise self._too_many(f"this client has {own} of its {self._most_per_client}", count)

    def _too_many(self, what: str, count: int) -> ApiError:
        wait = min(max(1, round(self._pace)), _LONGEST_WAIT)
        return ApiError(
            429,
            f"{what} replies, and {count} more are asked for; try again in {wait} s",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(wait)},
        )

    def release(self, place: Slot, took: float | None) -> None:
        """Make room for others."""
        self._taken.discard(place)
        if took is not None:
            self._pace = _MEMORY * self._pace + (1 - _MEMORY) * took

    def cancel_all(self) -> None:
        """End all that runs."""
        for place in self._taken:
            place.cancelled.set()
