"""Shows a reply in a terminal: thinking dimmed and timed, the answer as Markdown."""

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
    """Shows replies on stdout; if stdout is not a terminal, the answers alone, as they stream."""

    def __init__(self, *, show_thinking: bool) -> None:
        self.show_thinking = show_thinking
        self._console = Console()

    def show(self, events: Iterable[Event]) -> Finish:
        """Show a reply and return its last event."""
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
                newline = "\n" if self.show_thinking else ""
                seconds = time.monotonic() - started
                line = f"{newline}[dim]thought for {seconds:.1f} s[/dim]\n"
                self._console.print(line, highlight=False)
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
        has_text = False
        for event in events:
            if isinstance(event, Text):
                sys.stdout.write(event.text)
                sys.stdout.flush()
                has_text = True
            elif isinstance(event, Finish):
                finish = event
        if has_text:
            sys.stdout.write("\n")
            sys.stdout.flush()
        return finish


class _Blocks:
    """Prints Markdown block by block; the unfinished block is redrawn as it grows."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._text = ""
        self._live: Live | None = None

    def add(self, text: str) -> None:
        self._text += text
        while (end := _end_of_block(self._text)) is not None:
            self._print(self._text[:end])
            self._text = self._text[end:]
        if self._text.strip():
            if self._live is None:
                self._live = Live(console=self._console, transient=True, refresh_per_second=12)
                self._live.start()
            # A live display taller than the terminal cannot be erased: show its last rows.
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
    """Return the index after the first blank line outside fenced code, or None."""
    fenced, end = False, 0
    for line in text.splitlines(keepends=True):
        end += len(line)
        if line.lstrip().startswith(_FENCE):
            fenced = not fenced
        if not fenced and line.strip() == "" and text[:end].strip() and line.endswith("\n"):
            return end
    return None


@contextmanager
def on_enter_key(pressed: Callable[[], None]) -> Iterator[None]:
    """Call `pressed` whenever Enter is pressed in the block, on a terminal, without echo."""
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
    tty.setcbreak(stdin)  # not raw mode: Ctrl-C must still send its signal
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)
