"""Runs requests on the worker thread: prompt in, tokens to the request's watcher, outcome out."""

import logging
from collections.abc import Iterator

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.engine.params import Outcome, Request
from qwen3_mlx.engine.runner import Cancelled, decode, prefill
from qwen3_mlx.engine.sampling import Sampler
from qwen3_mlx.engine.worker import Worker
from qwen3_mlx.model.qwen3 import Qwen3

_log = logging.getLogger(__name__)


class Engine:
    """Takes requests from any thread and runs them one after another."""

    def __init__(self, model: Qwen3, worker: Worker, *, vocabulary: int) -> None:
        """Run `model`, which belongs to `worker`; ids from `vocabulary` on are never chosen."""
        self.model = model
        self._worker = worker
        self._vocabulary = vocabulary

    def submit(self, request: Request) -> None:
        """Run `request` when its turn comes; its watcher and `done` hear of it."""
        self._worker.post(lambda: self._run(request))

    def _run(self, request: Request) -> None:
        try:
            outcome: Outcome | BaseException = self._generate(request)
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits for the outcome
            _log.debug("a request failed", exc_info=True)
            outcome = error
        mx.clear_cache()
        request.done(outcome)

    def _generate(self, request: Request) -> Outcome:
        count = 0
        try:
            for token in self._tokens(request):
                count += 1
                if token in request.end_ids:
                    return Outcome("stop", count)
                request.watcher.advance([token])
                if request.watcher.finished:
                    return Outcome("stop", count)
        except Cancelled:
            return Outcome("cancelled", count)
        return Outcome("length", count)

    def _tokens(self, request: Request) -> Iterator[int]:
        """Give the tokens as they are chosen; raises Cancelled when nobody wants more."""
        total = len(request.ids)

        def go_on() -> None:
            if request.cancelled.is_set() or self._worker.ending:
                raise Cancelled

        def report(done: int) -> None:
            go_on()
            if request.progress:
                request.progress(done, total)

        cache = self.model.make_cache(total + request.room_for)
        sampler = Sampler(
            request.sampling,
            seed=request.seed,
            vocabulary=self._vocabulary,
            prompt=request.ids,
        )
        logits = prefill(
            self.model, cache, request.ids, chunk=backend.prefill_chunk(), checkpoint=report
        )
        tokens = decode(self.model, cache, logits, sampler, request.max_tokens)
        for number, token in enumerate(tokens):
            go_on() if number else report(total)
            yield token
