"""Perplexity, divergence, the errors of modules, their picture, and `qwen3 eval`."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_mlx import LLM, Qwen3Error, load
from qwen3_mlx.checkpoint.calibration_text import default_text
from qwen3_mlx.cli.main import main
from qwen3_mlx.evaluate import windows
from qwen3_mlx.evaluate.divergence import divergence
from qwen3_mlx.evaluate.perplexity import perplexity
from qwen3_mlx.evaluate.plots import Point, check_picture, draw
from qwen3_mlx.evaluate.weight_errors import ModuleRow, bits_per_weight, module_errors
from qwen3_mlx.model.qwen3 import Qwen3
from tests.support import MOE, TINY, make_model, random_ids, read_weights, write_tiny

USED = 1280  # ids of the demo's tokenizer
IDS = random_ids(50, USED)


def write_quantized(folder: Path, source: Path, bits: int, mode: str = "affine") -> Path:
    """Write the checkpoint at `source` with all of its matrices quantized."""
    shutil.copytree(source, folder)
    group_size = 64 if mode == "affine" else 32
    weights = {}
    for name, array in read_weights(source).items():
        if array.ndim == 1:
            weights[name] = array
            continue
        parts = mx.quantize(array, group_size, bits, mode=mode)
        kinds = ("weight", "scales", "biases")[: len(parts)]
        for kind, part in zip(kinds, parts, strict=True):
            weights[name.removesuffix("weight") + kind] = part
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    change_config(folder, quantization={"bits": bits, "group_size": group_size, "mode": mode})
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def log_softmax(llm: LLM, ids: list[int]) -> np.ndarray:
    """Do the straightforward thing: all logits at once, in float64, without the padding."""
    logits = np.array(llm.logits(ids)).astype(np.float64)[:, :USED]
    logits -= logits.max(axis=-1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))


def losses(llm: LLM, ids: list[int]) -> np.ndarray:
    return -log_softmax(llm, ids)[np.arange(len(ids) - 1), ids[1:]]


@pytest.fixture(scope="module")
def four_bits(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quantized(tmp_path_factory.mktemp("quantized") / "4", tiny_folder, 4)


@pytest.fixture(scope="module")
def candidate(four_bits: Path) -> Iterator[LLM]:
    with load(four_bits) as llm:
        yield llm


@pytest.fixture(autouse=True)
def no_model_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QWEN3_MODEL", raising=False)


# Windows


@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_windows_score_every_place_once(count: int, window: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, window - 1))
    spans = list(windows.spans(count, window, overlap))
    scored = [place for _, first, end in spans for place in range(first, end)]
    assert scored == list(range(count))
    assert all(end - start <= window for start, _, end in spans)
    assert all(first - start == min(first, overlap) for start, first, _ in spans)


def test_perplexity_is_that_of_the_logits(tiny: LLM) -> None:
    found = perplexity(tiny, IDS)
    expected = losses(tiny, IDS).mean()
    assert found.tokens == len(IDS) - 1
    assert found.mean_nll == pytest.approx(expected, rel=1e-5)
    assert found.perplexity == pytest.approx(np.exp(expected), rel=1e-4)


def test_any_window_that_holds_the_text_is_the_same(tiny: LLM) -> None:
    whole = perplexity(tiny, IDS, window=len(IDS) - 1)
    assert perplexity(tiny, IDS, window=2000, overlap=7) == whole
    assert perplexity(tiny, IDS, window=len(IDS) - 2).mean_nll != whole.mean_nll


def test_a_window_sees_its_overlap_and_no_more(tiny: LLM) -> None:
    first = losses(tiny, IDS[:21])  # reads 20 ids, scores the 20 that follow
    second = losses(tiny, IDS[15:36])[5:]
    third = losses(tiny, IDS[30:])[5:]
    expected = np.concatenate([first, second, third])
    found = perplexity(tiny, IDS, window=20, overlap=5)
    assert found.tokens == len(expected) == len(IDS) - 1
    assert found.mean_nll == pytest.approx(expected.mean(), rel=1e-5)


def test_chunks_and_blocks_make_no_difference(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = perplexity(tiny, IDS).mean_nll
    monkeypatch.setattr("qwen3_mlx.backend.prefill_chunk", lambda: 16)
    monkeypatch.setattr(windows, "_BLOCK", 7 * USED)
    assert perplexity(tiny, IDS).mean_nll == pytest.approx(whole, rel=1e-5)


def test_rows_of_no_token_do_not_count(tmp_path: Path) -> None:
    """Published checkpoints have more rows than tokens."""
    with load(write_tiny(tmp_path, padding=24)) as padded:
        expected = losses(padded, IDS).mean()
        assert perplexity(padded, IDS).mean_nll == pytest.approx(expected, rel=1e-5)
        with pytest.raises(ValueError, match="from 0 to 1,279, not 1,280"):
            perplexity(padded, [3, USED])


def test_the_head_sees_few_rows_at_a_time(
    tiny: LLM, candidate: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    head = Qwen3.head

    def record(model: Qwen3, x: mx.array) -> mx.array:
        rows.append(x.shape[0])
        return head(model, x)

    monkeypatch.setattr(Qwen3, "head", record)
    monkeypatch.setattr(windows, "_BLOCK", 8 * USED + 1000)
    divergence(tiny, candidate, IDS, window=30, overlap=4)
    assert max(rows) == 8
    assert sum(rows) == 2 * (len(IDS) - 1)


def test_progress_is_told(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(windows, "_BLOCK", 16 * USED)
    perplexity(tiny, IDS, progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 49), (16, 49), (32, 49), (48, 49), (49, 49)]


def test_text_is_its_ids(tiny: LLM) -> None:
    text = "What is 12 + 34?"
    assert perplexity(tiny, text) == perplexity(tiny, tiny.tokenizer.encode(text))


@pytest.mark.parametrize(
    ("ids", "options", "complaint"),
    [
        ([], {}, "0 tokens"),
        ([3], {}, "1 tokens"),
        ([3, USED], {}, "from 0 to 1,279, not 1,280"),
        ([0, -1], {}, "not -1"),
        (IDS, {"window": 0}, "window must be from 1 to the context of 2,048, not 0"),
        (IDS, {"window": 2049}, "not 2,049"),
        (IDS, {"window": 10, "overlap": 10}, "overlap must be from 0 to 9, not 10"),
        (IDS, {"overlap": -1}, "not -1"),
    ],
)
def test_wrong_arguments(
    tiny: LLM, ids: list[int], options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        perplexity(tiny, ids, **options)
    with pytest.raises(ValueError, match=complaint):
        divergence(tiny, tiny, ids, **options)


def test_damaged_weights_are_told(tiny: LLM, tiny_folder: Path) -> None:
    with load(tiny_folder) as damaged:
        norm = damaged.model.model.norm
        norm.weight = damaged.compute(lambda model: model.model.norm.weight * mx.nan)
        with pytest.raises(Qwen3Error, match="the logits of the model are not finite"):
            perplexity(damaged, IDS)
        with pytest.raises(Qwen3Error, match="the logits of the candidate are not finite"):
            divergence(tiny, damaged, IDS)


# Divergence


def test_no_divergence_from_itself(tiny: LLM) -> None:
    found = divergence(tiny, tiny, IDS)
    assert (found.mean_kl, found.p99_kl, found.agreement) == (0, 0, 1)
    assert found.reference == found.candidate == perplexity(tiny, IDS)


def test_divergence_is_that_of_the_logits(tiny: LLM, candidate: LLM) -> None:
    found = divergence(tiny, candidate, IDS)
    p, q = log_softmax(tiny, IDS)[:-1], log_softmax(candidate, IDS)[:-1]
    kl = (np.exp(p) * (p - q)).sum(axis=-1)
    assert kl.mean() > 1e-4
    assert found.mean_kl == pytest.approx(kl.mean(), rel=1e-3)
    assert found.p99_kl == pytest.approx(np.percentile(kl, 99), rel=1e-3)
    assert found.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    assert found.agreement < 1
    assert found.tokens == len(IDS) - 1
    assert found.candidate.mean_nll == pytest.approx(losses(candidate, IDS).mean(), rel=1e-5)
    assert divergence(candidate, tiny, IDS).mean_kl != found.mean_kl  # it has a direction


def test_fewer_bits_diverge_more(tiny: LLM, tiny_folder: Path) -> None:
    found = []
    for bits in (2, 4, 8):
        with load(tiny_folder, bits=bits) as llm:
            found.append(divergence(tiny, llm, IDS))
    two, four, eight = found
    assert two.mean_kl > 4 * four.mean_kl > 16 * eight.mean_kl > 0
    assert two.p99_kl > four.p99_kl > eight.p99_kl
    assert two.agreement < eight.agreement


def test_another_tokenizer_is_refused(tiny: LLM, tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "other")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with load(folder) as other:
        for text in ("What is the sum?", tiny.tokenizer.encode("What is the sum?")):
            with pytest.raises(Qwen3Error, match="different tokens"):
                divergence(tiny, other, text)


def test_another_vocabulary_is_refused(tiny: LLM, tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "smaller")
    weights = make_model(TINY | {"vocab_size": 960}).tensors()
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    change_config(folder, vocab_size=960)
    with load(folder) as smaller, pytest.raises(Qwen3Error, match="1,280 and 960 tokens"):
        divergence(tiny, smaller, IDS)


# Modules


@pytest.mark.parametrize("config", [TINY, MOE])
@pytest.mark.parametrize(("bits", "mode"), [(3, "affine"), (4, "mxfp4")])
def test_errors_of_modules(
    config: dict[str, Any],
    bits: int,
    mode: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qwen3_mlx.evaluate.weight_errors._BLOCK", 1000)  # several blocks a module
    source = write_tiny(tmp_path / "source", config)
    quantized = write_quantized(tmp_path / "quantized", source, bits, mode)
    rows = {row.path: row for row in module_errors(source, quantized)}
    group = 64 if mode == "affine" else 32
    weights = {name: array for name, array in read_weights(source).items() if array.ndim > 1}
    assert {f"{path}.weight" for path in rows} == set(weights)
    for name, array in weights.items():
        packed, scales, *rest = mx.quantize(array, group, bits, mode=mode)
        biases = rest[0] if rest else None
        back = mx.dequantize(packed, scales, biases, group_size=group, bits=bits, mode=mode)
        before, after = np.array(array), np.array(back.astype(mx.float32))
        error = np.sqrt(((after - before) ** 2).sum() / (before**2).sum())
        row = rows[name.removesuffix(".weight")]
        assert row.error == pytest.approx(error, rel=1e-4)
        assert row.weights == array.size
        assert row.format == ("3-bit g64" if mode == "affine" else "mxfp4")
        # float32 scales and biases beside 3 bits; one byte beside 4
        extra = 2 * 32 / 64 if mode == "affine" else 8 / 32
        assert row.bits_per_weight == bits + extra
    assert bits_per_weight(list(rows.values())) == pytest.approx(bits + extra)


def test_modules_come_in_the_order_of_layers(tmp_path: Path) -> None:
    config = MOE | {"num_hidden_layers": 11}
    folder = write_tiny(tmp_path / "deep", config)
    told: list[tuple[int, int]] = []
    rows = module_errors(folder, folder, progress=lambda done, total: told.append((done, total)))
    layers = [int(row.path.split(".")[2]) for row in rows if ".layers." in row.path]
    assert layers == sorted(layers) and max(layers) == 10
    assert (rows[0].path, rows[-1].path) == ("model.embed_tokens", "lm_head")
    assert {row.error for row in rows} == {0.0}
    assert {row.format for row in rows} == {"float32"}
    assert told == [(done, len(rows)) for done in range(len(rows) + 1)]


def test_a_copy_of_the_embedding_is_no_module(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "with_copy")
    weights = read_weights(tiny_folder)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    assert module_errors(folder, tiny_folder) == module_errors(tiny_folder, tiny_folder)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_hidden_layers": 1}, r"only one has model\.layers\.1"),
        ({"intermediate_size": 192}, r"down_proj has 64 x 128 weights in one and 64 x 192"),
    ],
)
def test_other_networks_have_no_errors(
    tiny_folder: Path, tmp_path: Path, changes: dict[str, int], complaint: str
) -> None:
    other = write_tiny(tmp_path / "other", TINY | changes)
    with pytest.raises(Qwen3Error, match=complaint):
        module_errors(tiny_folder, other)


# Text and picture


def test_there_is_text_without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    text = default_text()
    assert len(text) > 100_000 and "statement" in text
    assert default_text() == text
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(Qwen3Error, match="give a text of your own"):
        default_text()


POINTS = [Point("4 bits", 4.5, 0.02), Point("the same", 16, 0.0), Point("2 bits", 2.5, 0.4)]
ROWS = [ModuleRow(f"model.layers.{n}.mlp.up_proj", "4-bit g64", 64, 4.5, 0.1) for n in range(3)]


@pytest.mark.heavy
def test_pictures(tmp_path: Path) -> None:
    for name in ("a.svg", "b.SVG", "c.png"):
        draw(tmp_path / name, POINTS, ROWS)
    svg = (tmp_path / "a.svg").read_text()
    assert svg == (tmp_path / "b.SVG").read_text()
    assert "<svg" in svg and "<dc:date>" not in svg
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    draw(tmp_path / "alone.svg", POINTS[:1])
    assert (tmp_path / "alone.svg").stat().st_size < len(svg)
    assert "matplotlib.pyplot" not in sys.modules


def test_pictures_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"must end in \.png or \.svg, and a\.pdf does not"):
        draw(tmp_path / "a.pdf", POINTS)
    with pytest.raises(ValueError, match="is no folder"):
        check_picture(tmp_path / "nowhere" / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Qwen3Error, match=r"pip install 'matplotlib"):
        draw(tmp_path / "a.png", POINTS)
    assert not list(tmp_path.iterdir())


# The command line


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["eval", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("Räume ordnen: rooms, and what lies in them. " * 3, encoding="utf-8")
    return file


def test_eval_divergence(
    tiny: LLM,
    candidate: LLM,
    tiny_folder: Path,
    four_bits: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("divergence", tiny_folder, four_bits, "--text", text_file)
    picture = text_file.with_suffix(".svg")
    code, out, err = call(capsys, *arguments, "--window", "20", "--json", "--plot", picture)
    assert (code, err) == (0, "")
    facts = json.loads(out)
    expected = divergence(tiny, candidate, text_file.read_text("utf-8"), window=20)
    for name in ("tokens", "mean_kl", "p99_kl", "agreement"):
        assert facts[name] == getattr(expected, name)
    assert facts["candidate"]["perplexity"] == expected.candidate.perplexity
    assert facts["reference"]["model"] == str(tiny_folder)
    assert len(facts["modules"]) == len(module_errors(tiny_folder, four_bits))
    assert facts["bits_per_weight"] == 5.0
    assert picture.read_text().count("<svg") == 1

    code, out, err = call(capsys, *arguments, "--tokens", "30")
    assert code == 0
    assert "the first 30 of" in err
    for word in ("29", "nats", "99th percentile", "perplexity", "4-bit g64", "10 modules"):
        assert word in out


def test_eval_divergence_of_other_networks(
    tiny_folder: Path, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_tiny(tmp_path / "other", TINY | {"num_hidden_layers": 1})
    arguments = ("divergence", tiny_folder, other, "--text", text_file)
    code, out, err = call(capsys, *arguments)
    assert code == 0
    assert "nats" in out and "modules" not in out
    assert err.startswith("No table of modules: the checkpoints are not of one network")
    code, _, err = call(capsys, *arguments, "--plot", tmp_path / "a.png")
    assert code == 1
    assert err.startswith("qwen3: the checkpoints are not of one network")


def test_eval_perplexity(
    tiny: LLM, tiny_folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("perplexity", tiny_folder, "--window", "30")
    expected = perplexity(tiny, text_file.read_text("utf-8"), window=30)
    code, out, err = call(capsys, *arguments, "--text", text_file)
    assert (code, err) == (0, "")
    assert f"{expected.perplexity:,.3f}" in out
    with pytest.MonkeyPatch.context() as patch, text_file.open(encoding="utf-8") as piped:
        patch.setattr(sys, "stdin", piped)
        code, out, _ = call(capsys, *arguments, "--text", "-", "--json")
    assert json.loads(out)["mean_nll"] == expected.mean_nll
    code, out, err = call(capsys, *arguments, "--tokens", "40")
    assert code == 0 and "39" in out and "the first 40 of" in err


def test_eval_measures_what_a_load_option_costs(
    tiny_folder: Path, four_bits: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = ("divergence", tiny_folder, tiny_folder, "--text", text_file, "--json")
    facts = json.loads(call(capsys, *same)[1])
    assert facts["mean_kl"] == 0 and facts["bits_per_weight"] == 32
    for option in ("--kv-bits", "--bits"):
        facts = json.loads(call(capsys, *same, option, "4")[1])
        assert facts["mean_kl"] > 0 and facts["candidate"] != facts["reference"]
    assert facts["modules"] == [] and facts["bits_per_weight"] is None  # the stored ones have 32
    stored = json.loads(call(capsys, "divergence", tiny_folder, four_bits, *same[3:])[1])
    assert facts["mean_kl"] == pytest.approx(stored["mean_kl"], rel=1e-3)
    with_bits = ("--bits", "4", "--plot", text_file.with_suffix(".svg"))
    code, _, err = call(capsys, *same, *with_bits)
    assert code == 2 and "--plot shows the stored weights, which --bits changes" in err
    one = ("perplexity", tiny_folder, "--text", text_file, "--json")
    assert json.loads(call(capsys, *one)[1])["mean_nll"] == facts["reference"]["mean_nll"]
    found = json.loads(call(capsys, *one, "--bits", "4")[1])
    assert found["mean_nll"] == facts["candidate"]["mean_nll"]


def test_eval_helps(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        code, out, err = call(capsys, *arguments)
        assert (code, err) == (0, "")
        assert "perplexity" in out and "divergence" in out
    code, out, _ = call(capsys, "divergence", "--help")
    assert code == 0
    for word in ("REFERENCE", "CANDIDATE", "--text", "--plot", "--json", "nats"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["divergence", "a"], 2, "Missing argument 'CANDIDATE'"),
        (["perplexity", "--text", "nowhere.txt"], 2, "nowhere.txt cannot be read: No such file"),
        (["perplexity", "./nowhere"], 1, "is no folder here, nor a hub name"),
        (["perplexity", "--window", "0"], 1, "window must be from 1"),
        (["perplexity", "--tokens", "-1"], 2, "--tokens"),
        (["perplexity", "--tokens", "1"], 1, "two are the least"),
        (["perplexity", "--temperature", "1"], 2, "No such option: --temperature"),
        (["divergence", "./a", "./b", "--plot", "a.pdf"], 1, "must end in .png or .svg"),
        (["nothing"], 2, "No such command"),
    ],
)
def test_eval_failures_are_one_line(
    arguments: list[str], code: int, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, out, err = call(capsys, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("qwen3: ")]
    assert (found, out) == (code, "")
    assert len(lines) == 1 and complaint in lines[0]


def test_text_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "latin1.txt"
    file.write_bytes("Räume".encode("latin-1"))
    code, _, err = call(capsys, "perplexity", "--text", file)
    assert code == 2
    assert "is not UTF-8 text" in err
