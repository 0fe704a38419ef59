"""Nothing waits for ever: whatever callbacks, the collector, forks or faults do."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT = 300  # seconds; most take less than 20 on two idle cores


def run_apart(module: str, *arguments: str | Path) -> None:
    """Run a module in a process of its own, and show what it said if it fails or hangs."""
    command = [sys.executable, "-X", "faulthandler", "-m", module, *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            said, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # faulthandler shows where its threads are
            pytest.fail(f"{module} {arguments} hangs: {process.communicate()[0][-4000:]}")
    assert process.returncode == 0, said[-4000:]


@pytest.mark.heavy
def test_callbacks_may_do_anything_and_parts_of_the_engine_may_fail(tmp_path: Path) -> None:
    cases = "progress,deliver,soon,nested,circle,closing,freed,tools,finalizer,failing"
    run_apart("tests.engine.hanging", cases, tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_is_refused(tmp_path: Path) -> None:
    run_apart("tests.engine.hanging", "fork", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_what_takes_luck_to_hang_is_tried_often(tmp_path: Path) -> None:
    run_apart("tests.engine.hanging", "freed,fork", tmp_path, "often")


@pytest.mark.heavy
def test_whatever_fails_in_a_step_ends_in_an_error(tmp_path: Path) -> None:
    run_apart("tests.engine.faults", "plain", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["plain", "ngram", "draft"])
def test_whatever_fails_again_ends_in_an_error(way: str, tmp_path: Path) -> None:
    run_apart("tests.engine.faults", way, tmp_path, "all")
