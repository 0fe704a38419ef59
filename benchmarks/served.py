"""Runs `qwen3 serve` in its own process and measures its resources and response times.

On Linux the numbers come from /proc. On macOS `ps` reports memory and CPU time only: threads and
files are 0 there, and a wait is wall-clock time.
"""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_START = 60.0  # seconds until a server is ready
_EVERY = 0.05  # seconds between samples
_LONG = 10.0  # seconds from which a wait counts in full, even if no thread ran
_STUCK = 120.0  # seconds until a request to /health times out
_MOST = 4_000_000_000  # resident bytes at which the server is killed
ENDS = ("974", "975", "976")  # the demo's tokens that end a reply


@dataclass(frozen=True, slots=True)
class Held:
    """Resources of a process: resident bytes (children included), CPU seconds, threads, files."""

    resident: int
    seconds: float
    threads: int
    files: int


def held(pid: int) -> Held:
    """Return the resources that a process holds now.

    Raises:
        ProcessLookupError: there is no such process.
    """
    if sys.platform != "linux":
        return _held_on_mac(pid)
    stats = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # the process or thread has ended
            words = file.read_text().rpartition(")")[2].split()
            if int(file.parent.name) == pid or int(words[1]) == pid:
                stats[int(file.parent.name)] = words
    if pid not in stats:
        raise ProcessLookupError(f"there is no process {pid}")
    own = stats[pid]
    resident = sum(int(words[21]) for words in stats.values()) * os.sysconf("SC_PAGE_SIZE")
    seconds = (int(own[11]) + int(own[12])) / os.sysconf("SC_CLK_TCK")
    return Held(resident, seconds, int(own[17]), len(os.listdir(f"/proc/{pid}/fd")))


def _held_on_mac(pid: int) -> Held:
    command = ["ps", "-A", "-o", "pid=,ppid=,rss=,time="]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    own = next((row for row in rows if int(row[0]) == pid), None)
    if own is None:
        raise ProcessLookupError(f"there is no process {pid}")
    seconds = 0.0
    for part in own[3].split(":"):
        seconds = seconds * 60 + float(part)
    kilobytes = sum(int(row[2]) for row in rows if str(pid) in row[:2])
    return Held(1024 * kilobytes, seconds, 0, 0)


def scheduled(pid: int) -> dict[str, tuple[float, float]]:
    """Return the seconds that each thread of a process ran and waited for a core, by thread id."""
    found = {}
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(OSError):  # the process or thread has ended
            ran, waited = (task / "schedstat").read_text().split()[:2]
            found[task.name] = (int(ran) / 1e9, int(waited) / 1e9)
    return found


class Wait:
    """A span of time in which a client waits for a server."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._before = scheduled(pid)
        self._started = time.perf_counter()

    def seconds(self) -> tuple[float, float]:
        """Return the server's own part of the span and the whole span, in seconds.

        The time that a thread waited for a core belongs to the machine: other programs had the
        core. Unless the span is longer than `_LONG`, the server's part is at most the time that its
        threads ran.
        """
        span = time.perf_counter() - self._started
        now = scheduled(self._pid)
        if not now:
            return span, span
        none = (0.0, 0.0)
        machine = max(now[name][1] - self._before.get(name, none)[1] for name in now)
        ran = sum(now[name][0] - self._before.get(name, none)[0] for name in now)
        own = max(0.0, span - machine)
        return own if span > _LONG else min(own, ran), span


class Serve:
    """A server process: its port, its process id and its log."""

    def __init__(self, options: tuple[str, ...] = (), files: str = "") -> None:
        """Start a server with the demo model; `files` are arguments of `ulimit` before it."""
        self._scratch = tempfile.TemporaryDirectory()
        self._file = Path(self._scratch.name) / "log"
        command = [sys.executable, "-m", "qwen3_mlx", "serve", "--port", "0", *options]
        if files:
            command = ["sh", "-c", f'ulimit {files}; exec "$@"', "sh", *command]
        with self._file.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self.pid = self._process.pid
        self.port = self._ready()

    def _ready(self) -> int:
        started = time.perf_counter()
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", self.log())):
            if self._process.poll() is not None or time.perf_counter() - started > _START:
                self._process.kill()
                raise RuntimeError(f"the server did not start:\n{self.log()}")
            time.sleep(0.02)
        return int(found[1])

    def log(self) -> str:
        """Return the log so far."""
        return self._file.read_text(errors="replace")

    @property
    def alive(self) -> bool:
        """True while the process runs."""
        return self._process.poll() is None

    def stop(self, patience: float, signals: int = 1) -> float:
        """Send SIGTERM and return the seconds until the process ended.

        After `patience` seconds the process is killed and infinity returned.
        """
        started = time.perf_counter()
        for _ in range(signals):
            self._process.terminate()
            time.sleep(0.2 if signals > 1 else 0)
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return float("inf")
        return time.perf_counter() - started

    def close(self) -> None:
        """Kill the process and delete its log."""
        self._process.kill()
        self._process.wait()
        self._scratch.cleanup()


@contextmanager
def serve(options: tuple[str, ...] = (), files: str = "") -> Iterator[Serve]:
    """Yield a server with the demo model, which is killed at the end of the block."""
    served = Serve(options, files)
    try:
        yield served
    finally:
        served.close()


@contextmanager
def watched(served: Serve, *, stream: bool = False) -> Iterator[dict[str, float]]:
    """Watch a server from another process during the block; fill the yielded dict afterwards."""
    command = [sys.executable, "-m", "benchmarks.served", str(served.port), str(served.pid)]
    process = subprocess.Popen(
        command + ["stream"] * stream, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    process.stdout.readline()  # waits until the watcher has started
    seen: dict[str, float] = {}
    try:
        yield seen
    finally:
        seen |= json.loads(process.communicate(timeout=3 * _STUCK)[0])


def watch(port: int, pid: int, *, stream: bool) -> dict[str, float]:
    """Poll /health until stdin ends; return the longest waits and the peak memory.

    With `stream` replies are streamed all the time as well, and the longest gap is returned.
    """
    seen = {"own": 0.0, "wait": 0.0, "failed": 0.0, "gap": 0.0, "peak": 0.0}
    done = threading.Event()
    threads = [threading.Thread(target=_look, args=(port, pid, seen, done))]
    threads += [threading.Thread(target=_measure, args=(pid, seen, done))]
    if stream:
        threads += [threading.Thread(target=_read, args=(port, pid, seen, done))]
    for thread in threads:
        thread.start()
    print("begun", flush=True)
    sys.stdin.read()
    done.set()
    for thread in threads:
        thread.join()
    return seen


def _look(port: int, pid: int, seen: dict[str, float], done: threading.Event) -> None:
    while not done.wait(_EVERY):
        wait = Wait(pid)
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_STUCK)
            connection.request("GET", "/health", headers={"Connection": "close"})
            seen["failed"] += connection.getresponse().status != 200
            connection.close()
        except (OSError, http.client.HTTPException):
            seen["failed"] += 1
        own, span = wait.seconds()
        seen["own"], seen["wait"] = max(seen["own"], own), max(seen["wait"], span)


def _measure(pid: int, seen: dict[str, float], done: threading.Event) -> None:
    while not done.wait(_EVERY):
        with suppress(OSError):  # the server has ended
            resident = held(pid).resident
            seen["peak"] = max(seen["peak"], resident)
            if resident > _MOST:  # before the machine runs out of memory
                os.kill(pid, signal.SIGKILL)


def _read(port: int, pid: int, seen: dict[str, float], done: threading.Event) -> None:
    asked: dict[str, Any] = {"prompt": "1 2 3", "max_tokens": 2000, "stream": True}
    asked |= {"temperature": 1.5, "logit_bias": dict.fromkeys(ENDS, -100)}
    body = json.dumps(asked).encode()
    kind = {"Content-Type": "application/json"}
    while not done.is_set():
        with suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_STUCK)
            connection.request("POST", "/v1/completions", body, kind)
            for gap in _gaps(connection.getresponse(), pid, done):
                seen["gap"] = max(seen["gap"], gap)
            connection.close()
        done.wait(_EVERY)


def _gaps(answer: http.client.HTTPResponse, pid: int, done: threading.Event) -> Iterator[float]:
    """Yield the server's own part of the seconds between the lines of a stream."""
    answer.readline()
    wait = Wait(pid)
    while not done.is_set() and (line := answer.readline()):
        if line.startswith(b"data: [DONE]"):
            return
        yield wait.seconds()[0]
        wait = Wait(pid)


if __name__ == "__main__":
    print(json.dumps(watch(int(sys.argv[1]), int(sys.argv[2]), stream="stream" in sys.argv)))
