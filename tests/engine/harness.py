"""Shared by the tests of the engine: models, prompts, a client, constraints and fakes."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from qwen3_mlx.cache.quantized import CACHE_FORMATS
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.request import NORMAL, Phase, Request, RequestResult
from qwen3_mlx.engine.sampling_params import NEUTRAL, SamplingParams
from qwen3_mlx.engine.speculation.draft_model import DraftModel
from qwen3_mlx.engine.speculation.speculator import Speculator
from qwen3_mlx.engine.speculation.step_cost import StepCostModel, chip_costs
from qwen3_mlx.model.qwen3 import Qwen3
from tests.support import MOE, TinyQwen3, cache_format_of, greedy_tokens, make_model, random_ids

MODELS = {"dense": make_model(), "moe": make_model(MOE)}
WAYS = ["plain", "lookup", "draft"]  # of speculation
GREEDY = SamplingParams(temperature=0.0).over(NEUTRAL)
STEM = random_ids(70, seed=1)
PROMPTS = [
    STEM + random_ids(3, seed=2),
    STEM + random_ids(40, seed=3),
    STEM[:40] + random_ids(20, seed=4),
    random_ids(1, seed=5),
    random_ids(17, seed=6),
    random_ids(150, seed=7),
]
MOST = 30


class Client:
    """A client of one request that records its tokens, results and progress."""

    finished = False

    def __init__(self, ids: Sequence[int], max_tokens: int, **fields: Any) -> None:
        self.tokens: list[int] = []
        self.outcomes: list[RequestResult | BaseException] = []
        self.read: list[int] = []
        fields = {"sampling": GREEDY, "seed": 0, "end_ids": frozenset(), **fields}
        self.request = Request(
            ids=list(ids),
            max_tokens=max_tokens,
            sink=self,
            on_finish=self.outcomes.append,
            progress=lambda done, _: self.read.append(done),
            **fields,
        )

    def advance(self, ids: Sequence[int]) -> None:
        self.tokens += ids

    def rewind(self, count: int) -> None:
        del self.tokens[len(self.tokens) - count :]

    @property
    def outcome(self) -> RequestResult:
        (outcome,) = self.outcomes
        assert isinstance(outcome, RequestResult), outcome
        return outcome


@cache
def model_of(kind: str) -> TinyQwen3:
    if kind in MODELS:
        return MODELS[kind]
    model = make_model()
    model.cache_format = CACHE_FORMATS[kind]
    return model


def run(engine: Engine, *clients: Client) -> None:
    for client in clients:
        engine.submit(client.request)
    while engine.step():
        pass


def engine_of(model: Qwen3, way: str = "plain", **options: Any) -> Engine:
    options = {"cache_format": cache_format_of(model), **options}
    return Engine(model, vocabulary=1088, speculator=speculator_of(model, way), **options)


class Free(StepCostModel):
    """A cost model by which every draft pays that may be accepted at all."""

    def of(self, rows: int, *, synchronous: bool) -> float:
        return 1 + rows * 1e-6

    def observe(self, rows: int, seconds: float, *, synchronous: bool) -> None:
        """Ignore measurements."""


def speculator_of(model: Qwen3, way: str) -> Speculator | None:
    """Create a speculator; the draft model has the weights of the dense model."""
    if way == "plain":
        return None
    draft = DraftModel(model_of("dense")) if way == "draft" else None
    if draft:
        draft.size = 1
    return Speculator(model.config, draft, Free(chip_costs("applegpu_g16s")))


@cache
def alone(kind: str) -> list[list[int]]:
    """Return the reply to each prompt when nothing else runs."""
    return [greedy_tokens(model_of(kind), prompt, MOST) for prompt in PROMPTS]


class ScriptedConstraint:
    """Allows odd ids only, forces three ids after the fourth token, and ends at the tenth."""

    rollback, needs_mask = 0, True

    def __init__(self, forced_first: Sequence[int] = ()) -> None:
        self.finished = False
        self.taken: list[int] = []
        self._first = list(forced_first)

    def advance(self, ids: Sequence[int]) -> None:
        self.taken += ids
        self.finished = len(self.taken) >= 10

    def forced_tokens(self) -> list[int]:
        if not self.taken:
            return self._first
        return [2, 4, 6] if len(self.taken) == 4 else []

    def mask(self) -> Any:
        return np.full(1088 // 32, 0xAAAAAAAA, dtype=np.uint32)

    def lookahead_masks(self, ids: Sequence[int]) -> list[Any]:
        return masks_until_even(self.mask(), ids, 3 - len(self.taken))


def masks_until_even(mask: Any, ids: Sequence[int], most: int) -> list[Any]:
    """Return a mask for each token up to the first that is even, and one more."""
    even = next((index for index, token in enumerate(ids) if token % 2 == 0), len(ids))
    return [mask] * (1 + max(0, min(even, most)))


def expected_of_scripted(model: Qwen3, prompt: list[int], first: list[int]) -> list[int]:
    reply: list[int] = list(first)
    while len(reply) < 10:
        if len(reply) == 4:
            reply += [2, 4, 6]
            continue
        logits = np.array(model(mx.array([prompt + reply]))[0, -1])
        logits[::2] = -np.inf
        reply.append(int(logits.argmax()))
    return reply


class ErraticConstraint:
    """Rolls back, forces and masks depending on the chosen tokens, a few times each."""

    finished = False

    def __init__(self) -> None:
        self.rollback = 0
        self.taken: list[int] = []
        self._interventions = 0
        self._due: list[int] = []
        self._forced: list[int] = []

    def advance(self, ids: Sequence[int]) -> None:
        self.taken += ids
        self.rollback = 0
        if list(ids) == self._forced or self._interventions > 8:
            return
        if (ids[0] + 5 * len(self.taken)) % 3 == 0:
            self._interventions += 1
            self._due = [ids[0] // 2, 5, 6][: 1 + self._interventions % 3]
            if self._interventions % 2:
                self.rollback = min(2, len(self.taken))
                del self.taken[len(self.taken) - self.rollback :]

    @property
    def needs_mask(self) -> bool:
        return self._interventions % 3 == 2

    def forced_tokens(self) -> list[int]:
        self._forced, self._due = self._due, []
        return self._forced

    def mask(self) -> Any:
        return np.full(1088 // 32, 0xAAAAAAAA, dtype=np.uint32)

    def lookahead_masks(self, ids: Sequence[int]) -> list[Any]:
        return masks_until_even(self.mask(), ids, len(ids))


@cache
def expected_of_erratic(kind: str, which: int) -> list[int]:
    """Return the reply under the erratic constraint, token by token, without an engine."""
    model, reply, constraint = model_of(kind), list[int](), ErraticConstraint()
    prompt, cache, seen = PROMPTS[which], model.make_cache(), 0
    while len(reply) < MOST:
        rest = (prompt + reply)[seen:]
        logits = np.array(model(mx.array([rest]), cache, wanted=[len(rest) - 1])[0, -1])
        seen += len(rest)
        if constraint.needs_mask:
            logits[::2] = -np.inf
        token = int(logits.argmax())
        reply.append(token)
        constraint.advance([token])
        if constraint.rollback:
            del reply[len(reply) - constraint.rollback :]
            seen = min(seen, len(prompt) + len(reply))
            for layer in cache:
                layer.truncate(seen)
        while forced := constraint.forced_tokens():
            reply += forced
            constraint.advance(forced)
    return reply[:MOST]


class Schedulable:
    def __init__(
        self, name: str, prompt: int, reply: int = 10, priority: int = NORMAL, client: str = ""
    ) -> None:
        self.name, self.priority, self.client = name, priority, client
        self.room = self.num_computed = 0
        self.num_uncomputed, self._left = prompt, reply
        self.phase = Phase.WAITING

    def __repr__(self) -> str:
        return self.name

    @property
    def complete(self) -> bool:
        return self._left == 0

    def room_for(self, tokens: int) -> int:
        return max(self.room, tokens)

    def initial_room(self) -> int:
        return max(self.room, self.num_computed + self.num_uncomputed + 10)

    def reserve(self, room: int) -> None:
        self.room = max(self.room, room)

    def take(self, tokens: int) -> None:
        self.num_computed += tokens
        self._left -= self.phase is Phase.DECODE
        self.num_uncomputed = max(0, self.num_uncomputed - tokens)
        if not self.num_uncomputed:
            self.phase = Phase.DECODE


class FakeCaches:
    def __init__(self, kept: int = 0) -> None:
        self.preempted: list[Schedulable] = []
        self._kept = kept

    def admit(self, job: Schedulable) -> None:
        job.phase = Phase.PREFILL

    def preempt(self, job: Schedulable) -> None:
        self.preempted.append(job)
        job.num_uncomputed += job.num_computed
        job.num_computed, job.room, job.phase = 0, 0, Phase.WAITING

    @property
    def prefix_room(self) -> int:
        return self._kept

    def evict(self, tokens: int) -> None:
        self._kept = max(0, self._kept - tokens)
