"""How much memory bodies may take together, while they come and while they are answered."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.settings import Settings

_LARGEST = 4  # bodies of the largest size that there may be at once
_SMALL = 1 << 16  # bytes that are not counted: those who send no more never wait for others


class BodyMemory:
    """The body of one request."""

    def __init__(self, bodies: "BodyMemoryLimit", client: str) -> None:
        self.client = client
        self.size = 0
        self._bodies = bodies

    @property
    def counted(self) -> int:
        """The bytes that count among those of others."""
        return max(0, self.size - _SMALL)

    def grow(self, more: int) -> None:
        """Take more of it.

        Raises:
            ApiError: it is too large, or there is no room beside the others.
        """
        before = self.counted
        self.size += more
        self._bodies.take(self, self.counted - before)


class BodyMemoryLimit:
    """All bodies; for the event loop alone."""

    def __init__(self, settings: Settings) -> None:
        self._largest = settings.max_body
        self._most = _LARGEST * settings.max_body
        share = settings.most_per_client / settings.max_requests
        self._most_per_client = max(self._largest, round(share * self._most))
        self._held = Counter[str]()  # bytes, by clients

    @contextmanager
    def one(self, client: str) -> Iterator[BodyMemory]:
        """Surround a request."""
        body = BodyMemory(self, client)
        try:
            yield body
        finally:
            self._held[client] -= body.counted
            self._held += Counter()  # without those that have none

    def check(self, size: int) -> None:
        """Raise an ApiError if no body may have so many bytes."""
        if size > self._largest:
            raise ApiError(413, f"the request is larger than {self._largest:,} bytes (--max-body)")

    def take(self, body: BodyMemory, more: int) -> None:
        """Count so much more of a body; see `Body.grow`."""
        self._held[body.client] += more
        self.check(body.size)
        if not more:
            return
        for held, most in (
            (self._held[body.client], self._most_per_client),
            (self._held.total(), self._most),
        ):
            if held > most:
                raise ApiError(
                    503,
                    f"large requests have {held:,} of at most {most:,} bytes; try again in a "
                    "moment, or send less",
                    code="unavailable",
                    headers={"Retry-After": "5"},
                )
