"""Shows a reply: on a terminal thinking dimmed and timed and the answer as Markdown."""

import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text as Plain

from qwen3_mlx.cli.attachments import without_attachments
from qwen3_mlx.cli.console import visible
from qwen3_mlx.text.events import Event, Finish, Reasoning, Text, ToolCall

if TYPE_CHECKING:
    from qwen3_mlx.cli.markdown import MarkdownWriter


class Screen:
    """Shows replies on stdout; if stdout is not a terminal, the answers alone, as they stream."""

    def __init__(self, *, show_thinking: bool) -> None:
        self.show_thinking = show_thinking
        self.left_out: Collection[str] = ()  # tools whose calls are shown elsewhere
        self._console = Console()

    def show(self, events: Iterable[Event]) -> Finish:
        """Show a reply and return its last event."""
        started, thinking = time.monotonic(), False
        is_terminal = self._console.is_terminal
        answer = AnswerWriter()
        for event in events:
            if isinstance(event, Reasoning) and is_terminal:
                if not thinking:
                    self._say("thinking (Enter: answer now)")
                thinking = True
                if self.show_thinking:
                    shown = Plain(visible(event.text), style="dim italic")
                    self._console.print(shown, end="", soft_wrap=True)
                continue
            if thinking:
                newline = "\n" if self.show_thinking else ""
                self._say(f"{newline}thought for {time.monotonic() - started:.1f} s\n")
                thinking = False
            if isinstance(event, Text):
                answer.write(event.text)
            elif isinstance(event, ToolCall) and is_terminal:
                answer.close()
                if event.name not in self.left_out:
                    call = visible(f"{event.name}({event.raw_arguments})")
                    self._console.print(Plain(call, style="cyan"))
            elif isinstance(event, Finish):
                finish = event
        answer.close()
        return finish

    def recall(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Show the last question and its answer, on a terminal."""
        places = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if not places or not self._console.is_terminal:
            return
        question, *replies = messages[places[-1] :]
        self._say(f"> {visible(without_attachments(question['content']))}")
        answer = AnswerWriter()
        answer.write(
            "\n\n".join(each["content"] for each in replies if each["role"] == "assistant")
        )
        answer.close()

    def _say(self, text: str) -> None:
        self._console.print(Plain(text, style="dim"))


class AnswerWriter:
    """Writes an answer to stdout as it arrives: as Markdown on a terminal, otherwise unchanged."""

    def __init__(self) -> None:
        console = Console()
        self._markdown: MarkdownWriter | None = None
        if console.is_terminal:
            markdown = import_module("qwen3_mlx.cli.markdown")  # takes 40 ms, needless for a pipe
            self._markdown = markdown.MarkdownWriter(console)
        self._is_begun = False

    def write(self, text: str) -> None:
        """Write a further piece."""
        self._is_begun = True
        if self._markdown:
            self._markdown.write(visible(text))
        else:
            sys.stdout.write(text)
        sys.stdout.flush()

    def close(self) -> None:
        """Write what is left, and end the line."""
        if self._markdown:
            self._markdown.close()
        elif self._is_begun:
            sys.stdout.write("\n")
        sys.stdout.flush()
        self._is_begun = False
