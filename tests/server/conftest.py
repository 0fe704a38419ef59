"""What the tests share: Chromium, and servers with scripted replies and with the twins."""

from collections.abc import Iterator
from typing import Any

import pytest

from qwen3_mlx import LLM, load
from tests.embedding_twins import write_twin
from tests.server.browsing import chromium
from tests.server.fake_chat import FakeChat, fake_chat
from tests.server.serving import Served, serving


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, without a window."""
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def server(demo: LLM) -> Iterator[FakeChat]:
    """A server with scripted replies."""
    with serving(demo) as running, fake_chat(running) as fake:
        yield fake


@pytest.fixture(scope="session")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of an embedding model, with a short context."""
    folder = write_twin("embedding", tmp_path_factory.mktemp("served") / "embedding")
    with load(folder, context=256) as llm, serving(llm) as running:
        yield running


@pytest.fixture(scope="session")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of a reranker, with a short context."""
    folder = write_twin("reranker", tmp_path_factory.mktemp("served") / "reranker")
    with load(folder, context=256) as llm, serving(llm) as running:
        yield running
