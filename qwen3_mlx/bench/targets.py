"""Benchmark targets: this package's engine and mlx-lm, each run in its own process.

`python -m qwen3_mlx.bench.targets SETUP` takes a `Setup` as JSON and writes lines of JSON: the
numeric settings of the target, then each measurement when it is complete; or an error.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from stat import S_ISFIFO
from statistics import median
from threading import Thread
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from qwen3_mlx import backend
from qwen3_mlx.api.load import load
from qwen3_mlx.bench.measure import OURS, PEER, BenchTarget, Case, NumericSettings, Setup, measure
from qwen3_mlx.cache.quantized import cache_format
from qwen3_mlx.cluster.hosts import LOOPBACK, read_hosts
from qwen3_mlx.cluster.lead import LedQwen3
from qwen3_mlx.cluster.ring import RING, join_group
from qwen3_mlx.cluster.shares import describe, traffic
from qwen3_mlx.cluster.wire import free_port
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.hooks import TokenCollector
from qwen3_mlx.engine.request import Request, RequestResult
from qwen3_mlx.engine.sampling_params import NEUTRAL, SamplingParams
from qwen3_mlx.engine.speculation.speculator import Speculator
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.model.linear import whole
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.processes import module_command

_RANK, _ADDRESSES = "QWEN3_BENCH_RANK", "QWEN3_BENCH_ADDRESSES"
_SHORT, _STEPS = Case(1, 64), 8  # what is decoded to measure how long rank 0 waits
_GREEDY = SamplingParams(temperature=0.0).over(NEUTRAL)


class Ours:
    """This package's engine; must be created and used on the thread that created the model."""

    def __init__(self, model: Qwen3) -> None:
        self.vocabulary = model.config.vocab_size
        self._model = model
        self._engine, self._case = self._create_engine(Case(1, 1)), Case(1, 1)

    def configure(self, case: Case) -> bool:
        """Create the engine for a case, or keep it if the settings are the same."""
        if (case.kv_bits, case.copying) != (self._case.kv_bits, self._case.copying):
            self._engine, self._case = self._create_engine(case), case
        return True

    def _create_engine(self, case: Case) -> Engine:
        model = self._model
        speculator = Speculator(model.config) if case.copying else None
        return Engine(
            model,
            vocabulary=self.vocabulary,
            cache_format=cache_format(case.kv_bits, model.config.head_dim),
            available=backend.available_memory(),  # no other LLM shares the memory
            speculator=speculator,
        )

    def generate(self, prompts: Sequence[list[int]], max_tokens: int) -> Iterator[list[int]]:
        """Decode tokens after each prompt; see `BenchTarget.generate`."""
        sinks, results = [TokenCollector() for _ in prompts], list[RequestResult | BaseException]()
        requests = [
            Request(
                ids=ids,
                sampling=_GREEDY,
                max_tokens=max(1, min(max_tokens, self._engine.context - len(ids))),
                seed=0,
                end_ids=frozenset(),
                sink=sink,
                on_finish=results.append,
            )
            for ids, sink in zip(prompts, sinks, strict=True)
        ]
        for request in requests:
            self._engine.submit(request)
        try:
            running = True
            while running:
                running = self._engine.step()
                if tokens := [token for sink in sinks for token in sink.take()]:
                    yield tokens
        finally:
            for request in requests:
                self._engine.cancel(request)
            while self._engine.step():
                pass
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def forget(self) -> None:
        """Clear the KV caches; see `BenchTarget.forget`."""
        self._engine.forget()


class MlxLm:
    """mlx-lm: `generate_step` with a prompt cache that is kept, as in its chat, and its batches."""

    def __init__(
        self,
        folder: str,
        terms: NumericSettings | None,
        adapter: str | None = None,
        group: mx.distributed.Group | None = None,
    ) -> None:
        # Imported here: no other part of this package may depend on mlx-lm.
        from mlx_lm.generate import BatchGenerator, generate_step, generation_stream
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.tuner.utils import load_adapters
        from mlx_lm.utils import dequantize_model, load_model

        self._batches, self._steps, self._make_cache = (
            BatchGenerator,
            generate_step,
            make_prompt_cache,
        )
        self._stream = generation_stream
        self.model, _ = load_model(Path(folder))
        if terms and not terms.quantized:
            self.model = dequantize_model(self.model)
        if adapter:
            load_adapters(self.model, adapter)
        if group:  # by heads and columns; it has no pipeline for dense Qwen3
            self.model.shard(group)
        if terms:
            self.model.set_dtype(getattr(mx, terms.dtype))
            mx.eval(self.model.parameters())
        self.vocabulary = self.model.args.vocab_size
        self._kept: list[int] = []
        self._cache = self._make_cache(self.model)

    def generate(self, prompts: Sequence[list[int]], max_tokens: int) -> Iterator[list[int]]:
        """Decode tokens after each prompt; see `BenchTarget.generate`."""
        try:
            if len(prompts) == 1:
                yield from self._alone(prompts[0], max_tokens)
            else:
                yield from self._batch(prompts, max_tokens)
        finally:  # mlx-lm computes one step ahead; the process must not end during it
            backend.wait_for_work(self._stream)

    def _batch(self, prompts: Sequence[list[int]], max_tokens: int) -> Iterator[list[int]]:
        batch = self._batches(self.model, stop_tokens=[])
        try:
            batch.insert(prompts, [max_tokens] * len(prompts))
            while answers := batch.next_generated():
                yield [answer.token for answer in answers]
        finally:
            batch.close()

    def configure(self, case: Case) -> bool:
        """Return whether the case is supported; see `BenchTarget.configure`."""
        return not case.special

    def _alone(self, ids: list[int], max_tokens: int) -> Iterator[list[int]]:
        if ids[: len(self._kept)] != self._kept:
            self.forget()
        new, history = ids[len(self._kept) :], list(ids)
        steps = self._steps(
            mx.array(new), self.model, max_tokens=max_tokens, prompt_cache=self._cache
        )
        try:
            for token, _ in steps:
                history.append(token)
                yield [token]
        finally:
            self._kept = history[: self._cache[0].offset]

    def forget(self) -> None:
        """Clear the KV caches; see `BenchTarget.forget`."""
        self._kept, self._cache = [], self._make_cache(self.model)


def main() -> None:
    """Run the target that the argument describes and write its measurements."""
    setup = Setup.from_json(sys.argv[1])
    try:
        if setup.name == PEER:
            with _ranks(setup) as group:
                peer = MlxLm(setup.folder, setup.terms, setup.adapter, group)
                _measure(peer, peer.model, setup)
        elif setup.hosts:
            _measure_cluster(setup)
        else:
            with load(Path(setup.folder), adapter=setup.adapter) as llm:
                llm.compute(lambda model: _measure(Ours(model), model, setup))
    except (Qwen3Error, ValueError) as error:  # of what `load` refuses
        _write_line({"error": str(error)})


def _measure_cluster(setup: Setup) -> None:
    """Measure this package's engine on several machines."""
    hosts, split, layers = setup.hosts, setup.split, setup.layers
    with load(Path(setup.folder), hosts=hosts, split=split, layers=layers) as llm:
        model, cluster = llm.model, llm.cluster
        assert isinstance(model, LedQwen3) and cluster
        done: Future[float] = Future()

        def run() -> None:
            try:
                ours = Ours(model)
                _measure(ours, model, setup)
                done.set_result(_share_waiting(ours, model))
            except Exception as error:  # noqa: BLE001 - raised again below
                done.set_exception(error)

        llm.call_soon(run)
        waiting = done.result()
        itemsize = model.model.norm.weight.dtype.size
        messages, nbytes = traffic(llm.config, split, len(cluster.hosts), itemsize)
        sent = sum(peer.channel.sent for peer in model.crew.peers)
        figures = {
            "messages": messages,
            "nbytes": nbytes,
            "control": sent / max(1, model.passes) / len(model.crew.peers),
            "waiting": waiting,
            "shares": [describe(share) for share in cluster.shares],
        }
        _write_line({"cluster": figures})


def _share_waiting(ours: Ours, model: LedQwen3) -> float:
    """Return the share of a step that rank 0 spends waiting for the others.

    A stage of a pipeline measures it. Where layers are divided, it is what a step takes more than
    the same parts without their sums.
    """
    if model.share.is_stage:
        return model.waited / model.crew.busy
    (step,) = measure(ours, [_SHORT], _STEPS)
    for layer in model.layers:  # from here on nothing is sent
        layer.self_attn.reduce = layer.mlp.reduce = whole
    cache, token = model.make_cache(_SHORT.prompt + _STEPS + 1), mx.zeros((1, 1), dtype=mx.int32)
    mx.eval(model.model(mx.zeros((1, _SHORT.prompt), dtype=mx.int32), cache, None))
    times = [time.perf_counter()]
    for _ in range(_STEPS):
        mx.eval(mx.argmax(model.head(model.model(token, cache, None)), axis=-1))
        times.append(time.perf_counter())
    alone = median(after - before for before, after in pairwise(times))
    return max(0.0, 1 - alone * step.decode)


@contextmanager
def _ranks(setup: Setup) -> Iterator[mx.distributed.Group | None]:
    """Start the other ranks of mlx-lm on this machine; all run the same program."""
    if not setup.hosts:
        yield None
        return
    count = len(read_hosts(setup.hosts, None))
    rank, stated = int(os.environ.get(_RANK, 0)), os.environ.get(_ADDRESSES, "")
    addresses = stated or " ".join(f"{LOOPBACK}:{free_port(LOOPBACK)}" for _ in range(count))
    others = [
        subprocess.Popen(
            module_command("qwen3_mlx.bench.targets", sys.argv[1]),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=os.environ | {_RANK: str(other), _ADDRESSES: addresses},
        )
        for other in range(1, count)
        if rank == 0
    ]
    try:
        yield join_group(rank, {"backend": RING, "hosts": addresses.split()})
    finally:
        for process in others:
            process.kill()
            process.wait()


def _measure(target: BenchTarget, model: nn.Module, setup: Setup) -> None:
    held = {"terms": asdict(_terms_of(model)), "weights": mx.get_active_memory()}
    _write_line(held | {"bandwidth": backend.memory_bandwidth() if setup.name == OURS else 0.0})
    mx.clear_cache()
    for figures in measure(target, setup.cases, setup.count):
        _write_line({"figures": asdict(figures)})


def _terms_of(model: nn.Module) -> NumericSettings:
    named: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    parameters = dict(named)
    return NumericSettings(
        dtype=backend.dtype_name(parameters["model.norm.weight"].dtype),
        quantized=any(name.endswith(".scales") for name in parameters),
        blas=backend.BLAS.split(" (")[0],
    )


def _write_line(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    """End this process when its parent has ended: standard input is a pipe from it."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    if S_ISFIFO(os.fstat(0).st_mode):
        Thread(target=_end_with_parent, daemon=True).start()
    main()
