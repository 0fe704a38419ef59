"""What mlx-lm's own tools of learned quantization write, made here, loads and computes."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from qwen3_mlx import load
from tests.support import MOE, TINY, assert_close, random_ids, write_tiny

IDS = random_ids(20)
CONFIGS = {"dense": TINY, "moe": MOE}


def _rows(*_: object, **__: object) -> mx.array:
    """Return calibration text [N, L] in place of the downloaded one."""
    return mx.random.randint(0, 1200, (8, 32), key=mx.random.key(0))


def _lessons(*_: object, **__: object) -> tuple[list[Any], list[Any]]:
    rows: Any = _rows().tolist()
    return [(row, 0) for row in rows], [(row, 0) for row in rows[:4]]


# Each tool's options, and what replaces its download of calibration text.
TOOLS: dict[str, tuple[list[str], Callable[..., Any]]] = {
    "dwq": (["--batch-size", "2", "--learning-rate", "1e-4"], _lessons),
    "awq": (["--n-grid", "2", "--embed-group-size", "64"], _rows),
    "gptq": ([], _rows),
    "dynamic_quant": (["--target-bpw", "5.0"], _rows),
}


# mlx-lm's awq refuses a mixture of experts: it has no list of its layers.
CASES = [
    pytest.param(tool, kind, marks=[pytest.mark.slow] if tool == "dwq" else [])
    for tool in TOOLS
    for kind in CONFIGS
    if (tool, kind) != ("awq", "moe")
]


@pytest.mark.heavy
@pytest.mark.parametrize(("tool", "kind"), CASES)
def test_loads_and_computes_the_same(
    tool: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = pytest.importorskip("mlx_lm.utils", reason="mlx-lm makes the checkpoint here")
    module = importlib.import_module(f"mlx_lm.quant.{tool}")
    options, calibration = TOOLS[tool]
    monkeypatch.setattr(module, "load_data", calibration)
    source, made = write_tiny(tmp_path / "source", CONFIGS[kind]), tmp_path / "made"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", [tool, "--model", str(source), "--mlx-path", str(made), *options]
    )
    module.main()
    model, _ = lm.load_model(made)
    model.set_dtype(mx.float32)
    with load(made, dtype="float32", dequantize=False) as llm:
        assert_close(llm.logits(IDS), model(mx.array([IDS]))[0], 1e-4)
