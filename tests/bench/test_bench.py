"""`qwen3 bench`: what is measured, by whom, and how it is shown."""

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from qwen3_mlx import Qwen3Error, backend, load
from qwen3_mlx.bench.compare import EQUAL, TargetResult, _median, compare
from qwen3_mlx.bench.measure import (
    NEW,
    OURS,
    PEER,
    BenchTarget,
    Case,
    Measurement,
    NumericSettings,
    Setup,
    cases_of,
    measure,
)
from qwen3_mlx.bench.targets import MlxLm, Ours
from qwen3_mlx.cli.bench import _as_json, _bounds, _notes, _table
from qwen3_mlx.model.quantization import Format
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.model.sizes import published_model_config
from tests.cli.harness import QWEN3, call
from tests.support import greedy_tokens, make_model, random_ids, read_weights

TERMS = NumericSettings("float32", False, "a BLAS")
SMALL = ("--prompts", "8,20", "--together", "2", "--decode", "3")


class Scripted:
    """A side whose sequences begin one step after another, by a clock of its own."""

    vocabulary = 1000

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[list[list[int]], int] | str] = []

    def configure(self, case: Case) -> bool:
        return case.kv_bits is None

    def generate(self, prompts: Sequence[list[int]], max_tokens: int) -> Iterator[list[int]]:
        self.calls.append((list(map(list, prompts)), max_tokens))
        for step in range(max_tokens + len(prompts) - 1):
            self.now += 0.002
            yield [7] * min(step + 1, len(prompts))

    def forget(self) -> None:
        self.calls.append("forget")


def test_the_cheapest_cases_come_first() -> None:
    assert cases_of([100, 10], [8, 2]) == [
        Case(1, 10),
        Case(1, 10, kept=True),
        Case(1, 10, copying=True),
        Case(2, 10),
        Case(8, 10),
        Case(1, 100),
        Case(1, 100, kept=True),
        Case(1, 100, kv_bits=8),
    ]


def test_what_is_measured_are_steps_of_all_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    side = Scripted()
    clock = SimpleNamespace(perf_counter=lambda: side.now)
    monkeypatch.setattr("qwen3_mlx.bench.measure.time", clock)
    cases = [Case(1, 10), Case(1, 10, kept=True), Case(1, 10, kv_bits=8), Case(3, 4)]
    alone, kept, together = measure(side, cases, 5)
    assert alone.decode == pytest.approx(1 / 0.002)
    assert together.decode == pytest.approx(3 / 0.002)
    assert together.first_token > 2.5 * alone.first_token  # of the last to begin
    assert together.prefill == pytest.approx(3 * 4 / together.first_token)
    warm_up, first_forget, first, second, second_forget, third = side.calls
    assert first_forget == second_forget == "forget"
    assert isinstance(warm_up, tuple) and isinstance(first, tuple)
    assert isinstance(second, tuple) and isinstance(third, tuple)
    assert first[1] == 6
    grown = first[0][0] + 6 * [7]
    assert second[0][0][: len(grown)] == grown and len(second[0][0]) == len(grown) + NEW
    assert [len(ids) for ids in third[0]] == [4, 4, 4] and third[0][0] != third[0][1]


def test_a_batch_without_the_memory_to_decode_together_is_left_out() -> None:
    class Small(Scripted):
        def generate(self, prompts: Sequence[list[int]], max_tokens: int) -> Iterator[list[int]]:
            for tokens in super().generate(prompts, max_tokens):
                yield tokens[:2]

    found = measure(Small(), [Case(2, 4), Case(3, 4), Case(1, 10)], 5)
    assert [figures.case.sequences for figures in found] == [2, 1]


@pytest.fixture(scope="module")
def peer(tiny_folder: Path) -> MlxLm:
    return MlxLm(str(tiny_folder), TERMS)


@pytest.fixture(scope="module")
def own_model(tiny_folder: Path) -> Iterator[Qwen3]:
    model = make_model(json.loads((tiny_folder / "config.json").read_text()))
    model.load_weights(list(read_weights(tiny_folder).items()))
    yield model


@pytest.mark.parametrize("name", [OURS, PEER])
def test_both_sides_choose_the_same_tokens(name: str, own_model: Qwen3, peer: MlxLm) -> None:
    side: BenchTarget = Ours(own_model) if name == OURS else peer
    prompts = [random_ids(12, 300, seed) for seed in range(3)]
    expected = [greedy_tokens(own_model, ids, 6) for ids in prompts]
    told = list(side.generate(prompts, 6))
    full = [tokens for tokens in told if len(tokens) == 3]
    assert full and sum(map(len, told)) == 18
    side.forget()
    assert [token for tokens in side.generate(prompts[:1], 6) for token in tokens] == expected[0]
    longer = prompts[0] + expected[0] + random_ids(5, 300, 9)
    assert [token for tokens in side.generate([longer], 4) for token in tokens] == greedy_tokens(
        own_model, longer, 4
    )
    answer = side.generate(prompts, 50)
    next(answer)
    del answer  # which ends it
    assert len(list(side.generate(prompts[1:2], 2))) == 2


def test_what_goes_on_costs_what_is_new(own_model: Qwen3, peer: MlxLm) -> None:
    ids = random_ids(40, 300)
    ours = Ours(own_model)
    said = [token for tokens in ours.generate([ids], 4) for token in tokens]
    read: list[int] = []
    halves, decode = Qwen3.halves, Qwen3.decode

    def counting(model: Qwen3, ids: mx.array, *arguments: Any) -> Any:
        read.append(ids.size)
        return halves(model, ids, *arguments)

    def counting_one(model: Qwen3, ids: mx.array, caches: Any) -> Any:
        read.append(ids.size)
        return decode(model, ids, caches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qwen3, "halves", counting)
        patch.setattr(Qwen3, "decode", counting_one)
        list(ours.generate([ids + said + [1, 2, 3]], 2))
    assert read and sum(read) <= 3 + 1 + 2
    peer.forget()
    list(peer.generate([ids], 4))
    assert len(peer._kept) == 44


def test_an_error_of_the_engine_is_raised(own_model: Qwen3) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        list(Ours(own_model).generate([[]], 3))


@pytest.mark.heavy
def test_the_command_measures_both(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "speed.svg"
    arguments = ["bench", str(tiny_folder), "--against", "mlx-lm", *SMALL]
    code, out, err = call([*arguments, "--json", "--plot", str(picture)], capsys)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["decoded"] == 3 and found["machine"]["device"]
    both = ["mlx-lm, out of the box", "mlx-lm, equal terms"]
    if backend.BLAS.startswith("MLX's own"):  # then they are one: these weights are float32
        del both[0]
    assert list(found["sides"]) == [OURS, *both]
    for side in found["sides"].values():
        special = 2 * (side is found["sides"][OURS])
        assert len(side["figures"]) == 5 + special and side["weights"] > 0
        for figures in side["figures"]:
            assert min(figures[key] for key in ("first_token", "decode", "peak", "prefill")) > 0
    assert found["sides"][OURS]["terms"] == found["sides"]["mlx-lm, equal terms"]["terms"]
    assert found["sides"][both[0]]["terms"]["blas"].startswith("MLX's own")
    assert "sequences together" in picture.read_text()


@pytest.mark.heavy
def test_the_table_of_this_package_alone_of_a_folder_that_is_called_like_a_size(
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "8B").symlink_to(tiny_folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    code, out, err = call(["bench", "./8B", *SMALL], capsys)
    assert (code, err) == (0, "")
    for words in (
        "8 kept and 16 new",
        "2 together, after 8",
        "most, 2 x 8 tokens",
        "after 8, copying",
        "after 20, 8-bit cache",
        "decode, tokens/s, of those that the memory's bandwidth allows",
        "tokens a forward pass, by lookup",
        "qwen3-mlx: ",
    ):
        assert words in out, out
    assert "mlx-lm" not in out


def figures(case: Case, decode: float) -> Measurement:
    return Measurement(case, first_token=2.0, decode=decode, peak=10**9)


def test_what_was_not_reached_is_left_open_and_said() -> None:
    cases = [Case(1, 8), Case(2, 8)]
    ours = TargetResult(True, TERMS, 10**9, {case: figures(case, 30) for case in cases})
    peer = TargetResult(True, TERMS, 2 * 10**9, {cases[0]: figures(cases[0], 10)}, is_late=True)
    results = {OURS: ours, f"{PEER}, {EQUAL}": peer}
    rows = [line.split() for line in _table(cases, results, {cases[0]: 40.0})]
    assert ["after", "8", "30", "10", "3.00x"] in rows
    assert ["2", "together,", "after", "8", "30", "-"] in rows
    assert ["weights", "1", "2", "2.00x"] in rows
    assert rows[-1] == ["after", "8", "30", "of", "40", "75%"]
    notes = " ".join(_notes(cases, results, {cases[0]: 20.0}, 10))
    assert "mlx-lm, equal terms: float32" in notes and "(as it comes)" in notes
    assert notes.count("not measured within 10 minutes") == 1
    assert "More than 100%" in notes
    peer.is_late = False
    notes = " ".join(_notes(cases, results, {}, 10))
    assert "mlx-lm, equal terms: - was not measured: the memory was too small" in notes
    unloaded = {OURS: ours, f"{PEER}, {EQUAL}": TargetResult(is_default=False)}
    assert ["weights", "1", "-"] in [line.split() for line in _table(cases, unloaded, {})]


def test_the_bound_is_what_the_bandwidth_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token of Qwen3-4B in 4 bits reads 2.26 GB of weights, and 147 kB for each token before."""
    case, copying = Case(1, 2048), Case(1, 2048, copying=True)
    terms = NumericSettings("bfloat16", quantized=True, blas="")
    several = replace(figures(copying, 300), a_pass=3.0)
    ours = TargetResult(True, terms, 1, {case: figures(case, 100), copying: several}, 546e9)
    bounds = _bounds(published_model_config("4B"), lambda path: Format(4, 64), ours)
    assert bounds[case] == pytest.approx(546e9 / (2.263e9 + 2048 * 147_456), rel=1e-3)
    assert bounds[copying] == 3 * bounds[case]
    (found,) = _as_json({OURS: ours}, bounds).values()
    assert found["figures"][0]["decode_at_most"] == bounds[case]
    assert found["figures"][0]["share_of_bandwidth"] == 100 / bounds[case]
    monkeypatch.setattr(backend, "on_metal", lambda: True)
    monkeypatch.setattr(backend, "device_name", lambda: "Apple M4 Max")
    assert "Apple states 546 for the M4 Max" in " ".join(_notes([case], {OURS: ours}, bounds, 10))


def test_repeats_give_medians() -> None:
    case, rare = Case(1, 8), Case(2, 8)
    runs = [
        TargetResult(True, TERMS, 1, {case: figures(case, decode)}) for decode in (1.0, 9.0, 3.0)
    ]
    runs[0].figures[rare] = figures(rare, 1)
    found = _median(runs)
    assert found.figures == {case: figures(case, 3.0)}
    assert [one[case].decode for one in found.repeats] == [1.0, 9.0, 3.0]


def test_ratios_are_those_within_repeats_and_say_if_repeats_disagree() -> None:
    case = Case(1, 8)
    ours, slower, equal = (
        _median([TargetResult(True, TERMS, 1, {case: figures(case, x)}) for x in speeds])
        for speeds in [(4.0, 6.0, 5.0), (2.0, 3.0, 2.5), (5.0, 5.0, 5.0)]
    )
    results = {OURS: ours, "mlx-lm, as it comes": slower, "mlx-lm, equal terms": equal}
    table = "\n".join(_table([case], results, {}))
    assert re.search(r"after 8 +5 ±20% +2.5 ±20% +2.00x +5 ±0% +~1.00x", table)
    assert "in some repeats" in " ".join(_notes([case], results, {}, 10))


def test_who_begins_changes_with_each_repeat(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    def run(setup: Setup, seconds: float, measured: object) -> TargetResult:
        begun.append(setup.name)
        assert not (setup.terms and setup.name == OURS)
        return TargetResult(True, TERMS, 1, {Case(1, 8): figures(Case(1, 8), 1.0)})

    monkeypatch.setattr("qwen3_mlx.bench.compare._run", run)
    found = compare("", [Case(1, 8)], 2, against=(EQUAL,), repeats=3, seconds=1)
    assert begun == [OURS, PEER, PEER, OURS, OURS, PEER]
    assert list(found) == [OURS, f"{PEER}, {EQUAL}"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--against", "ollama"], "--against must be mlx-lm, not 'ollama'"),
        (["--terms", "equal"], "--terms are those of another engine: --against mlx-lm"),
        (["--against", "mlx-lm", "--terms", "fair"], "--terms must be one of both, box, equal"),
        (
            ["--prompts", "many"],
            "--prompts must be comma-separated numbers of at least 1, not 'many'",
        ),
        (["--together", "0,2"], "--together must be comma-separated numbers"),
        (["--prompts", "9999999"], "--prompts 9999999 is too long: the context has room for"),
        (["--together", "2,40"], "--together: no more than 32 sequences decode at once"),
        (["--decode", "100000"], "--decode 100000 is too long for a context of 8192"),
        (["--minutes", "inf"], "--minutes must be more than 0, at most 10,000"),
        (["--minutes", "nan"], "--minutes must be more than 0, at most 10,000"),
        (["--plot", "speed.pdf"], "must end in .png or .svg"),
        (["./nowhere"], "is no folder here, nor a hub name"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(["bench", *arguments], capsys)
    assert (code, out) == (2 if complaint.startswith("--") else 1, "")
    assert complaint in err and err.count("\n") == 1


def test_a_side_that_fails_is_one_sentence(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(Qwen3Error, match=r"config\.json"):
        compare(str(tmp_path), [Case(1, 8)], 2, seconds=600)
    with pytest.raises(Qwen3Error, match=r"there is no measurement after 0\.01 s"):
        compare(str(tiny_folder), [Case(1, 8)], 2, seconds=0.01)


@pytest.mark.heavy
def test_mlx_lm_failing_is_one_sentence(tiny_folder: Path, tmp_path: Path) -> None:
    """A checkpoint in shards whose names mlx-lm does not look for."""
    for file in tiny_folder.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = (tiny_folder / "model.safetensors").read_bytes()
    (tmp_path / "weights.safetensors").write_bytes(weights)
    with load(tiny_folder) as llm:
        names = llm.compute(lambda model: dict.fromkeys(model.tensors(), 0))
    index = {"weight_map": dict.fromkeys(names, "weights.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Qwen3Error, match="mlx-lm failed: "):
        compare(str(tmp_path), [Case(1, 8)], 2, against=(EQUAL,), seconds=600)


def test_ctrl_c_ends_the_sides_too(tiny_folder: Path) -> None:
    command = [*QWEN3, "bench", str(tiny_folder), "--prompts", "1500", "--decode", "200"]
    with subprocess.Popen(
        [*command, "--repeats", "500"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        while not (sides := _children(process.pid)):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (130, "", "qwen3: interrupted\n")
    for side in sides:  # one that was just being started sees that its parent is gone
        while _is_alive(side):
            time.sleep(0.05)


def _is_alive(process: int) -> bool:
    """Whether a process is at work; one that has ended may wait to be asked how."""
    state = subprocess.run(["ps", "-o", "state=", "-p", str(process)], capture_output=True)
    return state.stdout.strip() not in (b"", b"Z")


def _children(process: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]
