"""Ctrl-C in the `qwen3` command: it ends the process at once, or where `interruptible`, in order.

While there is nothing to clean up, a KeyboardInterrupt would only unwind through the imports as a
traceback, and would wait for other threads that download or read. A library must not touch signals,
so this module acts only in the process of the command.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from threading import current_thread, main_thread
from typing import NoReturn

_EXIT_STATUS = 130  # the shell's convention: 128 + SIGINT
LINE = "interrupted"
"""The message of the command after Ctrl-C."""
_CONVERT_SCRIPT = os.path.join(
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "convert.py"
)


def install_handler() -> None:
    """Install a handler by which Ctrl-C ends the command's process with one line.

    Has no effect in other programs, or where the signal is ignored or handled already. Must be
    called before the heavy imports.
    """
    if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


@contextmanager
def interruptible(
    stop: Callable[[], object] | None = None, *, patient: bool = False
) -> Iterator[None]:
    """Create a context in which Ctrl-C raises KeyboardInterrupt: there is something to clean up.

    With `stop`, Ctrl-C calls that instead, and what runs in the block ends by itself; a second
    Ctrl-C does not wait for that and raises, unless `patient`. Has no effect outside the main
    thread, or where the signal is ignored or handled by others.
    """
    before = signal.getsignal(signal.SIGINT)
    if current_thread() is not main_thread() or before not in (_end, signal.default_int_handler):
        yield
        return

    def call_stop(*_: object) -> None:
        assert stop
        stop()
        if not patient:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, call_stop if stop else signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _is_command() -> bool:
    program = next(iter(sys.argv), "")
    if program == "-m":  # Python has not yet located the module to run
        return ("-m", "qwen3_mlx") in pairwise(sys.orig_argv)
    return os.path.basename(program) == "qwen3" or os.path.abspath(program) == _CONVERT_SCRIPT


def _end(*_: object) -> NoReturn:
    """Exit at once: threads are not joined, no exit handler runs, and Python prints nothing."""
    # Erases the progress bar and shows the cursor, which the bar hides.
    erase = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""
    try:
        os.write(2, f"{erase}qwen3: {LINE}\n".encode())
    finally:
        os._exit(_EXIT_STATUS)
