"""Helpers of the server's tests."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from qwen3_mlx import LLM
from qwen3_mlx.server.response import ActiveRequest
from tests.server.serving import Served
from tests.support import write_tiny
from tests.text.harness import TOKENIZER

PARAMETERS = {
    "type": "object",
    "properties": {"expression": {"type": "string"}},
    "required": ["expression"],
}
TOOL: Any = {
    "type": "function",
    "function": {"name": "calculator", "description": "Calculates.", "parameters": PARAMETERS},
}

SUM: list[dict[str, Any]] = [{"role": "user", "content": "What is 12 + 34?"}]
CALCULATOR: dict[str, Any] = {
    "name": "calculator",
    "description": "Calculate.",
    "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": CALCULATOR}]
SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer"}},
    "required": ["sum"],
    "additionalProperties": False,
}
NEVER = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def of_template(folder: Path, template: str) -> Path:
    """Write a small random checkpoint with a chat template."""
    write_tiny(folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def warnings_of(response: httpx.Response) -> str:
    """Return the warnings of a reply, which must not be an error."""
    assert response.status_code == 200, response.text
    return str(response.headers.get("warnings", ""))


def short(path: str, most: int, **fields: Any) -> dict[str, Any]:
    """Return the body of a request for few tokens, in any protocol."""
    limit = {"options": {"num_predict": most}} if path == "/api/chat" else {"max_tokens": most}
    return {"messages": SUM, "stream": False, **limit, **fields}


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true, for as long as that may take on a busy machine."""
    pause = threading.Event()
    for _ in range(2000):
        if condition():
            return
        pause.wait(0.03)
    pytest.fail("it did not become true within a minute")


def message_of(response: httpx.Response) -> str:
    """Return the message of an error, in any protocol."""
    body = response.json()
    error = body["error"]
    return str(error if isinstance(error, str) else error["message"])


def until_idle(served: Served, seconds: float = 60) -> None:
    """Wait until nothing runs any more."""
    end = time.monotonic() + seconds
    while served.server.service.active:
        assert time.monotonic() < end, "something still runs"
        time.sleep(0.01)


def endless() -> dict[str, Any]:
    """A reply that would take a while, because it cannot end."""
    never = {str(TOKENIZER.id_of(end)): -100 for end in ("<|im_end|>", "<|endoftext|>")}
    return {"prompt": "1 2 3", "max_tokens": 8000, "logit_bias": never, "temperature": 1.5}


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """Write a certificate for this machine that nobody has signed, and its key."""
    if not (openssl := shutil.which("openssl")):
        pytest.skip("openssl makes the certificate")
    cert, key = folder / "cert.pem", folder / "key.pem"
    made = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = [openssl, *made.split(), *names, "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


class Process:
    """`qwen3 serve` as a user starts it."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qwen3_mlx", "serve", "--port", "0", *arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "QWEN3_MODEL": ""} | {"NO_COLOR": "1"},
        )
        assert self.process.stderr
        first = self.process.stderr.readline()
        found = re.search(r"http://\S+", first)
        assert found, first + self.process.stderr.read()
        self.url = found[0]

    def end(self, number: int = signal.SIGINT) -> tuple[int, str, str]:
        """Send a signal, and return the exit code and the output."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err


def submit_slowly(monkeypatch: pytest.MonkeyPatch, last: type) -> threading.Event:
    """Make `LLM.submit` return only after a `last` event and the request's end, as a thread may.

    The flag that is returned is set by the event.
    """
    ended, closed = threading.Event(), threading.Event()
    submit, receive, close = LLM.submit, ActiveRequest.receive, ActiveRequest.close

    def slow(*given: Any) -> Any:
        started = submit(*given)
        assert ended.wait(60) and closed.wait(60)
        return started

    def received(running: ActiveRequest, index: int, event: Any) -> None:
        receive(running, index, event)
        if isinstance(event, last):
            ended.set()

    def shut(running: ActiveRequest) -> None:
        close(running)
        closed.set()

    monkeypatch.setattr(LLM, "submit", slow)
    monkeypatch.setattr(ActiveRequest, "receive", received)
    monkeypatch.setattr(ActiveRequest, "close", shut)
    return ended


def samples(served: Served) -> dict[tuple[str, ...], float]:
    """Return the value of each sample by its name and the values of its labels."""
    answer = served.get("/metrics", Authorization="Bearer key")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(answer.text)
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }
