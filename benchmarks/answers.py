"""Runs one request on an engine and measures the times of its first token and its end."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.request import Request, RequestResult
from qwen3_mlx.engine.sampling_params import SamplingParams


@dataclass(slots=True)
class Answer:
    """Tokens and result of a request, and the seconds to first token and end; a `TokenSink`."""

    finished: bool = False
    tokens: list[int] = field(default_factory=list)
    first: float = 0.0
    seconds: float = 0.0
    outcome: RequestResult | BaseException | None = None
    started: float = field(default_factory=time.perf_counter)

    def advance(self, ids: Sequence[int]) -> None:
        """Add the next tokens."""
        self.first = self.first or time.perf_counter() - self.started
        self.tokens += ids

    def rewind(self, count: int) -> None:
        """Remove the last `count` tokens."""
        del self.tokens[len(self.tokens) - count :]

    def end(self, outcome: RequestResult | BaseException) -> None:
        """Record the result of the request."""
        self.outcome, self.seconds = outcome, time.perf_counter() - self.started


def answer(
    engine: Engine, ids: Sequence[int], sampling: SamplingParams, count: int
) -> tuple[Answer, RequestResult]:
    """Run one request of `count` tokens after `ids`; nothing else runs on the engine."""
    said = Answer()
    engine.submit(Request(ids, sampling, count, 0, frozenset(), said, said.end))
    while engine.step():
        pass
    assert isinstance(said.outcome, RequestResult), said.outcome
    return said, said.outcome
