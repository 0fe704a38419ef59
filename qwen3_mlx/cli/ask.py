"""`qwen3 "prompt"`: answers one prompt, streamed."""

import sys
import time
from typing import Annotated

import typer

import qwen3_mlx  # resolves its names on first use
from qwen3_mlx import backend
from qwen3_mlx.cli.console import Bar, note, stderr_text
from qwen3_mlx.cli.error_wording import UsageError
from qwen3_mlx.cli.options import (
    HideThinking,
    Model,
    ModelOptions,
    Quiet,
    ReplyOptions,
    SamplingOptions,
    load_model,
    with_options,
)
from qwen3_mlx.cli.screen import AnswerWriter
from qwen3_mlx.interrupt import interruptible
from qwen3_mlx.text.events import Finish, Reasoning, Text

_DEMO_NOTE = (
    "This is the embedded demo model: it adds, repeats, counts and reverses. "
    'For a real model: qwen3 --model 8B "..."'
)
_CLOSED_BY = {
    "budget": "its budget",
    "end": "an early end",
    "loop": "the loop guard",
    "request": "request",
}


@with_options
def ask(
    ctx: typer.Context,
    *,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="Prompt for the model; piped text is appended.",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    loading: ModelOptions,
    reply: ReplyOptions,
    sampling: SamplingOptions,
    hide_thinking: HideThinking = False,
    quiet: Quiet = False,
) -> int:
    """Send PROMPT to the model and stream the answer.

    Only the answer goes to stdout; thinking and notes go to stderr.
    """
    options = sampling.keywords()
    if ctx.args:  # the words after the first
        words = " ".join([prompt or "", *ctx.args])
        raise UsageError(f'put the prompt in quotes: qwen3 "{words}"')
    messages = [{"role": "system", "content": reply.system}] if reply.system else []
    messages.append({"role": "user", "content": _with_piped(prompt)})
    with load_model(model, loading, quiet=quiet) as llm, Bar("reading the prompt") as bar:
        started = time.perf_counter()
        progress = None if quiet else bar
        stream = llm.stream(
            messages, max_tokens=reply.max_tokens, stop=reply.stop, progress=progress, **options
        )
        if model is None and not quiet:
            note(_DEMO_NOTE)
        with interruptible(stream.close):  # the stream still yields its `Finish` event
            finish, first = _show(stream, show_thinking=not (hide_thinking or quiet))
        if not quiet:
            note(_status(finish, first - started, time.perf_counter() - first))
    return 130 if finish.reason == "cancelled" else 0


def _with_piped(prompt: str | None) -> str:
    """Return the prompt joined with the piped text; either may be missing, but not both."""
    piped = "" if sys.stdin.isatty() else sys.stdin.read().strip("\n")
    text = "\n\n".join(part for part in (prompt, piped) if part)
    if not text.strip():
        raise typer.BadParameter("give a prompt, as an argument or through a pipe")
    return text


def _show(stream: "qwen3_mlx.Stream", *, show_thinking: bool) -> tuple[Finish, float]:
    """Write events as they arrive; return the last one and the time of the first token."""
    first = 0.0
    thought = answered = False
    answer = AnswerWriter()
    for event in stream:
        first = first or time.perf_counter()
        if isinstance(event, Reasoning) and show_thinking:
            stderr_text(event.text)
            thought = True
        elif isinstance(event, Text):
            if thought and not answered:
                note("\n")
            answered = True
            answer.write(event.text)
        elif isinstance(event, Finish):
            finish = event
    answer.close()
    if thought and not answered:
        note("")
    return finish, first


def _status(finish: Finish, to_first: float, rest: float) -> str:
    usage = finish.usage
    count = usage.completion_tokens
    thinking = f" ({usage.reasoning_tokens} thinking)" if usage.reasoning_tokens else ""
    parts = [f"{count} tokens{thinking}"]
    if passes := finish.details.get("forward_passes"):
        parts.append(f"{passes} passes")
    if count > 1:
        parts.append(f"{(count - 1) / max(rest, 1e-9):.1f} tokens/s")
    parts += [
        f"first after {to_first:.2f} s",
        f"{backend.peak_memory() / 1e6:,.0f} MB",
    ]
    if finish.details.get("ended_by") == "loop":
        parts.append("ended by the loop guard")
    if finish.reason == "length":
        parts.append("cut off at the token limit")
    if closed_by := finish.details.get("thinking_closed_by"):
        parts.append(f"thinking closed by {_CLOSED_BY[closed_by]}")
    if finish.reason == "cancelled":
        parts.append("cancelled")
    return " · ".join(parts)
