"""What a chat uses of the desktop around it: the clipboard and the user's editor."""

import base64
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from qwen3_mlx.errors import Qwen3Error

_PROGRAMS = (  # the variable that states whether there is a display, and the command
    ("", ["pbcopy"]),
    ("WAYLAND_DISPLAY", ["wl-copy"]),
    ("DISPLAY", ["xclip", "-selection", "clipboard"]),
)


def copy(text: str) -> str:
    """Copy a text to the clipboard; return by what means.

    Without a program for that, or on another machine (SSH), the terminal copies (OSC 52).
    """
    for command in _clipboard_programs():
        done = subprocess.run(
            command,
            input=text.encode(),
            check=False,
            stdout=subprocess.DEVNULL,  # xclip stays, and would hold a pipe open
            stderr=subprocess.DEVNULL,
        )
        if done.returncode == 0:
            return command[0]
    if not sys.stdout.isatty():
        raise Qwen3Error("there is no clipboard without a terminal")
    sys.stdout.write(f"\x1b]52;c;{base64.b64encode(text.encode()).decode()}\a")
    sys.stdout.flush()
    return "the terminal"


def _clipboard_programs() -> list[list[str]]:
    """Return the commands that reach the clipboard of the user's machine; none by SSH."""
    if "SSH_CONNECTION" in os.environ:
        return []
    return [
        command
        for variable, command in _PROGRAMS
        if (not variable or os.environ.get(variable)) and shutil.which(command[0])
    ]


def edit(text: str) -> str:
    """Return a text as the user leaves it in the editor that VISUAL or EDITOR names.

    Raises:
        Qwen3Error: the editor cannot be run, or fails.
    """
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    with tempfile.TemporaryDirectory() as folder:  # only its owner may read it
        file = Path(folder) / "message.md"
        file.write_text(text, encoding="utf-8")
        try:
            done = subprocess.run([*shlex.split(editor), file], check=False)
        except (OSError, ValueError) as error:
            raise Qwen3Error(f"the editor {editor!r} cannot be run: {error}") from error
        if done.returncode:
            raise Qwen3Error(f"the editor {editor!r} failed with code {done.returncode}")
        return file.read_text(encoding="utf-8").rstrip("\n")
