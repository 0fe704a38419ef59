"""Ctrl-C in the `qwen3` command, while nothing is there that has to be put away.

A KeyboardInterrupt would unwind through the imports as a traceback, and wait for what other threads
download or read. A library leaves signals alone, so all of this is for the command's process only.
"""

import os
import signal
import sys
from itertools import pairwise
from threading import current_thread, main_thread
from typing import NoReturn

_CODE = 130  # as a shell has it: 128 and the signal's number
LINE = "interrupted"
"""What the command says of it."""
_CONVERT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "convert.py")


def end_at_once() -> None:
    """Let Ctrl-C end this process in one line, if it is the command and nobody ignores the signal.

    To be called before the heavy imports.
    """
    if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def unwind() -> None:
    """Let Ctrl-C raise a KeyboardInterrupt again, because there is something to put away now."""
    if current_thread() is main_thread() and signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command() -> bool:
    program = next(iter(sys.argv), "")
    if program == "-m":  # while Python looks for the module that it is to run
        return ("-m", "qwen3_mlx") in pairwise(sys.orig_argv)
    return os.path.basename(program) == "qwen3" or os.path.abspath(program) == _CONVERT


def _end(*_: object) -> NoReturn:
    """End without a word from Python: threads are not joined, and no exit handler runs."""
    bar_away = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""  # and the cursor, which it hides
    try:
        os.write(2, f"{bar_away}qwen3: {LINE}\n".encode())
    finally:
        os._exit(_CODE)
