"""How errors are worded on the command line: with its options, where the library has keywords."""

import re
from collections.abc import Collection
from difflib import get_close_matches

from typer.exceptions import TyperException

_BOTH = re.compile(r"(--[a-z-]+(?: \w+)?) \(\w+=[^()]*\)")  # "--force (force=True)"
_KEYWORD = re.compile(r"\b([a-z_]+)=(\"[^\"]*\"|'[^']*'|[\w.,-]*\w)")
_FIRST = re.compile(r"([a-z_]+)(?= must be |: )")  # "max_tokens must be at least 1, not 0"
_CALL = re.compile(r"(?:[;,] or|;) [^;,]*\b\w+\(\)[^;,]*")  # a way out that only Python has
_STRAY = re.compile(r"Got unexpected extra argument\(s\) \((.*)\)", re.DOTALL)
_CLOSE = 0.75  # of difflib: two letters of four that have changed places
# Verbs of other programs.
_ELSEWHERE = {"help": "--help", "version": "--version", "run": "chat --model"}


class WrongUsage(TyperException):
    """A command line that cannot be meant; the message says what to type instead."""

    exit_code = 2


def in_options(message: str, keywords: Collection[str]) -> str:
    """Return an error's message with options in the place of the `keywords` that have one.

    A way out that only a program has, a call of a function, is left out.
    """
    if (first := _FIRST.match(message)) and first[1] in keywords:
        message = f"--{first[1].replace('_', '-')}{message[first.end() :]}"

    def option(match: re.Match[str]) -> str:
        return _option(match) if match[1] in keywords else match[0]

    return _KEYWORD.sub(option, _CALL.sub("", _BOTH.sub(r"\1", message)))


def usage(error: TyperException) -> str:
    """Return what is wrong with a command line, and where the help of its verb is."""
    context = getattr(error, "ctx", None)
    verb = context.command_path.removesuffix(" ask") if context else "qwen3"
    words = error.format_message()
    if context and (stray := _STRAY.fullmatch(words)):
        names = [name for option in context.command.params for name in option.opts]
        model = "; --model names the model" if "--model" in names else ""
        words = f"a word too many: {stray[1]}{model}"
    return f"{words} (see {verb} --help)"


def _option(match: re.Match[str]) -> str:
    name, value = match[1].replace("_", "-"), match[2].strip("\"'")
    if value == "True":
        return f"--{name}"
    return f"--no-{name}" if value == "False" else f"--{name} {value}"


def verb_meant(word: str, verbs: Collection[str]) -> str | None:
    """Return the verb, or the option, that was probably meant by a word that is none."""
    close = get_close_matches(word, verbs, 1, _CLOSE)
    return close[0] if close else _ELSEWHERE.get(word)
