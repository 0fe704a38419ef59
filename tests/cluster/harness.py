"""Shared by the tests of clusters: ranks as threads of one process, and clusters in processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Barrier, Thread
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from qwen3_mlx import backend

T = TypeVar("T")


class Ranks:
    """Ranks that sum their arrays as a group does, each on a thread of its own."""

    def __init__(self, count: int) -> None:
        self._barrier = Barrier(count, timeout=60)
        self._parts: list[Any] = [None] * count

    def reduce(self, rank: int) -> Callable[[mx.array], mx.array]:
        def add(x: mx.array) -> mx.array:
            self._parts[rank] = np.array(x)
            self._barrier.wait()
            total = sum(self._parts)
            self._barrier.wait()
            return mx.array(total)

        return add

    def run(self, jobs: Sequence[Callable[[], T]]) -> list[T]:
        """Run a job for each rank at the same time; return their results, evaluated."""
        results: list[Any] = [None] * len(jobs)

        def run(rank: int) -> None:
            stream = backend.acquire_stream()
            try:
                with mx.stream(stream):
                    results[rank] = np.array(jobs[rank]())
            except BaseException as error:  # noqa: BLE001 - raised again below
                results[rank] = error
                self._barrier.abort()
            finally:
                backend.release_stream(stream)

        threads = [Thread(target=run, args=(rank,)) for rank in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


def led(
    folder: Path, do: str = "ask", *, seconds: float = 120, code: int = 0, **options: Any
) -> dict[str, Any]:
    """Run a function of `tests/cluster/led.py` in a process that ends with `code`.

    Return what it found.

    However it ends, no process of it is left.
    """
    out = folder / f"{len(list(folder.iterdir()))}.json"
    stated = json.dumps({"do": do, **options})
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.led", stated, str(out)],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, said = process.communicate(timeout=seconds)
    finally:
        end_group(process)
    assert process.returncode == code, said
    found: dict[str, Any] = json.loads(out.read_text())
    return found | {"said": said}


def outcome_of(folder: Path, do: str, *, seconds: float, **options: Any) -> dict[str, Any] | None:
    """Run a function of `tests/cluster/led.py` that may be killed; return what it found, if it did.

    All processes must have ended by themselves some seconds after it.
    """
    out = folder / "found.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.led", json.dumps({"do": do, **options}), str(out)],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        process.wait(seconds)
        end = time.monotonic() + 5
        while _has_members(process.pid):
            assert time.monotonic() < end, "a process is left"
            time.sleep(0.1)
    finally:
        end_group(process)
    return json.loads(out.read_text()) if out.exists() else None


def _has_members(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def end_group(process: "subprocess.Popen[str]") -> None:
    """Kill a process and those that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream:
            stream.close()
