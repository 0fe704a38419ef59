"""Tools on the command line: MCP servers, the question before each of their calls, and a limit."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import qwen3_mlx  # resolves its names on first use
from qwen3_mlx.cli.console import Bar, note
from qwen3_mlx.errors import Qwen3Error

if TYPE_CHECKING:
    from qwen3_mlx.mcp import Call
    from qwen3_mlx.text.described_tool import DescribedTool

_MAX_STEPS = 25  # replies of a turn that call tools


def check_steps(steps: int) -> None:
    """Check that a turn has not had too many replies that call tools.

    Raises:
        Qwen3Error: it has.
    """
    if steps > _MAX_STEPS:
        raise Qwen3Error(f"the model still calls tools after {_MAX_STEPS} replies; it is stopped")


@contextmanager
def served_tools(
    files: Sequence[Path], llm: "qwen3_mlx.LLM", *, yes: bool, quiet: bool
) -> Iterator[list["DescribedTool"]]:
    """Start the MCP servers of files for the block, and yield their tools.

    Each call is asked for, unless `yes`.

    Raises:
        Qwen3Error: a file is wrong, the tools' descriptions fill the context window, or the
            checkpoint does not chat.
    """
    if not files:
        yield []
        return
    if llm.kind != "chat":
        raise Qwen3Error(f"this model is for {llm.kind} and calls no tools: leave --mcp out")
    with Bar("starting MCP servers") as bar:
        servers = qwen3_mlx.mcp.connect(
            *(file.expanduser() for file in files),
            approve=None if yes else _Approval(),
            max_result=llm.context,  # characters: in English a quarter of the window
            progress=None if quiet else bar,
        )
    with servers:
        tools = servers.tools
        tokens = llm.count_tokens("?", tools=tools) - llm.count_tokens("?")
        count = f"tools of MCP servers: {len(tools)}, {tokens:,} tokens of {llm.context:,}"
        if tokens >= llm.context:
            raise Qwen3Error(f"{count}: leave some servers out, or take a larger --context")
        if not quiet:
            note(count)
        yield tools


class _Approval:
    """Asks the user before each call of a tool; without a terminal to ask at, no call is made."""

    def __init__(self) -> None:
        self._always: set[tuple[str, str]] = set()
        self._has_noted = False

    def __call__(self, call: "Call") -> bool:
        """Return whether to make a call.

        Raises:
            Qwen3Error: there is no terminal.
        """
        tool = (call.server, call.tool)
        if tool in self._always:
            return True
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            if not self._has_noted:
                note("qwen3: without a terminal to ask at, no tool is called; --yes calls them")
                self._has_noted = True
            raise Qwen3Error("no tool is called here, because the user cannot be asked")
        import termios

        termios.tcflush(sys.stdin, termios.TCIFLUSH)  # what was typed before is no answer
        arguments = json.dumps(call.arguments, ensure_ascii=False, indent=1)
        sys.stderr.write(f"{_printable(f'{call.server}: {call.tool} {arguments}')}\n")
        sys.stderr.write("Call it? y: once, a: always in this session, n: no [y/a/N] ")
        sys.stderr.flush()
        reply = sys.stdin.readline().strip().lower()
        if reply in ("a", "always"):
            self._always.add(tool)
        return reply in ("y", "yes", "a", "always")


def _printable(text: str) -> str:
    """Return a text with JSON's escapes for all that could hide or reorder parts of it."""
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
