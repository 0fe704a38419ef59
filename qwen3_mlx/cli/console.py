"""Terminal output of all subcommands: notes and progress bars on stderr, tables of facts."""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

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
_BAR_DELAY_SECONDS = 0.7  # shorter work shows no bar


def note(text: str) -> None:
    """Write a line to stderr."""
    stderr_text(f"{text}\n")


def stderr_text(text: str) -> None:
    """Write to stderr, dimmed on a terminal unless NO_COLOR is set."""
    if sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        text = f"{_DIM}{text}{_PLAIN}"
    sys.stderr.write(text)
    sys.stderr.flush()


def format_bytes(count: int) -> str:
    """Return a number of bytes in MB or GB, as text."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def print_facts(facts: Mapping[str, str]) -> None:
    """Print names and values as two columns on stdout."""
    table = Table.grid(padding=(0, 2))
    for name, fact in facts.items():
        table.add_row(f"[bold]{name}[/bold]", escape(fact))
    Console().print(table)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of cells as columns on stdout, without wrapping, so that scripts can read them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


class Bar:
    """Progress bar on a terminal, shown only for work longer than `_BAR_DELAY_SECONDS`.

    Call it with (done, total), from any thread.
    """

    def __init__(self, what: str, *, in_bytes: bool = False) -> None:
        self._in_bytes = in_bytes
        self._started = time.monotonic()
        self._what = what
        self._bar: Progress | None = None

    def __call__(self, done: int, total: int) -> None:
        """Update the bar; remove it when `done` reaches `total`."""
        if done >= total:
            self.close()
        elif self._bar:
            self._bar.update(self._bar.task_ids[0], completed=done)
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
