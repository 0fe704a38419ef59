"""Gain of speculation: python -m benchmarks.speculation

Forward passes and seconds with and without speculation, by the same engine in the same run. The
outputs are compared token by token. Copying: the demo repeats lists over several turns, and a
random network of six layers of Qwen3-0.6B's shape repeats itself. Nothing to copy: tokens sampled
from a tiny random network. Draft model: sums by the demo, drafted by its own 4-bit conversion.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from random import Random

from qwen3_mlx import backend  # first: the BLAS

# isort: split

import mlx.core as mx

from benchmarks.answers import answer
from benchmarks.graph import our_model
from qwen3_mlx import convert, load
from qwen3_mlx.api.checkpoints import DRAFT_NGRAM
from qwen3_mlx.api.llm import LLM
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.sampling_params import NEUTRAL, SamplingParams
from qwen3_mlx.engine.speculation.speculator import Speculator
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.model.sizes import published_config

_GREEDY = SamplingParams(temperature=0.0).over(NEUTRAL)
_WORDS = "red green blue black white apple river stone cloud tree house bird".split()
_CONVERSATIONS, _TURNS, _SUMS = 10, 5, 20
_CIRCLING, _DRAWN = 192, 2000  # tokens
_REPEATS = 3


@dataclass(frozen=True, slots=True)
class Work:
    """A run of a workload: its tokens, forward passes, draft tokens and seconds."""

    tokens: list[object]
    passes: int
    proposed: int
    accepted: int
    seconds: float


Run = Callable[[], Work]


def main() -> None:
    """Run each workload without and with speculation and print the table."""
    facts = backend.describe()
    print(f"{facts['device']}, BLAS {facts['blas']}, {time.strftime('%Y-%m-%d')}\n")
    print(f"{'':34}{'tokens':>8}{'passes':>8}{'a pass':>8}{'accepted':>10}{'faster':>9}")
    for name, plain, fast in works():
        _show(name, plain, fast)


def works() -> Iterator[tuple[str, Run, Run]]:
    """Yield each workload: its name, and how to run it without and with speculation."""
    with tempfile.TemporaryDirectory() as scratch, load() as llm, load(draft=DRAFT_NGRAM) as fast:
        yield "lists repeated, turn after turn", lambda: repeat(llm), lambda: repeat(fast)
        small = Path(scratch) / "demo-4bit"
        convert(str(files("qwen3_mlx") / "demo"), small, bits=4)
        yield "sums with thinking", lambda: add(llm), lambda: add(fast)
        with load(draft=small) as drafting:
            yield "the same, 4-bit draft model", lambda: add(llm), lambda: add(drafting)
    shape = {**published_config("0.6B"), "num_hidden_layers": 6}
    mx.random.seed(0)
    wide = Qwen3(ModelConfig.from_dict(shape))
    mx.eval(wide.parameters())
    yield "going in circles, 0.6B's shape", *_pair(wide, _GREEDY, _CIRCLING)
    yield "nothing to copy, tiny", *_pair(our_model(4), NEUTRAL, _DRAWN)


def repeat(llm: LLM) -> Work:
    """Run conversations in which the demo repeats a list several times."""

    def details() -> Iterator[tuple[str, int, dict[str, str]]]:
        rng = Random(1)
        for seed in range(_CONVERSATIONS):
            conversation = llm.conversation(thinking=False, seed=seed, prefetch_next_turn=False)
            items = " ".join(rng.sample(_WORDS, 6))
            for _ in range(_TURNS):
                reply = conversation.chat(f"Repeat: {items}")
                yield reply.text, reply.usage.completion_tokens, reply.details

    return _sum(details())


def add(llm: LLM) -> Work:
    """Run sums with thinking on the demo."""

    def details() -> Iterator[tuple[str, int, dict[str, str]]]:
        rng = Random(2)
        for seed in range(_SUMS):
            a, b = rng.randint(100, 9999), rng.randint(100, 9999)
            reply = llm.chat(f"What is {a} + {b}?", thinking=True, seed=seed)
            yield reply.reasoning + reply.text, reply.usage.completion_tokens, reply.details

    return _sum(details())


def _sum(replies: Iterator[tuple[str, int, dict[str, str]]]) -> Work:
    texts: list[object] = []
    passes = proposed = accepted = 0
    started = time.perf_counter()
    for text, tokens, details in replies:
        texts += [text] + [None] * (tokens - 1)
        passes += int(details.get("forward_passes", tokens))
        proposed += int(details.get("drafted_tokens", 0))
        accepted += int(details.get("accepted_tokens", 0))
    return Work(texts, passes, proposed, accepted, time.perf_counter() - started)


def _pair(model: Qwen3, sampling: SamplingParams, count: int) -> tuple[Run, Run]:
    return (
        lambda: generate(model, sampling, count),
        lambda: generate(model, sampling, count, Speculator(model.config)),
    )


def generate(
    model: Qwen3, sampling: SamplingParams, count: int, speculator: Speculator | None = None
) -> Work:
    """Run one request of `count` tokens on a model."""
    engine = Engine(model, vocabulary=model.config.vocab_size, speculator=speculator)
    said, end = answer(engine, range(64), sampling, count)
    return Work(list(said.tokens), end.passes, end.proposed, end.accepted, said.seconds)


def _show(name: str, plain: Run, fast: Run) -> None:
    """Run both several times in turn and print the fastest of each."""
    runs = [(plain(), fast()) for _ in range(_REPEATS)]
    if any(slow.tokens != quick.tokens for slow, quick in runs):
        raise SystemExit(f"{name}: speculation changed what came of it")
    slow, quick = (min(one, key=lambda work: work.seconds) for one in zip(*runs, strict=True))
    share = f"{quick.accepted}/{quick.proposed}"
    print(
        f"{name:34}{len(quick.tokens):>8,}{quick.passes:>8,}"
        f"{len(quick.tokens) / quick.passes:>8.2f}{share:>10}{slow.seconds / quick.seconds:>8.2f}x",
        flush=True,
    )


if __name__ == "__main__":
    main()
