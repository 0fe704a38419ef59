"""A server in a thread of the tests' own, as clients find one."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import httpx

from qwen3_mlx import LLM
from qwen3_mlx.server.serving import Server
from qwen3_mlx.server.settings import Settings


@dataclass(frozen=True, slots=True)
class Served:
    """A server at work."""

    url: str
    server: Server

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """Send JSON, with no patience for what hangs."""
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=60)

    def get(self, path: str, **headers: str) -> httpx.Response:
        """Ask for something."""
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=60)

    def chat(self, words: str = "What is 12 + 34?", **fields: Any) -> httpx.Response:
        """Say something by OpenAI's API."""
        messages = [{"role": "user", "content": words}]
        return self.post("/v1/chat/completions", {"messages": messages, **fields})


@contextmanager
def serving(llm: LLM, **settings: Any) -> Iterator[Served]:
    """Serve `llm` at a port of its own."""
    listener = socket.create_server(("127.0.0.1", 0))
    ready = Event()
    server = Server(llm, Settings(**{"model": "demo", "shutdown": 1.0, **settings}), ready.set)
    thread = Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        assert ready.wait(60)
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", server)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
