"""Limits of API keys per minute: of requests, and of tokens, read and generated together."""

import math
import time

from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.keys import Key

_MINUTE = 60.0  # seconds


class Quotas:
    """The requests and tokens that each key has left. Only the event loop uses it.

    A token bucket for each limit: full at first, it fills evenly within a minute. A reply's tokens
    are known at its end, so they are taken then, and may leave a debt.
    """

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, str], _Bucket] = {}

    def admit(self, key: Key) -> None:
        """Count a request of a key.

        Raises:
            ApiError: a limit is reached (429).
        """
        limits = {"requests": key.requests_per_minute, "tokens": key.tokens_per_minute}
        buckets = {unit: self._bucket(key, unit, limit) for unit, limit in limits.items() if limit}
        for unit, bucket in buckets.items():
            if seconds := bucket.seconds_until(1):
                raise ApiError(
                    429,
                    f"the key {key.name} has used its {bucket.per_minute:,} {unit} a minute; "
                    f"try again in {seconds} s",
                    code="rate_limit_exceeded",
                    headers={"Retry-After": str(seconds)},
                )
        if "requests" in buckets:
            buckets["requests"].take(1)

    def spend(self, key: Key, tokens: int) -> None:
        """Count the tokens of a reply."""
        if key.tokens_per_minute:
            self._bucket(key, "tokens", key.tokens_per_minute).take(tokens)

    def _bucket(self, key: Key, unit: str, per_minute: int) -> "_Bucket":
        """Return the bucket of a key; full if the limit is new or has changed."""
        bucket = self._buckets.get((key.name, unit))
        if bucket is None or bucket.per_minute != per_minute:
            bucket = self._buckets[key.name, unit] = _Bucket(per_minute)
        return bucket


class _Bucket:
    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._filled_at = time.monotonic()

    def seconds_until(self, amount: int) -> int:
        """Return the whole seconds until `amount` is there; 0 if it is."""
        self._fill()
        return max(0, math.ceil((amount - self._level) * _MINUTE / self.per_minute))

    def take(self, amount: int) -> None:
        """Take what may be more than is there."""
        self._fill()
        self._level -= amount

    def _fill(self) -> None:
        now = time.monotonic()
        grown = self._level + (now - self._filled_at) * self.per_minute / _MINUTE
        self._level, self._filled_at = min(float(self.per_minute), grown), now
