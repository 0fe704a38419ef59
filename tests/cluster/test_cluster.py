"""A model on several ranks answers as it does on one machine, and never hangs when a rank does."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3_mlx import load
from tests.cluster.harness import led, outcome_of
from tests.cluster.led import answers
from tests.support import DEMO

PIPELINE = {"hosts": "local:2", "split": "pipeline", "dequantize": False}
TENSOR = {"hosts": "local:2", "split": "tensor", "dequantize": False}
BOTH = [PIPELINE, pytest.param(TENSOR, marks=pytest.mark.slow)]


def assert_same(found: dict[str, Any], options: dict[str, Any], **also: Any) -> None:
    """Compare with the answers of one machine."""
    alone = {"hosts": None, "split": "pipeline", "layers": None}
    with load(also.pop("model", "demo"), **{**options, **alone}) as llm:
        expected = answers(llm, **also)
    # Another order of sums may round a key or a value of a quantized cache the other way.
    allowed = 0.05 if "kv_bits" in options else 2e-3
    for kind, value in expected.items():
        if kind in ("logits", "scores"):
            assert np.abs(np.array(found[kind]) - np.array(value)).max() <= allowed, kind
        else:
            assert found[kind] == value, kind
    if options["split"] == "pipeline":
        assert found["logits"] == expected["logits"]  # the same bits


@pytest.mark.heavy
def test_a_pipeline_answers_as_one_machine(tmp_path: Path) -> None:
    options = {**PIPELINE, "layers": [1, 3]}
    found = led(tmp_path, load=options, schema=True)
    assert_same(found, options, schema=True)
    assert found["layers"] == 4
    assert found["after a refusal"] == found["after a cancelled one"]
    embedding, computing = found["refused"]
    assert embedding.startswith("embedding and reranking run on one machine")
    assert computing.startswith("evaluating, tuning and computing")
    assert max(found["control bytes"]) <= 200 * found["passes"]
    assert found["said"] == ""


@pytest.mark.slow
def test_parts_of_layers_answer_as_one_machine(tmp_path: Path) -> None:
    options = {**TENSOR, "kv_bits": 8}
    assert_same(led(tmp_path, load=options), options)


@pytest.mark.slow
@pytest.mark.parametrize("base", [PIPELINE, TENSOR], ids=["pipeline", "tensor"])
@pytest.mark.parametrize(
    "more",
    [{}, {"draft": "ngram"}, {"draft": str(DEMO)}, {"kv_bits": "k8v4"}, {"kv_bits": 4}],
    ids=["plain", "ngram", "draft", "k8v4", "4"],
)
def test_all_ways_answer_as_one_machine(
    base: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    options = {**base, **more}
    assert_same(led(tmp_path, load=options, schema=True), options, schema=True)


@pytest.mark.slow
def test_three_ranks_answer_as_one_machine(tmp_path: Path) -> None:
    options = {**PIPELINE, "hosts": "local:3", "layers": [1, 2, 1]}
    assert_same(led(tmp_path, load=options), options)


@pytest.mark.slow
@pytest.mark.parametrize("base", [PIPELINE, TENSOR], ids=["pipeline", "tensor"])
def test_prompts_on_disk_survive_on_every_rank(base: dict[str, Any], tmp_path: Path) -> None:
    (out := tmp_path / "out").mkdir()
    options = {**base, "prompt_cache": str(tmp_path / "kept")}
    first = led(out, "restart", load=options)
    assert first["cached"] == 0
    assert len(list((tmp_path / "kept").iterdir())) == 2  # each rank has its part
    second = led(out, "restart", load=options)
    assert second["cached"] > 256 and second["text"] == first["text"]
    for file in (tmp_path / "kept").iterdir():
        file.unlink()
        break
    third = led(out, "restart", load=options)  # a rank without its part: all read the prompt anew
    assert third["cached"] == 0 and third["text"] == first["text"]


@pytest.mark.heavy
@pytest.mark.parametrize(("together", "at"), [(1, [1, 5, 6]), (4, [12, 13, 30])])
def test_a_failed_step_releases_the_followers(together: int, at: list[int], tmp_path: Path) -> None:
    found = led(tmp_path, "injected", load=TENSOR, at=at, together=together)
    *failed, last = found["texts"]
    assert all("injected" in text for text in failed)
    assert last == found["expected"]


@pytest.mark.heavy
@pytest.mark.parametrize("base", BOTH, ids=["pipeline", "tensor"])
def test_a_killed_follower_is_named_at_once(base: dict[str, Any], tmp_path: Path) -> None:
    found = led(tmp_path, "fault", load=base, signal="SIGKILL")
    for error in found["errors"]:
        assert error.startswith("local (rank 1) is gone (")
        assert error.endswith("; the cluster is down, start it again")
    # Within a fraction of a second on a machine that has nothing else to do.
    assert found["seconds 0"] < 10 and found["gone"] and found["close"] < 10
    assert "cannot connect twice" in found["again"]


@pytest.mark.heavy
@pytest.mark.parametrize(
    "where",
    [
        "here",
        pytest.param("elsewhere", marks=pytest.mark.slow),
        pytest.param("over RDMA", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_follower_is_named_within_the_limit(where: str, tmp_path: Path) -> None:
    hangs = where == "over RDMA"
    how = {"keep": where != "here", "hang": hangs, "code": int(hangs)}
    found = led(tmp_path, "fault", load=PIPELINE, signal="SIGSTOP", seconds=40, **how)
    said = r"local \(rank 1\) has not answered for (\d+) s; the cluster is down, start it again"
    limits = [int(*re.findall(f"^{said}$", error)) for error in found["errors"]]
    # 2 s, or on a busy machine 20 times what the longest step took; then a ping, and the notice.
    assert 2 <= limits[0] and found["seconds 0"] < limits[0] + 10
    assert found["gone"] and found["close"] < 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_no_fault_makes_a_rank_hang_or_stay(seed: int, tmp_path: Path) -> None:
    """Killed, stopped or ended at any time, loading included: everything ends, soon."""
    found = outcome_of(tmp_path, "random", seconds=45, seed=seed)
    named = "rank 1|not all followers have joined"
    assert found is None or all(re.search(named, error) for error in found["errors"]), found
