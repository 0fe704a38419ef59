"""Ctrl-C in the command: what an interruptible block changes, and what it leaves alone."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from qwen3_mlx.interrupt import interruptible


def press() -> None:
    """Send this process the signal of Ctrl-C, which the main thread handles before it goes on."""
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def same_handler_afterwards() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


def test_a_block_is_interrupted() -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        press()


def test_the_first_one_stops_the_work_and_the_second_the_block() -> None:
    stops: list[int] = []
    with pytest.raises(KeyboardInterrupt), interruptible(), interruptible(lambda: stops.append(1)):
        press()
        assert stops == [1]
        press()
    assert stops == [1]


def test_a_patient_block_is_not_interrupted() -> None:
    stops: list[int] = []
    with interruptible(lambda: stops.append(1), patient=True):
        press()
        press()
    assert stops == [1, 1]


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible(), interruptible(pytest.fail):
            press()
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_change_nothing() -> None:
    handlers = []

    def work() -> None:
        with interruptible():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]
