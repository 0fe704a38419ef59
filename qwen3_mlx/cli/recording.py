"""Which conversation a command records or continues, by its options."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from qwen3_mlx.cli.console import local_time, note, visible
from qwen3_mlx.cli.conversation_log import ConversationLog, Summary
from qwen3_mlx.cli.option_groups import option
from qwen3_mlx.cli.options import GENERATION, user_config
from qwen3_mlx.cli.recorder import Recorder
from qwen3_mlx.cli.user_files import config_file
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.model.sizes import DEMO

_NOTICE = (
    "Conversations are recorded in {}: qwen3 logs lists them; --no-log, or log = false in {}, "
    "switches that off."
)
_TITLE = 60  # characters
LAST = "last"
"""What `--continue` holds if no number follows it."""


@dataclass(frozen=True, slots=True)
class LogOptions:
    """Recording of a conversation, and the one that goes on."""

    continued: Annotated[
        str | None,
        option(
            "--continue",
            "-c",
            panel=GENERATION,
            metavar="[ID]",
            text="Continue the last conversation, or that with this number (qwen3 logs).",
        ),
    ] = None
    log: Annotated[
        bool | None,
        option("--log/--no-log", panel=GENERATION, text="Record the conversation, or do not."),
    ] = None


class ContinuingCommand(TyperCommand):
    """Command with `LogOptions`: `-c` takes a number that follows it, and nothing else."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = args[: args.index("--")] if "--" in args else args
        following = [*options[1:], ""]
        named = [
            f"--continue={LAST}" if word in ("-c", "--continue") and not after.isdecimal() else word
            for word, after in zip(options, following, strict=False)
        ]
        return super().parse_args(ctx, [*named, *args[len(options) :]])


@dataclass(frozen=True, slots=True)
class Recording:
    """The recorder of a conversation, its messages so far, and the model to load for it."""

    recorder: Recorder
    messages: list[dict[str, Any]]
    model: str | None


def start_recording(
    context: typer.Context,
    model: str | None,
    adapter: str | None,
    options: LogOptions,
    *,
    quiet: bool,
) -> Recording:
    """Open the log, if it is switched on, and find the conversation that goes on.

    A conversation goes on with its own model, unless the command line names one.

    Raises:
        Qwen3Error: there is no such conversation, or the log that has it cannot be read.
    """
    wanted = user_config().log if options.log is None else options.log
    goes_on = options.continued is not None
    messages: list[dict[str, Any]] = []
    number = None
    if adapter and Path(adapter).exists():  # of a folder its path, as of the model
        adapter = str(Path(adapter).resolve())
    with ExitStack() as undo:
        log = _opened(must=goes_on) if wanted or goes_on else None
        if log:
            undo.enter_context(log)
        if log and options.continued is not None:
            found = log.find(_number(options.continued))
            number, messages = found.id, log.messages(found.id)
            if not quiet:
                note_continued(found)
                if found.adapter != (adapter or ""):
                    before, now = found.adapter or "none", adapter or "none"
                    note(f"Its adapter changes: {before} so far, {now} from here on")
            source = context.get_parameter_source("model")
            if source is None or source.name != "COMMANDLINE":
                model = None if found.model == DEMO else found.model
        if not wanted:
            log = None
        recorder = Recorder(log, model, adapter=adapter or "", conversation=number)
        if log and not quiet and not log.is_announced():
            note(_NOTICE.format(log.path, config_file()))
        if log:
            undo.pop_all()  # the recorder closes it
    return Recording(recorder, messages, model)


def _opened(*, must: bool) -> ConversationLog | None:
    try:
        return ConversationLog.open()
    except Qwen3Error as error:
        if must:
            raise
        note(f"qwen3: the conversation is not recorded: {error}")
        return None


def note_continued(found: Summary) -> None:
    """Write a note that names the conversation that goes on."""
    count = f"{found.messages} message{'' if found.messages == 1 else 's'}"
    title = visible(found.title[:_TITLE])
    note(f"Goes on with {found.id}: {title} ({count}, {local_time(found.changed)})")


def with_system(messages: list[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    """Return the messages with a system prompt in place of their first; without it, if empty."""
    if system is None:
        return messages
    rest = messages[1:] if messages and messages[0]["role"] == "system" else messages
    return [{"role": "system", "content": system}, *rest] if system else rest


def _number(stated: str) -> int | None:
    if stated == LAST:
        return None
    if not stated.isdecimal():
        raise Qwen3Error(f"--continue takes the number of a conversation, not {stated!r}")
    return int(stated)
