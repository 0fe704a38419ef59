"""Command lines of the scripts whose output is a page in docs/: print it, or check the page."""

import difflib
import sys
from collections.abc import Callable
from pathlib import Path


def run(arguments: list[str], generate: Callable[[], str]) -> int:
    """Print what `generate` returns, or with --check FILE compare it with the file."""
    match arguments:
        case []:
            sys.stdout.buffer.write(generate().encode())  # UTF-8 in every locale
            return 0
        case ["--check", file]:
            return _check(Path(file), generate())
        case _:
            print("arguments: none, or --check FILE", file=sys.stderr)
            return 2


def _check(file: Path, expected: str) -> int:
    found = file.read_text(encoding="utf-8") if file.exists() else ""
    if found == expected:
        return 0
    old, new = found.splitlines(keepends=True), expected.splitlines(keepends=True)
    sys.stderr.writelines(difflib.unified_diff(old, new, str(file), "generated"))
    print(f"{file} is stale: run `make docs`", file=sys.stderr)
    return 1
