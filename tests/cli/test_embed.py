"""`qwen3 embed` and `qwen3 rerank`: texts in, vectors or an order out."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen3_mlx import load
from tests.adapters import mlx_tensors, pair, write_mlx
from tests.checkpoint.harness import qwen3, serving
from tests.cli.harness import call
from tests.embedding_twins import golden, write_twin
from tests.support import read_weights

Run = Callable[..., tuple[int, str, str]]
TEXTS = golden("embeddings")["embedding"]["cases"][0]["texts"][:4]  # the last one is empty


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twins")
    for name in ("embedding", "embedding-untied", "reranker", "reranker-seq-cls"):
        write_twin(name, folder / name)
    (folder / "texts.txt").write_text("".join(f"{text}\n" for text in TEXTS), "utf-8")
    return folder


@pytest.fixture
def run(root: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command on a twin."""

    def run(verb: str, *words: str, model: str = "embedding") -> tuple[int, str, str]:
        return call([verb, *words, "--model", str(root / model)], capsys)

    return run


def vectors_of(lines: str) -> np.ndarray:
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [row["index"] for row in rows] == list(range(len(rows)))
    return np.array([row["embedding"] for row in rows], np.float32)


def test_each_line_has_a_vector(root: Path, tmp_path: Path, run: Run) -> None:
    expected = np.array(golden("embeddings")["embedding"]["cases"][0]["vectors"][:4])
    code, out, err = run("embed", str(root / "texts.txt"))
    assert (code, err) == (0, "")
    assert np.abs(vectors_of(out) - expected).max() < 1e-5
    array, lines = tmp_path / "a.npy", tmp_path / "a.jsonl"
    assert run("embed", str(root / "texts.txt"), "-o", str(array)) == (0, "", "")
    assert run("embed", str(root / "texts.txt"), "--output", str(lines)) == (0, "", "")
    assert np.load(array).dtype == np.float32
    assert (np.load(array) == vectors_of(out)).all() and lines.read_text() == out


def test_an_adapter_changes_the_vectors(root: Path, tmp_path: Path, run: Run) -> None:
    path = "layers.0.self_attn.q_proj"
    (outputs, inputs) = read_weights(root / "embedding")[f"{path}.weight"].shape
    adapter = write_mlx(tmp_path / "adapter", mlx_tensors({f"model.{path}": pair(outputs, inputs)}))
    plain = run("embed", str(root / "texts.txt"))
    code, out, err = run("embed", str(root / "texts.txt"), "--adapter", str(adapter))
    assert (code, err) == (0, "")
    assert np.abs(vectors_of(out) - vectors_of(plain[1])).max() > 1e-3


def test_lines_of_json_from_a_pipe(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = golden("embeddings")["embedding"]["cases"][1]
    first, second = case["texts"]
    lines = f"{json.dumps(first)}\n{json.dumps({'text': second, 'id': 7})}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code, out, _ = run("embed", "-", "--jsonl", "--prompt-name", "query")
    assert code == 0 and np.abs(vectors_of(out) - np.array(case["vectors"])).max() < 1e-5
    file = tmp_path / "wrong.jsonl"
    file.write_text('"a"\n{"id": 1}\n')
    said = f"qwen3: line 2 of {file} is neither a JSON string nor an object with a text\n"
    assert run("embed", str(file)) == (1, "", said)


def test_a_byte_order_mark_is_no_text_and_nothing_is_said_to_be_there(
    root: Path, run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('\ufeff"One"\n', "utf-8")
    one = run("embed", str(file))[1]
    file.write_text('"One"\n')
    assert run("embed", str(file))[1] == one
    file.write_text("")
    assert run("embed", str(file)) == (0, "", f"There is no text in {file}.\n")


@pytest.mark.parametrize("model", ["embedding", "reranker"])
def test_there_is_no_chat(model: str, run: Run) -> None:
    code, out, err = run("chat", "--no-log", "-q", model=model)
    assert (code, out) == (1, "") and "load a chat model such as Qwen/Qwen3-8B" in err


def test_documents_cannot_steer_the_terminal(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "hostile.jsonl"
    file.write_text(json.dumps("a\x1b]0;owned\x07 \u202e") + "\n")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    out = run("rerank", "What?", str(file), model="reranker")[1]
    assert out.endswith("\ta\u241b]0;owned\u2407 \ufffd\n")


def test_documents_come_in_their_order(root: Path, run: Run, tmp_path: Path) -> None:
    case = golden("reranker")["cases"][0]
    file = tmp_path / "documents.jsonl"
    file.write_text("".join(f"{json.dumps(text)}\n" for text in case["documents"][:4]))
    code, out, err = run("rerank", case["query"], str(file), "--json", model="reranker")
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["index"] for row in rows] == [n for n in case["order"] if n < 4]
    for row in rows:
        assert abs(row["score"] - case["scores"][row["index"]]) < 1e-5
        assert row["text"] == case["documents"][row["index"]]
    _, out, _ = run("rerank", case["query"], str(file), model="reranker")
    assert out.splitlines()[-1] == "0.0685\tA cat"


def test_what_is_refused_is_one_line(
    root: Path, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, lines = str(root / "texts.txt"), str(tmp_path / "lines.jsonl")
    Path(lines).write_text('"a"\n"b\\ud800"\n')
    for words, said in (
        (("embed", texts, "-o", "a.txt"), "--output must be a .npy or .jsonl file, not a.txt"),
        (("embed", texts, "--dimensions", "65"), "--dimensions must be from 1 to 64, not 65"),
        (("embed", "nowhere.txt"), "nowhere.txt cannot be read: No such file or directory"),
        (
            ("embed", texts, "--instruction", "a", "--prompt-name", "query"),
            "--instruction a and --prompt-name query exclude each other",
        ),
        (("embed", texts, "--pooling", "mean"), "--pooling must be 'last', not 'mean'"),
        (
            ("embed", texts, "--context", "4"),
            f"line 1 of {texts} has 19 tokens or more and the most is 4; shorten it, or have it "
            "cut at its end (--truncate)",
        ),
        (("embed", lines), f"line 2 of {lines} is not valid Unicode at character 1"),
        (("rerank", "a", texts), "is an embedding model, not a reranker"),
        (
            ("ask", "Hello"),
            "this checkpoint is an embedding model; load a chat model such as Qwen/Qwen3-8B, or "
            "compute vectors with qwen3 embed",
        ),
    ):
        code, out, err = run(*words)
        assert code and not out and err.startswith("qwen3: ") and said in err
        assert err.count("\n") == 1
    code, _, err = call(["embed", texts], capsys)
    assert code == 1 and "--pooling last takes the hidden state of the last token" in err


def test_a_model_shows_what_it_is_for(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(["show", str(root / "embedding")], capsys)
    assert ["kind", "embedding"] in [line.split() for line in out.splitlines()]
    _, out, _ = call(["show", "--json", str(root / "reranker")], capsys)
    assert (json.loads(out)["kind"], json.loads(out)["chat"]) == ("reranker", False)
    _, out, _ = call(["show", str(root / "reranker-seq-cls")], capsys)
    assert "1,022 tokens, a score in place of a head" in out
    _, out, _ = call(["show", "--json", str(root / "reranker-seq-cls")], capsys)
    assert json.loads(out)["tied_head"] is False


def test_text_that_is_typed_is_waited_for_with_a_note(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = io.StringIO("One\n")
    monkeypatch.setattr(typed, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", typed)
    code, out, err = run("embed", "-")
    assert code == 0 and len(vectors_of(out)) == 1
    assert err == "Reading what is typed here; Ctrl-D on a line of its own ends it.\n"


def test_what_they_predict_is_no_measure_of_them(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embedder, headless, reranker = (
        str(root / name) for name in ("embedding", "embedding-untied", "reranker-seq-cls")
    )
    code, _, err = call(["eval", "perplexity", embedder, "--tokens", "8"], capsys)
    assert code == 1 and "a perplexity measures how a model writes text" in err
    code, _, err = call(["bench", reranker], capsys)
    assert code == 1 and "is a reranker, and a benchmark measures how a model writes text" in err
    divergence = ["eval", "divergence", "--tokens", "8"]
    code, out, err = call([*divergence, embedder, embedder], capsys)
    assert code == 0 and "is no chat model: compared are its predictions of text" in err
    for words in ([*divergence, reranker, reranker], ["convert", headless, "out", "--report"]):
        code, out, err = call(words, capsys)
        assert (code, out) == (1, "") and "predicts no text that could be compared" in err


def test_the_files_of_its_kind_are_fetched_from_the_hub(root: Path, tmp_path: Path) -> None:
    with serving(root / "embedding-untied") as (address, asked):
        words = ("embed", str(root / "texts.txt"), "-m", "someone/tiny", "-q")
        done = qwen3(*words, home=tmp_path, endpoint=address)
        assert (done.returncode, done.stderr) == (0, "")
        planned = qwen3("plan", "someone/tiny", "--json", home=tmp_path, endpoint=address)
        converted = tmp_path / "converted"
        made = qwen3("convert", "someone/tiny", str(converted), home=tmp_path, endpoint=address)
    expected = golden("embeddings")["embedding-untied"]["cases"][0]["vectors"][:4]
    assert np.abs(vectors_of(done.stdout) - np.array(expected)).max() < 1e-5
    assert {"modules.json", "1_Pooling/config.json"} < set(asked)
    assert made.returncode == 0 and (converted / "1_Pooling" / "config.json").is_file()
    # The network has no head, and none is planned for.
    with load(root / "embedding-untied") as llm:
        count = sum(array.size for array in llm.model.tensors().values())
    assert json.loads(planned.stdout)["parameters"] == count
