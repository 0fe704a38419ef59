"""Runs the application until a signal stops it; running replies may then finish."""

import asyncio
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import uvicorn

from qwen3_mlx.api.llm import LLM
from qwen3_mlx.errors import ClusterError
from qwen3_mlx.server.app import make_app
from qwen3_mlx.server.connections import Connection, Connections, Limits, raise_file_limit
from qwen3_mlx.server.model_source import ModelSource
from qwen3_mlx.server.settings import Settings
from qwen3_mlx.text.described_tool import DescribedTool

# Seconds of `shutdown`, at most half of it, for clients to read why their replies were cancelled.
_NOTICE = 2
BACKLOG = 128
# Seconds that a thread keeps the interpreter lock while others want it. Python's default of 0.005,
# for each preparing thread and each step of the event loop, would add up to a delay of 0.3 s.
_SWITCH_INTERVAL = 0.001
_TICKS_PER_SWEEP = 10  # a tick is 0.1 s


class Server(uvicorn.Server):
    """An HTTP server on sockets that are already bound."""

    def __init__(
        self,
        llm: LLM,
        settings: Settings,
        ready: Callable[[], None],
        limits: Limits | None = None,
        sources: Sequence[ModelSource] = (),
        tools: Sequence[DescribedTool] = (),
    ) -> None:
        app, self.service = make_app(llm, settings, sources, tools)
        self._llm = llm
        self._deadline = settings.shutdown - min(_NOTICE, settings.shutdown / 2)
        self._ready = ready
        limits = limits or Limits.of_process()
        self.connections = Connections(limits)
        protocol: Any = partial(Connection, connections=self.connections)
        config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=bool(settings.trusted_proxies),
            forwarded_allow_ips=list(settings.trusted_proxies),
            backlog=limits.accepted,
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
            timeout_keep_alive=max(1, round(limits.patience)),
            timeout_graceful_shutdown=max(1, round(settings.shutdown)),
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, then call `ready`."""
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(self.connections.on_error)
        await super().startup(sockets)
        for listener in sockets or ():
            # asyncio takes one number for the connections accepted at once and for those that wait
            # in the socket's queue; the queue may be longer.
            listener.listen(BACKLOG)
        self._llm.on_failure(self._fail)
        self._ready()

    def _fail(self, _: ClusterError) -> None:
        """Answer for a moment that the model is down, then stop; called on another thread."""

        def stop() -> None:
            self.should_exit = True

        self.loop.call_soon_threadsafe(self.loop.call_later, _NOTICE, stop)

    async def on_tick(self, counter: int) -> bool:
        """Check connections and idle models once a second; called every tenth of a second."""
        if counter % _TICKS_PER_SWEEP == 0:
            self.connections.sweep(self.loop.time())
            self.service.models.close_expired()
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal: the first lets running replies finish, the second cancels them."""
        if self.should_exit:
            self.loop.call_soon_threadsafe(self.service.admission.cancel_all)
        self.service.stopping = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more requests, cancel replies that do not finish in time, close the models."""
        self.service.stopping = True
        timer = self.loop.call_later(self._deadline, self.service.admission.cancel_all)
        await super().shutdown(sockets)
        timer.cancel()
        await self.service.models.stop()


def serve(
    llm: LLM,
    settings: Settings,
    listener: socket.socket,
    ready: Callable[[], None],
    sources: Sequence[ModelSource],
    tools: Sequence[DescribedTool],
) -> None:
    """Serve until SIGINT or SIGTERM; a second SIGINT does not wait. `ready` is called once.

    `llm` is the first of the `sources`; the others are loaded on demand. The page offers `tools`.

    Raises:
        Qwen3Error: the checkpoint cannot think as the settings want it to.
        ClusterError: a machine that computes has failed.
    """
    raise_file_limit()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    before = signal.signal(signal.SIGTERM, _quit)
    try:
        server = Server(llm, settings, ready, sources=sources, tools=tools)
        server.run([listener])
        if llm.failure:
            raise llm.failure
    except KeyboardInterrupt:  # uvicorn raises the signal again after the shutdown
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.setswitchinterval(interval)


def _quit(*_: object) -> NoReturn:
    raise KeyboardInterrupt
