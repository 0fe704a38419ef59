"""The public `convert`, its command and its script."""

import json
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from qwen3_mlx import CheckpointError, Qwen3Error, SamplingParams, convert, load
from qwen3_mlx.cli.evaluate import ReadingOptions, compare
from qwen3_mlx.cli.main import main
from qwen3_mlx.model.quantization import Format
from tests.cli.harness import call
from tests.support import DEMO, MOE, TINY, assert_close, random_ids, write_tiny

IDS = random_ids(30)
ROOT = Path(__file__).parents[2]


def logits(folder: Path) -> Any:
    with load(folder, dequantize=False) as llm:
        return llm.logits(IDS)


def test_converts_and_answers(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    made = convert(DEMO, tmp_path / "4bit", progress=lambda *words: told.append(words))
    assert made.output == tmp_path / "4bit"
    assert made.weights == 1870016
    assert 4.5 < made.bits_per_weight < 4.6
    assert set(made.formats.values()) == {Format(4, 64)}
    assert told[0][:2] == ("writing", 0) and told[-1] == ("writing", made.bytes, made.bytes)
    with load(made.output) as llm:
        greedy = SamplingParams(temperature=0)
        assert llm.chat("What is 12 + 34?", thinking=True, sampling=greedy).text.endswith("46")
    card = (made.output / "README.md").read_text()
    assert "library_name: mlx" in card and "| 4 | 64 | affine | 29 |" in card
    for name in ("chat_template.jinja", "tokenizer.json", "generation_config.json"):
        assert (made.output / name).read_bytes() == (DEMO / name).read_bytes()


def test_is_what_loading_with_bits_gives(tiny_folder: Path, tmp_path: Path) -> None:
    for bits in (3, 8):
        made = convert(tiny_folder, tmp_path / f"{bits}", bits=bits, dtype="float32")
        with load(tiny_folder, bits=bits, dequantize=False) as llm:
            assert_close(logits(made.output), llm.logits(IDS))


def test_more_bits_than_the_source_are_noted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    convert("demo", tmp_path / "4bit")
    assert not caplog.messages
    convert(tmp_path / "4bit", tmp_path / "8bit", bits=8)
    assert caplog.messages == ["8 bits from 4 bits: larger, not better"]
    caplog.clear()
    convert("demo", tmp_path / "3bit", bits=3)
    convert(tmp_path / "3bit", tmp_path / "default")
    assert caplog.messages == ["4 bits from 3 bits: larger, not better"]


def test_dequantizing_back(tiny_folder: Path, tmp_path: Path) -> None:
    quantized = convert(tiny_folder, tmp_path / "8bit", bits=8, dtype="float32")
    plain = convert(quantized.output, tmp_path / "plain", dequantize=True)
    assert plain.bits_per_weight == 32 and not plain.formats
    assert "quantization" not in json.loads((plain.output / "config.json").read_text())
    assert_close(logits(plain.output), logits(quantized.output), 1e-4)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "config", [None, pytest.param(MOE, marks=pytest.mark.slow)], ids=["dense", "moe"]
)
def test_the_measured_recipe_is_closer_at_its_size(
    config: dict[str, Any] | None, tmp_path: Path
) -> None:
    layers = 3
    source = write_tiny(tmp_path / "source", {**(config or TINY), "num_hidden_layers": layers})
    text = "What is 12 + 34? Repeat: red green blue. " * 24
    told: list[tuple[str, int, int]] = []
    measured = convert(
        source,
        tmp_path / "auto",
        recipe="auto",
        target_bpw=4.6,
        calibration=text,
        progress=lambda *words: told.append(words),
    )
    assert measured.bits_per_weight <= 4.6
    assert {what for what, *_ in told} == {"measuring", "writing"}
    assert len(set(measured.formats.values())) > 1
    formats = measured.formats
    for layer in range(layers):
        qkv = {formats[f"model.layers.{layer}.self_attn.{name}_proj"] for name in "qkv"}
        assert len(qkv) == 1
        if config:
            assert formats[f"model.layers.{layer}.mlp.gate"].bits == 8
    uniform = convert(source, tmp_path / "uniform", bits=4, group_size=64)
    assert uniform.bits_per_weight >= measured.bits_per_weight - 0.15
    with load(source) as llm:
        ids = llm.tokenizer.encode(text)[:200]
        expected = llm.logits(ids)
    distances: list[mx.array] = []
    for made in (measured, uniform):
        with load(made.output, dequantize=False) as llm:
            distances.append(mx.square(llm.logits(ids) - expected).mean())
    assert bool(distances[0] < distances[1])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"bits": 7}, "bits must be one of 2, 3, 4, 5, 6, 8, not 7"),
        ({"mode": "int4"}, "quantization mode must be one of"),
        ({"mode": "mxfp4", "bits": 8}, "bits must be one of 4, not 8"),
        ({"recipe": "best"}, "recipe must be one of uniform, mixed, mixed-rich, auto, not 'best'"),
        ({"recipe": "auto"}, "needs a target_bpw from 2.5 to 9.0 bits, not None"),
        ({"recipe": "auto", "target_bpw": 1}, "needs a target_bpw"),
        ({"recipe": "auto", "target_bpw": 4.5, "bits": 4}, "go with neither recipe 'auto'"),
        ({"recipe": "auto", "target_bpw": 4.5, "calibration": "short"}, "calibration text has"),
        ({"target_bpw": 4.5}, "go with recipe 'auto', not 'uniform'"),
        ({"recipe": "mixed", "mode": "mxfp4"}, "mixes bits"),
        ({"dequantize": True, "bits": 4}, "exclude each other"),
        ({"dequantize": True, "group_size": 32}, "nor dequantize"),
        ({"dequantize": True, "recipe": "mixed"}, "has no place"),
        ({"dtype": "int8"}, "dtype must be one of"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        convert(DEMO, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_lost(tmp_path: Path) -> None:
    made = convert(DEMO, tmp_path / "out", bits=8)
    before = (made.output / "model.safetensors").read_bytes()
    with pytest.raises(Qwen3Error, match="exists; --force"):
        convert(DEMO, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is no folder here"):
        convert("nowhere", tmp_path / "out", force=True)
    assert (made.output / "model.safetensors").read_bytes() == before
    assert convert(DEMO, tmp_path / "out", force=True).bits_per_weight < 5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.heavy
def test_the_command_and_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "qwen3_mlx.cli.convert.compare", partial(compare, reading=ReadingOptions(tokens=100))
    )
    output = tmp_path / "made"
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(DEMO), str(output), "--bits", "6", "--report", "--json"])
    assert not ended.value.code
    facts = json.loads(capsys.readouterr().out)
    assert facts["output"] == str(output)
    assert 0 < facts["report"]["mean_kl"] < 0.1
    report = json.loads((output / "report.json").read_text())
    assert report["modules"][0]["error"] > 0
    assert (output / "report.svg").read_text().startswith("<?xml")


@pytest.mark.heavy
def test_a_result_that_is_called_like_a_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "qwen3_mlx.cli.convert.compare", partial(compare, reading=ReadingOptions(tokens=100))
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    code, _, err = call(["convert", str(DEMO), "0.6b", "--report"], capsys)
    assert code == 0, err
    assert Path("0.6b/report.json").is_file()
    assert "Try it: qwen3 --model ./0.6b " in err


@pytest.mark.heavy
def test_the_script_is_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = str(ROOT / "convert.py")
    command = [sys.executable, script, str(DEMO), str(tmp_path / "made"), "--mode", "mxfp4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "4.26" in done.stdout and "qwen3 --model" in done.stderr

    def run(*arguments: str) -> tuple[int, str, str]:
        """Run it in this process, which saves half a second."""
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(script, run_name="__main__")
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    assert "--target-bpw" in run("--help")[1]
    code, _, err = run(str(DEMO), str(tmp_path / "made"))
    assert code == 1 and err.startswith("qwen3: ") and err.count("\n") == 1


def test_the_function_is_not_hidden_by_a_module() -> None:
    import qwen3_mlx.cli.convert

    assert callable(qwen3_mlx.convert)
