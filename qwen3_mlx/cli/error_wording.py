"""Rewords error messages for the command line: options in place of the library's keywords."""

import re
from collections.abc import Collection
from difflib import get_close_matches

from typer.exceptions import TyperException

_BOTH = re.compile(r"(--[a-z-]+(?: \w+)?) \(\w+=[^()]*\)")  # "--force (force=True)"
_KEYWORD = re.compile(r"\b([a-z_]+)=(\"[^\"]*\"|'[^']*'|[\w.,-]*\w)")
_FIRST = re.compile(r"([a-z_]+)(?= must be | is not valid |: )")  # "max_tokens must be at least 1"
_COMMAND = re.compile(r"\b(embed|rerank)\(\)")  # a remedy that is a command, too
_CALL = re.compile(r"(?:[;,] or|;) [^;,]*\b\w+\(\)[^;,]*")  # a remedy that only Python has
_STRAY = re.compile(r"Got unexpected extra argument\(s\) \((.*)\)", re.DOTALL)
_CUTOFF = 0.75  # difflib's ratio of four letters, two of them swapped, or one of them wrong
# Commands of other programs.
_FOREIGN_COMMANDS = {
    "help": "--help",
    "version": "--version",
    "run": "chat --model",
    "ls": "list",
    "models": "list",
    "download": "pull",
    "get": "pull",
    "remove": "rm",
    "delete": "rm",
    "info": "show",
    "uninstall": "rm",
    "history": "logs",
    "settings": "config",
    "completion": "--install-completion",
}


class UsageError(TyperException):
    """A command line that is probably a mistake; the message says what to type instead."""

    exit_code = 2


def of_the_system(error: OSError) -> str:
    """Return what the system refused, and which file it is about, without the error's number."""
    where = f"{error.filename} cannot be used: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def with_option_names(message: str, keywords: Collection[str]) -> str:
    """Return an error message with the `keywords` of the library written as options.

    A remedy that only a program has, the call of a function, is left out.
    """
    message = _COMMAND.sub(r"qwen3 \1", message)
    if (first := _FIRST.match(message)) and first[1] in keywords:
        message = f"--{first[1].replace('_', '-')}{message[first.end() :]}"

    def option(match: re.Match[str]) -> str:
        return _option(match) if match[1] in keywords else match[0]

    return _KEYWORD.sub(option, _CALL.sub("", _BOTH.sub(r"\1", message)))


def usage(error: TyperException) -> str:
    """Return a message that says what is wrong with a command line and which help to read."""
    context = getattr(error, "ctx", None)
    command = context.command_path.removesuffix(" ask") if context else "qwen3"
    message = error.format_message().removeprefix("Invalid value: ")
    if context and (stray := _STRAY.fullmatch(message)):
        names = [name for option in context.command.params for name in option.opts]
        hint = "; name the model with --model" if "--model" in names else ""
        message = f"unexpected argument: {stray[1]}{hint}"
    return f"{message} (see {command} --help)"


def _option(match: re.Match[str]) -> str:
    name, value = match[1].replace("_", "-"), match[2].strip("\"'")
    if value == "True":
        return f"--{name}"
    return f"--no-{name}" if value == "False" else f"--{name} {value}"


def hint(word: str, known: Collection[str]) -> str:
    """Return the known word that a misspelt one probably stands for, or else all of them."""
    close = get_close_matches(word, known, 1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def closest_command(word: str, verbs: Collection[str]) -> str | None:
    """Return the subcommand or option that a misspelt word probably stands for, or None.

    Of four letters, other words than a misspelt one differ in the first: "What" is not "chat".
    """
    close = get_close_matches(word, [verb for verb in verbs if verb[0] == word[:1]], 1, _CUTOFF)
    return close[0] if close else _FOREIGN_COMMANDS.get(word)
