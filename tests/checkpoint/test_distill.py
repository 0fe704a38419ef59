"""Learned quantization: scales and biases tuned against the original, kept only if better."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from qwen3_mlx import CheckpointError, Conversion, Qwen3Error, convert, load
from qwen3_mlx.api.calibration import distillation
from qwen3_mlx.checkpoint import distill
from qwen3_mlx.checkpoint.calibration_text import default_text
from qwen3_mlx.checkpoint.convert import partial_folder
from qwen3_mlx.checkpoint.load import quantizable_shapes
from qwen3_mlx.checkpoint.recipes import choose_formats
from qwen3_mlx.evaluate.divergence import divergence
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.quantization import Format
from qwen3_mlx.model.sizes import published_config
from qwen3_mlx.text.tokenizer import Tokenizer
from tests.cli.harness import call
from tests.support import DEMO, MOE, TINY, assert_close, read_weights, write_tiny

TEXT = default_text()[:5_000]
UNSEEN = default_text()[200_000:201_000]
KINDS = {"tied": TINY, "moe": MOE}


def mean_kl(folder: Path) -> float:
    with load(DEMO) as original, load(folder) as candidate:
        return divergence(original, candidate, UNSEEN).mean_kl


@pytest.mark.heavy
def test_the_divergence_falls(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    plain = convert(DEMO, tmp_path / "plain", bits=3)
    made = convert(
        DEMO,
        tmp_path / "tuned",
        bits=3,
        distill=5,
        calibration=TEXT,
        progress=lambda *words: told.append(words),
    )
    assert plain.distilled is None and made.distilled
    assert made.distilled.kept and made.distilled.steps == 5
    assert made.distilled.kl_after < 0.95 * made.distilled.kl_before
    assert mean_kl(made.output) < 0.95 * mean_kl(plain.output)
    assert told[-1] == ("distilling", 4 + 5, 4 + 5)
    assert (made.bytes, made.formats) == (plain.bytes, plain.formats)
    for name in ("config.json", "tokenizer.json"):
        assert (made.output / name).read_bytes() == (plain.output / name).read_bytes()
    assert sorted(made.output.iterdir()) == [made.output / path.name for path in _files(plain)]
    assert "5 steps" in (made.output / "README.md").read_text()


def _files(made: Conversion) -> list[Path]:
    return sorted(made.output.iterdir())


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("kind", "unpacked"),
    [
        ("moe", True),
        ("tied", False),  # as on a GPU
        pytest.param("tied", True, marks=pytest.mark.slow),
        pytest.param("moe", False, marks=pytest.mark.slow),
    ],
)
def test_what_is_tuned(
    kind: str, unpacked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not unpacked:
        monkeypatch.setattr(distill, "_UNPACKED", {one: one for one in distill._UNPACKED})
    source = write_tiny(tmp_path / "source", KINDS[kind])
    options: dict[str, Any] = {"bits": 4, "dtype": "float32"}  # bfloat16 rounds one step away
    plain = convert(source, tmp_path / "plain", **options)
    made = convert(source, tmp_path / "tuned", distill=1, calibration=TEXT, **options)
    assert made.distilled and made.distilled.kept
    before, after = read_weights(plain.output), read_weights(made.output)
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    assert changed == {
        name
        for name in before
        if name.endswith((".scales", ".biases")) and "layers" in name and "mlp.gate." not in name
    }
    lm = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is the reference here")
    model, _ = lm.load_model(made.output)
    model.set_dtype(mx.float32)
    ids = list(range(20))
    with load(made.output, dtype="float32", dequantize=False) as llm:
        assert_close(llm.logits(ids), model(mx.array([ids]))[0], 1e-4)


@pytest.mark.heavy
def test_what_is_no_better_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_tiny(tmp_path / "source")
    monkeypatch.setattr(distill, "_RATE", 10.0)
    made = convert(source, tmp_path / "tuned", bits=4, distill=2, calibration=TEXT)
    assert made.distilled and not made.distilled.kept
    assert made.distilled.kl_after > made.distilled.kl_before
    assert "distill did not lower the divergence on held-out text (" in caplog.text
    plain = convert(source, tmp_path / "plain", bits=4)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "tuned" / name).read_bytes() == (plain.output / name).read_bytes()
    assert "distill" not in (tmp_path / "tuned" / "README.md").read_text()


@pytest.mark.heavy
def test_the_command_says_what_it_gained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    source = str(write_tiny(tmp_path / "source"))
    command = ["convert", source, str(tmp_path / "out"), "--dtype", "float32", "--force"]
    command += ["--distill", "1", "--calibration", str(text)]
    code, out, _ = call(command, capsys)
    assert code == 0 and "on held-out text" in out
    code, out, _ = call([*command, "--json"], capsys)
    assert code == 0 and json.loads(out)["distilled"]["kept"]


class _Stop:
    """Interrupts a conversion when it reports a phase for the nth time."""

    def __init__(self, nth: int) -> None:
        self._left = nth

    def __call__(self, phase: str, done: int, total: int) -> None:
        self._left -= phase == "distilling"
        if not self._left:
            raise KeyboardInterrupt


@pytest.mark.heavy
def test_interrupted_and_resumed_is_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = write_tiny(tmp_path / "source"), tmp_path / "out"

    def run(output: Path, **options: Any) -> Conversion:
        settings: dict[str, Any] = {"bits": 4, "dtype": "float32", "distill": 2}
        return convert(source, output, calibration=TEXT, **settings, **options)

    expected = run(tmp_path / "expected")
    assert expected.distilled and expected.distilled.kept
    for nth in range(1, 5):  # two layers, two steps
        with pytest.raises(KeyboardInterrupt):
            run(output, progress=_Stop(nth))
        assert not output.exists()
        kept = {path.name for path in partial_folder(output).iterdir()}
        assert kept == {"conversion.json", "model.safetensors"}
    with monkeypatch.context() as patch:  # while the numbers are replaced
        patch.setattr(os, "fsync", _interrupt)
        patch.setattr(distill, "atomic_write", _plain_write)
        with pytest.raises(KeyboardInterrupt):
            run(output)
    assert (partial_folder(output) / distill.TUNED).exists() and not output.exists()
    with monkeypatch.context() as patch:
        patch.setattr(distill, "_tune", _interrupt)  # it is not needed a second time
        made = run(output)
    assert made.distilled == expected.distilled
    for path in _files(expected):
        if path.name != "README.md":  # which has the folder's name
            assert path.read_bytes() == (output / path.name).read_bytes(), path.name
    assert not partial_folder(output).exists()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _plain_write(path: Path) -> Any:
    return path.open("wb")


@pytest.mark.heavy
def test_other_steps_start_anew(tmp_path: Path) -> None:
    source, output = write_tiny(tmp_path / "source"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(source, output, bits=4, distill=2, calibration=TEXT, progress=_Stop(4))
    told: list[tuple[str, int, int]] = []
    made = convert(source, output, bits=4, progress=lambda *words: told.append(words))
    assert told[0] == ("writing", 0, made.bytes) and made.distilled is None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"distill": 0}, "distill is a number of steps, 1 to 1,000,000, not 0"),
        ({"distill": 10**20}, "distill is a number of steps"),
        ({"distill": True}, "distill is a number of steps"),
        ({"distill": 1.5}, "distill is a number of steps"),
        ({"distill": 2, "mode": "mxfp4"}, "which are floats in mode affine only, not mxfp4"),
        ({"distill": 2, "dequantize": True}, "there is nothing to distill"),
        ({"distill": 2, "calibration": "short"}, "to learn from it takes 1,024"),
        ({"calibration": "some"}, r"\(calibration with distill, too\)"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=complaint):
        convert(DEMO, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("calibration", [b"bytes", Path("notes.txt")])
@pytest.mark.parametrize("options", [{"distill": 2}, {"recipe": "auto", "target_bpw": 4.5}])
def test_a_calibration_that_is_no_text(
    calibration: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match="calibration must be text, not"):
        convert(DEMO, tmp_path / "out", calibration=calibration, **options)


def _codes_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return convert(DEMO, folder, bits=4).output


def _without_head(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_tiny(folder, {**TINY, "architectures": ["Qwen3Model"]})


def _too_large(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QWEN3_MEMORY", "0.2")
    return DEMO


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (_codes_kept, "nothing is rounded here: the source's codes are kept"),
        (_without_head, "distill needs the predictions of a head"),
        (_too_large, "distill takes .* GB of memory, .* and 0.[012] GB are free"),
    ],
)
def test_what_cannot_be_tuned(
    make: Callable[[Path, pytest.MonkeyPatch], Path],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = make(tmp_path / "source", monkeypatch)
    with pytest.raises(Qwen3Error, match=complaint):
        convert(source, tmp_path / "out", distill=2)
    assert not (tmp_path / "out").exists() and not partial_folder(tmp_path / "out").exists()


def test_numbers_that_are_none(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source")
    weights = read_weights(source)
    weights["model.norm.weight"][0] = float("nan")
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    with pytest.raises(CheckpointError, match="nothing can be learned from it"):
        convert(source, tmp_path / "out", distill=2, calibration=TEXT, allow_nonfinite=True)
    assert not partial_folder(tmp_path / "out").exists()


def test_nothing_is_in_both_texts() -> None:
    config = ModelConfig.from_dict(json.loads((DEMO / "config.json").read_text()))
    found = distillation(DEMO, config, None, 1)
    decode = Tokenizer(DEMO / "tokenizer.json").decode
    rows: list[Any] = [found.text.tolist(), found.held_out.tolist()]
    learned, held_out = (" ".join(map(decode, ids)).split("\n\n") for ids in rows)
    assert len(held_out) > 20
    assert not {part for part in held_out if len(part) > 40} & set(learned)


def test_what_does_not_fit_is_refused_before_auto_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN3_MEMORY", "0.2")
    phases: list[str] = []
    with pytest.raises(Qwen3Error, match=r"distill takes .* 0\.[012] GB are free"):
        convert(
            DEMO,
            tmp_path / "out",
            recipe="auto",
            target_bpw=4.5,
            distill=2,
            progress=lambda phase, *_: phases.append(phase),
        )
    assert not phases


def test_the_disk_has_room_for_what_is_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tiny(tmp_path / "source")
    made = convert(source, tmp_path / "plain", bits=4)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=made.bytes + 100))
    convert(source, tmp_path / "again", bits=4)
    with pytest.raises(Qwen3Error, match="the result takes .* GB more and the disk"):
        convert(source, tmp_path / "out", bits=4, distill=1, calibration=TEXT)
    assert not partial_folder(tmp_path / "out").exists()


@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak is about what is planned, and a large one's plan is below its weights as floats."""
    config = {**MOE, "num_hidden_layers": 4, "num_experts": 32, "hidden_size": 256}
    config |= {"moe_intermediate_size": 128}
    source = write_tiny(tmp_path / "source", config)
    network = ModelConfig.from_dict(json.loads((source / "config.json").read_text()))
    peaks: list[int] = []
    original = distill._tune

    def measured(*arguments: Any) -> Any:
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        result = original(*arguments)
        peaks.append(mx.get_peak_memory() - before)
        return result

    monkeypatch.setattr(distill, "_tune", measured)
    made = convert(source, tmp_path / "out", bits=4, distill=1, calibration=TEXT)
    planned = distill.needed_bytes(
        network, dict(made.formats), distillation(source, network, TEXT, 1)
    )
    assert 0.8 * planned < peaks[0] < 1.2 * planned
    large = published_config("30B-A3B")
    formats = choose_formats(quantizable_shapes(large), "uniform", Format(4, 64))
    text = distill.Distillation(1, mx.zeros((400, 128)), mx.zeros((64, 128)))
    network = ModelConfig.from_dict(large)
    assert distill.needed_bytes(network, formats, text) < 45e9  # 61 in bfloat16
