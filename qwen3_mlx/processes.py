"""Processes of this package's own: the command that starts one."""

import sys


def module_command(name: str, *arguments: str) -> list[str]:
    """Return the command that runs a module with this Python.

    With -P no file of the folder that it runs in is taken for a module, such as a random.py.
    """
    return [sys.executable, "-P", "-m", name, *arguments]
