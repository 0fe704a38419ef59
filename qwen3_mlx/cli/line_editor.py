"""Reads messages in a terminal, with history and completion; keeps what is typed ahead."""

import os
import select
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Self

from qwen3_mlx.cli.console import note

if TYPE_CHECKING:  # loaded when a chat begins, because it takes as long as the whole `--help`
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPress

_PROMPT, _CONTINUATION = "> ", ". "


def is_terminal() -> bool:
    """Return whether a user types and reads: stdin and stdout are a terminal."""
    return sys.stdin.isatty() and sys.stdout.isatty() and os.name == "posix"


class LineEditor:
    """The prompt of a chat; what is typed while a reply is shown is in the next prompt.

    A context manager, in which the terminal belongs to the editor.
    """

    def __init__(
        self, history: Path | None, completions: Mapping[str, Iterable[str] | Path]
    ) -> None:
        """Edit lines with a history that is kept in a file, or in memory only.

        `completions` are the commands with the words that complete each, or a `Path` for files.
        """
        from prompt_toolkit import PromptSession
        from prompt_toolkit.shortcuts import CompleteStyle

        self._history = _open_history(history) if history else None
        self._session = PromptSession[str](
            _PROMPT,
            multiline=True,
            prompt_continuation=_CONTINUATION,
            key_bindings=_key_bindings(),
            history=_recalled(self._history),
            completer=_completer(completions),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            enable_open_in_editor=True,
            enable_suspend=True,
            search_ignore_case=True,
            tempfile_suffix=".md",
        )
        self._terminal = self._session.input.fileno()

    def read(self) -> str:
        """Return what the user enters next; Ctrl-C discards it, but keeps it in the history.

        Raises:
            EOFError: the user ends the chat with Ctrl-D.
        """
        while True:
            try:
                text = self._session.prompt()
            except KeyboardInterrupt:
                if text := self._session.default_buffer.text:
                    self._session.history.append_string(text)
                    self._keep(text)
                continue
            self._keep(text)
            return text

    def _keep(self, text: str) -> None:
        if self._history and text.strip():
            try:
                self._history.store_string(text)
            except OSError as error:  # such as a full disk
                note(f"qwen3: the history of lines is not kept any more: {error}")
                self._history = None

    @contextmanager
    def typing_ahead(self, on_enter: Callable[[], None]) -> Iterator[None]:
        """Collect what is typed in the block, for the next prompt, without echo.

        Enter calls `on_enter` while nothing else has been typed, and else begins a line. Ctrl-C
        still sends its signal.
        """
        from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
        from prompt_toolkit.input.vt100_parser import Vt100Parser

        typed = get_typeahead(self._session.input)  # the rest of a paste without brackets

        def pressed(key: "KeyPress") -> None:
            if not typed and key.data in ("\r", "\n"):
                on_enter()
            elif key.key not in _IGNORED:
                typed.append(key)

        parser = Vt100Parser(pressed)
        self._session.output.enable_bracketed_paste()
        self._session.output.flush()
        try:
            with _each_input(self._terminal, parser.feed):
                yield
        finally:
            parser.flush()
            self._session.output.disable_bracketed_paste()
            self._session.output.flush()
            store_typeahead(self._session.input, _as_draft(typed))

    @contextmanager
    def released(self) -> Iterator[None]:
        """Create a context in which other programs, or functions, may use the terminal."""
        import termios

        quiet = termios.tcgetattr(self._terminal)
        termios.tcsetattr(self._terminal, termios.TCSADRAIN, self._usual)
        try:
            yield
        finally:
            termios.tcsetattr(self._terminal, termios.TCSADRAIN, quiet)

    def __enter__(self) -> Self:
        """Keep what is typed between two prompts: unchanged, without echo, also after Ctrl-C."""
        import termios

        self._usual = termios.tcgetattr(self._terminal)
        quiet = termios.tcgetattr(self._terminal)
        quiet[0] &= ~termios.ICRNL
        quiet[3] = quiet[3] & ~(termios.ECHO | termios.ICANON) | termios.NOFLSH
        quiet[6][termios.VMIN], quiet[6][termios.VTIME] = 1, 0
        termios.tcsetattr(self._terminal, termios.TCSADRAIN, quiet)
        return self

    def __exit__(self, *_: object) -> None:
        import termios

        termios.tcsetattr(self._terminal, termios.TCSADRAIN, self._usual)


_IGNORED = ("escape", "<cursor-position-response>")


def _as_draft(keys: Iterable["KeyPress"]) -> list["KeyPress"]:
    """Return keys with Enter as a new line: nothing is sent unseen."""
    from prompt_toolkit.key_binding import KeyPress
    from prompt_toolkit.keys import Keys

    new_line = [KeyPress(Keys.Escape, "\x1b"), KeyPress(Keys.ControlM, "\r")]
    return [draft for key in keys for draft in (new_line if key.data in ("\r", "\n") else [key])]


@contextmanager
def _each_input(terminal: int, take: Callable[[str], Any]) -> Iterator[None]:
    """Pass on what a terminal sends while the block runs."""
    from prompt_toolkit.input.posix_utils import PosixStdinReader

    reader = PosixStdinReader(terminal)
    ended, end = os.pipe()

    def listen() -> None:
        while not reader.closed:
            ready, _, _ = select.select([terminal, ended], [], [])
            if terminal in ready:
                take(reader.read())
            elif ended in ready:
                return

    thread = Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.close(end)
        thread.join()
        os.close(ended)


def _key_bindings() -> "KeyBindings":
    """Return the keys: Enter sends, after a backslash it begins a line, as Alt-Enter does."""
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter", filter=has_focus(DEFAULT_BUFFER))
    def _(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=has_focus(DEFAULT_BUFFER))
    @keys.add("escape", "c-j", filter=has_focus(DEFAULT_BUFFER))  # as typed before the first prompt
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _completer(completions: Mapping[str, Iterable[str] | Path]) -> Any:
    from prompt_toolkit.completion import (
        NestedCompleter,
        PathCompleter,
        WordCompleter,
        merge_completers,
    )

    def argument(words: Iterable[str] | Path) -> Any:
        if isinstance(words, Path):
            return PathCompleter(expanduser=True)
        return WordCompleter([*words], WORD=True, ignore_case=True)

    lines = [f"{name} " if words else name for name, words in completions.items()]
    names = WordCompleter(lines, sentence=True, ignore_case=True)
    arguments = {name: argument(words) for name, words in completions.items()}
    return merge_completers([names, NestedCompleter(arguments)])


def _open_history(file: Path) -> "FileHistory | None":
    from prompt_toolkit.history import FileHistory

    try:
        os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        note(f"qwen3: lines are not kept for the next chat: {error}")
        return None
    return FileHistory(file)


def _recalled(history: "FileHistory | None") -> Any:
    """Return a history in memory that begins with the lines of earlier chats.

    The editor keeps its lines here, so that a file which cannot be written loses none.
    """
    from prompt_toolkit.history import InMemoryHistory

    return InMemoryHistory([*history.load_history_strings()][::-1] if history else [])
