"""Draws the demo model answering in a terminal: python scripts/terminal_picture.py OUT.svg [chat]

With "chat" as the second argument it draws a conversation. The command runs in a pseudo-terminal,
so dim and bold text is dim and bold in the picture.
"""

import fcntl
import io
import os
import pty
import re
import struct
import sys
import tempfile
import termios
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMANDS = (
    ["What is 123 + 456?", "--seed", "1"],
    ["--no-thinking", "Reverse: red green blue"],
)
TURNS = (
    "What is 123 + 456?",
    "/budget 16",
    "Repeat: red green blue lamp river",
    "/nothink",
    "Who are you?",
    "/stats",
)
_COLUMNS = 96
_CONTROL = re.compile(r"(\x1b\[\d*[AK]|\x1b\[\?\d+[hl]|\x1b\[\d*[CDJ]|[\r\n\b])")
_SEQUENCE = re.compile(r"\x1b\[[?\d;]*[a-zA-Z]|[\b]")
_FONT = re.compile(r"@font-face \{.*?\}", re.DOTALL)  # rich would load the font from the network


def run(arguments: list[str], turns: tuple[str, ...] = ()) -> str:
    """Run `qwen3` in a terminal, type the turns, and return its output."""
    pid, terminal = pty.fork()
    if pid == 0:
        home = tempfile.mkdtemp()  # lines of other chats are not recalled
        Path(home, "config.toml").write_text("log = false\n")
        os.environ.update(TERM="xterm-256color", COLUMNS=str(_COLUMNS), QWEN3_HOME=home)
        os.environ["PROMPT_TOOLKIT_NO_CPR"] = "1"  # nothing here answers where the cursor is
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("4H", 50, _COLUMNS, 0, 0))
        os.environ.pop("QWEN3_MODEL", None)
        os.execv(sys.executable, [sys.executable, "-m", "qwen3_mlx", *arguments])
    shown = ""
    for turn in turns:
        shown += read(terminal, until=">")
        os.write(terminal, f"{turn}\r".encode())
    if turns:
        shown += read(terminal, until=">")
        os.write(terminal, b"\x04")
    shown += read(terminal, until=None)
    _, status = os.waitpid(pid, 0)
    if status:
        sys.exit(f"the command failed:\n{shown}")
    return shown


def read(terminal: int, until: str | None) -> str:
    """Read the output of a terminal until it ends, or until its text ends with `until`."""
    shown = b""
    while until is None or not _SEQUENCE.sub("", shown.decode(errors="replace")).endswith(until):
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # on Linux: the terminal was closed
            break
        if not piece:
            break
        shown += piece
    return shown.decode()


def settled(shown: str) -> str:
    """Return the final lines of a terminal's output, without text that was erased."""
    lines, row = [""], 0
    for piece in _CONTROL.split(shown):
        if piece == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif piece.endswith("A") and piece.startswith("\x1b["):
            row = max(0, row - 1)
        elif piece.endswith(("J", "K")) and piece.startswith("\x1b["):
            lines[row] = ""
        elif not _CONTROL.fullmatch(piece):
            lines[row] += piece
    return "\n".join(lines)


def main() -> None:
    """Write the picture as SVG."""
    console = Console(record=True, width=_COLUMNS, file=io.StringIO())
    is_chat = sys.argv[2:] == ["chat"]
    for arguments in [["chat"]] if is_chat else COMMANDS:
        words = " ".join(f'"{word}"' if " " in word else word for word in arguments)
        console.print(Text(f"$ qwen3 {words}", style="bold green"))
        shown = settled(run(arguments, TURNS if is_chat else ()))
        console.print(Text.from_ansi(shown))
    picture = console.export_svg(title="qwen3")
    Path(sys.argv[1]).write_text(_FONT.sub("", picture), encoding="utf-8")


if __name__ == "__main__":
    main()
