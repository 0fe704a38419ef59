"""A server in a thread of the tests' own, as clients find one."""

import asyncio
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import httpx

from qwen3_mlx import LLM
from qwen3_mlx.server.connections import Limits
from qwen3_mlx.server.model_source import ModelSource
from qwen3_mlx.server.run import Server
from qwen3_mlx.server.settings import Settings
from qwen3_mlx.text.described_tool import DescribedTool

# There is nothing to verify, and to load the certificates for it takes 20 ms of each request.
_PLAIN: dict[str, Any] = {"timeout": 60, "verify": False}


@dataclass(frozen=True, slots=True)
class Served:
    """A server at work."""

    url: str
    server: Server

    @property
    def llm(self) -> LLM:
        """The default model."""
        llm = self.server.service.models.default.llm
        assert llm
        return llm

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """Send JSON; a request that hangs fails."""
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, **_PLAIN)

    def get(self, path: str, **headers: str) -> httpx.Response:
        """Send a GET."""
        return httpx.get(f"{self.url}{path}", headers=headers, **_PLAIN)

    def chat(self, text: str = "What is 12 + 34?", **fields: Any) -> httpx.Response:
        """Send a user's message by OpenAI's API."""
        messages = [{"role": "user", "content": text}]
        return self.post("/v1/chat/completions", {"messages": messages, **fields})


@contextmanager
def serving(
    llm: LLM,
    limits: Limits | None = None,
    sources: Sequence[ModelSource] = (),
    tools: Sequence[DescribedTool] = (),
    **settings: Any,
) -> Iterator[Served]:
    """Serve `llm` at a port of its own, and the other models of `sources` beside it."""
    listener = socket.create_server(("127.0.0.1", 0))
    ready = Event()
    configured = Settings(**{"model": "demo", "shutdown": 1.0, **settings})
    server = Server(llm, configured, ready.set, limits, sources, tools)
    thread = Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        assert ready.wait(60)
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", server)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
