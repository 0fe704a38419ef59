"""Clients of the server find with several ranks what they find with one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_SERVER = Path(__file__).parents[1] / "server"
_CLIENTS = [
    *("test_client_hints", "test_clients", "test_completions", "test_fields", "test_methods"),
    *("test_ollama", "test_protocols", "test_request_body", "test_responses", "test_server"),
]


@pytest.mark.slow
def test_clients_of_two_ranks() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *(_SERVER / f"{name}.py" for name in _CLIENTS)],
        env={**os.environ, "QWEN3_TEST_HOSTS": "local:2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
