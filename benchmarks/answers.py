"""One request to an engine, from its submission to its end."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.request import Request, RequestResult
from qwen3_mlx.engine.sampling_params import SamplingParams


@dataclass(slots=True)
class Answer:
    """What came of it, and the seconds to its first token and to its end; a `TokenSink`."""

    finished: bool = False
    tokens: list[int] = field(default_factory=list)
    first: float = 0.0
    seconds: float = 0.0
    outcome: RequestResult | BaseException | None = None
    started: float = field(default_factory=time.perf_counter)

    def advance(self, ids: Sequence[int]) -> None:
        """Take the next tokens."""
        self.first = self.first or time.perf_counter() - self.started
        self.tokens += ids

    def rewind(self, count: int) -> None:
        """Forget the last tokens."""
        del self.tokens[len(self.tokens) - count :]

    def end(self, outcome: RequestResult | BaseException) -> None:
        """Take how it ended."""
        self.outcome, self.seconds = outcome, time.perf_counter() - self.started


def answer(
    engine: Engine, ids: Sequence[int], sampling: SamplingParams, count: int
) -> tuple[Answer, RequestResult]:
    """Have `count` tokens said after `ids`, and nothing else done meanwhile."""
    said = Answer()
    engine.submit(Request(ids, sampling, count, 0, frozenset(), said, said.end))
    while engine.step():
        pass
    assert isinstance(said.outcome, RequestResult), said.outcome
    return said, said.outcome
