"""Terminal output of all subcommands: notes and progress bars on stderr, tables of facts."""

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Self

import typer
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_GAP = "  "  # between the columns of a table
_LAST_WIDTH = 20  # columns of the terminal that the last one of a table has at least
_BAR_DELAY_SECONDS = 0.7  # shorter work shows no bar

# Unicode's explicit directions, which can make a text look like another (UAX #9).
_REORDERING = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROL = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
_CONTROL |= dict.fromkeys([*range(0x7F, 0xA0), *_REORDERING], 0xFFFD)


def note(text: str) -> None:
    """Write a line to stderr."""
    stderr_text(f"{text}\n")


def stderr_text(text: str) -> None:
    """Write to stderr; on a terminal dimmed, unless NO_COLOR is set, and `visible`."""
    if sys.stderr.isatty():
        text = visible(text)
        if "NO_COLOR" not in os.environ:
            text = f"{_DIM}{text}{_PLAIN}"
    sys.stderr.write(text)
    sys.stderr.flush()


def read_stdin() -> str:
    """Return what is typed or piped; at a terminal a note says that it is waited for."""
    if sys.stdin.isatty():
        note("Reading what is typed here; Ctrl-D on a line of its own ends it.")
    return sys.stdin.read()


def visible(text: str) -> str:
    """Return a text whose control characters, which could steer the terminal, are visible."""
    return text.translate(_CONTROL)


def local_time(time: str) -> str:
    """Return a time, in ISO's format, as that of this place, to the minute."""
    return f"{datetime.fromisoformat(time).astimezone():%Y-%m-%d %H:%M}"


def format_bytes(count: int) -> str:
    """Return a number of bytes in MB or GB, as text."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def print_facts(facts: Mapping[str, str]) -> None:
    """Print names and values as two columns on stdout."""
    table = Table.grid(padding=(0, 2))
    for name, fact in facts.items():
        table.add_row(f"[bold]{name}[/bold]", escape(fact))
    Console().print(table)


def print_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of cells below their heads as columns on stdout, one line each.

    On a terminal the last column is cut to the room that the others leave.
    """
    is_terminal = sys.stdout.isatty()
    table = [[visible(cell) for cell in row] if is_terminal else row for row in (heads, *rows)]
    widths = [max(map(cell_len, column)) for column in zip(*table, strict=True)]
    if is_terminal:
        room = Console().width - sum(widths[:-1]) - len(_GAP) * (len(widths) - 1)
        widths[-1] = min(widths[-1], max(room, _LAST_WIDTH))
    for row in table:
        cells = (set_cell_size(cell, width) for cell, width in zip(row, widths, strict=True))
        print(_GAP.join(cells).rstrip())


def confirm(question: str) -> None:
    """Ask a question on the terminal; end the command, with exit code 1, unless the answer is yes.

    Raises:
        ValueError: there is no terminal to ask at.
    """
    if not sys.stdin.isatty():
        raise ValueError("there is no terminal to ask at; --yes does it without a question")
    stderr_text(f"{question} [y/N] ")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise typer.Exit(1)


class Bar:
    """Progress bar on a terminal, shown only for work longer than `_BAR_DELAY_SECONDS`.

    Call it with (done, total), from any thread.
    """

    def __init__(self, what: str, *, in_bytes: bool = False) -> None:
        self._in_bytes = in_bytes
        self._started = time.monotonic()
        self._what = what
        self._bar: Progress | None = None

    def __call__(self, done: int, total: int, what: str | None = None) -> None:
        """Update the bar, and perhaps its text; remove it when `done` reaches `total`."""
        self._what = what or self._what
        if done >= total:
            self.close()
        elif self._bar:
            self._bar.update(self._bar.task_ids[0], completed=done, description=self._what)
        elif sys.stderr.isatty() and time.monotonic() - self._started > _BAR_DELAY_SECONDS:
            amount = (
                [DownloadColumn(), TransferSpeedColumn()]
                if self._in_bytes
                else [TaskProgressColumn()]
            )
            columns = TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn()
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.add_task(self._what, total=total, completed=done)
            self._bar.start()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
