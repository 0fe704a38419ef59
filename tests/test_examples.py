"""The examples, run as they stand: each on the demo checkpoint, in seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.embedding_twins import write_twin

_EXAMPLES = Path(__file__).parent.parent / "examples"
_SAYS = {
    "batch": ["What is 17 + 12? ", "one by one "],
    "long_context": ["after ", "turns dropped: "],
    "schema": ["Sum(answer=46) after ", " tokens of thinking"],
    "second_turn": ["without idle work:", "with idle work:", "1234 + 4321 = 5555"],
    "several_at_once": [],
    "stream": [],
    "thinking_budget": ["1024: 123 + 456 = 579 (52 tokens, the model)", "closed_by': 'request'"],
    "tools": ['calculator({"expression": "1234 + 4321"})', "assistant: "],
}


@pytest.mark.parametrize("name", _SAYS)
def test_an_example_runs(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(_EXAMPLES / f"{name}.py")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    for words in _SAYS[name]:
        assert words in done.stdout, done.stdout


def test_retrieval_runs_with_two_models(tmp_path: Path) -> None:
    models = [str(write_twin(name, tmp_path / name)) for name in ("embedding", "reranker")]
    done = subprocess.run(
        [sys.executable, str(_EXAMPLES / "retrieval.py"), *models],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
