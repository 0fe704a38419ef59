"""Measure how much of the code a reader has to follow: python scripts/shape.py

Prints what runs of this package between `llm.stream` and the first event of a reply of the demo
checkpoint (functions, calls, files), and the longest classes, functions and nestings.
"""

import ast
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from qwen3_mlx import load

PACKAGE = Path(__file__).parent.parent / "qwen3_mlx"
BLOCKS = (ast.For, ast.AsyncFor, ast.While, ast.If, ast.With, ast.AsyncWith, ast.Try, ast.Match)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def journey() -> tuple[int, int, int]:
    """Count functions, calls and files of the package up to the first event of a reply."""
    called: dict[tuple[str, str], int] = {}
    counting = False

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        # Comprehensions and generator expressions belong to the function that they stand in.
        if counting and event == "call" and code.co_filename.startswith(str(PACKAGE)):
            name = code.co_qualname.split(".<locals>.<")[0]
            called[code.co_filename, name] = called.get((code.co_filename, name), 0) + 1

    threading.setprofile(note)  # for the worker, which begins with the load
    with load() as llm:
        llm.chat("1 + 1", max_tokens=2)  # what is done once is no part of the journey
        sys.setprofile(note)
        counting = True
        stream = llm.stream("What is 12 + 34?")
        next(stream)
        counting = False
        sys.setprofile(None)
        stream.close()
    threading.setprofile(None)
    return len(called), sum(called.values()), len({file for file, _ in called})


def depth(node: ast.AST) -> int:
    """Return how deep blocks are nested in a function; `elif` is not deeper than its `if`."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*FUNCTIONS, ast.ClassDef)):
            continue
        chained = isinstance(node, ast.If) and [child] == node.orelse and isinstance(child, ast.If)
        deepest = max(deepest, depth(child) + (isinstance(child, BLOCKS) and not chained))
    return deepest


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def definitions() -> Iterator[tuple[str, str, Definition]]:
    """Yield place, name and tree of every class and function of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                yield str(path.relative_to(PACKAGE)), node.name, node


def lines(node: Definition) -> int:
    """Count the lines of a definition."""
    return (node.end_lineno or 0) - node.lineno + 1


def main() -> None:
    """Print the figures."""
    functions, calls, files = journey()
    print(f"llm.stream to the first event: {functions} functions, {calls} calls, {files} files\n")
    found = list(definitions())
    classes = [entry for entry in found if isinstance(entry[2], ast.ClassDef)]
    bodies = [entry for entry in found if not isinstance(entry[2], ast.ClassDef)]
    outside = [entry for entry in bodies if not entry[0].startswith("cli/")]
    tables: list[tuple[str, list[tuple[str, str, Definition]], Callable[[Any], int]]] = [
        ("longest classes, lines", classes, lines),
        ("longest functions outside cli/, lines", outside, lines),
        ("deepest nestings, blocks", bodies, depth),
    ]
    for title, entries, measure in tables:
        print(title)
        for place, name, node in sorted(entries, key=lambda entry: -measure(entry[2]))[:8]:
            print(f"  {measure(node):4} {place}: {name}")


if __name__ == "__main__":
    main()
