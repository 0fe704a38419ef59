"""The reference: checks computed on the CPU, with MLX's own BLAS, in a process of its own.

`python -m qwen3_mlx.verify.reference FOLDER NAMES DTYPES` writes the arrays of each check in each
dtype to a file, and then a line with the file's name. A process has one BLAS, and what went wrong
in that of the device may not spread.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.processes import module_command
from qwen3_mlx.verify import arrays, attention, networks, products
from qwen3_mlx.verify.check import Check

CHECKS: list[Check] = [
    *attention.CHECKS,
    *products.CHECKS,
    *arrays.CHECKS,
    *networks.CHECKS,
]


def _file_name(place: int, dtype: str) -> str:
    return f"{place}-{dtype}.safetensors"


class Reference:
    """The process, which computes ahead while the device computes the same checks."""

    def __init__(self, folder: Path, names: Sequence[str], dtypes: Sequence[str]) -> None:
        self._folder = folder
        self._names = names
        self._done: set[str] = set()
        self._errors = (folder / "errors").open("w+")
        self._process = subprocess.Popen(
            module_command(__name__, str(folder), json.dumps(names), json.dumps(dtypes)),
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "QWEN3_BLAS": "off"},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def arrays(self, name: str, dtype: str) -> list[mx.array]:
        """Wait for the arrays of a check.

        Raises:
            Qwen3Error: the process has failed.
        """
        file = _file_name(self._names.index(name), dtype)
        assert self._process.stdout
        while file not in self._done:
            line = self._process.stdout.readline()
            if not line:
                self._errors.seek(0)
                lines = self._errors.read().strip().splitlines() or ["it ended"]
                raise Qwen3Error(f"the reference of {name!r} failed: {lines[-1]}")
            self._done.add(line.strip())
        with mx.stream(mx.cpu):
            found = mx.load(str(self._folder / file))
        assert isinstance(found, dict)
        return [found[str(place)] for place in range(len(found))]


def main(folder: str, names: str, dtypes: str) -> None:
    """Compute the checks of these names, a JSON list, in these dtypes."""
    mx.set_default_device(mx.cpu)
    by_name = {check.name: check for check in CHECKS}
    for place, name in enumerate(json.loads(names)):
        for dtype in json.loads(dtypes):
            found = by_name[name].reference(backend.compute_dtype(dtype))
            file = _file_name(place, dtype)
            mx.save_safetensors(
                str(Path(folder) / file), {str(n): array for n, array in enumerate(found)}
            )
            sys.stdout.write(f"{file}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
