"""Stored responses: kept in memory, within a limit, each for the key of its client alone."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from qwen3_mlx.server.wire import json_bytes

MAX_STORED_BYTES = 64 << 20  # of JSON, of all responses
# The least that a response counts as, so that the limit is also one of their number: 1,024.
_LEAST_BYTES = MAX_STORED_BYTES >> 10


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response and the messages of its conversation, its own included.

    The messages exclude the instructions, which the next response does not inherit.
    """

    response: Mapping[str, Any]
    messages: Sequence[dict[str, Any]]

    @property
    def id(self) -> str:
        """The id of the response."""
        return str(self.response["id"])

    @property
    def size(self) -> int:
        """The bytes that count towards the limit; those of shared messages count for each."""
        nbytes = len(json_bytes(self.response)) + len(json_bytes(self.messages))
        return max(_LEAST_BYTES, nbytes)


class ResponseStore:
    """The stored responses of all owners; may be used from several threads.

    If there are too many, the oldest one of the owner with the most bytes goes first: one client
    cannot displace the responses of the others.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._stored: dict[tuple[str, str], tuple[StoredResponse, int]] = {}
        self._used = Counter[str]()  # bytes, by owners

    def put(self, owner: str, stored: StoredResponse) -> None:
        """Store a response, unless it is larger than the limit, and drop others that are over."""
        if (size := stored.size) > MAX_STORED_BYTES:
            return
        with self._lock:
            self._stored[owner, stored.id] = stored, size
            self._used[owner] += size
            while self._used.total() > MAX_STORED_BYTES:
                largest = max(self._used, key=lambda name: self._used[name])
                oldest = next(key for key in self._stored if key[0] == largest)
                self._remove(oldest)

    def get(self, owner: str, response_id: str) -> StoredResponse | None:
        """Return a response of an owner, or None."""
        with self._lock:
            stored, _ = self._stored.get((owner, response_id), (None, 0))
            return stored

    def delete(self, owner: str, response_id: str) -> bool:
        """Delete a response of an owner; return whether it was there."""
        with self._lock:
            found = (owner, response_id) in self._stored
            if found:
                self._remove((owner, response_id))
            return found

    def items(self, owner: str) -> dict[str, Mapping[str, Any]]:
        """Return the output items of the responses of an owner, by their ids."""
        with self._lock:
            responses = [one.response for key, (one, _) in self._stored.items() if key[0] == owner]
        return {item["id"]: item for response in responses for item in response["output"]}

    def _remove(self, key: tuple[str, str]) -> None:
        _, size = self._stored.pop(key)
        self._used[key[0]] -= size
        self._used += Counter()  # drops the owners at zero
