"""The page's server with a model that says what a test wants, as slowly as it wants.

The page, the list of models and the counts of tokens are those of a real server.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx

from tests.server.serving import Served


@dataclass
class FakeChat:
    """A server whose replies are `replies[words]` for the words of the user's last message."""

    url: str
    replies: dict[str, str] = field(default_factory=dict)
    thoughts: dict[str, str] = field(default_factory=dict)
    piece: int = 12  # characters
    delay: float = 0.0  # seconds between two pieces
    hold: float = 0.0  # seconds before the first
    requests: list[dict[str, Any]] = field(default_factory=list)

    def reply(self, words: str) -> str:
        """Return the whole reply to a message."""
        return self.replies.get(words, f"Reply to {words}")

    def pieces(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the deltas of a reply; one that is continued begins where it ends."""
        *_, last = body["messages"]
        words = [one["content"] for one in body["messages"] if one["role"] == "user"][-1]
        begun = last if body.get("continue_final_message") else {"content": ""}
        thought = self.thoughts.get(words, "") if body.get("thinking_budget") != 0 else ""
        parts = [("content", self.reply(words)[len(begun["content"]) :])]
        if not begun["content"]:
            rest = thought[len(begun.get("reasoning_content") or "") :]
            parts.insert(0, ("reasoning_content", rest))
        for name, text in parts:
            for at in range(0, len(text), self.piece):
                yield {name: text[at : at + self.piece]}


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    fake: FakeChat
    served: Served
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Write no log."""

    def _pass_on(self, response: httpx.Response) -> None:
        self.send_response(response.status_code)
        for name in ("content-type", "content-security-policy"):
            if name in response.headers:
                self.send_header(name, response.headers[name])
        self.send_header("Content-Length", str(len(response.content)))
        self.end_headers()
        with suppress(OSError):  # the page no longer waits
            self.wfile.write(response.content)

    def do_GET(self) -> None:
        self._pass_on(self.served.get(self.path))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.path.endswith("/chat/completions"):
            self._pass_on(self.served.post(self.path, body))
            return
        self.fake.requests.append(body)
        if not body.get("stream"):
            words = self.fake.reply(body["messages"][-1]["content"])
            message = {"role": "assistant", "content": words}
            self._pass_on(httpx.Response(200, json={"choices": [{"message": message}]}))
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        with suppress(OSError):  # the page has stopped the reply
            self._stream(body)

    def _stream(self, body: dict[str, Any]) -> None:
        self.wfile.write(b": keepalive 1/100\n\n")
        time.sleep(self.fake.hold)
        for delta in self.fake.pieces(body):
            self._write({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
            time.sleep(self.fake.delay)
        self._write({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        usage = {
            "prompt_tokens": 20,
            "completion_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {"reasoning_tokens": 3},
        }
        timings = {"predicted_per_second": 33.3}
        self._write({"choices": [], "usage": usage, "timings": timings})
        self.wfile.write(b"data: [DONE]\n\n")

    def _write(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())


@contextmanager
def fake_chat(served: Served) -> Iterator[FakeChat]:
    """Serve a fake chat in front of a real server."""
    fake = FakeChat("")
    handler = type("Handler", (_Handler,), {"fake": fake, "served": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
