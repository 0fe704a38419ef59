"""Runs the application, until it is told to stop; then what is being said may be finished."""

import asyncio
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import uvicorn

from qwen3_mlx.api.llm import LLM
from qwen3_mlx.server.app import make_app
from qwen3_mlx.server.connections import Connection, Connections, Limits, raise_file_limit
from qwen3_mlx.server.service import Service
from qwen3_mlx.server.settings import Settings

_LAST_WORDS = 2  # seconds, at most half of all, for cancelled replies to tell their clients
BACKLOG = 128
# Seconds that a thread keeps the interpreter while others want it. Python's 0.005 for each of the
# threads that prepare, and for each step of the event loop, make 0.3 s of waiting.
_INTERVAL = 0.001
_TICKS = 10  # of a tenth of a second, from one look at all connections to the next


class Server(uvicorn.Server):
    """A server over sockets that are open already."""

    def __init__(
        self,
        llm: LLM,
        settings: Settings,
        ready: Callable[[], None],
        limits: Limits | None = None,
    ) -> None:
        app, self._service = make_app(llm, settings)
        self._deadline = settings.shutdown - min(_LAST_WORDS, settings.shutdown / 2)
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
            timeout_keep_alive=max(1, round(limits.patience)),
            timeout_graceful_shutdown=max(1, round(settings.shutdown)),
        )
        super().__init__(config)

    @property
    def service(self) -> Service:
        """What it serves."""
        return self._service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(self.connections.on_error)
        await super().startup(sockets)
        for listener in sockets or ():
            # More may wait to be accepted than are accepted at once, which asyncio takes for one.
            listener.listen(BACKLOG)
        self._ready()

    async def on_tick(self, counter: int) -> bool:
        """Do what is done every tenth of a second."""
        if counter % _TICKS == 0:
            self.connections.sweep(self.loop.time())
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal: the first lets replies come to their end, another ends them now."""
        if self.should_exit:
            self.loop.call_soon_threadsafe(self._service.cancel_all)
        self._service.stopping = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, and end those that are not done in time."""
        self._service.stopping = True
        timer = self.loop.call_later(self._deadline, self._service.cancel_all)
        await super().shutdown(sockets)
        timer.cancel()


def serve(llm: LLM, settings: Settings, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM; a second SIGINT does not wait. `ready` is called once.

    Raises:
        Qwen3Error: the checkpoint cannot think as the settings want it to.
    """
    raise_file_limit()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_INTERVAL)
    before = signal.signal(signal.SIGTERM, _quit)
    try:
        Server(llm, settings, ready).run([listener])
    except KeyboardInterrupt:  # which the server hands on when all is done
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.setswitchinterval(interval)


def _quit(*_: object) -> NoReturn:
    raise KeyboardInterrupt
