"""`qwen3 chat`: a conversation in the terminal."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from qwen3_mlx.cli.chat_session import ChatSession
from qwen3_mlx.cli.console import note
from qwen3_mlx.cli.options import (
    HideThinking,
    Model,
    ModelOptions,
    Quiet,
    ReplyOptions,
    SamplingOptions,
    load_model,
    option,
    with_options,
)
from qwen3_mlx.cli.screen import Screen

_PROMPT, _CONTINUATION_PROMPT = "> ", ". "


@with_options
def chat(
    *,
    model: Model = None,
    loading: ModelOptions,
    reply: ReplyOptions,
    sampling: SamplingOptions,
    file: Annotated[Path | None, option("--load", text="Continue a saved conversation.")] = None,
    hide_thinking: HideThinking = False,
    quiet: Quiet = False,
) -> None:
    """Chat with a model in the terminal; /help lists the commands.

    The idle time after an answer prefills the next turn, so that its answer
    starts at once. Each line of piped input is a turn.
    """
    options = sampling.keywords()
    with load_model(model, loading, quiet=quiet) as llm:
        conversation = llm.conversation(
            system=reply.system,
            file=file,
            max_tokens=reply.max_tokens,
            stop=reply.stop,
            drop_oldest=True,
            **options,
        )
        if model is None and not quiet:
            note("This is the embedded demo model; for a real model: qwen3 chat --model 8B")
        if sys.stdin.isatty() and not quiet:
            note("/help lists the commands; Ctrl-D ends the chat.")
        screen = Screen(show_thinking=not (hide_thinking or quiet))
        ChatSession(llm, conversation, screen, quiet=quiet).run(_lines())


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
