"""Servers under load: python -m benchmarks.server [CLIENTS]

Each client (32 by default) asks the demo model for one sum, with thinking, all at the same time. Of
six rounds the last five count. The table has the tokens per second of all clients together, the
seconds to the first token, and the numbers of complete and of correct replies. mlx-lm's server runs
the same files, out of the box and on equal terms (float32, the same BLAS).
"""

import asyncio
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from qwen3_mlx import backend, convert

_DEMO = str(files("qwen3_mlx") / "demo")
_MAX_TOKENS = 200  # tokens of a reply
_TURNS = 6  # the first is a warm-up and does not count
# Qwen's settings for thinking; its model cards forbid greedy decoding.
_SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
_PATIENCE = 60  # seconds until a server is ready
# mlx-lm's server with the BLAS library that our backend loads.
_EQUAL = "from qwen3_mlx import backend; from mlx_lm.server import main; main()"


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply to one client; `first` is the seconds to its first token."""

    text: str
    tokens: int
    first: float
    whole: bool


def main() -> None:
    """Run each server under load and print the table."""
    clients = int(sys.argv[1]) if sys.argv[1:] else 32
    facts = backend.describe()
    print(f"{facts['device']}, BLAS {facts['blas']}, {time.strftime('%Y-%m-%d')}")
    print(
        f"{clients} clients at once, the demo model, Qwen's sampling, "
        f"at most {_MAX_TOKENS} tokens\n"
    )
    print(
        f"{'':26}{'ready, s':>9}{'tokens/s':>10}{'first token, s':>24}"
        f"{'whole':>8}{'right':>7}\n{'':45}{'median    95 %    last':>24}"
    )
    rates = {}
    with tempfile.TemporaryDirectory() as scratch:
        floats = Path(scratch) / "floats"
        convert(_DEMO, floats, dequantize=True, dtype="float32")
        ours = [sys.executable, "-m", "qwen3_mlx", "serve", "--quiet", "--model", _DEMO]
        peer = ["--log-level", "ERROR", "--model"]
        for name, command in (
            ("qwen3-mlx", ours),
            ("mlx-lm, equal terms", [sys.executable, "-c", _EQUAL, *peer, str(floats)]),
            ("mlx-lm, out of the box", [sys.executable, "-m", "mlx_lm", "server", *peer, _DEMO]),
        ):
            rates[name] = measure(name, command, clients)
    print()
    for name, rate in list(rates.items())[1:]:
        print(f"throughput against {name}: {rates['qwen3-mlx'] / rate:.1f}x")


def measure(name: str, command: list[str], clients: int) -> float:
    """Measure a server, print its row and return its tokens per second."""
    with running(command) as (port, ready):
        asyncio.run(load(port, clients, turn=0))
        answers, seconds = [], 0.0
        for turn in range(1, _TURNS):
            started = time.perf_counter()
            answers += asyncio.run(load(port, clients, turn=turn))
            seconds += time.perf_counter() - started
    rate = sum(answer.tokens for answer in answers) / seconds
    firsts = sorted(answer.first for answer in answers)
    late = firsts[int(len(firsts) * 0.95)]
    whole = sum(answer.whole for answer in answers)
    right = sum(is_right(answer.text) for answer in answers)
    print(
        f"{name:26}{ready:9.2f}{rate:10.1f}{statistics.median(firsts):10.2f}{late:8.2f}"
        f"{firsts[-1]:8.2f}{whole:5}/{len(answers)}{right:7}",
        flush=True,
    )
    return rate


@contextmanager
def running(command: list[str]) -> Iterator[tuple[int, float]]:
    """Start a server; yield its port and the seconds until it answered."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not answers(port):
            if process.poll() is not None or time.perf_counter() - started > _PATIENCE:
                sys.exit(f"{' '.join(command)} did not start")
            time.sleep(0.02)
        yield port, time.perf_counter() - started
    finally:
        process.terminate()
        process.wait()


def answers(port: int) -> bool:
    """Return whether the server answers /health."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")
            return b" 200 " in connection.recv(4096)
    except OSError:
        return False


async def load(port: int, clients: int, turn: int) -> list[Answer]:
    """Send the requests of all clients at once and return the answers."""
    sums = [(100 + 7 * n + turn, 200 + 13 * n + turn) for n in range(clients)]
    return await asyncio.gather(*(ask(port, a, b) for a, b in sums))


async def ask(port: int, a: int, b: int) -> Answer:
    """Request a sum and return the streamed reply."""
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": f"What is {a} + {b}?"}],
            "max_tokens": _MAX_TOKENS,
            **_SAMPLING,
            "chat_template_kwargs": {"enable_thinking": True},
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )
    started, first, text, tokens, whole = time.perf_counter(), 0.0, "", 0, False
    while line := await reader.readline():
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            whole = True
            break
        chunk = json.loads(line[6:])
        for choice in chunk["choices"]:
            delta = choice["delta"]
            if not first and any(delta.get(name) for name in ("content", "reasoning")):
                first = time.perf_counter() - started
            text += delta.get("content") or ""
        tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    writer.close()
    return Answer(f"{a}+{b}:{text}", tokens, first, whole)


def is_right(text: str) -> bool:
    """Return whether the sum in an answer is right."""
    question, _, answer = text.partition(":")
    a, _, b = question.partition("+")
    return answer.strip().endswith(f"= {int(a) + int(b)}")


if __name__ == "__main__":
    main()
