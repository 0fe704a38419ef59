"""How a reply appears in a terminal: thinking dimmed and timed, the answer as Markdown."""

import os
import select
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Event as Flag
from threading import Thread

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text as Plain

from qwen3_mlx.text.events import Event, Finish, Reasoning, Text, ToolCall

_FENCE = "```"


class Screen:
    """Shows replies on stdout; where that is no terminal, the answers alone, as they come."""

    def __init__(self, *, show_thinking: bool) -> None:
        self.show_thinking = show_thinking
        self._console = Console()

    def show(self, events: Iterable[Event]) -> Finish:
        """Show a reply, and give its last event."""
        if not self._console.is_terminal:
            return self._show_plainly(events)
        started, thinking = time.monotonic(), False
        blocks = _Blocks(self._console)
        for event in events:
            if isinstance(event, Reasoning):
                if not thinking:
                    self._console.print("[dim]thinking (Enter: answer now)[/dim]", highlight=False)
                thinking = True
                if self.show_thinking:
                    self._console.print(Plain(event.text, style="dim italic"), end="")
                continue
            if thinking:
                line = "\n" if self.show_thinking else ""
                took = time.monotonic() - started
                self._console.print(f"{line}[dim]thought for {took:.1f} s[/dim]\n", highlight=False)
                thinking = False
            if isinstance(event, Text):
                blocks.add(event.text)
            elif isinstance(event, ToolCall):
                blocks.close()
                self._console.print(Plain(f"{event.name}({event.raw_arguments})", style="cyan"))
            elif isinstance(event, Finish):
                finish = event
        blocks.close()
        return finish

    def _show_plainly(self, events: Iterable[Event]) -> Finish:
        said = False
        for event in events:
            if isinstance(event, Text):
                sys.stdout.write(event.text)
                sys.stdout.flush()
                said = True
            elif isinstance(event, Finish):
                finish = event
        if said:
            sys.stdout.write("\n")
            sys.stdout.flush()
        return finish


class _Blocks:
    """Prints Markdown block by block; the one that is being written is shown as it grows."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._text = ""
        self._live: Live | None = None

    def add(self, text: str) -> None:
        self._text += text
        while (place := _end_of_block(self._text)) is not None:
            self._print(self._text[:place])
            self._text = self._text[place:]
        if self._text.strip():
            if self._live is None:
                self._live = Live(console=self._console, transient=True, refresh_per_second=12)
                self._live.start()
            rows = max(1, self._console.height - 2)
            self._live.update(Markdown("\n".join(self._text.splitlines()[-rows:])))

    def close(self) -> None:
        self._print(self._text)
        self._text = ""

    def _print(self, text: str) -> None:
        if self._live:
            self._live.stop()
            self._live = None
        if text.strip():
            self._console.print(Markdown(text))
            self._console.print()


def _end_of_block(text: str) -> int | None:
    """Give the place after the first blank line that is not within fenced code."""
    fenced, place = False, 0
    for line in text.splitlines(keepends=True):
        place += len(line)
        if line.lstrip().startswith(_FENCE):
            fenced = not fenced
        if not fenced and line.strip() == "" and text[:place].strip() and line.endswith("\n"):
            return place
    return None


@contextmanager
def enter_key(pressed: Callable[[], None]) -> Iterator[None]:
    """Call `pressed` when Enter is pressed meanwhile, on a terminal; what is typed is not shown."""
    if not (sys.stdin.isatty() and sys.stdout.isatty() and os.name == "posix"):
        yield
        return
    import termios
    import tty

    stdin, ended = sys.stdin.fileno(), Flag()
    before = termios.tcgetattr(stdin)

    def listen() -> None:
        while not ended.is_set():
            ready, _, _ = select.select([stdin], [], [], 0.1)
            if ready and not ended.is_set() and os.read(stdin, 64).strip(b" ") in (b"\n", b"\r"):
                pressed()

    thread = Thread(target=listen, daemon=True)
    tty.setcbreak(stdin)  # Ctrl-C is a signal still
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)
