"""The engines that can be measured, each in a process of its own: ours, and mlx-lm's.

`python -m qwen3_mlx.bench.targets SETUP` takes a `Setup` as JSON and writes lines of JSON: the
terms that the side computes on, then each of its figures as it is there; or an error.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from stat import S_ISFIFO
from threading import Thread
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from qwen3_mlx import backend
from qwen3_mlx.api.load import load
from qwen3_mlx.bench.measure import OURS, PEER, BenchTarget, Case, NumericSettings, Setup, measure
from qwen3_mlx.cache.quantized import cache_format
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.request import Request, RequestResult
from qwen3_mlx.engine.sampling_params import NEUTRAL, SamplingParams
from qwen3_mlx.engine.speculation.speculator import Speculator
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.model.qwen3 import Qwen3

_GREEDY = SamplingParams(temperature=0.0).over(NEUTRAL)


class Ours:
    """This package's engine; to be made and used by the thread that made the model."""

    def __init__(self, model: Qwen3) -> None:
        self.vocabulary = model.config.vocab_size
        self._model = model
        self._engine, self._case = self._made(Case(1, 1)), Case(1, 1)

    def configure(self, case: Case) -> bool:
        """Have an engine that does what the case wants; it goes on as long as that is the same."""
        if (case.kv_bits, case.copying) != (self._case.kv_bits, self._case.copying):
            self._engine, self._case = self._made(case), case
        return True

    def _made(self, case: Case) -> Engine:
        model = self._model
        model.cache_format = cache_format(case.kv_bits, model.config.head_dim)
        speculator = Speculator(model.config) if case.copying else None
        return Engine(
            model,
            vocabulary=self.vocabulary,
            available=backend.available_memory(),  # nothing else runs: no share of it is needed
            speculator=speculator,
        )

    def generate(self, prompts: Sequence[list[int]], most: int) -> Iterator[list[int]]:
        """Do as `BenchTarget` says."""
        watchers, ends = [_TokenSink() for _ in prompts], list[RequestResult | BaseException]()
        requests = [
            Request(
                ids=ids,
                sampling=_GREEDY,
                max_tokens=max(1, min(most, self._engine.context - len(ids))),
                seed=0,
                end_ids=frozenset(),
                sink=watcher,
                on_finish=ends.append,
            )
            for ids, watcher in zip(prompts, watchers, strict=True)
        ]
        for request in requests:
            self._engine.submit(request)
        try:
            going = True
            while going:
                going = self._engine.step()
                if tokens := [token for watcher in watchers for token in watcher.take()]:
                    yield tokens
        finally:
            for request in requests:
                self._engine.cancel(request)
            while self._engine.step():
                pass
        for end in ends:
            if isinstance(end, BaseException):
                raise end

    def forget(self) -> None:
        """Do as `BenchTarget` says."""
        self._engine.forget()


class _TokenSink:
    """Holds a sequence's tokens until they are taken."""

    finished = False

    def __init__(self) -> None:
        self._tokens: list[int] = []

    def advance(self, ids: Sequence[int]) -> None:
        """Take the next tokens."""
        self._tokens += ids

    def rewind(self, count: int) -> None:
        """Forget the last tokens."""
        del self._tokens[len(self._tokens) - count :]

    def take(self) -> list[int]:
        """Give them away."""
        tokens, self._tokens = self._tokens, []
        return tokens


class MlxLm:
    """mlx-lm: its `generate_step` with a cache that is kept, as its chat does; its batches."""

    def __init__(self, folder: str, terms: NumericSettings | None) -> None:
        # Imported where they are used: nothing else in this package may need them.
        from mlx_lm.generate import BatchGenerator, generate_step, generation_stream
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.utils import dequantize_model, load_model

        self._batches, self._steps, self._make_cache = (
            BatchGenerator,
            generate_step,
            make_prompt_cache,
        )
        self._stream = generation_stream
        self.model, _ = load_model(Path(folder))
        if terms:
            if not terms.quantized:
                self.model = dequantize_model(self.model)
            self.model.set_dtype(getattr(mx, terms.dtype))
            mx.eval(self.model.parameters())
        self.vocabulary = self.model.args.vocab_size
        self._kept: list[int] = []
        self._cache = self._make_cache(self.model)

    def generate(self, prompts: Sequence[list[int]], most: int) -> Iterator[list[int]]:
        """Do as `BenchTarget` says."""
        try:
            yield from (
                self._alone(prompts[0], most) if len(prompts) == 1 else self._batch(prompts, most)
            )
        finally:  # it is a step ahead, and the process may end with this one
            backend.wait_for_work(self._stream)

    def _batch(self, prompts: Sequence[list[int]], most: int) -> Iterator[list[int]]:
        batch = self._batches(self.model, stop_tokens=[])
        try:
            batch.insert(prompts, [most] * len(prompts))
            while answers := batch.next_generated():
                yield [answer.token for answer in answers]
        finally:
            batch.close()

    def configure(self, case: Case) -> bool:
        """Do as `BenchTarget` says."""
        return not case.special

    def _alone(self, ids: list[int], most: int) -> Iterator[list[int]]:
        if ids[: len(self._kept)] != self._kept:
            self.forget()
        new, said = ids[len(self._kept) :], list(ids)
        steps = self._steps(mx.array(new), self.model, max_tokens=most, prompt_cache=self._cache)
        try:
            for token, _ in steps:
                said.append(token)
                yield [token]
        finally:
            self._kept = said[: self._cache[0].offset]

    def forget(self) -> None:
        """Do as `BenchTarget` says."""
        self._kept, self._cache = [], self._make_cache(self.model)


def main() -> None:
    """Load the side that the argument describes, measure it, and write what comes."""
    setup = Setup.from_json(sys.argv[1])
    try:
        if setup.name == PEER:
            peer = MlxLm(setup.folder, setup.terms)
            _measure(peer, peer.model, setup)
        else:
            with load(Path(setup.folder)) as llm:
                llm.compute(lambda model: _measure(Ours(model), model, setup))
    except Qwen3Error as error:
        _tell({"error": str(error)})


def _measure(side: BenchTarget, model: nn.Module, setup: Setup) -> None:
    held = {"terms": asdict(_terms_of(model)), "weights": mx.get_active_memory()}
    _tell(held | {"bandwidth": backend.memory_bandwidth() if setup.name == OURS else 0.0})
    mx.clear_cache()
    for figures in measure(side, setup.cases, setup.count):
        _tell({"figures": asdict(figures)})


def _terms_of(model: nn.Module) -> NumericSettings:
    named: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    parameters = dict(named)
    return NumericSettings(
        dtype=str(parameters["model.norm.weight"].dtype).removeprefix("mlx.core."),
        quantized=any(name.endswith(".scales") for name in parameters),
        blas=backend.BLAS.split(" (")[0],
    )


def _tell(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    """End this process when the one that holds the other end of its standard input is gone."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    if S_ISFIFO(os.fstat(0).st_mode):
        Thread(target=_end_with_parent, daemon=True).start()
    main()
