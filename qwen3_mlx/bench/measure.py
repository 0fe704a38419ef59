"""Speed measurement: prefill and decode throughput and peak memory of an engine.

Any engine that implements `BenchTarget` is measured in the same way.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import mlx.core as mx

OURS, PEER = "qwen3-mlx", "mlx-lm"
NEW = 16  # tokens after a kept prompt and reply: about a short message
_PERIOD = 32  # tokens that a copying prompt repeats
_MAX_TOKENS_PER_PASS = 32  # with speculation


@dataclass(frozen=True, slots=True)
class Case:
    """One case of the benchmark.

    Attributes:
        sequences: the number of sequences in the batch.
        prompt: tokens of each prompt.
        kept: True if the prompt is that of the case before, its reply, and `NEW` tokens, so that
            the prefix cache applies.
        kv_bits: bits of a quantized KV cache; None for a plain one.
        copying: True if the prompt repeats itself and speculation is on.
    """

    sequences: int
    prompt: int
    kept: bool = False
    kv_bits: int | None = None
    copying: bool = False

    @property
    def special(self) -> bool:
        """True if only this package is measured: the case needs a feature of its own."""
        return self.copying or self.kv_bits is not None


@dataclass(frozen=True, slots=True)
class Measurement:
    """The measurements of one case.

    Attributes:
        case: the case.
        first_token: seconds until every sequence has its first token.
        decode: tokens per second, of all sequences together.
        peak: the most bytes that MLX held.
        a_pass: tokens of a sequence per forward pass.
    """

    case: Case
    first_token: float
    decode: float
    peak: int
    a_pass: float = 1.0

    @property
    def prefill(self) -> float:
        """Prompt tokens per second, of all sequences together."""
        return self.case.sequences * self.case.prompt / self.first_token


@dataclass(frozen=True, slots=True)
class NumericSettings:
    """The settings that decide the speed of a model: dtype, quantization and BLAS library."""

    dtype: str
    quantized: bool
    blas: str


@dataclass(frozen=True, slots=True)
class Setup:
    """The job of a benchmark process.

    Attributes:
        name: `OURS` or `PEER`.
        folder: the checkpoint.
        cases: the cases to measure, in order.
        count: decode steps per case.
        terms: settings to which mlx-lm's model is converted; None keeps its own.
        adapter: an adapter of the checkpoint.
        hosts, split, layers: several machines, as `load` takes them.
    """

    name: str
    folder: str
    cases: Sequence[Case]
    count: int
    terms: NumericSettings | None = None
    adapter: str | None = None
    hosts: str | None = None
    split: str = "pipeline"
    layers: str | None = None

    @classmethod
    def from_json(cls, text: str) -> "Setup":
        """Create a setup from the JSON that `json.dumps(asdict(setup))` writes."""
        content = json.loads(text)
        cases = [Case(**case) for case in content["cases"]]
        terms = NumericSettings(**content["terms"]) if content["terms"] else None
        return cls(**content | {"cases": cases, "terms": terms})


class BenchTarget(Protocol):
    """An engine with a loaded model; `vocabulary` is the number of its token ids."""

    vocabulary: int

    def configure(self, case: Case) -> bool:
        """Prepare the engine for a case; return False if it does not support the case."""

    def generate(self, prompts: Sequence[list[int]], max_tokens: int) -> Iterator[list[int]]:
        """Decode `max_tokens` tokens after each prompt, greedily; yield the tokens of each step.

        A single prompt that begins with the previous prompt and reply reuses their KV cache.
        """

    def forget(self) -> None:
        """Clear the KV caches of earlier prompts."""


def cases_of(prompts: Sequence[int], together: Sequence[int]) -> list[Case]:
    """Return the cases, cheapest first.

    Each prompt length runs alone, fresh and with a kept prefix. The shortest also runs in batches
    of the sizes in `together`.
    """
    alone = [Case(1, length, kept) for length in sorted(prompts) for kept in (False, True)]
    several = [Case(count, min(prompts)) for count in sorted(together)]
    others = [Case(1, min(prompts), copying=True), Case(1, max(prompts), kv_bits=8)]
    return sorted([*alone, *several, *others], key=lambda case: case.sequences * case.prompt)


def measure(target: BenchTarget, cases: Sequence[Case], count: int) -> Iterator[Measurement]:
    """Yield the measurement of each case, over `count` steps that advance every sequence.

    A case is left out if its sequences never decode all together, such as for want of memory.
    """
    list(target.generate([_ids(2, 0, target.vocabulary)], 2))  # warm-up: threads, kernels, buffers
    history: list[int] = []  # the prompt and reply of the last case
    for case in cases:
        if not target.configure(case):
            continue
        if case.kept:
            prompts = [history + _ids(NEW, len(history), target.vocabulary)]
        else:
            target.forget()
            period = min(case.prompt, _PERIOD) if case.copying else case.prompt
            prompts = [
                (_ids(period, n, target.vocabulary) * case.prompt)[: case.prompt]
                for n in range(case.sequences)
            ]
        mx.reset_peak_memory()
        # Sequences that begin first decode while the prompts of the last are still being read, so
        # they need tokens beyond those that are measured.
        ahead = 0 if case.sequences == 1 else case.sequences * (case.prompt // 8 + 1)
        started = time.perf_counter()
        times, counts = list[float](), list[int]()
        history = list(prompts[0])
        max_tokens = (count + 1) * (_MAX_TOKENS_PER_PASS if case.copying else 1)
        answer = target.generate(prompts, max_tokens + ahead)
        for tokens in answer:
            history += tokens if case.sequences == 1 else tokens[:1]
            if len(tokens) >= case.sequences:  # a step that advanced every sequence
                times.append(time.perf_counter())
                counts.append(len(tokens))
            if len(times) > count:
                break
        del answer  # cancels the sequences that still run
        if len(times) < 2:
            continue
        first, peak = times[0] - started, mx.get_peak_memory()
        steps = [after - before for before, after in zip(times, times[1:], strict=False)]
        if case.copying:
            a_pass = sum(counts[1:]) / len(steps)
            yield Measurement(case, first, sum(counts[1:]) / sum(steps), peak, a_pass)
        else:
            yield Measurement(case, first, case.sequences / median(steps), peak)


def _ids(count: int, seed: int, vocabulary: int) -> list[int]:
    """Return ids spread over the vocabulary, without its end, where the special tokens are."""
    return [(7919 * place + 11 + seed) % max(vocabulary - 300, 1) for place in range(count)]
