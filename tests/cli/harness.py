"""What the tests of this room share."""

import io
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Self

import pexpect
import pyte
import pytest

from qwen3_mlx.cli.main import main

QWEN3 = [sys.executable, "-m", "qwen3_mlx"]


def call(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run the command in this process; give exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def piped(arguments: Sequence[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command in this process, with a pipe as its stdin: it saves half a second."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        patch.delenv("QWEN3_MODEL", raising=False)
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        main(arguments)
    code = int(ended.value.code or 0)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


class Terminal:
    """A command in a terminal of its own, and what a user sees there."""

    def __init__(self, command: Sequence[str], *, rows: int = 24, columns: int = 80) -> None:
        self._screen = pyte.HistoryScreen(columns, rows, history=10_000)
        self._stream = pyte.Stream(self._screen)
        self._seen = 0
        self._child = pexpect.spawn(
            command[0],
            list(command[1:]),
            dimensions=(rows, columns),
            encoding="utf-8",
            codec_errors="replace",
            # This terminal answers no questions about the place of its cursor.
            env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
        )
        self._child.delaybeforesend = None

    def text(self) -> str:
        """Return all lines, those that have left the screen too."""
        above = ["".join(line[x].data for x in sorted(line)) for line in self._screen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *self._screen.display])

    def _read(self) -> None:
        try:
            self._stream.feed(self._child.read_nonblocking(65536, 0.1))
        except pexpect.TIMEOUT:
            pass

    def wait(self, *words: str, seconds: float = 60) -> None:
        """Read until all of these words are seen, in this order, after those waited for before."""
        end = time.monotonic() + seconds
        for word in words:
            while (place := self.text().find(word, self._seen)) < 0:
                assert time.monotonic() < end, f"no {word!r} in\n{self.text()}"
                self._read()
            self._seen = place + len(word)

    def wait_for_change(self) -> None:
        """Read until more is seen than the command's echo of what was typed."""
        before = self.text()
        while len(self.text()) < len(before) + 100:
            self._read()

    def type(self, keys: str) -> None:
        """Send keys."""
        self._child.send(keys)

    def paste(self, text: str) -> None:
        """Send a text as terminals do that mark what is pasted."""
        self.type(f"\x1b[200~{text}\x1b[201~")

    def end(self, seconds: float = 60) -> int | None:
        """Return the exit status of the command."""
        end = time.monotonic() + seconds
        try:
            while True:
                assert time.monotonic() < end, f"no end of\n{self.text()}"
                self._read()
        except pexpect.EOF:
            self._child.close()
        return None if self._child.exitstatus is None else int(self._child.exitstatus)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.close(force=True)
