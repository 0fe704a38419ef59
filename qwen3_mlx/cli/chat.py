"""`qwen3 chat`: a conversation in the terminal."""

import importlib.util
import inspect
import io
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import qwen3_mlx  # resolves its names on first use
from qwen3_mlx.arguments import refuse_deferred
from qwen3_mlx.cli.console import YARN_NOTE, note
from qwen3_mlx.cli.load_options import (
    Bits,
    Context,
    Dequantize,
    Draft,
    Dtype,
    HideThinking,
    KvBits,
    MaxTokens,
    MinP,
    Model,
    PresencePenalty,
    PromptCache,
    Quiet,
    Revision,
    Seed,
    Stop,
    System,
    Temperature,
    Thinking,
    ThinkingBudget,
    TopK,
    TopP,
    load,
)
from qwen3_mlx.cli.screen import Screen, on_enter_key
from qwen3_mlx.engine.sampling_params import SamplingParams
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.text.events import Finish, Usage

_PROMPT, _CONTINUATION_PROMPT = "> ", ". "
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


@dataclass(slots=True)
class _SessionStats:
    """Token counts and seconds of the replies so far."""

    replies: int = 0
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0
    seconds: float = 0.0

    def add(self, usage: Usage, seconds: float) -> None:
        self.replies += 1
        self.prompt += usage.prompt_tokens
        self.cached += usage.cached_tokens
        self.completion += usage.completion_tokens
        self.reasoning += usage.reasoning_tokens
        self.seconds += seconds

    def __str__(self) -> str:
        speed = self.completion / self.seconds if self.seconds else 0.0
        return (
            f"{self.replies} replies · {self.prompt:,} prompt tokens, {self.cached:,} cached · "
            f"{self.completion:,} reply tokens, {self.reasoning:,} thinking · "
            f"{speed:.1f} tokens/s"
        )


def chat(  # noqa: PLR0913 - one parameter an option
    model: Model = None,
    revision: Revision = None,
    bits: Bits = None,
    dtype: Dtype = None,
    dequantize: Dequantize = None,
    context: Context = None,
    kv_bits: KvBits = None,
    draft: Draft = None,
    prompt_cache: PromptCache = None,
    system: System = None,
    thinking: Thinking = None,
    thinking_budget: ThinkingBudget = None,
    max_tokens: MaxTokens = None,
    stop: Stop = None,
    seed: Seed = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    presence_penalty: PresencePenalty = None,
    file: Annotated[
        Path | None,
        typer.Option("--load", help="Continue a saved conversation.", show_default=False),
    ] = None,
    hide_thinking: HideThinking = False,
    quiet: Quiet = False,
) -> None:
    """Chat with a model in the terminal; /help lists the commands.

    The idle time after an answer prefills the next turn, so that its answer
    starts at once. Each line of piped input is a turn.
    """
    sampling = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        presence_penalty=presence_penalty,
    )
    llm = load(
        model,
        quiet=quiet,
        revision=revision,
        bits=bits,
        dtype=dtype,
        dequantize=dequantize,
        context=context,
        kv_bits=kv_bits,
        draft=draft,
        prompt_cache=prompt_cache,
    )
    with llm:
        screen = Screen(show_thinking=not (hide_thinking or quiet))
        session = _Session(llm, screen, max_tokens, quiet=quiet)
        session.conversation = llm.conversation(
            system=system,
            file=file,
            thinking=thinking,
            thinking_budget=thinking_budget,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            seed=seed,
            drop_oldest=True,
        )
        if not quiet:
            _greet(model, yarn=context is not None and llm.config.yarn is not None)
        for line in _lines():
            try:
                if not session.take(line):
                    break
            except BrokenPipeError:  # the reader of stdout is gone
                break
            except (Qwen3Error, ValueError, TypeError, OSError) as error:
                note(f"qwen3: {error}")


def _greet(model: str | None, *, yarn: bool) -> None:
    if model is None:
        note("This is the embedded demo model; for a real model: qwen3 chat --model 8B")
    if yarn:
        note(YARN_NOTE)
    if sys.stdin.isatty():
        note("/help lists the commands; Ctrl-D ends the chat.")


class _Session:
    """State of one chat: the model, the conversation, its tools and its statistics."""

    conversation: "qwen3_mlx.Conversation"

    def __init__(
        self,
        llm: "qwen3_mlx.LLM",
        screen: Screen,
        max_tokens: int | None = None,
        *,
        quiet: bool = False,
    ) -> None:
        self._max_tokens, self._quiet = max_tokens, quiet
        self._llm = llm
        self._screen = screen
        self._stats = _SessionStats()
        self._functions: list[Callable[..., Any]] = []

    def take(self, line: str) -> bool:
        """Run one line of input: a command or a message. Return False to end the chat."""
        words = line.strip()
        command, _, rest = words.partition(" ")
        if words in ("/exit", "/quit"):
            return False
        if not words.startswith("/") or (command in ("/think", "/no_think") and rest):
            if words:
                self._reply(lambda: self.conversation.stream(line))
        elif (run := getattr(self, f"_do_{command[1:]}", None)) is not None:
            run(rest.strip())
        else:
            note(f"There is no command {command}; /help lists the commands.")
        return True

    def _reply(self, start: "Callable[[], qwen3_mlx.Stream]") -> None:
        """Show a reply, run the tools it calls, and show the replies to their results."""
        finish = self._show(start())
        while finish.reason == "tool_calls" and self._functions:
            self.conversation.answer_calls(self._functions)
            finish = self._show(self.conversation.stream())
        for remark in (_remarks(finish, self._max_tokens), finish.details.get("warning")):
            if remark and not self._quiet:
                note(remark)

    def _show(self, stream: "qwen3_mlx.Stream") -> Finish:
        started = time.monotonic()
        with _ctrl_c_closes(stream), on_enter_key(stream.finish_thinking):
            finish = self._screen.show(stream)
        self._stats.add(finish.usage, time.monotonic() - started)
        return finish

    # --- commands: `_do_NAME` gets the text after /NAME -----------------------------------------

    def _do_help(self, _: str) -> None:
        note(_HELP)

    def _do_think(self, _: str) -> None:
        self._set_thinking(True)

    def _do_nothink(self, _: str) -> None:
        self._set_thinking(False)

    def _set_thinking(self, on: bool) -> None:
        self._llm.thinking.resolve(on)
        self.conversation.options["thinking"] = on
        if not on:  # a budget without thinking is refused
            self.conversation.options["thinking_budget"] = None
        note("Thinking is on." if on else "Thinking is off.")

    def _do_budget(self, text: str) -> None:
        if text and not text.isdigit():
            raise ValueError(f"/budget takes a number of tokens, not {text!r}")
        self.conversation.options["thinking_budget"] = int(text) if text else None
        if text and self.conversation.options.get("thinking") is False:
            self.conversation.options["thinking"] = None
        note(f"Thinking takes at most {text} tokens." if text else "Thinking has no budget.")

    def _do_tools(self, text: str) -> None:
        self._functions = load_functions(Path(shlex.split(text)[0]).expanduser()) if text else []
        self.conversation.options["tools"] = self._functions or None
        names = ", ".join(function.__name__ for function in self._functions)
        note(f"The model may call {names}." if names else "No tools.")

    def _do_system(self, text: str) -> None:
        messages = self.conversation.messages
        if messages and messages[0]["role"] == "system":
            del messages[0]
        if text:
            messages.insert(0, {"role": "system", "content": text})
        note("The system prompt is set." if text else "No system prompt.")

    def _do_retry(self, _: str) -> None:
        self._reply(self.conversation.retry)

    def _do_edit(self, text: str) -> None:
        if not text:
            raise ValueError("/edit takes the new text of the last message")
        self._reply(lambda: self.conversation.edit(text))

    def _do_save(self, text: str) -> None:
        self.conversation.save(_file(text, "/save"))
        note(f"Saved: {text}")

    def _do_load(self, text: str) -> None:
        self.conversation.messages = self._llm.conversation(file=_file(text, "/load")).messages
        note(f"{len(self.conversation.messages)} messages.")

    def _do_stats(self, _: str) -> None:
        note(str(self._stats))


def load_functions(file: Path) -> list[Callable[..., Any]]:
    """Return the functions that a Python file of the user defines, except those named `_...`.

    Runs the file.

    Raises:
        Qwen3Error: the file cannot be run, or defines no function.
        TypeError: one of the functions is async or a generator.
    """
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise Qwen3Error(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise Qwen3Error(f"{file} fails: {type(error).__name__}: {error}") from error
    found: list[Callable[..., Any]] = [
        function
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and function.__module__ == module.__name__
        and not name.startswith("_")
    ]
    if not found:
        raise Qwen3Error(f"{file} defines no function")
    for function in found:
        refuse_deferred(function.__name__, function)
    return found


def _file(text: str, command: str) -> Path:
    if not text:
        raise ValueError(f"{command} takes a file")
    return Path(text).expanduser()


def _remarks(finish: Finish, max_tokens: int | None) -> str:
    """Return why a reply ended early and which turns were dropped; empty for a usual reply."""
    details = finish.details
    parts = []
    if finish.reason == "length" and "ended_by" not in details:
        limited = max_tokens is not None and finish.usage.completion_tokens >= max_tokens
        parts.append(f"cut off: {'--max-tokens' if limited else 'the context window is full'}")
    if finish.reason == "cancelled":
        parts.append("stopped")
    if details.get("ended_by") == "loop":
        parts.append("stopped by the loop guard: the text repeated itself")
    if dropped := details.get("dropped_turns"):
        parts.append(f"the oldest turns were dropped: {dropped}")
    return " · ".join(parts)


def _lines() -> Iterator[str]:
    """Yield the typed or piped input, one turn at a time."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are not text must not end the chat
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives input() line editing and a history
    while True:
        try:
            line = _line(_PROMPT)
            while line.endswith("\\") or _in_quotes(line):
                line = line.removesuffix("\\") + "\n" + _line(_CONTINUATION_PROMPT)
        except EOFError:
            return
        except KeyboardInterrupt:
            note("")
            continue
        text = line.strip()
        quoted = text.startswith('"""') and text.endswith('"""') and len(text) >= 6
        yield text[3:-3].strip("\n") if quoted else line


def _in_quotes(line: str) -> bool:
    """Return whether a text of several lines has begun and not ended."""
    text = line.strip()
    return text.startswith('"""') and not (len(text) >= 6 and text.endswith('"""'))


def _line(prompt: str) -> str:
    return input(prompt if sys.stdin.isatty() and sys.stdout.isatty() else "")


@contextmanager
def _ctrl_c_closes(stream: "qwen3_mlx.Stream") -> Iterator[None]:
    """Stop the answer, not the program, on Ctrl-C."""
    before = signal.signal(signal.SIGINT, lambda *_: stream.close())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
