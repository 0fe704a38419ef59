"""`qwen3 logs`: the recorded conversations: lists, searches, shows, exports and deletes them."""

import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qwen3_mlx.cli.console import confirm, local_time, note, print_table
from qwen3_mlx.cli.conversation_log import ConversationLog
from qwen3_mlx.cli.option_groups import option
from qwen3_mlx.cli.options import Json
from qwen3_mlx.cli.screen import AnswerWriter
from qwen3_mlx.cli.user_files import CHAT_HISTORY, data_file
from qwen3_mlx.files import atomic_write

Number = Annotated[
    int | None,
    typer.Argument(
        metavar="[ID]", help="Number of the conversation; the last if omitted.", show_default=False
    ),
]
Numbers = Annotated[
    list[int] | None,
    typer.Argument(metavar="[ID]...", help="Numbers of conversations.", show_default=False),
]
Replaced = Annotated[
    bool,
    option(
        "--replaced",
        text="Also messages that were retried, edited or dropped, marked as replaced.",
    ),
]
Limit = Annotated[
    int, option("--limit", "-n", min=0, text="Maximum number to list; 0 is all.", show_default=True)
]


class _Logs(TyperGroup):
    """Command group in which a number shows that conversation."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        shown = ["show", *args] if args and args[0].isdecimal() else args
        return super().parse_args(ctx, shown)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands and not get_close_matches(args[0], self.commands):
            words = f'"{" ".join(args)}"'
            ctx.fail(f"there is no command {args[0]!r}; to find it: qwen3 logs search {words}")
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=_Logs, rich_markup_mode="rich")


@app.callback(invoke_without_command=True)
def logs(context: typer.Context, limit: Limit = 20, as_json: Json = False) -> None:
    """List the recorded conversations, the last first.

    [bold]qwen3 logs search "binary tree"[/bold]   find messages by their words.
    [bold]qwen3 logs show 12[/bold]   read a conversation.
    [bold]qwen3 chat --continue 12[/bold]   go on with it.
    """
    if context.invoked_subcommand is not None:
        return
    with ConversationLog.open() as log:
        found = log.summaries(limit or -1)
    if as_json:
        for summary in found:
            print(json.dumps(asdict(summary), ensure_ascii=False))
    elif found:
        rows = [
            (str(each.id), local_time(each.changed), Path(each.model).name, each.title)
            for each in found
        ]
        print_table(("ID", "last change", "model", "begins with"), rows)
    else:
        note("No conversation has been recorded.")


@app.command("search")
def search(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="Words that a message must contain.")],
    limit: Limit = 20,
    as_json: Json = False,
) -> None:
    """Find the messages that contain all words of TEXT, also as parts of words.

    The case of letters does not matter. Thinking is not searched.
    """
    if not text.strip():
        raise typer.BadParameter("give a word to search for")
    with ConversationLog.open() as log:
        found = log.search(text, limit or -1)
    if as_json:
        for hit in found:
            print(json.dumps(asdict(hit), ensure_ascii=False))
    elif found:
        rows = [
            (str(hit.conversation), local_time(hit.changed), hit.role, hit.excerpt) for hit in found
        ]
        print_table(("ID", "last change", "by", "text"), rows)
    else:
        note("No message has these words.")


@app.command("show")
def show(number: Number = None, replaced: Replaced = False) -> None:
    """Print a conversation as Markdown, without the thinking."""
    with ConversationLog.open() as log:
        found = log.find(number)
        shown = _markdown(log.exported(found, replaced=replaced), thinking=False)
        left_out = 0 if replaced else len(log.messages(found.id, replaced=True)) - found.messages
    writer = AnswerWriter()
    writer.write(shown.removesuffix("\n"))
    writer.close()
    if left_out:
        note(f"Replaced messages that are not shown: {left_out}; --replaced shows them.")


def _exported(text: str) -> int:
    if not text.isdecimal():
        raise typer.BadParameter(
            f"{text!r} is not the number of a conversation; -o {text} writes to a file"
        )
    return int(text)


@app.command("export")
def export(
    numbers: Annotated[
        list[int] | None,
        typer.Argument(
            metavar="[ID]...",
            help="Numbers of conversations.",
            show_default=False,
            parser=_exported,
        ),
    ] = None,
    everything: Annotated[bool, option("--all", text="Export all conversations.")] = False,
    as_json: Annotated[
        bool,
        option("--json", text="One JSON object a line; qwen3 chat --load reads a file of one."),
    ] = False,
    replaced: Replaced = False,
    output: Annotated[
        Path | None,
        option("--output", "-o", text="File to write, in place of stdout; .json is JSON."),
    ] = None,
) -> None:
    """Write conversations as Markdown or JSON, with the thinking; the last one if none is named."""
    with ConversationLog.open() as log:
        named = [log.find(each) for each in numbers or ()]
        chosen = log.summaries() if everything else named or [log.find()]
        written = [log.exported(summary, replaced=replaced) for summary in chosen]
    if as_json or (output and output.suffix == ".json"):
        text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in written)
    else:
        text = "\n".join(_markdown(each, thinking=True) for each in written)
    if output:
        with atomic_write(output.expanduser(), private=True) as file:
            file.write(text.encode())
    else:
        sys.stdout.write(text)


@app.command("delete")
def delete(
    numbers: Numbers = None,
    everything: Annotated[
        bool, option("--all", text="Delete all, and the history of chats.")
    ] = False,
    yes: Annotated[bool, option("--yes", "-y", text="Do not ask.")] = False,
) -> None:
    """Delete conversations; nothing of their texts stays in the file.

    --all also empties the history of lines typed in chats.
    """
    if bool(numbers) == everything:
        raise typer.BadParameter("name the conversations to delete, or state --all")
    with ConversationLog.open() as log:
        chosen = log.summaries() if everything else [log.find(each) for each in numbers or ()]
        what = f"{len(chosen)} conversation{'' if len(chosen) == 1 else 's'}"
        what += " and the history of lines typed in chats" if everything else ""
        if not yes:
            for summary in chosen:
                note(f"{summary.id}  {summary.title[:60]}")
            confirm(f"Delete {what}?")
        log.delete(None if everything else [summary.id for summary in chosen])
    if everything:
        with suppress(FileNotFoundError):
            os.truncate(data_file(CHAT_HISTORY), 0)
    note(f"Deleted {what}.")


def _markdown(conversation: dict[str, Any], *, thinking: bool) -> str:
    """Return a conversation as Markdown, a heading for each message."""
    head = f"# Conversation {conversation['id']}\n\n{conversation['model']}, "
    parts = [head + conversation["created"][:10]]
    for message in conversation["messages"]:
        mark = " (replaced)" if message.get("replaced") else ""
        parts.append(f"## {message['role'].capitalize()}{mark}")
        if thinking and (text := message.get("reasoning_content")):
            parts.append("\n".join(f"> {line}".rstrip() for line in text.strip().splitlines()))
        if message["content"]:
            parts.append(message["content"].strip("\n"))
        for call in message.get("tool_calls") or ():
            function = call["function"]
            parts.append(f"`{function['name']}({function['arguments']})`")
    return "\n\n".join(parts) + "\n"
