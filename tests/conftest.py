"""What all tests share: the reference numerics, and a small model to load."""

import gc
import os
import signal
import tempfile

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # on M5, float32 is otherwise not float32
# Threads of BLAS gain nothing on the small models of tests, and spin between their products.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.pop("QWEN3_MEMORY", None)
# Or each process that tests start would compile the package anew, for a third of a second.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Neither the user's settings nor conversations; what tests ask is not recorded.
os.environ["QWEN3_HOME"] = tempfile.mkdtemp()
# No certificate is needed, and to load the usual ones takes a client 20 ms.
os.environ["SSL_CERT_DIR"] = os.environ["QWEN3_HOME"]
with open(os.path.join(os.environ["QWEN3_HOME"], "config.toml"), "w") as _settings:
    _settings.write("log = false\n")

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main
from hypothesis import HealthCheck, settings

from qwen3_mlx import LLM, load
from qwen3_mlx.engine import memory_ledger
from qwen3_mlx.text import repetition
from tests import devices
from tests.support import write_tiny

devices.prepare()
device = devices.device

# A machine that has other work to do is no failure.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
# A shell has what it runs in the background ignore Ctrl-C, and so would the commands of the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Spare the collector the half million objects of the tests, which it would go through anew."""
    gc.collect()
    gc.freeze()


_build = cache(typer.main.get_command)


def _command_of(app: typer.Typer) -> Any:
    """Return the command of `app` as new; to build it takes longer than most commands do."""
    command = _build(app)
    vars(command).pop("_shows_all", None)
    return command


typer.main.get_command = _command_of  # type: ignore[assignment]


@pytest.fixture(scope="session")
def demo() -> Iterator[LLM]:
    """The embedded checkpoint, loaded as it is on disk; QWEN3_TEST_HOSTS names several ranks."""
    with load(dequantize=False, hosts=os.environ.get("QWEN3_TEST_HOSTS")) as llm:
        yield llm


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with the demo's tokenizer."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Iterator[LLM]:
    """That checkpoint, loaded."""
    with load(tiny_folder) as llm:
        yield llm


@pytest.fixture
def short_circles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a text go in circles when 40 tokens are repeated, and not only after 256."""
    monkeypatch.setattr(repetition, "_MIN_REPEATED", 40)


@pytest.fixture
def whole_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no other LLM of the process be sure of any memory."""
    monkeypatch.setattr(memory_ledger, "_shares", [])
