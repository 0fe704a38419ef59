"""What the benchmark counts, and that it can tell it."""

from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.__main__ import PARTS, with_part
from benchmarks.checkpoint import random_checkpoint
from benchmarks.conversion import report
from benchmarks.gpu import STEPS, Step, main
from benchmarks.graph import dispatches_per_layer
from benchmarks.host import table
from benchmarks.quality import Made, mean_of, most_different, points, read_exam, verdicts
from qwen3_mlx.checkpoint.weights import Weights
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.model.sizes import published_config


def test_a_decoded_token_takes_fewer_kernels_than_mlx_lms() -> None:
    count = dispatches_per_layer()
    assert count == {"ours": 16, "peer": 19}
    assert count["ours"] <= 0.85 * count["peer"]


MACHINE = {"device": "cpu", "system": "Linux", "blas": "none"}


def test_the_table_of_the_hosts_work_names_ratios() -> None:
    pair = {"ours": 1.0, "peer": 2.0}
    loading = {"peak": 11, "result": 10, "files": 10, "largest tensor": 1}
    shown = table(
        {
            "machine": MACHINE,
            "date": "2026-01-01",
            "sampling": pair,
            "start to first token": pair,
            "dispatches per layer": pair,
            "graph building": {1: pair, 8: pair},
            "loading": loading,
            "quantizing": loading,
        }
    )
    assert shown.count("2.00x") == 5
    assert "1.10 x files" in shown


def test_a_parts_output_takes_the_place_of_the_last() -> None:
    document = "# Figures\n<!-- soak -->\nold\n<!-- end -->\nrest\n"
    written = with_part(document, "soak", "new\n")
    assert "old" not in written and written.endswith("<!-- end -->\nrest\n")
    assert "$ python -m benchmarks.soak\nnew\n```" in written
    assert with_part(written, "soak", "new\n") == written
    with pytest.raises(ValueError, match="0 places for plan"):
        with_part(document, "plan", "new")


def test_the_document_has_a_place_for_every_part() -> None:
    document = (Path(__file__).parent.parent / "docs" / "benchmarks.md").read_text("utf-8")
    for name, command in PARTS.items():
        assert f"$ {command}\n" in document
        with_part(document, name, "")


def made(recipe: str, name: str, bits: float, kl: float) -> Made:
    return Made(recipe, name, bits, kl, 1.0)


MADE = [
    made("uniform", "4-bit", 4.5, 0.1),
    made("mixed", "3-bit", 4.6, 0.08),
    made("mixed-rich", "3-bit", 4.4, 0.09),
    made("auto", "4.50", 4.49, 0.02),
    made("auto", "4.60", 4.6, 0.016),
]


def test_the_measured_recipe_is_set_against_what_is_no_smaller() -> None:
    assert verdicts(MADE) == pytest.approx(
        {"auto 4.5 / uniform 4-bit": 0.2, "auto / mixed 3-bit": 0.2}
    )
    drawn = points(MADE)
    assert [point.label for point in drawn] == ["4-bit", "", "", "", ""]
    assert drawn[1].line == "mixed" and drawn[1].bits == 4.6


def test_exams_are_read_and_compared() -> None:
    printed = "1 digit: A + B 等于多少？, on    100/100  100.0%\nRepeat   40/50    80.0%\n"
    exam = read_exam(printed)
    assert exam == {"1 digit: A + B 等于多少？, on": 1.0, "Repeat": 0.8}
    assert mean_of(exam) == pytest.approx(90)
    other = {**exam, "Repeat": 0.5}
    assert most_different(exam, other, 5) == ["Repeat: 80 -> 50 %"]


def test_the_report_of_conversions_names_what_differs() -> None:
    side = {"seconds": 2.0, "peak": 5e8}
    sizes = {"ours": side, "peer": {"seconds": 3.0, "peak": 1e9}, "tensors": 7, "differing": []}
    shown = report(
        {
            "machine": MACHINE,
            "date": "2026-01-01",
            "sizes": {"0.6B": sizes, "4B": {**sizes, "differing": ["norm"]}},
            "resume": {"interruptions": 2, "found": [0, 50], "total": 100, "differing": []},
            "quality": {"topics": [asdict(one) for one in MADE]},
            "exam": {"original": {"Repeat": 1.0}, "4-bit": {"Repeat": 0.5}},
        }
    )
    assert "1.50x  all 7 tensors alike" in shown
    assert "1.50x  1 tensors differ" in shown
    assert "found done (%): 0, 50; at the end all files alike" in shown
    assert "auto 4.5 / uniform 4-bit: 0.20x" in shown
    assert "exam of 4-bit: 50.0 % over 1 rows\n  Repeat: 100 -> 50 %" in shown


def test_random_checkpoints_of_real_shape_are_written_by_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 256, "num_hidden_layers": 2}
    config = {**published_config("8B"), **small}
    monkeypatch.setattr("benchmarks.checkpoint.published_config", lambda _: dict(config))
    folder = random_checkpoint(tmp_path / "random", "8B", bits=None)
    found = Weights(folder)
    assert len(found.files) == 2 + 3  # the layers; embedding, norm, head
    needed = Qwen3(ModelConfig.from_dict(config)).tensors()
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {
        name: tuple(array.shape) for name, array in needed.items()
    }


def test_every_step_of_a_gpu_runs_and_failures_are_named(capfd: pytest.CaptureFixture[str]) -> None:
    steps = {
        "good": Step(60, ["-c", "print('done')"]),
        "bad": Step(60, ["-c", "raise SystemExit(3)"]),
        "slow": Step(0.1, ["-c", "import time; time.sleep(60)"]),
        "last": Step(60, ["-c", "print('still')"]),
    }
    assert main([], steps) == 1
    out = capfd.readouterr().out
    assert "done" in out and "still" in out and "stopped after 0 s" in out
    assert out.endswith("failed: bad, slow\n")
    assert main(["good"], steps) == 0
    with pytest.raises(SystemExit, match="there is no step 'x'; there are verify, tests, demo"):
        main(["x"])
    assert sum(step.seconds for step in STEPS.values()) <= 900
    for word in STEPS["tests"].command:
        assert not word.startswith("tests/") or (Path(__file__).parent.parent / word).is_dir()
