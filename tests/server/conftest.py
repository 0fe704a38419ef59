"""What the tests of the page share: Chromium, and a server with scripted replies."""

from collections.abc import Iterator
from typing import Any

import pytest

from qwen3_mlx import LLM
from tests.server.browsing import chromium
from tests.server.fake_chat import FakeChat, fake_chat
from tests.server.serving import serving


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
