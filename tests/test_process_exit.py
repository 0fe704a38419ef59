"""Processes that end while the device computes: none hangs, and each has the exit code it should.

OpenBLAS joins its threads at the end of a process, and waits for ever where one is in the middle of
a product. So every way to end must have waited for what was in flight.
"""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import httpx
import pytest

from qwen3_mlx import backend
from qwen3_mlx.bench.measure import PEER, Case, NumericSettings, Setup
from tests.server.harness import Process
from tests.support import TINY, write_tiny

_PATIENCE = 120  # seconds; an end takes one or two
_WIDE = TINY | {"hidden_size": 512, "num_hidden_layers": 2}  # for which OpenBLAS uses all cores
_START = """
import gc, sys, threading
from qwen3_mlx import backend, load  # before MLX: or it takes its own BLAS
import mlx.core as mx
many = 200 if "openblas" in backend.BLAS else 10
llm = load(sys.argv[1])
llm.chat("Hello", max_tokens=1)
options = {"temperature": 0, "loop_guard": False, "max_tokens": 600}  # which end no reply early
stream = llm.stream("Hello " * 200, **options)
"""
_ENDS = {  # the last lines of a program, and its exit code
    "stream open": ("next(stream)", 0),
    "stream unread": ("", 0),
    "stream closed": ("next(stream); stream.close()", 0),
    "several streams": ("streams = [llm.stream(str(n)) for n in range(4)]; next(streams[-1])", 0),
    "exit in the loop": ("for event in stream: sys.exit(3)", 3),
    "exception in the loop": ("for event in stream: raise ValueError", 1),
    "in a with": ("with llm:\n    next(stream)", 0),
    "collected": ("next(stream); del llm, stream; gc.collect()", 0),
    "collected in a circle": ("circle = [stream]; circle += [circle, llm]; del llm, stream", 0),
    "read by a daemon": (
        "threading.Thread(target=list, args=(stream,), daemon=True).start(); next(stream)",
        0,
    ),
    "logits for a daemon": (
        "threading.Thread(target=llm.logits, args=([1] * 1500,), daemon=True).start()",
        0,
    ),
    "several models": ("other = load(sys.argv[1]); next(other.stream('Hello')); next(stream)", 0),
    "own work": (
        "llm.close()\na = mx.random.normal((512, 512))\nfor _ in range(many // 4): a = a @ a\n"
        "mx.async_eval(a)",
        0,
    ),
    "forked": (
        "import os, warnings; warnings.simplefilter('ignore')\nnext(stream)\n"
        "if os.fork() == 0: sys.exit(5)\nsys.exit(os.waitstatus_to_exitcode(os.wait()[1]))",
        5,
    ),
    "interrupted": ("print('ready', flush=True)\nfor event in stream: pass", -signal.SIGINT),
    "batch interrupted": (
        "print('ready', flush=True)\nllm.batch(['Hello ' * n for n in (9, 99, 200)], **options)",
        -signal.SIGINT,
    ),
    "end interrupted": (  # while it waits for the job in work
        "def long():\n    a = mx.random.normal((1024, 1024))\n"
        "    for _ in range(many // 8): a = a @ a\n    return a\n"
        "llm.call_soon(lambda: [print('ready', flush=True), mx.eval(long())])",
        130,
    ),
}


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("wide"), _WIDE)


def end_of(
    command: Sequence[str], *, interrupt: bool = False, pause: float = 0.0
) -> tuple[int, str]:
    """Run a command to its end, and give its exit code and what it wrote to stderr.

    With `interrupt` it gets a SIGINT as soon as it has written anything, or `pause` seconds later.
    """
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            if interrupt:
                assert process.stdout and process.stdout.read(1)
                time.sleep(pause)
                process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=_PATIENCE)
        finally:
            process.kill()
    return process.returncode, errors


def check_end(name: str, folder: Path, pause: float = 0.0) -> None:
    last, code = _ENDS[name]
    command = [sys.executable, "-c", _START + last, str(folder)]
    found, errors = end_of(command, interrupt="interrupted" in name, pause=pause)
    assert found == code, f"{name} ended with {found}: {errors}"


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name",
    ["stream open", "exit in the loop", "own work", "forked", "interrupted", "end interrupted"],
)
def test_a_program_ends(name: str, wide_folder: Path) -> None:
    check_end(name, wide_folder)


@pytest.mark.heavy
@pytest.mark.parametrize("interrupt", [False, True])
def test_the_command_ends(interrupt: bool, wide_folder: Path) -> None:
    command = [sys.executable, "-m", "qwen3_mlx", "Hello " * 200, "--no-thinking", "--seed", "3"]
    command += ["--model", str(wide_folder), "--max-tokens", "300" if interrupt else "30"]
    code, errors = end_of(command, interrupt=interrupt)
    assert code == (130 if interrupt else 0), errors


@pytest.mark.slow  # tests/bench measures one, and waits for its end
@pytest.mark.parametrize("together", [1, 2])
def test_a_measured_peer_ends(together: int, wide_folder: Path) -> None:
    blas = backend.BLAS.split(" (")[0]
    terms = NumericSettings(dtype="float32", quantized=False, blas=blas)
    setup = json.dumps(asdict(Setup(PEER, str(wide_folder), [Case(together, 64)], 4, terms)))
    code, errors = end_of([sys.executable, "-m", "qwen3_mlx.bench.targets", setup])
    assert code == 0, errors


@pytest.mark.slow
def test_two_hundred_ends(wide_folder: Path) -> None:
    for number in range(200):
        name = list(_ENDS)[number % len(_ENDS)]
        check_end(name, wide_folder, pause=random.Random(number).uniform(0, 0.3))


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, 2])
def test_a_server_ends(signals: int, wide_folder: Path) -> None:
    for number in range(10):
        server = Process("--model", str(wide_folder), "--shutdown", "0.2")
        body = {"prompt": "Hello " * 200, "max_tokens": 600, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            if number % 2:
                next(answer.iter_lines())
            if signals == 2:
                server.process.send_signal(signal.SIGINT)
                time.sleep(random.Random(number).uniform(0, 0.3))
            code, _, errors = server.end()
        # A second one may come when the server is gone and Python itself is ending.
        assert code == 0 or (signals == 2 and code in (130, -signal.SIGINT)), errors
