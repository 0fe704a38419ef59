"""The examples, run as they stand: each on the demo checkpoint, in seconds."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.embedding_twins import write_twin

_EXAMPLES = Path(__file__).parent.parent / "examples"
_SAYS = {
    "batch": ["What is 17 + 12? ", "one by one "],
    "mcp_tools": ['calculator({"expression": "1234 + 4321"})', "tool: 5555", "4321 = 5555"],
    "long_context": ["after ", "turns dropped: "],
    "schema": ["Sum(answer=46) after ", " tokens of thinking"],
    "second_turn": ["without idle work:", "with idle work:", "1234 + 4321 = 5555"],
    "several_at_once": [],
    "stream": [],
    "thinking_budget": ["1024: 123 + 456 = 579 (52 tokens, the model)", "closed_by': 'request'"],
    "tools": ['calculator({"expression": "1234 + 4321"})', "assistant: "],
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", _SAYS)
def test_an_example_runs(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which saves half a second."""
    file = str(_EXAMPLES / f"{name}.py")
    monkeypatch.delenv("QWEN3_MODEL", raising=False)
    monkeypatch.setattr(sys, "argv", [file])
    runpy.run_path(file, run_name="__main__")
    said = capsys.readouterr().out
    assert said
    for words in _SAYS[name]:
        assert words in said, said


@pytest.mark.slow
def test_a_fine_tune_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(_EXAMPLES / "fine_tune.py")
    monkeypatch.syspath_prepend(str(_EXAMPLES))
    monkeypatch.setattr("qwen3_mlx.tuning.tune.draw_losses", lambda *_: None)  # takes a second
    monkeypatch.setattr("qwen3_mlx.tuning.tune._MAX_VALID", 8)
    monkeypatch.setattr(sys, "argv", [file, "1"])
    runpy.run_path(file, run_name="__main__")
    assert "without the adapter: 0 of 24 right" in capsys.readouterr().out


def test_an_example_is_a_program() -> None:
    command = [sys.executable, str(_EXAMPLES / "stream.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_retrieval_runs_with_two_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [str(write_twin(name, tmp_path / name)) for name in ("embedding", "reranker")]
    file = str(_EXAMPLES / "retrieval.py")
    monkeypatch.setattr(sys, "argv", [file, *models])
    runpy.run_path(file, run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) == 2
