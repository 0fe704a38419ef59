"""Large and hostile request bodies against a server: how long others wait while each is refused.

    python -m benchmarks.bodies [--model MODEL] [case ...]

For each body: its size, the answer, the seconds until it came, the CPU seconds of the server, the
longest wait of a `GET /health` and the longest gap in a running stream meanwhile (all but the CPU
seconds wall time), and by how much the memory of the server has grown at most.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

_LONGEST = 60.0  # seconds for an answer
_TICK = 0.02
CHAT, TEXT, COUNT = "/v1/chat/completions", "/v1/completions", "/v1/messages/count_tokens"


def _turns(count: int) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": "hi"} for n in range(count)]


def _said(content: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 5}


def _code(size: int) -> str:
    text = Path(__file__).read_text()
    return (text * (size // len(text) + 1))[:size]


def _json(body: Any) -> bytes:
    return json.dumps(body).encode()


CASES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a word": (CHAT, lambda: _json(_said("hi"))),  # what the machine itself makes others wait
    "1M bad messages": (CHAT, lambda: b'{"messages":[' + b"0," * 999_999 + b"0]}"),
    "100,000 prompts": (TEXT, lambda: _json({"n": 32, "prompt": ["a"] * 100_000})),
    "32 x 30,000 prompts": (TEXT, lambda: _json({"n": 32, "prompt": ["a"] * 30_000})),
    "400,000 nulls": (TEXT, lambda: _json({"prompt": [None] * 400_000})),
    "500,000 unknown fields": (
        CHAT,
        lambda: _json({**{f"field{n}": n for n in range(500_000)}, **_said("hi")}),
    ),
    "100,000 turns": (CHAT, lambda: _json({"messages": _turns(100_000), "max_tokens": 5})),
    "100,000 turns counted": (COUNT, lambda: _json({"messages": _turns(100_000)})),
    "60,000 turns": (CHAT, lambda: _json({"messages": _turns(60_000), "max_tokens": 5})),
    "10M objects": (CHAT, lambda: b'{"messages":[' + b"{}," * 9_999_999 + b"{}]}"),
    "30 MB of words": (CHAT, lambda: _json(_said("x " * 15_000_000))),
    "30 MB, one word": (CHAT, lambda: _json(_said("x" * 30_000_000))),
    "1 MB of code": (CHAT, lambda: _json(_said(_code(1_000_000)))),
    "1 MB of code counted": (COUNT, lambda: _json(_said(_code(1_000_000)))),
    "100,000 stops": (
        CHAT,
        lambda: _json({**_said("hi"), "stop": [f"q{n}" for n in range(10**5)]}),
    ),
    "200,000 biases": (
        CHAT,
        lambda: _json({**_said("hi"), "logit_bias": {str(n): 1 for n in range(2 * 10**5)}}),
    ),
    "depth 100,000": (CHAT, lambda: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "5,000 digits": (CHAT, lambda: b'{"seed":' + b"9" * 5000 + b"}"),
}


class Watch(threading.Thread):
    """Asks for /health all the time, reads a stream, and looks at the server's memory."""

    def __init__(self, url: str, process: int) -> None:
        super().__init__(daemon=True)
        self._url, self._process = url, process
        self._over = threading.Event()
        self.health = self.gap = 0.0
        self.memory = 0

    def run(self) -> None:
        """Watch until `end`."""
        stream = threading.Thread(target=self._read, daemon=True)
        stream.start()
        with httpx.Client(base_url=self._url, timeout=2 * _LONGEST) as client:
            while not self._over.is_set():
                began = time.perf_counter()
                client.get("/health")
                self.health = max(self.health, time.perf_counter() - began)
                self.memory = max(self.memory, resident(self._process))
                time.sleep(_TICK)
        stream.join()

    def _read(self) -> None:
        body = {"prompt": "1 2 3", "max_tokens": 4000, "temperature": 1.5, "stream": True}
        last = time.perf_counter()
        while not self._over.is_set():
            with httpx.stream(
                "POST", f"{self._url}{TEXT}", json=body, timeout=2 * _LONGEST
            ) as sent:
                for _ in sent.iter_lines():
                    now = time.perf_counter()
                    self.gap, last = max(self.gap, now - last), now
                    if self._over.is_set():
                        break

    def end(self) -> None:
        """Stop watching."""
        self._over.set()
        self.join()


def resident(process: int) -> int:
    """Return the memory of a process, in bytes."""
    found = subprocess.run(["ps", "-o", "rss=", "-p", str(process)], capture_output=True, text=True)
    return int(found.stdout) * 1024


def cpu_seconds(process: int) -> float:
    """Return the CPU time of a process, where Linux tells it."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except FileNotFoundError:
        return float("nan")


@contextmanager
def server(model: str | None) -> Iterator[tuple[str, int]]:
    """Start `qwen3 serve`, and yield its address and process."""
    command = [sys.executable, "-m", "qwen3_mlx", "serve", "--port", "0", "--quiet"]
    command += ["--model", model] if model else []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            line = next(line for line in process.stderr if " is at http" in line)
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield line.split(" is at ")[1].split()[0], process.pid
        finally:
            process.kill()


def measure(url: str, process: int, path: str, body: bytes) -> str:
    """Send a body, and return what came of it in a line."""
    before, used = resident(process), cpu_seconds(process)
    watch = Watch(url, process)
    watch.start()
    time.sleep(0.5)
    began = time.perf_counter()
    try:
        kind = {"Content-Type": "application/json"}
        answer = httpx.post(f"{url}{path}", content=body, headers=kind, timeout=_LONGEST)
        said = f"{answer.status_code} {answer.text[:160]}"
    except httpx.HTTPError as error:
        said = type(error).__name__
    took = time.perf_counter() - began
    watch.end()
    return (
        f"{len(body) / 1e6:6.2f} MB  {took:6.2f} s  cpu {cpu_seconds(process) - used:6.2f} s  "
        f"health {watch.health:6.2f} s  gap {watch.gap:6.2f} s  "
        f"memory +{max(0, watch.memory - before) / 1e6:5.0f} MB  {said}"
    )


def main() -> None:
    """Measure each case, with a server of its own, so that none suffers from another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model")
    parser.add_argument("cases", nargs="*")
    asked = parser.parse_args()
    for name, (path, body) in CASES.items():
        if not asked.cases or any(word in name for word in asked.cases):
            with server(asked.model) as (url, process):
                print(f"{name:24}{measure(url, process, path, body())}", flush=True)


if __name__ == "__main__":
    main()
