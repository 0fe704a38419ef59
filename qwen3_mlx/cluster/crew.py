"""The followers as the leader sees them, and the watchdog: a peer that stalls must be noticed.

MLX waits without limit for a machine that has stopped. So each follower acknowledges each step, and
a thread without MLX knows which step is outstanding since when.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

from qwen3_mlx.cluster.wire import Channel, Message, WireError
from qwen3_mlx.errors import ClusterError

LIMIT_SECONDS = 20.0  # that a step may take at least
_LIMIT_FACTOR = 20  # times what it should take
_POLL_SECONDS = 0.5
_PING_SECONDS = 1.0  # for an answer of a host that is alive
_DOWN = "the cluster is down, start it again"


@dataclass(slots=True, eq=False)
class Peer:
    """A follower: its name, its rank, and what was last heard of it."""

    name: str
    rank: int
    channel: Channel
    port: int = 0  # for computing
    acknowledged: int = 0  # the last step that it has done
    heard_at: float = 0.0
    answers: "SimpleQueue[Any]" = field(default_factory=SimpleQueue)

    def __str__(self) -> str:
        return f"{self.name} (rank {self.rank})"


class Crew:
    """The followers of a cluster.

    Attributes:
        failure: why the cluster is down; None while it is up.
        busy: the seconds that all steps have taken.
    """

    def __init__(self, peers: Sequence[Peer], limit: float = LIMIT_SECONDS) -> None:
        """Start to listen to the followers and to watch them."""
        self.peers = peers
        self.failure: ClusterError | None = None
        self.busy = 0.0
        self._limit = limit
        self._on_failure: list[Callable[[ClusterError], None]] = []
        self._lock = Lock()
        self._closing = False
        self._step = self._tokens = 0  # the outstanding step, 0 if there is none
        self._begun_at = 0.0
        self._longest, self._seconds_a_token = 0.0, float("inf")
        self._busy = Event()  # wakes the watchdog, which sleeps while the engine is idle
        for peer in peers:
            Thread(target=self._listen, args=(peer,), name="qwen3-peer", daemon=True).start()
        Thread(target=self._watch, name="qwen3-watchdog", daemon=True).start()

    def on_failure(self, call: Callable[[ClusterError], None]) -> None:
        """Call `call`, on another thread, if the cluster fails, or at once if it has failed.

        Several are called in their order.
        """
        with self._lock:
            self._on_failure.append(call)
            failure = self.failure
        if failure:
            call(failure)

    def check(self) -> None:
        """Raise the `ClusterError` of a cluster that is down."""
        if self.failure:
            raise self.failure

    def send(self, message: Message) -> None:
        """Send a message to all followers.

        Raises:
            ClusterError: the cluster is down.
        """
        self.check()
        for peer in self.peers:
            try:
                peer.channel.send(message)
            except OSError as error:
                raise self._lose(peer, error) from error

    def ask(self, message: Message) -> list[Any]:
        """Send a message and return the answers of all followers.

        Raises:
            ClusterError: the cluster is down, or one does not answer in time.
        """
        self.send(message)
        answers = []
        for peer in self.peers:
            end = time.monotonic() + self._limit
            while not self.failure:
                try:
                    answers.append(peer.answers.get(timeout=_POLL_SECONDS))
                    break
                except Empty:
                    if time.monotonic() > end:
                        self._fail(self._silent([peer]))
            self.check()
        return answers

    # --- the steps ----------------------------------------------------------------------------

    def begin(self, step: int, tokens: int) -> None:
        """Note that a step of so many tokens is submitted."""
        self._begun_at, self._tokens, self._step = time.monotonic(), tokens, step
        if not self._busy.is_set():
            self._busy.set()

    def done(self) -> None:
        """Note that the outstanding step is done: it needs nothing more of the followers."""
        if self._step:
            seconds = time.monotonic() - self._begun_at
            self.busy += seconds
            self._longest = max(self._longest, seconds)
            self._seconds_a_token = min(self._seconds_a_token, seconds / self._tokens)
            self._step = 0

    def reason(self, error: Exception) -> ClusterError:
        """Return why a step failed with an error of the device: because a peer is gone, perhaps."""
        end = time.monotonic() + _PING_SECONDS
        while not self.failure and time.monotonic() < end:
            time.sleep(_POLL_SECONDS / 10)
        # If no connection is lost, the ring is broken all the same: the ranks are out of step.
        return self._fail(ClusterError(f"the cluster cannot compute ({error}); start it again"))

    @property
    def limit(self) -> float:
        """The seconds that the outstanding step may take."""
        expected = max(self._longest, min(self._seconds_a_token, 1e9) * self._tokens)
        known = self._seconds_a_token < float("inf")
        return max(self._limit, _LIMIT_FACTOR * expected if known else 0.0)

    def _watch(self) -> None:
        while not (self._closing or self.failure):
            if not self._step:
                self._busy.clear()
                if not self._step:  # none has begun meanwhile
                    self._busy.wait()
                continue
            step, begun_at, limit = self._step, self._begun_at, self.limit
            time.sleep(min(_POLL_SECONDS, limit))
            late = [peer for peer in self.peers if peer.acknowledged < step]
            if step == self._step and late and time.monotonic() > begun_at + limit:
                self._fail(self._silent(late))

    def _silent(self, late: Sequence[Peer]) -> ClusterError:
        """Return the error that names those of the `late` that do not even answer a ping."""
        asked_at = time.monotonic()
        for peer in late:
            try:
                peer.channel.send({"ping": 1})
            except OSError:
                continue
        time.sleep(_PING_SECONDS)
        dead = [peer for peer in late if peer.heard_at < asked_at] or late
        have = "has" if len(dead) == 1 else "have"
        names = ", ".join(map(str, dead))
        return ClusterError(f"{names} {have} not answered for {self.limit:.0f} s; {_DOWN}")

    # --- the connections ------------------------------------------------------------------------

    def _listen(self, peer: Peer) -> None:
        try:
            while True:
                message = peer.channel.receive()
                peer.heard_at = time.monotonic()
                if "ack" in message:
                    peer.acknowledged = int(message["ack"])
                elif "answer" in message:
                    peer.answers.put(message["answer"])
                elif "failed" in message:
                    self._fail(ClusterError(f"{peer} failed: {message['failed']}; {_DOWN}"))
        except (EOFError, OSError, WireError, ValueError) as error:
            self._lose(peer, error)

    def _lose(self, peer: Peer, error: Exception) -> ClusterError:
        return self._fail(ClusterError(f"{peer} is gone ({error}); {_DOWN}"))

    def _fail(self, error: ClusterError) -> ClusterError:
        """Mark the cluster as down, unless it is already or is closed; return why it is down."""
        with self._lock:
            if self.failure or self._closing:
                return self.failure or error
            self.failure, calls = error, list(self._on_failure)
        self._busy.set()
        for call in calls:
            call(error)
        return error

    def close(self) -> None:
        """End the followers in order."""
        self._closing = True
        self._busy.set()
        for peer in self.peers:
            try:
                peer.channel.send({"end": 1})
            except OSError:
                continue
            finally:
                peer.channel.close()
