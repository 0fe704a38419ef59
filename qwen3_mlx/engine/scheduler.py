"""Who runs next: pure decisions over counts of tokens. Nothing here computes or holds an array.

Every step all sequences that are being answered choose a token, and a chunk of prompts is read.
Room in caches is counted in tokens, and nobody starts who has none.

Clients take turns: of the jobs that wait with the least priority, the next is one of the client
with the fewest running; of several such clients, the one that was served longest ago. A client with
many jobs is so kept waiting by others with few, but not for ever: they run as its own are ending.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from qwen3_mlx.engine.request import IDLE

_MAX_STALL = 0.25  # seconds that a chunk of somebody's prompt may keep the others waiting
_MAX_RUNNING = 32
_MIN_CHUNK = 64
_MEMORY = 0.7  # how much a new measurement of the speed leaves of the old
_MAX_CLIENTS = 256  # clients, beyond which those with nothing to do are forgotten


class Schedulable(Protocol):
    """What is known of a request here."""

    room: int  # tokens that its caches have room for

    @property
    def priority(self) -> int:
        """Who comes first: the least."""

    @property
    def client(self) -> str:
        """Whose job it is."""

    @property
    def answering(self) -> bool:
        """Whether its prompt has been read, so that it chooses a token a step."""

    @property
    def complete(self) -> bool:
        """Whether it needs no more steps; it goes when the last one is done."""

    @property
    def num_computed(self) -> int:
        """The tokens in its caches."""

    @property
    def num_uncomputed(self) -> int:
        """The tokens known that are not in its caches yet."""

    def room_for(self, tokens: int) -> int:
        """Give the room that its caches will have once they hold `tokens`."""

    def first_room(self) -> int:
        """Give the room that it begins with."""

    def reserve(self, room: int) -> None:
        """Have so much room at the next write."""


J = TypeVar("J", bound=Schedulable)
J_contra = TypeVar("J_contra", bound=Schedulable, contravariant=True)


class CacheOwner(Protocol[J_contra]):
    """Who holds the caches, and does what is decided here."""

    def admit(self, job: J_contra) -> None:
        """Give a job its caches, with what is known of its tokens."""

    def preempt(self, job: J_contra) -> None:
        """Take a job's caches away; it will begin anew."""

    def held_by_prefixes(self) -> int:
        """The tokens that kept prefixes have room for."""

    def evict(self, tokens: int) -> None:
        """Give up kept prefixes for so many tokens, as far as there are any."""


@dataclass(frozen=True, slots=True)
class Step(Generic[J]):
    """What the next forward pass does: a token for each of `decoding`, and a chunk of a prompt.

    That is the first of `prefilling`; prompts of the others that are short find room beside it.
    """

    decoding: Sequence[J]
    prefilling: Sequence[J]


class Scheduler(Generic[J]):
    """Holds those who wait and those who run, and decides each step."""

    def __init__(self, room: int, memory: CacheOwner[J]) -> None:
        """Share out `room` tokens of cache."""
        self.room = room
        self.waiting: list[J] = []
        self.running: list[J] = []  # whoever loses least by making room for others is last
        self._memory = memory
        self._speed = 0.0  # tokens of prompt a second
        self._stuck = False  # the first of the line found no room, and nothing has changed since
        self._preempted: list[J] = []  # of those who wait: they had their turn, and come first
        self._served: dict[str, int] = {}  # when each client was served last, counted in turns
        self._turns = 0

    def add(self, job: J) -> None:
        """Have a job run when its turn comes: by priority, by client, then in order of arrival."""
        self.waiting.append(job)
        self.waiting.sort(key=lambda waiting: waiting.priority)
        self._stuck = False

    def remove(self, job: J) -> None:
        """Forget a job."""
        (self.running if job in self.running else self.waiting).remove(job)
        if job in self._preempted:
            self._preempted.remove(job)
        self._stuck = False

    def clear(self) -> None:
        """Forget all jobs."""
        for jobs in (self.running, self.waiting, self._preempted):
            jobs.clear()
        self._stuck = False

    def held(self) -> int:
        """Count the tokens that caches have room for, those of kept prefixes included."""
        return sum(job.room for job in self.running) + self._memory.held_by_prefixes()

    def next_step(self) -> Step[J]:
        """Decide what runs next; admits and pauses as memory allows and priorities demand."""
        self._preempt_idle_work()
        self._admit()
        for job in list(self.running):
            if job in self.running and job.answering and not job.complete:
                self._make_room(job, job.room_for(job.num_computed + max(1, job.num_uncomputed)))
        alive = [job for job in self.running if not job.complete]
        decoding = [job for job in alive if job.answering]
        reading = [job for job in alive if not job.answering]
        if reading:  # whoever else has a prompt to be read is next
            self.running.remove(reading[0])
            self.running.append(reading[0])
        return Step(decoding, reading)

    def prefill_budget(self, step: Step[J], limit: int) -> int:
        """Give the most tokens to read of prompts, up to `limit`, so that nobody waits long."""
        if not step.decoding and step.prefilling and step.prefilling[0].priority < IDLE:
            return limit
        patient = int(self._speed * _MAX_STALL) // _MIN_CHUNK * _MIN_CHUNK
        return min(limit, max(_MIN_CHUNK, patient))

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn how long a step with so many tokens of prompt took."""
        speed = tokens / max(seconds, 1e-6)
        self._speed = speed if not self._speed else _MEMORY * self._speed + (1 - _MEMORY) * speed

    def _preempt_idle_work(self) -> None:
        if any(job.priority < IDLE for job in (*self.waiting, *self.running)):
            for job in [job for job in self.running if job.priority >= IDLE]:
                self._preempt(job)

    def _admit(self) -> None:
        self._stuck = self._stuck and bool(self.running)
        while self.waiting and not self._stuck and len(self.running) < _MAX_RUNNING:
            job = self._next()
            if job.priority >= IDLE and self.running:
                return
            self._memory.admit(job)
            if job not in self.waiting:  # it could not even begin
                continue
            self.waiting.remove(job)
            if job in self._preempted:
                self._preempted.remove(job)
            self.running.append(job)
            self._note_turn(job.client)
            self._stuck = not self._make_room(job, job.first_room())

    def _next(self) -> J:
        """Return whose turn it is of those who wait."""
        first = [job for job in self.waiting if job.priority == self.waiting[0].priority]
        for job in first:
            if job in self._preempted:
                return job
        running = Counter(job.client for job in self.running)

        def turn(job: J) -> tuple[int, int]:
            return running[job.client], self._served.get(job.client, 0)

        return min(first, key=turn)  # of equal ones that is the first to come

    def _note_turn(self, client: str) -> None:
        self._turns += 1
        self._served[client] = self._turns
        if len(self._served) > _MAX_CLIENTS:
            present = {job.client for job in (*self.running, *self.waiting)}
            self._served = {c: turn for c, turn in self._served.items() if c in present}

    def _make_room(self, job: J, room: int) -> bool:
        """Have a job's caches grow to `room`, if need be at the cost of those that came later.

        False if it has been put back into the line itself.
        """
        if room <= job.room:
            return True
        while (lack := self.held() - job.room + room - self.room) > 0:
            last = self.running[-1]
            alone = last is job and len(self.running) == 1
            if lack <= self._memory.held_by_prefixes() or alone:
                self._memory.evict(lack)
                break  # what one alone may need was made sure of before it was let in
            self._preempt(last)
            if last is job:
                return False
        job.reserve(room)
        return True

    def _preempt(self, job: J) -> None:
        self._memory.preempt(job)
        if job in self.running:  # it may have ended meanwhile
            self.running.remove(job)
            same = sum(other.priority < job.priority for other in self.waiting)
            self.waiting.insert(same, job)
            self._preempted.append(job)
