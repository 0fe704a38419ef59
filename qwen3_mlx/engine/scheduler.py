"""Continuous batching: decides which sequences run in the next step.

It decides by counts of tokens alone and holds no arrays; a `CacheOwner` carries out what it
decides, which may commit the step in flight. In every step each sequence that is being answered
decodes one token, and a chunk of prompts is prefilled. Room in caches is counted in tokens, and no
sequence starts without room.

Clients take turns: of the waiting sequences with the least priority number, the next belongs to the
client with the fewest running; of several such clients, to the one that was served longest ago. A
client with many requests is so kept waiting by others with few, but not for ever: they run as its
own are ending.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from qwen3_mlx.engine.moving_average import MovingAverage
from qwen3_mlx.engine.request import IDLE, Phase

_MAX_STALL = 0.25  # seconds that a chunk of a prompt may delay the sequences that decode
MAX_RUNNING = 32  # sequences
_MIN_CHUNK = 64  # tokens
_SPEED_DECAY = 0.7  # weight of the old value when a new measurement of the speed arrives
_MAX_CLIENTS = 256  # clients; beyond that, those without a request are forgotten


class Schedulable(Protocol):
    """A sequence as the scheduler sees it."""

    priority: int  # the least comes first
    client: str
    phase: Phase

    @property
    def room(self) -> int:
        """The tokens that its caches have room for."""

    @property
    def complete(self) -> bool:
        """True if it needs no more steps; it is removed when the last one is done."""

    @property
    def num_computed(self) -> int:
        """The tokens in its caches."""

    @property
    def num_uncomputed(self) -> int:
        """The known tokens that are not in its caches yet."""

    def room_for(self, tokens: int) -> int:
        """Return the room that its caches have once they hold `tokens`."""

    def initial_room(self) -> int:
        """Return the room that it starts with."""

    def reserve(self, room: int) -> None:
        """Grow its caches to `room` tokens at the next write."""


S = TypeVar("S", bound=Schedulable)
S_contra = TypeVar("S_contra", bound=Schedulable, contravariant=True)


class CacheOwner(Protocol[S_contra]):
    """Holds the caches, and carries out what the scheduler decides."""

    @property
    def prefix_room(self) -> int:
        """The tokens that kept prefixes have room for."""

    def admit(self, sequence: S_contra) -> None:
        """Create the caches of a sequence, filled with what is kept of its tokens, or end it."""

    def preempt(self, sequence: S_contra) -> None:
        """Release the caches of a sequence; it starts again later."""

    def evict(self, tokens: int) -> None:
        """Evict kept prefixes with room for so many tokens, as far as there are any."""


@dataclass(frozen=True, slots=True)
class ScheduledStep(Generic[S]):
    """The work of one forward pass: a token for each of `decoding`, and a chunk of a prompt.

    The chunk is of the first of `prefilling`; short prompts of the others may be read beside it.
    """

    decoding: Sequence[S]
    prefilling: Sequence[S]


class Scheduler(Generic[S]):
    """Holds the waiting and the running sequences, and decides each step."""

    def __init__(self, room: int, caches: CacheOwner[S]) -> None:
        """Create a scheduler that shares out `room` tokens of cache."""
        self.room = room
        self.waiting: list[S] = []
        self.running: list[S] = []  # the last, which loses least, is preempted first
        self._caches = caches
        self._speed = MovingAverage(_SPEED_DECAY)  # tokens of prompt a second
        self._blocked = False  # the first waiting found no room, and nothing has changed since
        self._preempted: list[S] = []  # of those waiting: they come first, ahead of clients' turns
        self._last_turn: dict[str, int] = {}  # the turn in which each client was last admitted
        self._turn = 0  # admissions so far

    def add(self, sequence: S) -> None:
        """Add a waiting sequence: it runs by priority, then by client, then in order of arrival."""
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda waiting: waiting.priority)
        self._blocked = False

    def remove(self, sequence: S) -> None:
        """Remove a sequence."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        if sequence in self._preempted:
            self._preempted.remove(sequence)
        self._blocked = False

    def clear(self) -> None:
        """Remove all sequences."""
        for sequences in (self.running, self.waiting, self._preempted):
            sequences.clear()
        self._blocked = False

    def room_in_use(self) -> int:
        """Count the tokens that caches have room for, kept prefixes included."""
        return sum(sequence.room for sequence in self.running) + self._caches.prefix_room

    def next_step(self) -> ScheduledStep[S]:
        """Return the next step, after admitting and preempting as room and priorities demand."""
        self._preempt_idle_work()
        self._admit()
        for sequence in list(self.running):
            # Making room for one may have preempted another of the list.
            if (
                sequence in self.running
                and sequence.phase is Phase.DECODE
                and not sequence.complete
            ):
                tokens = sequence.num_computed + max(1, sequence.num_uncomputed)
                self._make_room(sequence, sequence.room_for(tokens))
        active = [sequence for sequence in self.running if not sequence.complete]
        decoding = [sequence for sequence in active if sequence.phase is Phase.DECODE]
        prefilling = [sequence for sequence in active if sequence.phase is Phase.PREFILL]
        if prefilling:  # round robin: another prompt is read first in the next step
            self.running.remove(prefilling[0])
            self.running.append(prefilling[0])
        return ScheduledStep(decoding, prefilling)

    def prefill_budget(self, step: ScheduledStep[S], limit: int) -> int:
        """Return the most prompt tokens to read in `step`, up to `limit`.

        By the measured speed, so that decoding is not stalled for longer than `_MAX_STALL`.
        """
        if not step.decoding and step.prefilling and step.prefilling[0].priority < IDLE:
            return limit
        tokens = int(self._speed.value * _MAX_STALL) // _MIN_CHUNK * _MIN_CHUNK
        return min(limit, max(_MIN_CHUNK, tokens))

    def observe(self, tokens: int, seconds: float) -> None:
        """Record how long a step with so many tokens of prompt took."""
        self._speed.add(tokens / max(seconds, 1e-6))

    def _preempt_idle_work(self) -> None:
        if any(sequence.priority < IDLE for sequence in (*self.waiting, *self.running)):
            for sequence in [sequence for sequence in self.running if sequence.priority >= IDLE]:
                self._preempt(sequence)

    def _admit(self) -> None:
        # With nothing running there is room for any: longer requests are refused before they wait.
        self._blocked = self._blocked and bool(self.running)
        while not self._blocked and len(self.running) < MAX_RUNNING:
            sequence = self._next_waiting()
            if sequence is None or (sequence.priority >= IDLE and self.running):
                return
            self._caches.admit(sequence)
            if sequence.phase is Phase.ENDED:
                continue
            self.waiting.remove(sequence)
            if sequence in self._preempted:
                self._preempted.remove(sequence)
            self.running.append(sequence)
            self._record_turn(sequence.client)
            self._blocked = not self._make_room(sequence, sequence.initial_room())

    def _next_waiting(self) -> S | None:
        """Return the waiting sequence to admit next, if there is one."""
        waiting = [sequence for sequence in self.waiting if sequence.phase is not Phase.ENDED]
        candidates = [sequence for sequence in waiting if sequence.priority == waiting[0].priority]
        for sequence in candidates:
            if sequence in self._preempted:
                return sequence
        num_running = Counter(sequence.client for sequence in self.running)

        def turn(sequence: S) -> tuple[int, int]:
            return num_running[sequence.client], self._last_turn.get(sequence.client, 0)

        # Of equals, `min` takes the first to arrive.
        return min(candidates, key=turn, default=None)

    def _record_turn(self, client: str) -> None:
        self._turn += 1
        self._last_turn[client] = self._turn
        if len(self._last_turn) > _MAX_CLIENTS:
            active = {sequence.client for sequence in (*self.running, *self.waiting)}
            self._last_turn = {c: turn for c, turn in self._last_turn.items() if c in active}

    def _make_room(self, sequence: S, room: int) -> bool:
        """Grow a sequence's caches to `room`, preempting later arrivals if necessary.

        Returns False if the sequence itself was preempted, or has ended.
        """
        if room <= sequence.room:
            return True
        while (shortfall := self.room_in_use() - sequence.room + room - self.room) > 0:
            victim = self.running[-1]
            alone = victim is sequence and len(self.running) == 1
            if shortfall <= self._caches.prefix_room or alone:
                self._caches.evict(shortfall)
                break  # one alone has room: longer requests are refused before they wait
            self._preempt(victim)
            if sequence not in self.running:  # the victim, or ended by the step in flight
                return False
        sequence.reserve(room)
        return True

    def _preempt(self, sequence: S) -> None:
        self._caches.preempt(sequence)
        if sequence in self.running:  # not if the step in flight has ended it
            self.running.remove(sequence)
            position = sum(other.priority < sequence.priority for other in self.waiting)
            self.waiting.insert(position, sequence)
            self._preempted.append(sequence)
