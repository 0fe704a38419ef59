"""What the tests of this room share."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from qwen3_mlx.cache.quantized import CACHE_FORMATS
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.request import NORMAL, Request, RequestResult
from qwen3_mlx.engine.sampling_params import NEUTRAL, SamplingParams
from qwen3_mlx.engine.speculation.draft_model import DraftModel
from qwen3_mlx.engine.speculation.speculator import Speculator
from qwen3_mlx.engine.speculation.step_cost import StepCostModel, chip_costs
from qwen3_mlx.model.qwen3 import Qwen3
from tests.support import MOE, greedy_tokens, make_model, random_ids

MODELS = {"dense": make_model(), "moe": make_model(MOE)}
WAYS = ["plain", "lookup", "draft"]  # to speculate
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
    """Asks for one reply, and takes note of what it is told."""

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
def model_of(kind: str) -> Qwen3:
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
    return Engine(model, vocabulary=1088, speculator=speculator_of(model, way), **options)


class Free(StepCostModel):
    """Has every proposal pay that may come true at all."""

    def of(self, rows: int, *, synchronous: bool) -> float:
        return 1 + rows * 1e-6

    def observe(self, rows: int, seconds: float, *, synchronous: bool) -> None:
        """Keep to that."""


def speculator_of(model: Qwen3, way: str) -> Speculator | None:
    """Make one; the draft model of a dense model is its own weights, and knows most tokens."""
    if way == "plain":
        return None
    draft = DraftModel(model_of("dense")) if way == "draft" else None
    if draft:
        draft.size = 1
    return Speculator(model.config, draft, Free(chip_costs("applegpu_g16s")))


@cache
def alone(kind: str) -> list[list[int]]:
    """Give what each prompt is answered with when nothing else runs."""
    return [greedy_tokens(model_of(kind), prompt, MOST) for prompt in PROMPTS]


class Script:
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
        return foreseen(self.mask(), ids, 3 - len(self.taken))


def foreseen(mask: Any, ids: Sequence[int], most: int) -> list[Any]:
    """Give a mask for each token up to the first that is not odd, and one more."""
    odd = next((place for place, token in enumerate(ids) if token % 2 == 0), len(ids))
    return [mask] * (1 + max(0, min(odd, most)))


def expected_of_a_script(model: Qwen3, prompt: list[int], first: list[int]) -> list[int]:
    found: list[int] = list(first)
    while len(found) < 10:
        if len(found) == 4:
            found += [2, 4, 6]
            continue
        logits = np.array(model(mx.array([prompt + found]))[0, -1])
        logits[::2] = -np.inf
        found.append(int(logits.argmax()))
    return found


class Whims:
    """Takes back, forces and masks by what was chosen, a few times each."""

    finished = False

    def __init__(self) -> None:
        self.rollback = 0
        self.taken: list[int] = []
        self._whims = 0
        self._due: list[int] = []
        self._forced: list[int] = []

    def advance(self, ids: Sequence[int]) -> None:
        self.taken += ids
        self.rollback = 0
        if list(ids) == self._forced or self._whims > 8:
            return
        if (ids[0] + 5 * len(self.taken)) % 3 == 0:
            self._whims += 1
            self._due = [ids[0] // 2, 5, 6][: 1 + self._whims % 3]
            if self._whims % 2:
                self.rollback = min(2, len(self.taken))
                del self.taken[len(self.taken) - self.rollback :]

    @property
    def needs_mask(self) -> bool:
        return self._whims % 3 == 2

    def forced_tokens(self) -> list[int]:
        self._forced, self._due = self._due, []
        return self._forced

    def mask(self) -> Any:
        return np.full(1088 // 32, 0xAAAAAAAA, dtype=np.uint32)

    def lookahead_masks(self, ids: Sequence[int]) -> list[Any]:
        return foreseen(self.mask(), ids, len(ids))


@cache
def whimsical(kind: str, which: int) -> list[int]:
    """Give what a prompt is answered with by whims, a token at a time, without an engine."""
    model, found, whims = model_of(kind), list[int](), Whims()
    while len(found) < MOST:
        logits = np.array(model(mx.array([PROMPTS[which] + found]), model.make_cache())[0, -1])
        if whims.needs_mask:
            logits[::2] = -np.inf
        token = int(logits.argmax())
        found.append(token)
        whims.advance([token])
        if whims.rollback:
            del found[len(found) - whims.rollback :]
        while forced := whims.forced_tokens():
            found += forced
            whims.advance(forced)
    return found[:MOST]


class Schedulable:
    def __init__(
        self, name: str, prompt: int, reply: int = 10, priority: int = NORMAL, client: str = ""
    ) -> None:
        self.name, self.priority, self.client = name, priority, client
        self.room = self.num_computed = 0
        self.num_uncomputed, self._left = prompt, reply
        self.answering = False

    def __repr__(self) -> str:
        return self.name

    @property
    def complete(self) -> bool:
        return self._left == 0

    def room_for(self, tokens: int) -> int:
        return max(self.room, tokens)

    def first_room(self) -> int:
        return max(self.room, self.num_computed + self.num_uncomputed + 10)

    def reserve(self, room: int) -> None:
        self.room = max(self.room, room)

    def take(self, tokens: int) -> None:
        self.num_computed += tokens
        self._left -= self.answering
        self.num_uncomputed = max(0, self.num_uncomputed - tokens)
        self.answering |= not self.num_uncomputed


class House:
    def __init__(self, kept: int = 0) -> None:
        self.paused: list[Schedulable] = []
        self._kept = kept

    def admit(self, job: Schedulable) -> None:
        pass

    def preempt(self, job: Schedulable) -> None:
        self.paused.append(job)
        job.num_uncomputed, job.num_computed, job.room, job.answering = (
            job.num_computed + job.num_uncomputed,
            0,
            0,
            False,
        )

    def held_by_prefixes(self) -> int:
        return self._kept

    def evict(self, tokens: int) -> None:
        self._kept = max(0, self._kept - tokens)
