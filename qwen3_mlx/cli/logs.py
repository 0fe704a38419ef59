"""`qwen3 logs`: the recorded conversations: lists, searches, shows, exports and deletes them."""

import json
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from qwen3_mlx.cli.console import note
from qwen3_mlx.cli.conversation_log import ConversationLog, Summary
from qwen3_mlx.cli.options import Json, option
from qwen3_mlx.errors import Qwen3Error
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
Limit = Annotated[
    int, option("--limit", "-n", min=0, text="Maximum number to list; 0 is all.", show_default=True)
]


class _Logs(TyperGroup):
    """Command group in which a number shows that conversation."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        shown = ["show", *args] if args and args[0].isdecimal() else args
        return super().parse_args(ctx, shown)


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
    with _log() as log:
        found = log.summaries(limit or -1)
    if as_json:
        for summary in found:
            print(json.dumps(asdict(summary), ensure_ascii=False))
    elif found:
        rows = [(str(each.id), _time(each), Path(each.model).name, each.title) for each in found]
        _print_table(("ID", "last change", "model", "begins with"), rows)
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
    with _log() as log:
        found = log.search(text, limit or -1)
    if as_json:
        for hit in found:
            print(json.dumps(asdict(hit), ensure_ascii=False))
    elif found:
        rows = [(str(hit.conversation), hit.role, hit.excerpt) for hit in found]
        _print_table(("ID", "by", "text"), rows)
    else:
        note("No message has these words.")


@app.command("show")
def show(number: Number = None) -> None:
    """Print a conversation as Markdown, without the thinking."""
    with _log() as log:
        sys.stdout.write(_markdown(log.exported(log.find(number)), thinking=False))


@app.command("export")
def export(
    numbers: Numbers = None,
    everything: Annotated[bool, option("--all", text="Export all conversations.")] = False,
    as_json: Annotated[
        bool,
        option("--json", text="One JSON object a line; qwen3 chat --load reads a file of one."),
    ] = False,
    output: Annotated[
        Path | None, option("--output", "-o", text="File to write, in place of stdout.")
    ] = None,
) -> None:
    """Write conversations as Markdown or JSON, with the thinking; the last one if none is named."""
    with _log() as log:
        named = [log.find(each) for each in numbers or ()]
        chosen = log.summaries() if everything else named or [log.find()]
        written = [log.exported(summary) for summary in chosen]
    if as_json:
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
    everything: Annotated[bool, option("--all", text="Delete all conversations.")] = False,
    yes: Annotated[bool, option("--yes", "-y", text="Do not ask.")] = False,
) -> None:
    """Delete conversations; nothing of their texts stays in the file."""
    if bool(numbers) == everything:
        raise typer.BadParameter("name the conversations to delete, or state --all")
    with _log() as log:
        chosen = log.summaries() if everything else [log.find(each) for each in numbers or ()]
        if not yes:
            if not sys.stdin.isatty():
                raise typer.BadParameter("state --yes to delete without being asked")
            for summary in chosen:
                note(f"{summary.id}  {summary.title[:60]}")
            if not typer.confirm(f"Delete {_count(chosen)}?", err=True):
                return
        log.delete([summary.id for summary in chosen])
    note(f"Deleted {_count(chosen)}.")


@contextmanager
def _log() -> Iterator[ConversationLog]:
    """Open the log for the block, in which an error of SQLite becomes a sentence."""
    with ConversationLog.open() as log:
        try:
            yield log
        except sqlite3.Error as error:
            raise Qwen3Error(f"the log of conversations, {log.path}: {error}") from error


def _count(chosen: list[Summary]) -> str:
    return f"{len(chosen)} conversation{'' if len(chosen) == 1 else 's'}"


def _time(summary: Summary) -> str:
    return f"{datetime.fromisoformat(summary.changed).astimezone():%Y-%m-%d %H:%M}"


def _print_table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows, on a terminal each cut to its width."""
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(row))
        return
    table = Table(box=None, pad_edge=False, expand=True)
    for head in heads:  # the last column takes the room that the others leave
        table.add_column(head, no_wrap=True, ratio=1 if head == heads[-1] else None)
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def _markdown(conversation: dict[str, Any], *, thinking: bool) -> str:
    """Return a conversation as Markdown, a heading for each message."""
    head = f"# Conversation {conversation['id']}\n\n{conversation['model']}, "
    parts = [head + conversation["created"][:10]]
    for message in conversation["messages"]:
        parts.append(f"## {message['role'].capitalize()}")
        if thinking and (text := message.get("reasoning_content")):
            parts.append("\n".join(f"> {line}".rstrip() for line in text.strip().splitlines()))
        if message["content"]:
            parts.append(message["content"].strip("\n"))
        for call in message.get("tool_calls") or ():
            function = call["function"]
            parts.append(f"`{function['name']}({function['arguments']})`")
    return "\n\n".join(parts) + "\n"
