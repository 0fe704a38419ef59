"""Prints the reference of the command line as Markdown, generated from its --help.

`make docs` writes it to docs/cli.md; `cli_docs.py --check docs/cli.md` fails if that is stale.
"""

import os
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import generated
from typer.main import get_command
from typer.testing import CliRunner

_HEAD = """\
# The `qwen3` command

<!-- Generated from --help by `make docs`; edit the help texts in qwen3_mlx/cli instead. -->
"""


def reference() -> str:
    """Return the help of the command and of each of its subcommands, as Markdown."""
    app = import_module("qwen3_mlx.cli.main").app
    runner = CliRunner()
    sections = [_HEAD]
    for words in [[], *_subcommands(get_command(app))]:
        result = runner.invoke(app, [*words, "--help"], prog_name="qwen3")
        if result.exit_code:
            raise SystemExit(f"qwen3 {' '.join(words)} --help failed: {result.output}")
        lines = [line.rstrip() for line in result.output.strip("\n").splitlines()]
        body = "\n".join(lines).strip("\n")
        sections.append(f"## `{' '.join(['qwen3', *words])}`\n\n```text\n{body}\n```\n")
    return "\n".join(sections)


def _subcommands(group: Any) -> Iterator[list[str]]:
    """Yield the path of each visible subcommand, as words, with nested ones."""
    for name, command in getattr(group, "commands", {}).items():
        if not command.hidden:
            yield [name]
            yield from ([name, *words] for words in _subcommands(command))


def main(arguments: list[str]) -> int:
    """Print the reference, or with --check FILE compare it with the file."""
    # Typer reads width and colours from the environment once, when it imports Rich: set them first.
    os.environ |= {"COLUMNS": "80", "TERMINAL_WIDTH": "80", "NO_COLOR": "1"}
    for name in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS", "TTY_COMPATIBLE"):
        os.environ.pop(name, None)
    return generated.run(arguments, reference)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
