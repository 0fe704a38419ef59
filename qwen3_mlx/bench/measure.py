"""How fast an engine is: prompts read, tokens decoded, alone and together, and the memory it takes.

Whatever can do what `BenchTarget` says can be measured, in the same way.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import mlx.core as mx

OURS, PEER = "qwen3-mlx", "mlx-lm"
NEW = 16  # tokens that follow what is kept, as a short message would
_PERIOD = 32  # tokens that a prompt repeats, to be copied
_MOST_A_PASS = 32


@dataclass(frozen=True, slots=True)
class Case:
    """`sequences` at once, each with a prompt of so many tokens.

    With `kept` the prompt is that of the case before, its reply, and `NEW` tokens. `kv_bits` are
    those of a quantized cache. With `copying` the prompt says the same again and again, and it is
    speculated on what comes next.
    """

    sequences: int
    prompt: int
    kept: bool = False
    kv_bits: int | None = None
    copying: bool = False

    @property
    def special(self) -> bool:
        """Whether it is asked of this package alone."""
        return self.copying or self.kv_bits is not None


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a case came to."""

    case: Case
    first_token: float  # seconds until every sequence had its first
    decode: float  # tokens a second, of all sequences together
    peak: int  # the most bytes that MLX held
    a_pass: float = 1.0  # tokens that a sequence got of a forward pass

    @property
    def prefill(self) -> float:
        """The tokens of prompt read a second."""
        return self.case.sequences * self.case.prompt / self.first_token


@dataclass(frozen=True, slots=True)
class NumericSettings:
    """What decides how fast a model can be: its numbers, and who multiplies them."""

    dtype: str
    quantized: bool
    blas: str


@dataclass(frozen=True, slots=True)
class Setup:
    """What a side is to do; mlx-lm's model is brought to `terms`, if there are any."""

    name: str
    folder: str
    cases: Sequence[Case]
    count: int
    terms: NumericSettings | None = None

    @classmethod
    def from_json(cls, text: str) -> "Setup":
        """Read what `json.dumps(asdict(setup))` wrote."""
        content = json.loads(text)
        cases = [Case(**case) for case in content["cases"]]
        terms = NumericSettings(**content["terms"]) if content["terms"] else None
        return cls(content["name"], content["folder"], cases, content["count"], terms)


class BenchTarget(Protocol):
    """An engine with a model."""

    vocabulary: int

    def configure(self, case: Case) -> bool:
        """Get ready for a case; False if this engine can do no such thing."""

    def generate(self, prompts: Sequence[list[int]], most: int) -> Iterator[list[int]]:
        """Decode `most` tokens after each prompt, greedily; give those of a step at a time.

        A single prompt that goes on from the one before and its reply costs what is new.
        """

    def forget(self) -> None:
        """Let go of what is kept of earlier prompts."""


def cases_of(prompts: Sequence[int], together: Sequence[int]) -> list[Case]:
    """List the cases, cheapest first: each length of prompt alone, the shortest by several."""
    alone = [Case(1, length, kept) for length in sorted(prompts) for kept in (False, True)]
    several = [Case(count, min(prompts)) for count in sorted(together)]
    others = [Case(1, min(prompts), copying=True), Case(1, max(prompts), kv_bits=8)]
    return sorted([*alone, *several, *others], key=lambda case: case.sequences * case.prompt)


def measure(side: BenchTarget, cases: Sequence[Case], count: int) -> Iterator[Measurement]:
    """Measure the cases in turn, each over `count` steps in which every sequence got a token."""
    list(side.generate([_ids(2, 0, side.vocabulary)], 2))  # sets up threads, kernels and buffers
    said: list[int] = []
    for case in cases:
        if not side.configure(case):
            continue
        if case.kept:
            prompts = [said + _ids(NEW, len(said), side.vocabulary)]
        else:
            side.forget()
            different = min(case.prompt, _PERIOD) if case.copying else case.prompt
            prompts = [
                (_ids(different, n, side.vocabulary) * case.prompt)[: case.prompt]
                for n in range(case.sequences)
            ]
        mx.reset_peak_memory()
        # The first sequences to begin decode while the last are still read, in small chunks.
        ahead = 0 if case.sequences == 1 else case.sequences * (case.prompt // 8 + 1)
        started = time.perf_counter()
        times, counts = list[float](), list[int]()
        said = list(prompts[0])
        most = (count + 1) * (_MOST_A_PASS if case.copying else 1)
        answer = side.generate(prompts, most + ahead)
        for tokens in answer:
            said += tokens if case.sequences == 1 else tokens[:1]
            if len(tokens) >= case.sequences:
                times.append(time.perf_counter())
                counts.append(len(tokens))
            if len(times) > count:
                break
        del answer  # ends what has not ended
        first, peak = times[0] - started, mx.get_peak_memory()
        steps = [after - before for before, after in zip(times, times[1:], strict=False)]
        if case.copying and steps:
            a_pass = sum(counts[1:]) / max(1, len(steps))
            yield Measurement(case, first, sum(counts[1:]) / sum(steps), peak, a_pass)
        else:
            yield Measurement(case, first, case.sequences / median(steps), peak)


def _ids(count: int, seed: int, vocabulary: int) -> list[int]:
    """Give ids all over the vocabulary, but for its end, where the special ones are."""
    return [(7919 * place + 11 + seed) % max(vocabulary - 300, 1) for place in range(count)]
