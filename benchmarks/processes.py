"""Runs measurements in their own processes."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

# mlx-lm's process sometimes waits forever for threads of MLX's CPU build.
_PATIENCE = 1800  # seconds


def json_of(module: str, *arguments: object, dies: bool = False) -> Any:
    """Run a module in its own process and return the JSON that it prints.

    Exits if the process fails or times out. With `dies` it must fail.
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
    """Return the peak resident bytes of this process.

    On Linux `getrusage` starts from the parent's peak, so /proc is used there.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(fields["VmHWM"].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes
