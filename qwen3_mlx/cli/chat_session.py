"""One chat: runs lines of input, which are messages or commands, and shows the replies."""

import shlex
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import qwen3_mlx  # resolves its names on first use
from qwen3_mlx.cli.console import note
from qwen3_mlx.cli.screen import Screen, on_enter_key
from qwen3_mlx.cli.tool_file import load_functions
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.interrupt import interruptible
from qwen3_mlx.text.events import Finish, Usage

_HELP = """\
/think, /nothink    turn thinking on or off
/budget N           limit thinking to N tokens; /budget alone removes the limit
/tools FILE.py      let the model call the functions in a file; /tools alone removes them
/system TEXT        set the system prompt; /system alone removes it
/retry              generate the last reply again
/edit TEXT          replace the last message with TEXT and reply to it
/save FILE          save the conversation
/load FILE          load a saved conversation
/stats              tokens and speed so far
/exit               leave the chat, as does Ctrl-D
Enter while it thinks: answer now. Ctrl-C: stop the answer.
A line that ends with \\ continues; \"\"\" begins and ends a text of several lines."""


class ChatSession:
    """State of one chat: the model, the conversation, its tools and its statistics."""

    def __init__(
        self,
        llm: "qwen3_mlx.LLM",
        conversation: "qwen3_mlx.Conversation",
        screen: Screen,
        *,
        quiet: bool = False,
    ) -> None:
        self._llm = llm
        self._conversation = conversation
        self._screen = screen
        self._quiet = quiet
        self._usages: list[Usage] = []
        self._seconds = 0.0  # that the replies took
        self._functions: list[Callable[..., Any]] = []

    def run(self, lines: Iterable[str]) -> None:
        """Run lines of input until one of them ends the chat; errors are shown."""
        for line in lines:
            try:
                if not self.take(line):
                    return
            except BrokenPipeError:  # the reader of stdout is gone
                return
            except (Qwen3Error, ValueError, TypeError, OSError) as error:
                note(f"qwen3: {error}")

    def take(self, line: str) -> bool:
        """Run one line of input: a command or a message. Return False to end the chat."""
        words = line.strip()
        command, _, rest = words.partition(" ")
        if words in ("/exit", "/quit"):
            return False
        if not words.startswith("/") or (command in ("/think", "/no_think") and rest):
            if words:
                self._reply(lambda: self._conversation.stream(line))
        elif (run := getattr(self, f"_do_{command[1:]}", None)) is not None:
            run(rest.strip())
        else:
            note(f"There is no command {command}; /help lists the commands.")
        return True

    def _reply(self, start: "Callable[[], qwen3_mlx.Stream]") -> None:
        """Show a reply, run the tools it calls, and show the replies to their results."""
        finish = self._show(start())
        while finish.reason == "tool_calls" and self._functions:
            self._conversation.answer_calls(self._functions)
            finish = self._show(self._conversation.stream())
        for remark in (self._remarks(finish), finish.details.get("warning")):
            if remark and not self._quiet:
                note(remark)

    def _show(self, stream: "qwen3_mlx.Stream") -> Finish:
        started = time.monotonic()
        # The first Ctrl-C stops the answer, and the next ones must not end the program meanwhile.
        with interruptible(stream.close, patient=True), on_enter_key(stream.finish_thinking):
            finish = self._screen.show(stream)
        self._usages.append(finish.usage)
        self._seconds += time.monotonic() - started
        return finish

    def _remarks(self, finish: Finish) -> str:
        """Return why a reply ended early and which turns were dropped; empty for a usual reply."""
        details = finish.details
        parts = []
        if finish.reason == "length" and "ended_by" not in details:
            max_tokens = self._conversation.options.get("max_tokens")
            limited = max_tokens is not None and finish.usage.completion_tokens >= max_tokens
            parts.append(f"cut off: {'--max-tokens' if limited else 'the context window is full'}")
        if finish.reason == "cancelled":
            parts.append("stopped")
        if details.get("ended_by") == "loop":
            parts.append("stopped by the loop guard: the text repeated itself")
        if dropped := details.get("dropped_turns"):
            parts.append(f"the oldest turns were dropped: {dropped}")
        return " · ".join(parts)

    # --- commands: `_do_NAME` gets the text after /NAME -----------------------------------------

    def _do_help(self, _: str) -> None:
        note(_HELP)

    def _do_think(self, _: str) -> None:
        self._set_thinking(True)

    def _do_nothink(self, _: str) -> None:
        self._set_thinking(False)

    def _set_thinking(self, on: bool) -> None:
        self._llm.thinking.resolve(on)
        self._conversation.options["thinking"] = on
        if not on:  # a budget without thinking is refused
            self._conversation.options["thinking_budget"] = None
        note("Thinking is on." if on else "Thinking is off.")

    def _do_budget(self, text: str) -> None:
        if text and not text.isdigit():
            raise ValueError(f"/budget takes a number of tokens, not {text!r}")
        self._conversation.options["thinking_budget"] = int(text) if text else None
        if text and self._conversation.options.get("thinking") is False:
            self._conversation.options["thinking"] = None
        note(f"Thinking takes at most {text} tokens." if text else "Thinking has no budget.")

    def _do_tools(self, text: str) -> None:
        self._functions = load_functions(Path(shlex.split(text)[0]).expanduser()) if text else []
        self._conversation.options["tools"] = self._functions or None
        names = ", ".join(function.__name__ for function in self._functions)
        note(f"The model may call {names}." if names else "No tools.")

    def _do_system(self, text: str) -> None:
        messages = self._conversation.messages
        if messages and messages[0]["role"] == "system":
            del messages[0]
        if text:
            messages.insert(0, {"role": "system", "content": text})
        note("The system prompt is set." if text else "No system prompt.")

    def _do_retry(self, _: str) -> None:
        self._reply(self._conversation.retry)

    def _do_edit(self, text: str) -> None:
        if not text:
            raise ValueError("/edit takes the new text of the last message")
        self._reply(lambda: self._conversation.edit(text))

    def _do_save(self, text: str) -> None:
        self._conversation.save(_file(text, "/save"))
        note(f"Saved: {text}")

    def _do_load(self, text: str) -> None:
        self._conversation.messages = self._llm.conversation(file=_file(text, "/load")).messages
        note(f"{len(self._conversation.messages)} messages.")

    def _do_stats(self, _: str) -> None:
        usages = self._usages
        prompt = sum(usage.prompt_tokens for usage in usages)
        cached = sum(usage.cached_tokens for usage in usages)
        generated = sum(usage.completion_tokens for usage in usages)
        thinking = sum(usage.reasoning_tokens for usage in usages)
        note(
            f"{len(usages)} replies · {prompt:,} prompt tokens, {cached:,} cached · "
            f"{generated:,} reply tokens, {thinking:,} thinking · "
            f"{generated / self._seconds if usages else 0:.1f} tokens/s"
        )


def _file(text: str, command: str) -> Path:
    if not text:
        raise ValueError(f"{command} takes a file")
    return Path(text).expanduser()
