"""What the tests of this room share: fixtures."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest

from qwen3_mlx import backend
from tests import devices


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Record every attention call of a Mac's GPU, and if there is one, allow no fallback."""
    recorded: list[dict[str, Any]] = []
    original = mx.fast.scaled_dot_product_attention
    fused = backend.on_gpu() and not devices.SIMULATED

    def record(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        recorded.append({"q": q.shape, "k": k.shape, "v": v.shape, **options})
        return original(q, k, v, **options, force_fused=fused)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", record)
    monkeypatch.setattr(backend, "on_gpu", lambda: True)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    yield recorded
