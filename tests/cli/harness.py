"""What the tests of this room share."""

import sys
from collections.abc import Sequence

import pytest

from qwen3_mlx.cli.main import main

QWEN3 = [sys.executable, "-m", "qwen3_mlx"]


def call(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run the command in this process; give exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err
