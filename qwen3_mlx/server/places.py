"""Who is let in: the places that requests take, from before their bodies are read."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event as Flag
from typing import Any

from qwen3_mlx.server.errors import ApiError

_LONGEST_WAIT = 60  # seconds that a client is told to stay away
_MEMORY = 0.8  # how much a new measurement leaves of the old


class Place:
    """A request among the others, until `leave`; it counts for as many as the replies it wants."""

    def __init__(self, places: "Places", record: dict[str, Any]) -> None:
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
            self._places.check_room(count, beside=self)
            self.count = count

    def leave(self, took: float | None = None) -> None:
        """Make room for others, after so many seconds of replies; may be called twice."""
        self._places.leave(self, took)


class Places:
    """All places that are taken; for the event loop alone."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: set[Place] = set()
        self._pace = 1.0  # seconds that a request takes, lately

    @property
    def active(self) -> int:
        """The replies that run or wait."""
        return sum(place.count for place in self._taken)

    @contextmanager
    def one(self, record: dict[str, Any]) -> Iterator[Place]:
        """Let a request in; unless replies that run keep its place, it leaves it at the end.

        Raises:
            ApiError: there are too many already.
        """
        self.check_room(1)
        place = Place(self, record)
        self._taken.add(place)
        try:
            yield place
        finally:
            if not place.kept:
                place.leave()

    def check_room(self, count: int, beside: Place | None = None) -> None:
        """Check that there is room for so many replies, without what `beside` counts already.

        Raises:
            ApiError: there is not.
        """
        active = self.active - (beside.count if beside else 0)
        if count > self._most:
            raise ApiError(400, f"{count:,} replies are asked for, and at most {self._most} can be")
        if active + count > self._most:
            wait = min(max(1, round(self._pace)), _LONGEST_WAIT)
            raise ApiError(
                429,
                f"the server answers or keeps waiting {active} of at most {self._most} replies, "
                f"and {count} more are asked for; try again in {wait} s",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(wait)},
            )

    def leave(self, place: Place, took: float | None) -> None:
        """Make room for others."""
        self._taken.discard(place)
        if took is not None:
            self._pace = _MEMORY * self._pace + (1 - _MEMORY) * took

    def cancel_all(self) -> None:
        """End all that runs."""
        for place in self._taken:
            place.cancelled.set()
