"""Methods that an address takes or does not."""

from collections.abc import Iterator

import httpx
import pytest

from qwen3_mlx import LLM
from tests.server.serving import Served, serving


@pytest.fixture(scope="module")
def served(demo: LLM) -> Iterator[Served]:
    """A server."""
    with serving(demo) as running:
        yield running


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/models", "GET"),
        ("GET", "/v1/messages", "POST"),
        ("DELETE", "/api/chat", "POST"),
    ],
)
def test_a_refusal_names_the_method_that_is_taken(
    served: Served, method: str, path: str, allowed: str
) -> None:
    response = httpx.request(method, served.url + path, verify=False)
    assert response.status_code == 405 and "does not take this method" in response.text
    assert response.headers["allow"] == allowed


def test_health_is_told_by_its_status_alone(served: Served) -> None:
    response = httpx.head(f"{served.url}/health", verify=False)
    assert response.status_code == 200 and not response.content
    assert "head" not in served.get("/openapi.json").json()["paths"]["/health"]
