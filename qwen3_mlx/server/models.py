"""The models of the server: loaded when a request names them, and closed to make room for others.

A request leases its model, and a leased model is not closed. One model at a time is loaded or
closed, so that each sees the memory that the ones before it took. If a model does not fit, the
least recently used idle one is closed, and then the next. If all are busy, the least recently used
one gets no new requests until it is idle: otherwise steady traffic to it would keep others out.
"""

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Event as Flag
from typing import Any

from qwen3_mlx.api.llm import LLM
from qwen3_mlx.errors import CapacityError, KindError, Qwen3Error
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.model_source import ModelSource, is_default, room_for
from qwen3_mlx.server.response import EventBridge
from qwen3_mlx.server.threads import in_daemon
from qwen3_mlx.text.kind import CHAT
from qwen3_mlx.text.thinking import Thinking

_PATIENCE = 60.0  # seconds that a load waits for busy models
_RETRY_AFTER = 10  # seconds
_ABANDONED = 10.0  # seconds at the end for a load to notice that it was abandoned
_MAX_NAMED = 20  # models that an error names


class ServedModel:
    """A model of the pool, and what is loaded of it. Only the event loop uses it.

    Attributes:
        source: its names, and how to load it.
        llm: the loaded model; None if it is not loaded.
        bridge: carries its events to the event loop.
        created: time of loading, in seconds since the epoch.
        kind: what it is for: "chat", "embedding" or "reranker".
        thinking: the thinking modes of a chat model; None before it is first loaded.
        weight_bytes: bytes of its weights; 0 before it is first loaded.
        leases: number of requests that use it.
        used: when the last one came.
        keep_alive: seconds that it stays loaded when it is idle.
        expires: when it is closed if it stays idle.
        progress: modules loaded, and their number, while it loads.
    """

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self.llm: LLM | None = None
        self.bridge: EventBridge | None = None
        self.created = int(time.time())
        self.kind = source.kind
        self.thinking: Thinking | None = None
        self.weight_bytes = 0
        self.leases = 0
        self.used = 0.0
        self.keep_alive = self.expires = math.inf
        self.progress = (0, 0)
        self.draining = False  # gets no new requests, since it will be closed
        self.idle = asyncio.Event()
        self.idle.set()
        self.waiting: list[Lease] = []
        self.loading: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """The name that clients see."""
        return self.source.name

    @property
    def context(self) -> int:
        """The context window in tokens; that of the network while it is not loaded."""
        return self.llm.context if self.llm else self.source.config.context_window

    @property
    def state(self) -> str:
        """One of "loaded", "loading" and "not-loaded", in LM Studio's terms."""
        return "loaded" if self.llm else "loading" if self.loading else "not-loaded"

    def stays_despite(self, seconds: float | None) -> bool:
        """Return whether it always stays loaded although a request says that it should not."""
        return self.source.load is None and seconds not in (None, math.inf)

    def open(self, llm: LLM) -> None:
        """Take what was loaded."""
        self.llm, self.bridge = llm, EventBridge(llm)
        self.created, self.progress = int(time.time()), (0, 0)
        self.kind, self.thinking = llm.kind, llm.thinking if llm.kind == CHAT else None
        self.weight_bytes = llm.model.nbytes


class Lease:
    """The use of a model by one request, from when the model is ready until `release`."""

    def __init__(self, pool: "ModelPool", model: ServedModel, keep_alive: float | None) -> None:
        self.model = model
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pool = pool
        self._keep_alive = keep_alive
        self._holds = False

    def grant(self, now: float, default: float) -> None:
        """Begin the use, unless it was given up."""
        model = self.model
        if self.ready.done():
            return
        self._holds = True
        model.leases += 1
        model.idle.clear()
        model.used = now
        if model.source.load:
            model.keep_alive = default if self._keep_alive is None else self._keep_alive
        self.ready.set_result(None)

    def fail(self, error: ApiError) -> None:
        """End the wait with an error, unless it was given up."""
        if not self.ready.done():
            self.ready.set_exception(error)

    def release(self) -> None:
        """End the use, or the wait for it; may be called twice."""
        if not self.ready.cancel() and not self.ready.cancelled():
            self.ready.exception()  # which may not have been read, and need not be
        if self._holds:
            self._holds = False
            self._pool.release(self.model)


class ModelPool:
    """All models that are served, the default one first. Only the event loop uses it."""

    def __init__(
        self,
        sources: Sequence[ModelSource],
        keep_alive: float,
        check: Callable[[LLM], None],
    ) -> None:
        """Serve the models; an idle one is closed after `keep_alive` s.

        `check` raises for a loaded model that cannot be served with the settings.
        """
        self.models = [ServedModel(source) for source in sources]
        self._keep_alive = keep_alive
        self._check = check
        self._turn = asyncio.Lock()  # loading and closing
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = Flag()

    @property
    def default(self) -> ServedModel:
        """The model of requests that name none."""
        return self.models[0]

    @property
    def loaded(self) -> list[tuple[ServedModel, LLM]]:
        """The models that are loaded."""
        return [(model, model.llm) for model in self.models if model.llm]

    @property
    def context(self) -> int:
        """The longest context window of all."""
        return max(model.context for model in self.models)

    def seconds_left(self, model: ServedModel) -> float:
        """Return in how many seconds the model is closed if no request comes; may be inf."""
        return model.keep_alive if model.leases else model.expires - time.monotonic()

    def find(self, name: str | None, *, strict: bool = False) -> ServedModel:
        """Return the model of a name; a sole one without adapters answers to any, unless `strict`.

        Raises:
            ApiError: there is no such model (404).
        """
        named = [model for model in self.models if name and model.source.answers_to(name)]
        if named:
            return next((model for model in named if model.name == name), named[0])
        names = [name for model in self.models for name in model.source.names]
        if is_default(name) or (len(names) == 1 and not strict):
            return self.default
        more = f" and {len(names) - _MAX_NAMED} more" * (len(names) > _MAX_NAMED)
        verb = "is" if len(names) == 1 else "are"
        raise ApiError(
            404,
            f"model {name!r:.200} not found; there {verb} {', '.join(names[:_MAX_NAMED])}{more}",
            code="model_not_found",
        )

    @contextmanager
    def suggesting(self, model: ServedModel) -> Iterator[None]:
        """Name other models in an error of the block that `model` is of the wrong kind."""
        try:
            yield
        except ApiError as error:
            if isinstance(cause := error.__cause__, KindError):
                fit = [one.name for one in self.models if one.kind == cause.needed]
                if names := ", ".join(name for name in fit[:_MAX_NAMED] if name != model.name):
                    error.message += f"; {cause.needed} models here: {names}"
            raise

    def open(self, model: ServedModel, llm: LLM) -> None:
        """Serve a model that was loaded and checked."""
        model.open(llm)
        model.used = time.monotonic()
        model.keep_alive = self._keep_alive if model.source.load else math.inf
        model.expires = model.used + model.keep_alive

    def lease(self, model: ServedModel, keep_alive: float | None = None) -> Lease:
        """Return the lease of a model, which is loaded if it is not; see `Lease.ready`.

        The model stays loaded for `keep_alive` s after the request; None is the server's default.
        """
        lease = Lease(self, model, keep_alive)
        model.waiting.append(lease)
        self._serve_waiting(model)
        return lease

    def release(self, model: ServedModel) -> None:
        """Count a request less; called by its lease."""
        model.leases -= 1
        if model.leases == 0:
            model.idle.set()
            model.expires = time.monotonic() + model.keep_alive
            self.close_expired()

    def unload(self, model: ServedModel) -> None:
        """Close a model as soon as it is idle, unless it always stays loaded."""
        if model.source.load:
            model.keep_alive, model.expires = 0.0, time.monotonic()
            self.close_expired()

    def close_expired(self) -> None:
        """Close the models whose time is over; called once a second."""
        if not self._turn.locked():  # otherwise a second later
            for model in filter(self._has_expired, self.models):
                self._start(self._expire(model))

    async def stop(self) -> None:
        """Abandon what is being loaded, and close all models."""
        self._stopping.set()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_ABANDONED)
        for model in self.models:
            if model.source.load:
                await self._close(model)

    # --- loading and closing --------------------------------------------------------------------

    def _serve_waiting(self, model: ServedModel) -> None:
        """Grant the leases that wait for a model, or have it loaded for them."""
        if model.llm and not model.draining:
            waiting, model.waiting = model.waiting, []
            for lease in waiting:
                lease.grant(time.monotonic(), self._keep_alive)
        elif model.waiting and not model.loading and not model.llm:
            model.loading = self._start(self._load(model))

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _load(self, model: ServedModel) -> None:
        """Load a model for the requests that wait for it; an error is theirs alone."""
        try:
            async with self._turn:
                model.waiting = [lease for lease in model.waiting if not lease.ready.done()]
                if model.waiting:
                    self.open(model, await self._load_with_room(model))
        except Exception as error:  # noqa: BLE001 - raised again where leases are awaited
            waiting, model.waiting = model.waiting, []
            for lease in waiting:
                lease.fail(self._as_api_error(error))
        finally:
            model.loading = None
        for other in self.models:
            other.draining = False
            self._serve_waiting(other)

    async def _load_with_room(self, model: ServedModel) -> LLM:
        """Load a model; close others until it fits.

        Raises:
            ApiError: the others stay busy (503).
            Qwen3Error: it does not fit, or cannot be loaded.
        """
        end = asyncio.get_running_loop().time() + _PATIENCE
        while True:
            try:
                return await in_daemon(partial(self._load_checked, model))
            except CapacityError as error:
                others = [other for other, _ in self.loaded if other.source.load]
                if not others or not error.fits_alone:
                    raise
                # An idle one, else the one whose last request came first.
                victim = min(others, key=lambda other: (other.leases > 0, other.used))
                if victim.leases:
                    # It may fit then, without what the requests took for the moment.
                    await self._wait_until_idle(victim, end, error)
                else:
                    await self._close(victim)

    def _load_checked(self, model: ServedModel) -> LLM:
        """Load a model on this thread."""
        assert model.source.load
        self._follow(model, 0, 0)
        others = [other.source for other in self.models if other is not model and not other.llm]
        with room_for(others, beside=model.source):
            llm = model.source.load(partial(self._follow, model))
        try:
            self._check(llm)
        except BaseException:
            llm.close()
            raise
        return llm

    def _follow(self, model: ServedModel, done: int, total: int) -> None:
        if self._stopping.is_set():  # an error ends the loading
            raise Qwen3Error("the server is shutting down")
        model.progress = done, total

    async def _wait_until_idle(self, model: ServedModel, end: float, why: Exception) -> None:
        """Wait until a model is idle, and give it no new requests from now on.

        Raises:
            ApiError: it is not idle at the time `end` (503).
        """
        model.draining = True
        try:
            async with asyncio.timeout_at(end):
                await model.idle.wait()
        except TimeoutError:
            raise ApiError(
                503,
                f"{why}; {model.name} could be closed for it, but has answered requests for "
                f"{_PATIENCE:g} s; try again",
                code="unavailable",
                headers={"Retry-After": str(_RETRY_AFTER)},
            ) from None

    async def _close(self, model: ServedModel) -> None:
        """Close a model, and free its memory."""
        llm, model.llm, model.bridge = model.llm, None, None
        model.draining = False
        if llm:
            await asyncio.to_thread(llm.close)
        self._serve_waiting(model)

    def _has_expired(self, model: ServedModel) -> bool:
        idle = model.llm and model.source.load and not model.leases
        return bool(idle and model.expires <= time.monotonic())

    async def _expire(self, model: ServedModel) -> None:
        async with self._turn:
            if self._has_expired(model):
                await self._close(model)

    def _as_api_error(self, error: Exception) -> ApiError:
        if self._stopping.is_set():
            return ApiError(503, "the server is shutting down", code="unavailable")
        if isinstance(error, Qwen3Error | ValueError | OSError):
            return ApiError(500, str(error), code="internal")  # a retry cannot succeed
        return ApiError.of(error)
