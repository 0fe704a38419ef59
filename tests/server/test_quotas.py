"""What the holder of a key may do in a minute."""

import time
from pathlib import Path

import httpx
import pytest

from qwen3_mlx import LLM
from tests.server.harness import endless, until
from tests.server.serving import Served, serving


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock for the limits, which stands still."""
    now = [time.monotonic()]
    monkeypatch.setattr("qwen3_mlx.server.quotas.time", type("", (), {"monotonic": lambda: now[0]}))
    return now


def asked(served: Served, key: str) -> httpx.Response:
    """Ask for a few tokens with a key."""
    body = {**endless(), "max_tokens": 4}
    return served.post("/v1/completions", body, Authorization=f"Bearer {key}")


def test_limits_are_each_keys_own(demo: LLM, tmp_path: Path, clock: list[float]) -> None:
    file = tmp_path / "keys"
    file.write_text("ann secret-a 2\nbob secret-b - 10\nsecret-c\n")
    with serving(demo, key_file=file) as served:
        assert [asked(served, "secret-a").status_code for _ in range(3)] == [200, 200, 429]
        refused = asked(served, "secret-a")
        sentence = "the key ann has used its 2 requests a minute; try again in 30 s"
        assert refused.json()["error"]["message"] == sentence
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.headers["retry-after"] == "30"
        assert served.get("/v1/models", Authorization="Bearer secret-a").status_code == 200
        first = asked(served, "secret-b")
        used = first.json()["usage"]["total_tokens"]
        assert first.status_code == 200 and used > 5
        assert asked(served, "secret-b").status_code == 200  # with what is left; then there is debt
        assert "has used its 10 tokens a minute" in asked(served, "secret-b").text
        assert asked(served, "secret-c").status_code == 200
        clock[0] += 31
        assert [asked(served, "secret-a").status_code for _ in range(2)] == [200, 429]
        clock[0] += 6 * (2 * used - 10)  # seconds in which the debt is paid
        assert asked(served, "secret-b").status_code == 200


def test_who_leaves_early_pays_too(demo: LLM, tmp_path: Path, clock: list[float]) -> None:
    file = tmp_path / "keys"
    file.write_text("ann secret - 20\n")
    with serving(demo, key_file=file) as served:
        body = {**endless(), "stream": True}
        headers = {"Authorization": "Bearer secret"}
        url = f"{served.url}/v1/completions"
        with httpx.stream("POST", url, json=body, headers=headers) as response:
            for _ in zip(response.iter_lines(), range(60), strict=False):
                pass
        until(lambda: asked(served, "secret").status_code == 429)
