"""`qwen3 "prompt"`: one question, one streamed answer."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

import qwen3_mlx  # whose names resolve on first use: `--help` loads no tokenizer and no model
from qwen3_mlx import backend
from qwen3_mlx.cli.console import Bar, note, stderr_text
from qwen3_mlx.cli.options import (
    Bits,
    Draft,
    Dtype,
    KvBits,
    Model,
    PromptCache,
    Revision,
    option,
)
from qwen3_mlx.engine.params import SamplingParams
from qwen3_mlx.text.events import Finish, Reasoning, Text

_DEMO_NOTE = (
    "This is the embedded demo model: it adds, repeats, counts and reverses. "
    'For the real one: qwen3 --model 8B "..."'
)
_CLOSED_BY = {
    "budget": "its budget",
    "end": "an early end",
    "loop": "the loop guard",
    "request": "request",
}
_REPLY, _CHOICE, _SHOW = "Reply", "Choice of words", "Display"


def ask(  # noqa: PLR0913 - one parameter an option
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to say; text piped in follows it.", show_default=False),
    ] = None,
    model: Model = None,
    revision: Revision = None,
    bits: Bits = None,
    dtype: Dtype = None,
    kv_bits: KvBits = None,
    draft: Draft = None,
    prompt_cache: PromptCache = None,
    system: Annotated[
        str | None, option("--system", "-s", panel=_REPLY, text="A system prompt.")
    ] = None,
    thinking: Annotated[
        bool | None,
        option(
            "--thinking/--no-thinking",
            panel=_REPLY,
            text="Think before the answer, or answer at once.",
        ),
    ] = None,
    thinking_budget: Annotated[
        int | None,
        option("--thinking-budget", panel=_REPLY, text="Think at most so many tokens."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        option("--max-tokens", "-n", panel=_REPLY, text="At most so many tokens, thinking too."),
    ] = None,
    stop: Annotated[
        list[str] | None,
        option("--stop", panel=_REPLY, text="End before this text; may be given again."),
    ] = None,
    seed: Annotated[
        int | None, option("--seed", panel=_CHOICE, text="The same seed, the same reply.")
    ] = None,
    temperature: Annotated[
        float | None,
        option("--temperature", "-t", panel=_CHOICE, text="0 takes the likeliest token."),
    ] = None,
    top_p: Annotated[
        float | None,
        option("--top-p", panel=_CHOICE, text="Only the likeliest that make up this share."),
    ] = None,
    top_k: Annotated[
        int | None, option("--top-k", panel=_CHOICE, text="Only the k likeliest; 0 is all.")
    ] = None,
    min_p: Annotated[
        float | None,
        option("--min-p", panel=_CHOICE, text="Only those this likely, beside the likeliest."),
    ] = None,
    presence_penalty: Annotated[
        float | None,
        option("--presence-penalty", panel=_CHOICE, text="Against repetition: 0 to 2."),
    ] = None,
    hide_thinking: Annotated[
        bool, option("--hide-thinking", panel=_SHOW, text="Do not show the thinking.")
    ] = False,
    quiet: Annotated[
        bool, option("--quiet", "-q", panel=_SHOW, text="Nothing but the answer, and errors.")
    ] = False,
) -> int:
    """Send PROMPT to the model and stream the answer.

    The answer alone goes to stdout; thinking and notes go to stderr.
    """
    sampling = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        presence_penalty=presence_penalty,
    )
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": _with_piped(prompt)})
    with Bar("loading") as bar:
        llm = qwen3_mlx.load(
            model,
            revision=revision,
            bits=bits,
            dtype=dtype,
            kv_bits=kv_bits,
            draft=draft,
            prompt_cache=prompt_cache,
            progress=bar,
        )
    with llm, Bar("reading the prompt") as bar:
        started = time.perf_counter()
        stream = llm.stream(
            messages,
            thinking=thinking,
            thinking_budget=thinking_budget,
            max_tokens=max_tokens,
            sampling=sampling,
            seed=seed,
            stop=stop,
            progress=bar,
        )
        if model is None and not quiet:
            note(_DEMO_NOTE)
        with _ctrl_c_closes(stream):
            finish, first = _show(stream, show_thinking=not (hide_thinking or quiet))
        if not quiet:
            note(_status(finish, first - started, time.perf_counter() - first))
    return 130 if finish.reason == "cancelled" else 0


def _with_piped(prompt: str | None) -> str:
    """Join the prompt and what is piped in, each of which may be missing but not both."""
    piped = "" if sys.stdin.isatty() else sys.stdin.read().strip("\n")
    text = "\n\n".join(part for part in (prompt, piped) if part)
    if not text.strip():
        raise typer.BadParameter("give a prompt, as an argument or through a pipe")
    return text


def _show(stream: "qwen3_mlx.Stream", *, show_thinking: bool) -> tuple[Finish, float]:
    """Write the events as they come; give the last, and the time when the first token came."""
    first = 0.0
    thought = answered = False
    for event in stream:
        first = first or time.perf_counter()
        if isinstance(event, Reasoning) and show_thinking:
            stderr_text(event.text)
            thought = True
        elif isinstance(event, Text):
            if thought and not answered:
                note("\n")
            answered = True
            _write(event.text)
        elif isinstance(event, Finish):
            finish = event
    if answered:
        _write("\n")
    elif thought:
        note("")
    return finish, first


@contextmanager
def _ctrl_c_closes(stream: "qwen3_mlx.Stream") -> Iterator[None]:
    """End the generation on Ctrl-C, so that the stream can say what it came to."""

    def close(*_: object) -> None:
        stream.close()
        signal.signal(signal.SIGINT, before)  # a second Ctrl-C does not wait

    before = signal.signal(signal.SIGINT, close)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


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
