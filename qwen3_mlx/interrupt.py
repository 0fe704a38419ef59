"""Ctrl-C in the `qwen3` command, while there is nothing to clean up.

A KeyboardInterrupt would unwind through the imports as a traceback, and would wait for other
threads that download or read. A library must not touch signals, so this module acts only in the
process of the command.
"""

import os
import signal
import sys
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


def restore_keyboard_interrupt() -> None:
    """Restore the KeyboardInterrupt on Ctrl-C, because there is something to clean up now."""
    if current_thread() is main_thread() and signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
