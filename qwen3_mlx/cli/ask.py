"""`qwen3 "prompt"`: answers one prompt, streamed."""

import json
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import qwen3_mlx  # resolves its names on first use
from qwen3_mlx import backend
from qwen3_mlx.cli.attachments import read_attachment
from qwen3_mlx.cli.console import Bar, note, read_stdin, stderr_text
from qwen3_mlx.cli.error_wording import UsageError
from qwen3_mlx.cli.option_groups import with_options
from qwen3_mlx.cli.options import (
    HideThinking,
    Model,
    ModelOptions,
    QuestionOptions,
    Quiet,
    ReplyOptions,
    SamplingOptions,
    Yes,
    load_model,
)
from qwen3_mlx.cli.recorder import Recorder
from qwen3_mlx.cli.recording import LogOptions, start_recording, with_system
from qwen3_mlx.cli.screen import AnswerWriter
from qwen3_mlx.cli.short_schema import schema_from
from qwen3_mlx.cli.tool_file import load_functions
from qwen3_mlx.cli.tool_use import check_steps, served_tools, shown_with_question
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.interrupt import interruptible
from qwen3_mlx.text.events import Event, Finish, Reasoning, Text, ToolCall

_DEMO_NOTE = (
    "This is the embedded demo model: it adds, repeats, counts and reverses. "
    'For a real model: qwen3 --model 8B "..."'
)
_NO_ANSWER = (
    "qwen3: there is no answer: the token limit ended the thinking; a larger --max-tokens, a "
    "--thinking-budget or --no-thinking leaves room"
)
_STDIN = "-"
_BURST = 1e-4  # seconds a token: pieces that come faster were generated before the first was shown
_CLOSED_BY = {
    "budget": "its budget",
    "end": "an early end",
    "loop": "the loop guard",
    "request": "request",
}


@with_options
def ask(  # noqa: PLR0913 - one parameter a group of options
    ctx: typer.Context,
    *,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="Prompt for the model, or - for stdin; piped text is appended.",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    loading: ModelOptions,
    reply: ReplyOptions,
    question: QuestionOptions,
    sampling: SamplingOptions,
    recording: LogOptions,
    yes: Yes = False,
    hide_thinking: HideThinking = False,
    quiet: Quiet = False,
) -> int:
    """Send PROMPT to the model and stream the answer.

    Only the answer goes to stdout; thinking and notes go to stderr.
    """
    if ctx.args:  # the words after the first
        words = " ".join([prompt or "", *ctx.args])
        raise UsageError(f'put the prompt in quotes: qwen3 "{words}"')
    functions = load_functions(reply.tools.expanduser()) if reply.tools else []
    options: dict[str, Any] = {
        **sampling.keywords(),
        "max_tokens": reply.max_tokens,
        "stop": reply.stop,
        "schema": schema_from(question.schema) if question.schema is not None else None,
        "prefetch_next_turn": False,
    }
    text = _message(prompt, question.file or ())
    begun = start_recording(ctx, model, loading.adapter, recording, quiet=quiet)
    with (
        begun.recorder as recorder,
        load_model(begun.model, loading, quiet=quiet) as llm,
        served_tools(reply.mcp or (), llm, yes=yes, quiet=quiet, required=True) as served,
    ):
        tools: list[Callable[..., Any]] = [*functions, *served]
        history = with_system(begun.messages, reply.system)
        conversation = llm.conversation(messages=history, tools=tools or None, **options)
        if begun.model is None and not quiet:
            note(_DEMO_NOTE)
        hide = hide_thinking or quiet
        asked = shown_with_question(served, functions, yes=yes)
        show = partial(_show_json if question.json else partial(_show, asked=asked), hide=hide)
        finish = _reply(lambda: conversation.stream(text), conversation, recorder, show, quiet)
        steps = 0
        while finish.reason == "tool_calls" and tools:
            check_steps(steps := steps + 1)
            known = len(conversation.messages)
            conversation.answer_calls(tools)
            if question.json:
                _show_results(conversation.messages[known:])
            finish = _reply(conversation.stream, conversation, recorder, show, quiet)
    return 130 if finish.reason == "cancelled" else 0


def _message(prompt: str | None, files: Sequence[Path]) -> str:
    """Return files, prompt and piped text as one message; there must be one of them."""
    piped = ""
    if prompt == _STDIN or not sys.stdin.isatty():
        piped = read_stdin().strip("\n")
    prompt = None if prompt == _STDIN else prompt
    text = "\n\n".join(part for part in (*map(_attached, files), prompt, piped) if part)
    if not text.strip():
        raise UsageError("give a prompt, as an argument or through a pipe")
    return text


def _attached(file: Path) -> str:
    try:
        return read_attachment(file.expanduser())
    except OSError as error:
        raise Qwen3Error(f"{file} cannot be read: {error.strerror}") from error


def _reply(
    start: "Callable[[], qwen3_mlx.Stream]",
    conversation: "qwen3_mlx.Conversation",
    recorder: Recorder,
    show: Callable[[Iterator[Event]], None],
    quiet: bool,
) -> Finish:
    """Show and record one reply of the conversation."""
    times = [time.perf_counter()]
    finish: Finish | None = None
    answered = False

    def events(stream: "qwen3_mlx.Stream") -> Iterator[Event]:
        nonlocal finish, answered
        for event in recorder.recorded(stream):
            times.append(time.perf_counter())
            finish = event if isinstance(event, Finish) else None
            answered |= isinstance(event, Text)
            yield event

    with Bar("reading the prompt") as bar:
        conversation.options["progress"] = None if quiet else bar
        stream = start()
        recorder.record(conversation.messages)
        with interruptible(stream.close):  # the stream still yields its `Finish` event
            show(events(stream))
    assert finish
    recorder.record(conversation.messages)
    if not quiet:
        note(_status(finish, times[1] - times[0], times[-1] - times[1]))
    elif finish.reason == "length" and not answered:
        note(_NO_ANSWER)
    return finish


def _show(events: Iterator[Event], *, asked: Collection[str], hide: bool) -> None:
    """Write the answer as it arrives, and the thinking on stderr unless `hide`.

    Calls of the tools in `asked` are left out: the question before a call shows it.
    """
    thought = answered = False
    answer = AnswerWriter()
    for event in events:
        if isinstance(event, Reasoning) and not hide:
            stderr_text(event.text)
            thought = True
        elif isinstance(event, Text):
            if thought and not answered:
                note("\n")
            answered = True
            answer.write(event.text)
        elif isinstance(event, ToolCall):
            answer.close()
            if thought and not answered:
                note("")
            if not (hide or event.name in asked):
                note(f"{event.name}({event.raw_arguments})")
            thought = False
    answer.close()
    if thought and not answered:
        note("")


def _show_json(events: Iterator[Event], *, hide: bool) -> None:
    """Write each event as a line of JSON, without those of the thinking if `hide`."""
    for event in events:
        if hide and isinstance(event, Reasoning):
            continue
        kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(event).__name__).lower()
        fields = {key: value for key, value in asdict(event).items() if key != "tokens"}
        _print_event({"type": kind, **fields})


def _show_results(messages: Sequence[dict[str, Any]]) -> None:
    """Write the results of tools as lines of JSON."""
    for message in messages:
        result = {"id": message["tool_call_id"], "name": message["name"]}
        _print_event({"type": "tool_result", **result, "content": message["content"]})


def _print_event(event: dict[str, Any]) -> None:
    print(json.dumps(event, ensure_ascii=False), flush=True)


def _status(finish: Finish, to_first: float, rest: float) -> str:
    usage = finish.usage
    count = usage.completion_tokens
    closed_by = finish.details.get("thinking_closed_by")
    closing = ", the sentence that closed it included" if closed_by else ""
    thinking = f" ({usage.reasoning_tokens} thinking{closing})" if usage.reasoning_tokens else ""
    parts = [f"{count} tokens{thinking}"]
    if passes := finish.details.get("forward_passes"):
        parts.append(f"{passes} passes")
    if count > 1 and rest > _BURST * count:
        parts.append(f"{(count - 1) / rest:.1f} tokens/s")
    parts += [
        f"first after {to_first:.2f} s",
        f"{backend.peak_memory() / 1e6:,.0f} MB",
    ]
    if finish.details.get("ended_by") == "loop":
        parts.append("ended by the loop guard")
    if finish.reason == "length":
        parts.append("cut off at the token limit")
    if closed_by:
        parts.append(f"thinking closed by {_CLOSED_BY[closed_by]}")
    if finish.reason == "cancelled":
        parts.append("cancelled")
    return " · ".join(parts)
