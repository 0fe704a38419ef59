"""A head that config.json ties to the embedding: the weights decide whether it is."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from qwen3_mlx import CheckpointError, convert, load
from qwen3_mlx.files import read_json
from tests.checkpoint.harness import EMBEDDING, HEAD, with_head
from tests.cli.harness import call
from tests.support import assert_close, random_ids, read_weights

IDS = random_ids(20)


def logits(folder: Path, **options: Any) -> mx.array:
    with load(folder, **options) as llm:
        return llm.logits(IDS)


def states(folder: Path) -> bool:
    found = read_json(folder / "config.json")["tie_word_embeddings"]
    assert isinstance(found, bool)
    return found


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def own(tiny_folder: Path, tmp_path: Path) -> Path:
    return with_head(tiny_folder, tmp_path / "own", like="other")


@pytest.fixture
def expected(tiny_folder: Path, tmp_path: Path) -> mx.array:
    """The logits of the same weights under a config that says how they are."""
    return logits(with_head(tiny_folder, tmp_path / "said", like="other", tie=False))


def test_loading_takes_a_head_of_its_own(
    own: Path, tiny_folder: Path, expected: mx.array, caplog: pytest.LogCaptureFixture
) -> None:
    with load(own) as llm:
        assert not llm.config.tie_word_embeddings
        found = llm.logits(IDS)
    assert_close(found, expected, 0)
    assert float(mx.abs(found - logits(tiny_folder)).max()) > 0.01
    (warning,) = warnings(caplog)
    assert "lm_head holds other numbers; it is used, as if tie_word_embeddings were" in warning


@pytest.mark.parametrize("bits", [None, 4])
def test_converting_keeps_it_and_says_so(
    bits: int | None, own: Path, expected: mx.array, tmp_path: Path, caplog: Any
) -> None:
    convert(own, tmp_path / "out", bits=bits, dequantize=bits is None, dtype="float32")
    assert len(warnings(caplog)) == 1
    assert not states(tmp_path / "out")
    found = logits(tmp_path / "out")
    assert_close(found, expected if bits is None else logits(own, bits=bits), 1e-5)
    assert len(warnings(caplog)) == 1 + (bits is not None)  # the result needs no warning


@pytest.mark.slow
def test_the_measured_recipe_measures_it(own: Path, tmp_path: Path) -> None:
    text = " ".join(f"{n} + {n} = {2 * n}." for n in range(100))
    made = convert(own, tmp_path / "out", recipe="auto", target_bpw=8, calibration=text)
    assert "lm_head" in made.formats
    assert not states(tmp_path / "out")


def test_a_copy_of_the_embedding_stays_tied(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = with_head(tiny_folder, tmp_path / "copy", like="copy")
    assert_close(logits(folder), logits(tiny_folder), 0)
    convert(folder, tmp_path / "out", dequantize=True)
    assert states(tmp_path / "out")
    assert HEAD not in read_weights(tmp_path / "out")
    assert not warnings(caplog)


@pytest.mark.parametrize("kind", ["another dtype", "another zero"])
def test_a_head_with_the_numbers_of_the_embedding_stays_tied(
    kind: str, tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "same")
    weights = read_weights(folder)
    embedding = weights[EMBEDDING].astype(mx.bfloat16).at[0, 0].multiply(0)
    weights[EMBEDDING] = embedding
    if kind == "another dtype":
        weights[HEAD] = embedding.astype(mx.float32)
    else:
        zero = mx.zeros_like(embedding[:1, :1])
        row = mx.concatenate([-zero, embedding[:1, 1:]], axis=1)
        weights[HEAD] = mx.concatenate([row, embedding[1:]])
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with load(folder) as llm:
        assert llm.config.tie_word_embeddings
    convert(folder, tmp_path / "out", dequantize=True)
    assert states(tmp_path / "out")
    assert not warnings(caplog)


@pytest.mark.parametrize("kind", ["more rows", "no rows", "bias"])
def test_a_head_that_fits_nowhere_is_refused_in_a_sentence(
    kind: str, tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "misfit")
    weights = read_weights(folder)
    embedding = weights[EMBEDDING]
    if kind == "bias":
        weights |= {HEAD: embedding, "lm_head.bias": mx.zeros(len(embedding))}
    else:
        weights[HEAD] = (
            mx.concatenate([embedding, embedding[:8]])
            if "more" in kind
            else mx.zeros((0, embedding.shape[1]))
        )
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    words = "unexpected: lm_head.bias" if kind == "bias" else r"an lm_head\.weight \[.*is needed;"
    for attempt in (lambda: load(folder), lambda: convert(folder, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=words):
            attempt()
    assert not warnings(caplog)
    if kind != "bias":
        code, _, err = call(["plan", str(folder)], capsys)
        assert code == 1 and "lm_head.weight" in err


@pytest.mark.parametrize("kind", ["weight", "scales", "biases", "copy"])
def test_quantized_by_mlx(
    kind: str, tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "quantized"
    convert(tiny_folder, folder, bits=4)
    weights = read_weights(folder)
    for name in ("weight", "scales", "biases"):
        weights[f"lm_head.{name}"] = weights[f"model.embed_tokens.{name}"]
    if kind != "copy":
        weights[f"lm_head.{kind}"] = weights[f"lm_head.{kind}"][::-1]
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    found = logits(folder)
    assert len(warnings(caplog)) == (kind != "copy")
    config = read_json(folder / "config.json")
    said = {**config, "tie_word_embeddings": kind == "copy"}
    (folder / "config.json").write_text(json.dumps(said))
    assert_close(found, logits(folder), 0)
    assert len(warnings(caplog)) == (kind != "copy")


def test_planning_counts_it(own: Path, tiny_folder: Path, capsys: Any) -> None:
    def weights_of(folder: Path) -> tuple[int, str]:
        code, out, err = call(["plan", str(folder), "--json"], capsys)
        assert code == 0
        return json.loads(out)["weights"]["bf16"], err

    tied, said = weights_of(tiny_folder)
    assert said == ""
    rows, width = read_weights(own)[HEAD].shape
    assert weights_of(own)[0] == tied + 2 * rows * width


def test_comparing_it_with_what_was_made_of_it(own: Path, tmp_path: Path, capsys: Any) -> None:
    convert(own, tmp_path / "out", dequantize=True, dtype="float32")
    arguments = ["eval", "divergence", str(own), str(tmp_path / "out"), "--tokens", "64", "--json"]
    code, out, err = call(arguments, capsys)
    assert code == 0, err
    found = json.loads(out)
    assert found["mean_kl"] == pytest.approx(0, abs=1e-9)
    assert "lm_head" in [row["path"] for row in found["modules"]]
