"""Take a picture of the demo answering in a terminal: python scripts/terminal_picture.py OUT.svg

The command runs in a real terminal of its own, so what is dim or bold there is so in the picture.
"""

import io
import os
import pty
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMANDS = (
    ["What is 123 + 456?", "--seed", "1"],
    ["--no-thinking", "Reverse: red green blue"],
)
_COLUMNS = 96
_FONT = re.compile(r"@font-face \{.*?\}", re.DOTALL)  # rich would fetch it from a network host


def run(arguments: list[str]) -> str:
    """Run `qwen3` in a terminal and give what it shows."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS=str(_COLUMNS))
        os.environ.pop("QWEN3_MODEL", None)
        os.execv(sys.executable, [sys.executable, "-m", "qwen3_mlx", *arguments])
    shown = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # Linux's way to say that the terminal was closed
            break
        if not piece:
            break
        shown += piece
    _, status = os.waitpid(pid, 0)
    if status:
        sys.exit(f"the command failed:\n{shown.decode()}")
    return shown.decode().replace("\r\n", "\n")


def main() -> None:
    """Write the picture."""
    console = Console(record=True, width=_COLUMNS, file=io.StringIO())
    for arguments in COMMANDS:
        words = " ".join(f'"{word}"' if " " in word else word for word in arguments)
        console.print(Text(f"$ qwen3 {words}", style="bold green"))
        console.print(Text.from_ansi(run(arguments)))
    picture = console.export_svg(title="qwen3")
    Path(sys.argv[1]).write_text(_FONT.sub("", picture), encoding="utf-8")


if __name__ == "__main__":
    main()
