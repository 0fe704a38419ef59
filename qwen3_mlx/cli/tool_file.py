"""Functions of a user's Python file, which the model may call as tools."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from qwen3_mlx.arguments import refuse_deferred
from qwen3_mlx.errors import Qwen3Error


def load_functions(file: Path) -> list[Callable[..., Any]]:
    """Return the functions that a Python file of the user defines, except those named `_...`.

    Runs the file as it is now: Python's cache of compiled files takes one that was changed twice in
    a second for the same.

    Raises:
        Qwen3Error: the file cannot be run, or defines no function.
        TypeError: one of the functions is async or a generator.
    """
    if file.suffix != ".py" or not file.is_file():
        raise Qwen3Error(f"{file} is not a Python file")
    module = ModuleType(file.stem)
    module.__file__ = str(file)
    try:
        exec(compile(file.read_bytes(), file, "exec"), vars(module))
    except Exception as error:
        raise Qwen3Error(f"{file} fails: {type(error).__name__}: {error}") from error
    found: list[Callable[..., Any]] = [
        function
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and function.__module__ == module.__name__
        and not name.startswith("_")
    ]
    if not found:
        raise Qwen3Error(f"{file} defines no function")
    for function in found:
        refuse_deferred(function.__name__, function)
    return found
