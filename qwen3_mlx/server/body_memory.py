"""Limits the memory of all request bodies together, while they are received and answered."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.settings import Settings

_MAX_LARGEST = 4  # bodies of the largest size at once
_FREE_BYTES = 1 << 16  # of each body, not counted: small requests are never refused for others


class BodyMemory:
    """The memory of one body."""

    def __init__(self, bodies: "BodyMemoryLimit", client: str) -> None:
        self.client = client
        self.size = 0
        self._bodies = bodies

    @property
    def counted(self) -> int:
        """The bytes that count towards the limits."""
        return max(0, self.size - _FREE_BYTES)

    def grow(self, more: int) -> None:
        """Count `more` received bytes.

        Raises:
            ApiError: the body is too large (413), or all bodies together are (503).
        """
        before = self.counted
        self.size += more
        self._bodies.take(self, self.counted - before)


class BodyMemoryLimit:
    """The memory of all bodies. Not thread-safe: only the event loop uses it."""

    def __init__(self, settings: Settings) -> None:
        self._largest = settings.max_body
        self._limit = _MAX_LARGEST * settings.max_body
        share = settings.max_replies_per_client / settings.max_requests
        self._limit_per_client = max(self._largest, round(share * self._limit))
        self._used = Counter[str]()  # bytes, by clients

    @contextmanager
    def one(self, client: str) -> Iterator[BodyMemory]:
        """Count the body of a request until the block ends."""
        body = BodyMemory(self, client)
        try:
            yield body
        finally:
            self._used[client] -= body.counted
            self._used += Counter()  # drops the clients at zero

    def check(self, size: int) -> None:
        """Raise an ApiError if a body of `size` bytes is too large."""
        if size > self._largest:
            raise ApiError(413, f"the request is larger than {self._largest:,} bytes (--max-body)")

    def take(self, body: BodyMemory, more: int) -> None:
        """Count `more` bytes of a body; see `BodyMemory.grow`."""
        self._used[body.client] += more
        self.check(body.size)
        if not more:
            return
        for used, limit in (
            (self._used[body.client], self._limit_per_client),
            (self._used.total(), self._limit),
        ):
            if used > limit:
                raise ApiError(
                    503,
                    f"large requests have {used:,} of at most {limit:,} bytes; try again in a "
                    "moment, or send less",
                    code="unavailable",
                    headers={"Retry-After": "5"},
                )
