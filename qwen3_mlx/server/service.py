"""The one engine behind all routes: who is let in, and what is begun."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from fastapi import Request

from qwen3_mlx.api.generation import PreparedRequest
from qwen3_mlx.api.llm import LLM
from qwen3_mlx.api.options import Options
from qwen3_mlx.server.admission import Admission, Slot
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.keys import Keys
from qwen3_mlx.server.preparing import PreparationPool
from qwen3_mlx.server.response import ActiveRequest, EventBridge
from qwen3_mlx.server.settings import Settings
from qwen3_mlx.server.thinking import ThinkingRequest
from qwen3_mlx.text.fair_queue import Caller

_AT_ONCE = 16 << 10  # bytes that take little longer than to wake a thread for them
_READERS = 2  # threads for large bodies, which together take as many times the memory of one

Prepare = Callable[[Caller], PreparedRequest]
T = TypeVar("T")


class Service:
    """A loaded checkpoint, and the requests that it is answering."""

    def __init__(self, llm: LLM, settings: Settings) -> None:
        self.llm = llm
        self.settings = settings
        self.context = llm.context
        self._mailbox = EventBridge(llm)
        self.created = int(time.time())
        self.keys = Keys(settings.api_key, settings.key_file)
        self.stopping = False
        self.started = time.monotonic()
        self._readers = ThreadPoolExecutor(_READERS, "qwen3-body")
        self.places = Admission(settings.max_requests, settings.most_per_client)
        self.preparing = PreparationPool()
        llm.load_grammars()  # now, for it would hold up all that runs

    @property
    def active(self) -> int:
        """The replies that run or wait."""
        return self.places.active

    def another_model(self, name: str | None) -> list[str]:
        """Warn of a model that is asked for and is not the one that answers."""
        if name in (None, "", "default", self.settings.model):
            return []
        return [f"there is no model {name!r:.200} here; {self.settings.model} answers"]

    def options(self, wish: ThinkingRequest, warnings: list[str]) -> Options:
        """Give what a request says of thinking as the library has it, and add to its warnings."""
        settings = self.settings
        found = wish.resolve(self.llm.thinking, settings.thinking, settings.thinking_budget)
        warnings += found.warnings
        return {
            "thinking": found.thinking,
            "thinking_budget": found.budget,
            "thinking_budget_bends": found.bends,
        }

    async def aside(self, size: int, job: Callable[[], T]) -> T:
        """Do a job whose time grows with so many bytes of JSON: at once if few, or on a thread."""
        if size <= _AT_ONCE:
            return job()
        return await asyncio.get_running_loop().run_in_executor(self._readers, job)

    async def run(
        self,
        request: Request,
        place: Slot,
        prepares: Sequence[Prepare],
        *,
        choices: int = 1,
    ) -> ActiveRequest:
        """Send the replies to a request to the engine; to be closed by the caller.

        What is prepared may take its time, and is done on a thread. A reply gets less than
        `max_tokens`, with a warning, where the context has less room.

        Raises:
            ApiError: it cannot be had.
        """
        running = ActiveRequest(self._mailbox, self.settings, place, choices)

        def start(caller: Caller) -> None:
            tasks = [task for prepare in prepares for task in _copies(prepare(caller), choices)]
            if warning := tasks[0].details.get("warning"):
                running.warnings.append(warning)
            if self.settings.log_content:
                place.record["prompts"] = [task.prompt for task in tasks]
            running.begin(tasks)

        try:
            await self.preparing.do(request, place.cancelled, start)
        except BaseException as error:
            running.close()
            if isinstance(error, ApiError) and running.ended_by:
                raise running.ended_by from error
            raise
        return running

    def cancel_all(self) -> None:
        """End all that runs: the time for a shutdown is over."""
        self.places.cancel_all()


def _copies(task: PreparedRequest, count: int) -> list[PreparedRequest]:
    """Return a task as often as there are to be replies to it, whose seeds follow each other."""
    seed = task.asked.seed
    if seed is None:
        return [task] * count
    return [replace(task, asked=replace(task.asked, seed=seed + n)) for n in range(count)]
