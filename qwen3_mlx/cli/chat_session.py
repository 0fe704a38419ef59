"""State of one chat: its model, conversation, branches, tools and attached files."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import qwen3_mlx  # resolves its names on first use
from qwen3_mlx.cli.console import note
from qwen3_mlx.cli.line_editor import LineEditor
from qwen3_mlx.cli.recorder import Recorder
from qwen3_mlx.cli.screen import Screen
from qwen3_mlx.cli.tool_use import check_steps, served_tools, shown_with_question
from qwen3_mlx.engine.sampling_params import SamplingParams
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.interrupt import interruptible
from qwen3_mlx.text.described_tool import DescribedTool
from qwen3_mlx.text.events import Finish, Usage

Message = dict[str, Any]
_SAMPLING = {entry.name for entry in fields(SamplingParams)}


@dataclass(slots=True)
class _Branch:
    """A conversation among those of a chat; the messages of the current one are elsewhere."""

    messages: list[Message]
    recorder: Recorder


class ChatSession:
    """State of one chat, and what its commands do; errors are raised.

    Attributes:
        tools: those of the model: functions, and tools of MCP servers.
        usages, seconds: token counts of the replies so far, and the time they took.
        editor: the prompt that the user types at, if there is one.
        files: parts of a message that are sent with the next one.
    """

    def __init__(
        self,
        open_model: Callable[[str | None], "AbstractContextManager[qwen3_mlx.LLM]"],
        model: str | None,
        screen: Screen,
        *,
        options: Mapping[str, Any],
        recorder: Recorder,
        yes: bool = False,
        quiet: bool = False,
    ) -> None:
        """Open a model; `options` are those of `LLM.conversation`, for every model of the chat.

        With `yes` the tools of MCP servers are called without asking.
        """
        self.tools: list[Callable[..., Any]] = []
        self._functions: list[Callable[..., Any]] = []
        self._servers = ExitStack()
        self._served: list[DescribedTool] = []
        self._yes = yes
        self.usages: list[Usage] = []
        self.seconds = 0.0
        self.editor: LineEditor | None = None
        self._open_model = open_model
        self._screen = screen
        self._quiet = quiet
        self.files: list[str] = []
        self._open(model, options)
        self._branches = [_Branch([], recorder)]
        self._current = 0

    # --- models ---------------------------------------------------------------------------------

    def _open(self, model: str | None, options: Mapping[str, Any]) -> None:
        loaded = self._open_model(model)
        self.llm = loaded.__enter__()
        self._loaded, self._model = loaded, model
        try:
            self.conversation = self.llm.conversation(drop_oldest=True, **options)
        except BaseException:
            self._close_model()
            raise

    def _close_model(self) -> None:
        self._loaded.__exit__(None, None, None)

    @property
    def model_name(self) -> str:
        """The model as it was named; the embedded demo if it was not."""
        return self._model or "demo"

    def use_model(self, model: str) -> None:
        """Go on with another model; if it cannot be loaded, with the one before.

        Raises:
            Qwen3Error: it cannot be loaded, or several machines hold the one before together.
        """
        if self.llm.cluster:
            raise Qwen3Error(
                "MLX connects machines once in a process, so this model stays until the end of "
                f"the chat: start another with --hosts and -m {model}"
            )
        before, options = self._model, {**self.conversation.options}
        options["messages"] = self.conversation.messages
        with interruptible():
            self._close_model()  # first: the memory may not suffice for both
            try:
                self._open(model, options)
            except BaseException:
                self._open(before, options)
                raise
        self._recorder.model, self._recorder.adapter = model, ""  # which fits the first alone

    # --- replies --------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Send a message with the attached files, and show the reply."""

        def start() -> "qwen3_mlx.Stream":
            files = "".join(f"{file}\n\n" for file in self.files)
            stream = self.conversation.stream(files + text)
            self.files = []
            return stream

        self.reply(start)

    def reply(self, start: "Callable[[], qwen3_mlx.Stream]") -> None:
        """Show a reply, run the tools it calls, and show the replies to their results."""
        finish = self._show(start)
        steps = 0
        while finish.reason == "tool_calls" and self.tools:
            check_steps(steps := steps + 1)
            with self.released():
                self.conversation.answer_calls(self.tools)
            finish = self._show(self.conversation.stream)
        for remark in (self._remarks(finish), finish.details.get("warning")):
            if remark and not self._quiet:
                note(remark)

    def released(self) -> AbstractContextManager[None]:
        """Return a context in which other programs, or functions, may use the terminal."""
        return self.editor.released() if self.editor else nullcontext()

    def _show(self, start: "Callable[[], qwen3_mlx.Stream]") -> Finish:
        started = time.monotonic()
        stream = start()
        self.record()
        typing = self.editor.typing_ahead(stream.finish_thinking) if self.editor else nullcontext()
        # The first Ctrl-C stops the answer, and the next ones must not end the program meanwhile.
        try:
            with interruptible(stream.close, patient=True), typing:
                finish = self._screen.show(self._recorder.recorded(stream))
        finally:
            self.record()
        self.usages.append(finish.usage)
        self.seconds += time.monotonic() - started
        return finish

    def _remarks(self, finish: Finish) -> str:
        """Return why a reply ended early and which turns were dropped; empty for a usual reply."""
        details = finish.details
        parts = []
        if finish.reason == "length" and "ended_by" not in details:
            max_tokens = self.conversation.options.get("max_tokens")
            limited = max_tokens is not None and finish.usage.completion_tokens >= max_tokens
            parts.append(f"cut off: {'--max-tokens' if limited else 'the context window is full'}")
        if finish.reason == "cancelled":
            parts.append("stopped")
        if details.get("ended_by") == "loop":
            parts.append("stopped by the loop guard: the text repeated itself")
        if dropped := details.get("dropped_turns"):
            parts.append(f"the oldest turns were dropped: {dropped}")
        return " · ".join(parts)

    # --- what commands change -------------------------------------------------------------------

    def set_options(self, **changes: Any) -> None:
        """Change options of all further replies; None resets them to the model's."""
        sampling = {name: value for name, value in changes.items() if name in _SAMPLING}
        options = {**self.conversation.options, **changes}
        options = {name: value for name, value in options.items() if name not in _SAMPLING}
        options["sampling"] = replace(self._sampling, **sampling)
        messages = self.conversation.messages
        self.conversation = self.llm.conversation(messages=messages, drop_oldest=True, **options)

    def use_functions(self, functions: Sequence[Callable[..., Any]]) -> None:
        """Offer functions to the model, in place of those before."""
        self._functions = [*functions]
        self._offer_tools()

    def use_servers(self, files: Sequence[Path]) -> None:
        """Offer the tools of the MCP servers of files, in place of those before."""
        self._served = []
        self._offer_tools()
        self._servers.close()
        served = served_tools(files, self.llm, yes=self._yes, quiet=self._quiet)
        self._served = self._servers.enter_context(served)
        self._offer_tools()

    def _offer_tools(self) -> None:
        self.tools = [*self._functions, *self._served]
        left_out = shown_with_question(self._served, self._functions, yes=self._yes)
        self._screen.left_out = left_out
        self.set_options(tools=self.tools or None)

    def option(self, name: str) -> Any:
        """Return an option of all further replies; None is the model's."""
        if name in _SAMPLING:
            return getattr(self._sampling, name)
        return self.conversation.options.get(name)

    @property
    def _sampling(self) -> SamplingParams:
        return self.conversation.options.get("sampling") or SamplingParams()

    # --- conversations --------------------------------------------------------------------------

    @property
    def _recorder(self) -> Recorder:
        return self._branches[self._current].recorder

    def record(self) -> None:
        """Record the messages as they are now."""
        self._recorder.record(self.conversation.messages)

    def begin(self, messages: list[Message], recorded: int | None = None) -> None:
        """Begin another conversation in place of the current one; `recorded` is its number."""
        recorder = self._recorder.another(recorded)
        self._recorder.close()
        self._branches[self._current].recorder = recorder
        self.conversation.messages = messages

    def recall(self) -> None:
        """Show the last question and its answer, on a terminal."""
        if not self._quiet:
            self._screen.recall(self.conversation.messages)

    def branch(self, number: int | None) -> int:
        """Go on in a copy of the conversation, or in a branch; return its number, from 1.

        Raises:
            ValueError: there is no such branch.
        """
        if number is not None and not 1 <= number <= len(self._branches):
            raise ValueError(f"there is no branch {number}; the last one is {len(self._branches)}")
        self._branches[self._current].messages = self.conversation.messages
        if number is None:
            copy = deepcopy(self.conversation.messages)
            self._branches.append(_Branch(copy, self._recorder.another()))
        self._current = (number or len(self._branches)) - 1
        self.conversation.messages = self._branches[self._current].messages
        return self._current + 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for branch in self._branches:
            branch.recorder.close()
        self._servers.close()
        self._close_model()
