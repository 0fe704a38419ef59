"""`qwen3 chat`: a conversation in the terminal."""

import io
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import Annotated

import typer

from qwen3_mlx.cli import chat_commands
from qwen3_mlx.cli.chat_session import ChatSession
from qwen3_mlx.cli.console import note
from qwen3_mlx.cli.error_wording import UsageError
from qwen3_mlx.cli.line_editor import LineEditor, is_terminal
from qwen3_mlx.cli.option_groups import option, with_options
from qwen3_mlx.cli.options import (
    HideThinking,
    Model,
    ModelOptions,
    Quiet,
    ReplyOptions,
    SamplingOptions,
    Yes,
    alias_meant,
    load_model,
)
from qwen3_mlx.cli.recording import LogOptions, start_recording, with_system
from qwen3_mlx.cli.screen import Screen
from qwen3_mlx.cli.user_files import CHAT_HISTORY, data_file
from qwen3_mlx.errors import Qwen3Error


@with_options
def chat(  # noqa: PLR0913 - one parameter a group of options
    ctx: typer.Context,
    *,
    model: Model = None,
    loading: ModelOptions,
    reply: ReplyOptions,
    sampling: SamplingOptions,
    recording: LogOptions,
    file: Annotated[Path | None, option("--load", text="Continue a saved conversation.")] = None,
    yes: Yes = False,
    hide_thinking: HideThinking = False,
    quiet: Quiet = False,
) -> None:
    """Chat with a model in the terminal; /help lists the commands.

    The idle time after an answer prefills the next turn, so that its answer
    starts at once. Each line of piped input is a turn.
    """
    if file and recording.continued is not None:
        raise UsageError("--load and --continue name two conversations; state one")
    begun = start_recording(ctx, model, loading.adapter, recording, quiet=quiet)
    # An adapter fits the first model, not those that /model names.
    options = chain([loading], repeat(replace(loading, adapter=None)))
    with ExitStack() as stack:
        session = ChatSession(
            lambda name: load_model(alias_meant(ctx, name), next(options), quiet=quiet),
            begun.model,
            Screen(show_thinking=not (hide_thinking or quiet)),
            options={
                "messages": with_system(begun.messages, reply.system),
                "file": file,
                "max_tokens": reply.max_tokens,
                "stop": reply.stop,
                **sampling.keywords(),
            },
            recorder=stack.enter_context(begun.recorder),
            yes=yes,
            quiet=quiet,
        )
        stack.enter_context(session)
        if begun.model is None and not quiet:
            note("This is the embedded demo model; for a real model: qwen3 chat --model 8B")
        if is_terminal():
            history = _history() if begun.recorder.is_recording else None
            editor = LineEditor(history, chat_commands.completions())
            session.editor = stack.enter_context(editor)
        if sys.stdin.isatty() and not quiet:
            note(f"{session.model_name} · /help lists the commands; Ctrl-D ends the chat.")
        session.recall()
        if reply.tools:
            chat_commands.take(session, f"/tools {reply.tools}")
        if reply.mcp:
            session.use_servers(reply.mcp)
        succeeded = chat_commands.run(session, _lines(session.editor))
    if not (succeeded or sys.stdin.isatty()):  # a script must learn that a turn has failed
        raise typer.Exit(1)


def _history() -> Path | None:
    try:
        return data_file(CHAT_HISTORY)
    except Qwen3Error as error:
        note(f"qwen3: lines are not kept for the next chat: {error}")
        return None


def _lines(editor: LineEditor | None) -> Iterator[str]:
    """Yield the typed or piped input, one turn at a time."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are not text must not end the chat
    while True:
        try:
            line = editor.read() if editor else _piped_turn()
        except EOFError:
            return
        except KeyboardInterrupt:
            continue
        yield line


def _piped_turn() -> str:
    """Return a turn of piped input: a line, or several that are joined by backslashes or quotes."""
    line = input()
    while line.endswith("\\") or _in_quotes(line):
        line = line.removesuffix("\\") + "\n" + input()
    text = line.strip()
    quoted = text.startswith('"""') and text.endswith('"""') and len(text) >= 6
    return text[3:-3].strip("\n") if quoted else line


def _in_quotes(line: str) -> bool:
    """Return whether a text of several lines has begun and not ended."""
    text = line.strip()
    return text.startswith('"""') and not (len(text) >= 6 and text.endswith('"""'))
