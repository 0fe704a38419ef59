"""Tools on the command line: MCP servers, the question before each of their calls, and a limit."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qwen3_mlx  # resolves its names on first use
from qwen3_mlx.cli.console import Bar, note
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.text.described_tool import DescribedTool, with_unique_names

if TYPE_CHECKING:
    from qwen3_mlx.mcp import Call

# Characters that count as printable and show nothing: fillers, variation selectors, blanks.
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
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
    files: Sequence[Path],
    llm: "qwen3_mlx.LLM",
    *,
    yes: bool,
    quiet: bool,
    required: bool = False,
) -> Iterator[list[DescribedTool]]:
    """Start the MCP servers of files for the block, and yield their tools.

    Each call is asked for, unless `yes`. Servers that fail are left out, with a warning.

    Raises:
        Qwen3Error: a file is wrong, the tools' descriptions fill the context window, the
            checkpoint does not chat, or tools are `required` and all servers fail.
    """
    if not files:
        yield []
        return
    if llm.kind != "chat":
        raise Qwen3Error(f"this model is for {llm.kind} and calls no tools: leave --mcp out")
    with Bar("starting MCP servers") as bar:
        servers = qwen3_mlx.mcp.connect(
            *(file.expanduser() for file in files),
            approve=None if yes else _Approval(quiet=quiet),
            max_result=llm.context,  # characters: in English a quarter of the window
            progress=None if quiet else bar,
        )
    with servers:
        tools = servers.tools
        if required and servers.failed and not tools:
            raise Qwen3Error("no MCP server has started, so there are no tools: leave --mcp out?")
        tokens = llm.count_tokens("?", tools=tools) - llm.count_tokens("?")
        count = f"tools of MCP servers: {len(tools)}, {tokens:,} tokens of {llm.context:,}"
        if tokens >= llm.context:
            raise Qwen3Error(f"{count}: leave some servers out, or take a larger --context")
        if not quiet:
            note(count)
        yield tools


def shown_with_question(
    served: Sequence[DescribedTool], functions: Sequence[Callable[..., Any]], *, yes: bool
) -> frozenset[str]:
    """Return the names, as the model has them, of tools whose calls `_Approval` shows."""
    if yes or not _can_ask():
        return frozenset()
    taken = [function.__name__ for function in functions]
    return frozenset(tool.name for tool in with_unique_names(served, taken))


def _can_ask() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


class _Approval:
    """Asks the user before each call of a tool; without a terminal to ask at, no call is made."""

    def __init__(self, *, quiet: bool) -> None:
        """Create it; `quiet` leaves out calls that are not asked for any more."""
        self._quiet = quiet
        self._always: set[tuple[str, str]] = set()
        self._has_noted = False

    def __call__(self, call: "Call") -> bool:
        """Return whether to make a call.

        Raises:
            Qwen3Error: there is no terminal.
        """
        tool = (call.server, call.tool)
        if not _can_ask():
            if not self._has_noted:
                note("qwen3: without a terminal to ask at, no tool is called; --yes calls them")
                self._has_noted = True
            raise Qwen3Error("no tool is called here, because the user cannot be asked")
        arguments = json.dumps(call.arguments, ensure_ascii=False, indent=1)
        shown = _printable(f"{call.server}: {call.tool} {arguments}")
        if tool in self._always:
            if not self._quiet:
                note(shown)
            return True
        import termios

        termios.tcflush(sys.stdin, termios.TCIFLUSH)  # what was typed before is no answer
        sys.stderr.write(f"{shown}\n")
        sys.stderr.write("Call it? y: once, a: always in this session, n: no [y/a/N] ")
        sys.stderr.flush()
        reply = sys.stdin.readline().strip().lower()
        if reply in ("a", "always"):
            self._always.add(tool)
        return reply in ("y", "yes", "a", "always")


def _printable(text: str) -> str:
    """Return a text with JSON's escapes for all that could hide or reorder parts of it."""

    def is_seen(character: str) -> bool:
        return character == "\n" or (character.isprintable() and not _BLANK.match(character))

    return "".join(c if is_seen(c) else json.dumps(c)[1:-1] for c in text)
