"""The service behind all routes: admits requests and starts their replies on the engines."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

from fastapi import Request

from qwen3_mlx.api.llm import LLM
from qwen3_mlx.api.options import Options
from qwen3_mlx.api.prepared_request import PreparedRequest
from qwen3_mlx.engine.sampling_params import SamplingParams
from qwen3_mlx.errors import ClusterError, Qwen3Error
from qwen3_mlx.server.admission import Admission, Slot
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.keys import Keys
from qwen3_mlx.server.metrics import Metrics
from qwen3_mlx.server.model_source import ModelSource, is_default
from qwen3_mlx.server.models import ModelPool, ServedModel
from qwen3_mlx.server.preparing import ComputingPool, PreparationPool
from qwen3_mlx.server.quotas import Quotas
from qwen3_mlx.server.response import ActiveRequest
from qwen3_mlx.server.settings import Settings
from qwen3_mlx.server.thinking import ThinkingRequest
from qwen3_mlx.server.wire import RequestModel
from qwen3_mlx.text.events import Usage
from qwen3_mlx.text.fair_queue import Caller
from qwen3_mlx.text.kind import CHAT

_MAX_INLINE = 16 << 10  # bytes of JSON that cost little more than waking a thread for them
_BODY_THREADS = 2  # for large bodies; each adds the memory of one body that is parsed

Prepare = Callable[..., PreparedRequest]
T = TypeVar("T")


class Service:
    """The part of the server that all models share: requests, keys, threads, figures."""

    def __init__(self, llm: LLM, settings: Settings, sources: Sequence[ModelSource]) -> None:
        """Serve the `sources`, of which the first is loaded as `llm`.

        Raises:
            Qwen3Error, ValueError: the settings do not fit `llm`.
        """
        self.settings = settings
        check = partial(_check, settings)
        check(llm)
        self.models = ModelPool(sources, settings.model_keep_alive, check)
        self.models.open(self.models.default, llm)
        self.keys = Keys(settings.api_key, settings.key_file)
        self.stopping = False
        self.started = time.monotonic()
        self._body_threads = ThreadPoolExecutor(_BODY_THREADS, "qwen3-body")
        self.quotas = Quotas()
        self.metrics = Metrics()
        self.admission = Admission(
            settings.max_requests, settings.max_replies_per_client, self._spent
        )
        self.preparing = PreparationPool()
        self.computing = ComputingPool(settings.request_timeout)

    @property
    def failure(self) -> ClusterError | None:
        """Why a machine that computes has failed; None while all work."""
        return next((llm.failure for _, llm in self.models.loaded if llm.failure), None)

    @property
    def active(self) -> int:
        """Number of replies that run or wait."""
        return self.admission.active

    def _spent(self, slot: Slot, usage: Usage) -> None:
        self.metrics.add_reply(slot.record["model"], usage)
        if slot.key:
            self.quotas.spend(slot.key, usage.prompt_tokens + usage.completion_tokens)

    async def run_sized(self, size: int, job: Callable[[], T]) -> T:
        """Run a job over `size` bytes of JSON: inline if they are few, otherwise on a thread."""
        if size <= _MAX_INLINE:
            return job()
        return await asyncio.get_running_loop().run_in_executor(self._body_threads, job)


class ModelService:
    """The service as an endpoint has it: with the model that its request has leased.

    `name` is what the request calls the model; it may choose an adapter.
    """

    def __init__(self, service: Service, model: ServedModel, name: str | None) -> None:
        assert model.llm and model.bridge
        adapter = model.source.adapter_of(name)
        self.llm = model.llm.with_adapter(adapter) if adapter else model.llm
        self.name = model.source.shown_name(name)
        self.context = model.context
        self.settings = service.settings
        self.preparing = service.preparing
        self.computing = service.computing
        self.run_sized = service.run_sized
        self.model = model
        self._bridge = model.bridge

    def model_warnings(self, body: RequestModel) -> list[str]:
        """Return warnings if the request names another model, or a time for one that stays."""
        named = is_default(body.model) or self.model.source.answers_to(str(body.model))
        warnings = {
            f"there is no model {body.model!r:.200} here; {self.name} answers": not named,
            "ttl was ignored: the model stays loaded": self.model.stays_despite(body.model_seconds),
        }
        return [warning for warning, applies in warnings.items() if applies]

    def thinking_options(self, request: ThinkingRequest, warnings: list[str]) -> Options:
        """Return the library's options for the thinking of a request, and append its warnings."""
        settings = self.settings
        resolved = request.resolve(self.llm.thinking, settings.thinking, settings.thinking_budget)
        warnings += resolved.warnings
        return {
            "thinking": resolved.thinking,
            "thinking_budget": resolved.budget,
            "thinking_budget_bends": resolved.bends,
        }

    async def run(
        self,
        request: Request,
        slot: Slot,
        prepares: Sequence[Prepare],
        *,
        choices: int = 1,
    ) -> ActiveRequest:
        """Submit the replies to a request to the engine; the caller closes the result.

        The preparation may be slow and runs on a thread. Where the context window has less room
        than `max_tokens`, the reply is shortened, with a warning.

        Raises:
            ApiError: the request cannot be served.
        """
        running = ActiveRequest(self._bridge, self.settings, slot, choices)

        def start(caller: Caller) -> None:
            prepared = [
                copy
                for prepare in prepares
                for copy in _copies(prepare(caller, clamp_max_tokens=True), choices, self.settings)
            ]
            if warning := prepared[0].details.get("warning"):
                running.warnings.append(warning)
            if self.settings.log_content:
                slot.record["prompts"] = [reply.prompt for reply in prepared]
            running.begin(prepared)

        try:
            await self.preparing.run(request, slot.cancelled, start)
        except BaseException as error:
            running.close()
            if isinstance(error, ApiError) and running.ended_by:
                raise running.ended_by from error
            raise
        return running


def _check(settings: Settings, llm: LLM) -> None:
    """Check that a model can be served with the settings, and load what its first request needs.

    Raises:
        Qwen3Error: the checkpoint cannot think as the settings require.
        ValueError: a token of the settings' `logit_bias` is not in the vocabulary.
    """
    if llm.kind != CHAT:
        return  # these settings are for replies
    llm.thinking.resolve(settings.thinking)
    if settings.thinking_budget is not None and not llm.thinking.can_think:
        raise Qwen3Error("this checkpoint cannot think; leave thinking_budget out")
    vocabulary = min(len(llm.tokenizer), llm.config.vocab_size)
    for token in settings.sampling.logit_bias or ():
        if not 0 <= token < vocabulary:  # each request would be refused
            raise ValueError(f"logit_bias names {token}; token ids are 0 to {vocabulary - 1}")
    llm.load_grammars()  # now, since later it would delay all running requests


def _copies(prepared: PreparedRequest, count: int, settings: Settings) -> list[PreparedRequest]:
    """Return one prepared request for each choice, with the server's sampling where it sets none.

    If a seed is set, the choices have consecutive seeds.
    """
    options = prepared.options
    sampling = (options.sampling or SamplingParams()).over(settings.sampling)
    seed = settings.seed if options.seed is None else options.seed
    seeds = [None] * count if seed is None else range(seed, seed + count)
    prepared = replace(prepared, sampling=sampling.over(prepared.sampling))
    return [
        replace(prepared, options=replace(options, sampling=sampling, seed=seed)) for seed in seeds
    ]
