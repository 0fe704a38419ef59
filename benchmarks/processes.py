"""Measurements in processes of their own."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

# mlx-lm's process has been seen to wait for ever for threads of MLX's CPU build.
_PATIENCE = 1800  # seconds


def json_of(module: str, *arguments: object, dies: bool = False) -> Any:
    """Run a module in a process of its own and read the line of JSON that it prints.

    With `dies` it must not end well.
    """
    words = list(map(str, arguments))
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=_PATIENCE,
            env=os.environ | {"MLX_ENABLE_TF32": "0"},
        )
    except subprocess.TimeoutExpired:
        sys.exit(f"{module} {' '.join(words)} was stopped after {_PATIENCE:,} s; run it again")
    if bool(done.returncode) != dies:
        sys.exit(f"{module} {' '.join(words)} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


def peak_resident() -> int:
    """Give the most bytes that this process has held resident.

    On Linux what `getrusage` says begins with the parent's peak; /proc has the process's own.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(fields["VmHWM"].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes
