"""Tasks of lm-eval: `qwen3 eval tasks`, and `llm.score` below it."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from qwen3_mlx import LLM, ContextError, Qwen3Error, load
from qwen3_mlx.cli.main import main
from qwen3_mlx.evaluate import tasks
from qwen3_mlx.evaluate.tasks import Answering, TaskResults, run_tasks
from tests.engine.harness import engine_of
from tests.evaluate import lm_eval_standin
from tests.support import DEMO, make_model, random_ids, write_tiny

_DATA = Path(__file__).parent.parent / "data" / "eval"
_EXPECTED = json.loads((_DATA / "expected.json").read_text("utf-8"))

Run = Callable[..., tuple[TaskResults, list[Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tasks, with the place of their data."""
    folder = tmp_path_factory.mktemp("tasks")
    for file in _DATA.glob("*.yaml"):
        (folder / file.name).write_text(file.read_text("utf-8").replace("DATA", str(_DATA)))
    return folder


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """The demo, with the window of the references."""
    with load(context=512, dequantize=False) as llm:
        yield llm


@pytest.fixture(autouse=True)
def standin(monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval_standin.install(monkeypatch)
    monkeypatch.delenv("QWEN3_MODEL", raising=False)


@pytest.fixture
def run(llm: LLM, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a task, and gives its results and the answers to its requests."""

    def run(name: str, **options: Any) -> tuple[TaskResults, list[Any]]:
        answers: list[Any] = []
        method = tasks._Answers._answer

        def noted(*arguments: Any) -> list[Any]:
            answers.extend(method(*arguments))
            return answers

        monkeypatch.setattr(tasks._Answers, "_answer", noted)
        return run_tasks(llm, [name], include=folder, **options), answers

    return run


def check_metrics(found: TaskResults, name: str) -> None:
    """Check the metrics that the stand-in knows."""
    for metric, value in found.results["results"][name].items():
        if "," in metric and "stderr" not in metric:
            assert value == pytest.approx(_EXPECTED[name]["metrics"][metric], rel=1e-5), metric


@pytest.mark.heavy
def test_choices_are_scored_as_by_the_reference_and_shared_examples_read_once(run: Run) -> None:
    found, answers = run("demo_choices")
    check_metrics(found, "demo_choices")
    expected = [pair for pairs in _EXPECTED["demo_choices"]["answers"] for pair in pairs]
    for (value, greedy), (reference, is_greedy) in zip(answers, expected, strict=True):
        assert value == pytest.approx(reference, abs=1e-4) and greedy == is_greedy
    assert {greedy for _, greedy in answers} == {True, False}
    assert found.prompt_tokens >= 3 * found.tokens_read and not found.shortened
    alone, _ = run("demo_choices", num_fewshot=0)
    assert alone.prompt_tokens < found.prompt_tokens / 3


@pytest.mark.heavy
def test_texts_are_cut_into_windows_as_by_the_reference(run: Run) -> None:
    found, answers = run("demo_lines")
    check_metrics(found, "demo_lines")
    references = [one for (one,) in _EXPECTED["demo_lines"]["answers"]]
    assert len(answers) > len(references)
    assert sum(value for value, _ in answers) == pytest.approx(sum(references), abs=5e-3)


def test_replies_are_those_of_the_reference(run: Run) -> None:
    found, answers = run("demo_raw")
    check_metrics(found, "demo_raw")
    assert answers == [reply for (reply,) in _EXPECTED["demo_raw"]["answers"]]
    assert any("<think>" in reply for reply in answers)  # without a chat template tags are text


@pytest.mark.heavy
def test_the_thinking_is_no_part_of_an_answer(run: Run) -> None:
    asked = Answering(chat=True, thinking=True)
    # This stop string stands in all thinking, and ends none.
    found, answers = run("demo_chat", answering=asked, gen_kwargs="until=carry")
    check_metrics(found, "demo_chat")
    assert answers == [reply for (reply,) in _EXPECTED["demo_chat"]["answers"]]
    assert not found.unfinished
    short, _ = run("demo_chat", limit=2, answering=asked, gen_kwargs="max_gen_toks=8")
    assert short.unfinished == 2


def test_samples_follow_the_seed(run: Run) -> None:
    sampled = "do_sample=true,temperature=3.0,max_gen_toks=8"
    replies = [
        tuple(run("demo_raw", limit=2, gen_kwargs=sampled, answering=Answering(seed=seed))[1][-2:])
        for seed in (1, 1, 2)
    ]
    assert replies[0] == replies[1] != replies[2]


def test_repetitions_of_a_request_are_other_samples(llm: LLM) -> None:
    options = {"do_sample": True, "temperature": 3.0, "max_gen_toks": 8}
    requests = [SimpleNamespace(args=("What is", options))] * 2
    first, second = tasks._Answers(llm, Answering(), None).generate_until(requests)
    assert first != second


def test_requests_are_sorted_and_their_answers_are_not(llm: LLM) -> None:
    asked: list[int] = []
    progress: list[tuple[int, int]] = []

    def answer(index: int) -> int:
        asked.append(index)
        return 10 * index

    model = tasks._Answers(llm, Answering(), lambda *counts: progress.append(counts))
    assert model._answer([[2, 1], [1, 2], [3], [1]], answer) == [0, 10, 20, 30]
    assert asked[0] == 3 and sorted(asked) == [0, 1, 2, 3]
    assert sorted(progress) == [(done, 4) for done in (1, 2, 3, 4)]


def test_a_long_prompt_loses_its_beginning(folder: Path) -> None:
    with load(context=64, dequantize=False) as small:
        found = run_tasks(small, ["demo_choices"], include=folder, limit=1)
        assert found.shortened == 4 and found.prompt_tokens == 4 * 64
        with pytest.raises(Qwen3Error, match="a reply of 64 tokens .* leaves no room"):
            run_tasks(small, ["demo_raw"], include=folder, limit=1)


@pytest.mark.parametrize(
    ("name", "options", "kind", "complaint"),
    [
        ("demo_chois", {}, ValueError, "no task 'demo_chois'; close to it are demo_choices"),
        ("demo_raw", {"limit": 0}, ValueError, "limit must be above 0, not 0"),
        ("xyz", {}, ValueError, "no task 'xyz'; see lm-eval ls tasks"),
        (
            "demo_choices",
            {"answering": Answering(chat=True, thinking=True)},
            Qwen3Error,
            "demo_choices compares the likelihoods",
        ),
        (
            "demo_raw",
            {"gen_kwargs": "num_beams=4", "limit": 1},
            Qwen3Error,
            "num_beams=4, which is not supported",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused(
    run: Run, name: str, options: dict[str, Any], kind: type[Exception], complaint: str
) -> None:
    with pytest.raises(kind, match=complaint):
        run(name, **options)


def test_thinking_needs_a_conversation() -> None:
    with pytest.raises(ValueError, match="conversations only"):
        Answering(thinking=False)


def test_an_error_ends_the_other_requests(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    method, calls = LLM.score, list[int]()

    def fail(llm: LLM, ids: Sequence[int], *more: Any) -> Any:
        calls.append(len(ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return method(llm, ids, *more)

    monkeypatch.setattr(LLM, "score", fail)
    with pytest.raises(KeyboardInterrupt):
        run("demo_choices")
    assert len(calls) < 30


# --- the command --------------------------------------------------------------------------------


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["eval", "tasks", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


@pytest.mark.heavy
def test_eval_tasks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--include", folder, "--limit", 2)
    code, out, err = call(capsys, "--tasks", "demo_choices,demo_lines", *arguments, "--json")
    assert code == 0 and set(json.loads(out)) == {"demo_choices", "demo_lines"}
    assert err.startswith("what lm-eval prints\nRead ") and "times as many" in err
    code, out, _ = call(
        capsys, "--tasks", "demo_chat", *arguments, "--thinking", "--gen-kwargs", "max_gen_toks=60"
    )
    assert code == 0
    assert (
        out.split()
        == (
            "task examples filter metric value standard error demo_chat 0 none exact_match 1.0000"
        ).split()
    )
    code, out, err = call(
        capsys, "--tasks", "demo_chat", *arguments, "--thinking", "--gen-kwargs", "max_gen_toks=8"
    )
    assert code == 0 and "2 replies ended inside their thinking" in err
    code, _, err = call(capsys, "--tasks", "demo_choices", *arguments, "--thinking")
    assert code == 1 and err.endswith("nothing is thought; leave --thinking out\n")


def test_without_lm_eval_the_command_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, out, err = call(capsys, "--tasks", "gsm8k")
    assert (code, out) == (1, "") and err.startswith("qwen3: evaluation tasks need lm-eval: ")
    assert "install" in err and err.count("\n") == 1


# --- scores -------------------------------------------------------------------------------------


def test_scores_are_those_of_the_logits_wherever_they_begin(llm: LLM) -> None:
    ids = random_ids(60, 1000)
    logprobs = nn.log_softmax(llm.logits(ids), axis=-1)[:-1]
    expected = np.array(mx.take_along_axis(logprobs, mx.array(ids[1:])[:, None], axis=1)[:, 0])
    best = np.array(logprobs.max(axis=-1))
    for start, cached in ((1, 0), (40, 39), (59, 58), (1, 0)):
        found = llm.score(ids, start)
        assert found.cached_tokens == cached
        assert [one.token for one in found.logprobs] == ids[start:]
        assert [one.logprob for one in found.logprobs] == pytest.approx(
            expected[start - 1 :], abs=1e-4
        )
        assert [one.top[0][1] for one in found.logprobs] == pytest.approx(
            best[start - 1 :], abs=1e-4
        )


def test_texts_that_are_scored_at_once_share_a_context() -> None:
    engine, found = engine_of(make_model()), list[Any]()
    context = random_ids(40)
    for endings in ([[1, 2, 3]], [[4, 5, 6], [7, 8, 9], [1, 5, 6]]):
        for ending in endings:
            engine.score(context + ending, 40, found.append, Event())
        while engine.step():
            pass
    assert [scores.cached_tokens for scores in found] == [0, 39, 39, 39]


def test_a_text_of_one_token_more_than_the_window_is_scored(llm: LLM) -> None:
    assert len(llm.score([7] * 513, 512).logprobs) == 1  # the last is not read
    with pytest.raises(ContextError, match="513 tokens and the context window is 512"):
        llm.score([7] * 514, 512)


@pytest.mark.parametrize(
    ("ids", "start", "kind"),
    [
        ([1, 2], 0, ValueError),
        ([1, 2], 2, ValueError),
        ([], 1, ValueError),
        ([1, 5000], 1, ValueError),
        ("ab", 1, TypeError),
    ],
)
def test_what_cannot_be_scored_is_refused(
    llm: LLM, ids: Any, start: int, kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        llm.score(ids, start)


def test_a_cancelled_scoring_raises(llm: LLM) -> None:
    cancelled = Event()
    cancelled.set()
    with pytest.raises(Qwen3Error, match="cancelled"):
        llm.score([1, 2, 3], 1, cancelled)


def test_the_prefix_is_the_end_that_the_tokenizer_names(tmp_path: Path, llm: LLM) -> None:
    assert llm.prefix_id == llm.tokenizer.id_of("<|im_end|>")
    config = json.loads((DEMO / "tokenizer_config.json").read_text())
    folder = write_tiny(tmp_path)
    for changes, name in (
        ({"bos_token": "<|endoftext|>"}, "<|endoftext|>"),
        ({"eos_token": None}, None),
    ):
        (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))
        with load(folder) as changed:
            assert changed.prefix_id == (name and changed.tokenizer.id_of(name))
