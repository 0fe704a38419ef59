"""Fine-tuning at the public face: `tune` and `qwen3 tune` on tiny checkpoints, in a few steps."""

import gc
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import qwen3_mlx
from qwen3_mlx import LLM, Qwen3Error, Tuning, load
from qwen3_mlx.tuning.events import SampleReply, StepDone, TuningEvent, TuningPlan, Validated
from qwen3_mlx.tuning.keep import read_keep
from tests.cli.harness import call, piped
from tests.support import MOE, TINY, write_tiny

QUESTIONS = [(f"Which is larger, {a} or {a + 3}?", str(a + 3)) for a in range(20)]


def write_lines(file: Path, lines: list[Any]) -> Path:
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


def conversation(question: str, answer: str, **more: Any) -> dict[str, Any]:
    asked = {"role": "user", "content": question}
    return {"messages": [asked, {"role": "assistant", "content": answer, **more}]}


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the runs the second that a picture takes; `tuned` has one."""
    monkeypatch.setattr("qwen3_mlx.tuning.tune.draw_losses", lambda *_: None)


@pytest.fixture(scope="module")
def lessons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("lessons") / "lessons.jsonl"
    return write_lines(file, [conversation(*pair) for pair in QUESTIONS])


def train(folder: Path, data: Path, out: Path, **options: Any) -> Tuning:
    settings = {"steps": 4, "batch": 4, "learning_rate": 1e-3, "rank": 4, **options}
    return qwen3_mlx.tune(folder, data=data, out=out, **settings)


def adapter_of(folder: Path) -> dict[str, mx.array]:
    loaded = mx.load(str(folder / "adapters.safetensors"))
    assert isinstance(loaded, dict)
    return loaded


def same(one: dict[str, mx.array], other: dict[str, mx.array]) -> bool:
    return one.keys() == other.keys() and all(
        mx.array_equal(array, other[name]).item() for name, array in one.items()
    )


@pytest.fixture(scope="module")
def tuned(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, lessons: Path
) -> tuple[Tuning, list[TuningEvent]]:
    events: list[TuningEvent] = []
    out = tmp_path_factory.mktemp("tuned") / "adapter"
    return train(tiny_folder, lessons, out, steps=6, report=events.append), events


def test_the_loss_falls_and_the_adapter_is_used_by_load(
    tuned: tuple[Tuning, list[TuningEvent]], tiny_folder: Path, tiny: LLM
) -> None:
    made, _ = tuned
    assert made.loss_before is not None and made.loss < made.loss_before
    ids = tiny.tokenizer.encode("Which is larger?")
    with load(tiny_folder, adapter=made.folder) as llm:
        assert not mx.allclose(llm.logits(ids), tiny.logits(ids))
    assert str(made.folder) in made.usage
    assert "<svg" in (made.folder / "losses.svg").read_text()


def test_a_run_tells_its_plan_steps_validations_and_samples(
    tuned: tuple[Tuning, list[TuningEvent]],
) -> None:
    _, events = tuned
    plan = events[0]
    assert isinstance(plan, TuningPlan)
    assert (plan.lessons, plan.valid, plan.steps) == (18, 2, 6)
    assert plan.cut == plan.left_out == 0
    assert [event.step for event in events if isinstance(event, StepDone)] == [1, 2, 3, 4, 5, 6]
    validated = [event.step for event in events if isinstance(event, Validated)]
    assert (validated[0], validated[-1]) == (0, 6)
    samples = [event for event in events if isinstance(event, SampleReply)]
    assert [sample.step for sample in samples][:7] == [0, 1, 2, 3, 4, 5, 6]
    assert "Which is larger" in samples[0].prompt


def test_the_same_seed_gives_the_same_adapter_and_another_one_does_not(
    tmp_path: Path, tiny_folder: Path, lessons: Path
) -> None:
    made = [
        train(tiny_folder, lessons, tmp_path / str(n), steps=1, seed=seed).folder
        for n, seed in enumerate((1, 1, 2))
    ]
    first, again, other = map(adapter_of, made)
    assert same(first, again) and not same(first, other)


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_every_type_trains_and_loads(
    kind: str, tmp_path: Path, tiny_folder: Path, tiny: LLM, lessons: Path
) -> None:
    made = train(tiny_folder, lessons, tmp_path / kind, type=kind, steps=1, layers=1)
    names = adapter_of(made.folder)
    assert names and all(name.startswith("model.layers.1.") for name in names)
    assert json.loads((made.folder / "adapter_config.json").read_text())["num_layers"] == 1
    ids = tiny.tokenizer.encode("Which is larger?")
    with load(tiny_folder, adapter=made.folder) as llm:
        assert not mx.array_equal(llm.logits(ids), tiny.logits(ids))


@pytest.mark.heavy
def test_experts_are_trained_and_the_router_is_not(tmp_path: Path, lessons: Path) -> None:
    made = train(write_tiny(tmp_path / "moe", MOE), lessons, tmp_path / "out", steps=1)
    qwen3_mlx.convert(tmp_path / "moe", tmp_path / "4bit")
    train(tmp_path / "4bit", lessons, tmp_path / "half", steps=1, dtype="bfloat16")
    modules = {name.split(".", 3)[3].rpartition(".")[0] for name in adapter_of(made.folder)}
    assert "mlp.switch_mlp.down_proj" in modules and "mlp.gate" not in modules
    with load(tmp_path / "moe", adapter=made.folder) as llm:
        assert llm.complete("Hi", max_tokens=1)


def test_quantized_weights_stay_and_full_refuses_them(tmp_path: Path, lessons: Path) -> None:
    folder = tmp_path / "4bit"
    qwen3_mlx.convert(write_tiny(tmp_path / "tiny"), folder)
    made = train(folder, lessons, tmp_path / "out", steps=1, dequantize=False)
    assert made.steps == 1
    with pytest.raises(Qwen3Error, match="type full trains the weights themselves, and these are"):
        train(folder, lessons, tmp_path / "full", type="full", dequantize=False)


def test_checkpointing_changes_nothing_but_memory(
    tmp_path: Path, tiny_folder: Path, lessons: Path
) -> None:
    plain = train(tiny_folder, lessons, tmp_path / "plain", steps=2)
    other = train(tiny_folder, lessons, tmp_path / "other", steps=2, checkpointing=True)
    assert same(adapter_of(plain.folder), adapter_of(other.folder))
    with load(tiny_folder) as llm:  # not patched
        assert type(llm.model.layers[0]).__name__ == "Block"


@pytest.mark.heavy
def test_a_killed_run_resumes_to_the_same_adapter(
    tmp_path: Path, tiny_folder: Path, lessons: Path
) -> None:
    whole = train(tiny_folder, lessons, tmp_path / "whole", steps=8)

    class Killed(BaseException):
        pass

    out = tmp_path / "killed"

    def kill(event: TuningEvent) -> None:
        if isinstance(event, StepDone) and event.step == 5:
            shutil.copytree(out, tmp_path / "copy")  # what kill -9 would leave
            raise Killed

    with pytest.raises(Killed):
        train(tiny_folder, lessons, out, steps=8, report=kill)
    for folder in (out, tmp_path / "copy"):
        made = train(tiny_folder, lessons, folder, steps=8, resume=True)
        assert same(adapter_of(folder), adapter_of(whole.folder))
        assert (made.steps, made.best_step, made.loss) == (8, whole.best_step, whole.loss)
        assert (folder / "log.jsonl").read_text() == (whole.folder / "log.jsonl").read_text()


def test_a_folder_with_a_training_is_not_overwritten(
    tuned: tuple[Tuning, list[TuningEvent]], tiny_folder: Path, lessons: Path
) -> None:
    folder = tuned[0].folder
    with pytest.raises(Qwen3Error, match="has a training already: continue it with resume=True"):
        train(tiny_folder, lessons, folder)
    with pytest.raises(Qwen3Error, match="was begun with rank 4, not 2"):
        train(tiny_folder, lessons, folder, rank=2, resume=True)
    with pytest.raises(Qwen3Error, match="has other files, such as chat_template.jinja"):
        train(tiny_folder, lessons, tiny_folder)


@pytest.mark.parametrize("name", ["log.jsonl", "state.safetensors", "adapters.safetensors"])
def test_a_damaged_training_is_not_resumed(
    name: str,
    tuned: tuple[Tuning, list[TuningEvent]],
    tmp_path: Path,
    tiny_folder: Path,
    lessons: Path,
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tuned[0].folder, folder)
    (folder / name).write_bytes(b"{")
    with pytest.raises(Qwen3Error, match="has no whole training to resume: .* begin anew"):
        train(tiny_folder, lessons, folder, steps=6, resume=True)


def test_other_lessons_from_a_pipe_are_not_resumed(
    tmp_path: Path, tiny_folder: Path, lessons: Path
) -> None:
    def train_from_pipe(text: str, **options: Any) -> None:
        read, write = os.pipe()
        os.write(write, text.encode())
        os.close(write)
        train(tiny_folder, Path(f"/dev/fd/{read}"), tmp_path / "out", steps=1, **options)
        os.close(read)

    text = lessons.read_text()
    train_from_pipe(text)
    with pytest.raises(Qwen3Error, match="was begun with data"):
        train_from_pipe(text.replace("larger", "smaller"), resume=True)


@pytest.mark.parametrize("count", [20, 1])  # with and without lessons to validate with
def test_an_adapter_that_is_not_finite_is_never_saved(
    count: int, tmp_path: Path, tiny_folder: Path
) -> None:
    data = write_lines(tmp_path / "data.jsonl", [conversation(*pair) for pair in QUESTIONS[:count]])
    with pytest.raises(Qwen3Error, match="is not finite: take a smaller learning_rate"):
        train(tiny_folder, data, tmp_path / "out", steps=1, learning_rate=1e38)
    assert not (tmp_path / "out" / "adapters.safetensors").exists()


@pytest.mark.heavy
def test_accumulated_batches_are_one_large_batch_in_less_memory(
    tmp_path: Path, tiny_folder: Path, lessons: Path
) -> None:
    keep = tmp_path / "keep.txt"
    keep.write_text("What is 1 + 2?\nWho are you?\nWhy?")
    made, planned = list[Tuning](), list[int]()

    def report(event: TuningEvent) -> None:
        if isinstance(event, TuningPlan):
            planned.append(event.memory)

    for name, batch, accumulate in (("one", 8, 1), ("parts", 2, 4)):
        options = {"batch": batch, "accumulate": accumulate, "keep": keep, "steps": 3}
        options |= {"max_length": 48, "report": report}
        made.append(train(tiny_folder, lessons, tmp_path / name, **options))
    one, parts = (adapter_of(tuning.folder) for tuning in made)
    assert all(mx.allclose(array, parts[name], atol=2e-5) for name, array in one.items())
    logs = [(tuning.folder / "log.jsonl").read_text().splitlines() for tuning in made]
    for first, second in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert first == pytest.approx(second, abs=1e-4)
    assert planned[1] < planned[0] / 2


def test_the_plan_trains_and_writes_nothing(
    tmp_path: Path, tiny_folder: Path, lessons: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tiny_folder), "--data", str(lessons), "--out", str(tmp_path / "out")]
    code, _, err = call(["tune", *arguments, "--plan"], capsys)
    assert code == 0 and "memory" in err and "step" not in err.replace("steps", "")
    code, out, _ = call(["tune", *arguments, "--plan", "--json"], capsys)
    assert code == 0 and json.loads(out)["lessons"] == 18
    assert not (tmp_path / "out").exists()


@pytest.mark.heavy
@pytest.mark.parametrize("type", ["lora", "dora", "full"])
@pytest.mark.parametrize("config", [TINY, MOE])
def test_the_plan_counts_what_is_trained(
    type: str, config: dict[str, Any], tmp_path: Path, lessons: Path
) -> None:
    if type == "dora" and config is MOE:
        return
    folder, plans = write_tiny(tmp_path / "model", config), list[TuningEvent]()
    made = train(
        folder, lessons, tmp_path / "out", type=type, steps=1, layers=1, report=plans.append
    )
    assert isinstance(plans[0], TuningPlan)
    assert plans[0].trained == sum(array.size for array in adapter_of(made.folder).values())


@pytest.mark.heavy
def test_training_stops_when_validations_are_no_better(
    tmp_path: Path, tiny_folder: Path, lessons: Path
) -> None:
    made = train(tiny_folder, lessons, tmp_path / "out", steps=40, learning_rate=3.0)
    assert made.best_step < made.steps < 40 and made.stopped_early


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "it is no JSON"),
        ("1", "it is no JSON object; a lesson has"),
        ('{"id": 1}', 'it must have one of "messages"'),
        ('{"text": ""}', "its text must be a string that is not empty"),
        ('{"prompt": "Hi"}', "its completion must be a string"),
        ('{"messages": "Hi"}', "its messages must be a list"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "has no turn of the assistant's"),
        ('{"messages": [{"role": "bot", "content": "Hi"}]}', "has role 'bot'"),
        ('{"messages": [{"role": "assistant", "content": ""}]}', "the assistant says nothing"),
        ('[{"text": "Hi"}]', "it begins a JSON list; a line is an object"),
        ('{"text": "Hi", "tools": []}', "text and tools exclude each other"),
        ('{"messages": [], "completion": "Hi"}', "messages and completion exclude each other"),
        (
            '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", '
            '"tool_calls": [{"function": {"name": "add", "arguments": "{"}}]}]}',
            "the arguments of add are no JSON object",
        ),
    ],
)
def test_a_wrong_line_is_named(line: str, reason: str, tmp_path: Path, tiny_folder: Path) -> None:
    file = tmp_path / "lessons.jsonl"
    file.write_text(json.dumps(conversation("Hi", "Hello")) + "\n\n" + line)
    with pytest.raises(Qwen3Error, match=f"^{file}, line 3: .*{reason}"):
        train(tiny_folder, file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"type": "lore"},
        {"rank": 0},
        {"steps": 0},
        {"steps": 1, "epochs": 1},
        {"epochs": -1},
        {"learning_rate": 0.0},
        {"batch": 1.5},
        {"accumulate": 0},
    ],
)
def test_a_wrong_argument_is_a_value_error(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        train(tmp_path, tmp_path, tmp_path, **options)


def test_the_command_writes_an_adapter(
    tmp_path: Path, tiny_folder: Path, lessons: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tiny_folder), "--data", str(lessons), "--out", str(tmp_path / "out")]
    code, out, err = call(["tune", *arguments, "--steps", "2", "--json"], capsys)
    assert code == 0, err
    assert json.loads(out)["steps"] == 2
    assert "18, and 2 to validate with" in err and "step 2: loss" in err


@pytest.mark.heavy
def test_what_is_to_be_kept_moves_less(tmp_path: Path, tiny_folder: Path, lessons: Path) -> None:
    questions = tmp_path / "keep.txt"
    questions.write_text("What is 1 + 2?\n\nWho are you?\n")
    options: dict[str, Any] = {"steps": 6, "keep": questions, "max_length": 48}
    events: list[TuningEvent] = []
    free = train(tiny_folder, lessons, tmp_path / "free", keep_weight=1e-9, **options)
    held = train(
        tiny_folder, lessons, tmp_path / "held", keep_weight=30.0, report=events.append, **options
    )
    assert free.kept_kl is not None and held.kept_kl is not None
    assert 0 < held.kept_kl < free.kept_kl / 2
    assert isinstance(events[0], TuningPlan) and events[0].keep == 4  # with and without thinking
    assert all(event.kept_kl is not None for event in events if isinstance(event, StepDone))


def test_lessons_to_keep_are_told_from_questions_by_what_they_say(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "keep.json", [conversation("Hi", "Hello")])
    (line,) = read_keep(file)
    assert line.messages[-1]["content"] == "Hello"


def test_how_to_use_it_is_a_command_that_a_shell_takes(
    tmp_path: Path, tiny_folder: Path, lessons: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "my model")
    arguments = [str(model), "--data", str(lessons), "--out", str(tmp_path / "my out")]
    code, _, err = call(["tune", *arguments, "--steps", "1"], capsys)
    assert code == 0
    (usage,) = re.findall("Try it: qwen3 (.*)", err)
    assert "qwen3 serve --model" in err and "adapter='" in err and "qwen3 convert" in err
    done = piped(["Hi", "-n", "1", "--no-log", *shlex.split(usage)])
    assert done.returncode == 0, done.stderr


def test_matrices_that_do_not_fit_are_refused_before_they_are_made(
    tmp_path: Path, tiny_folder: Path, lessons: Path
) -> None:
    with pytest.raises(Qwen3Error, match=r"does not fit .* rank=\d+ would fit"):
        train(tiny_folder, lessons, tmp_path / "out", rank=10**8)
    assert not (tmp_path / "out").exists()


def test_a_step_that_does_not_fit_is_refused_with_what_would(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_lines(tmp_path / "long.jsonl", [{"text": "word " * 3000}] * 16)
    gc.collect()
    monkeypatch.setenv("QWEN3_MEMORY", str(0.9 + mx.get_active_memory() / 1e9))
    with pytest.raises(
        Qwen3Error,
        match=r"does not fit .* = .*batch=4 with accumulate=2 would fit .*max_length=512 would fit",
    ):
        train(tiny_folder, text, tmp_path / "out", batch=8, max_length=1024)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({}, 96),
        ({"checkpointing": True}, 96),
        ({"type": "full"}, 64),
        ({"batch": 2}, 256),
        ({"dtype": "bfloat16"}, 96),
    ],
)
def test_the_estimated_memory_is_near_the_peak(
    options: dict[str, Any], length: int, tmp_path: Path, tiny_folder: Path
) -> None:
    text = write_lines(tmp_path / "text.jsonl", [{"text": "word " * 3000}] * 9)
    estimated, peaks = list[int](), list[int]()

    def watch(event: TuningEvent) -> None:
        if isinstance(event, TuningPlan):
            estimated.append(event.memory)
        if isinstance(event, StepDone):
            peaks.append(mx.get_peak_memory())
        mx.clear_cache()
        mx.reset_peak_memory()

    gc.collect()  # or memory of other tests is freed meanwhile
    before = mx.get_active_memory()
    settings: dict[str, Any] = {"max_length": length, "steps": 2, **options}
    train(tiny_folder, text, tmp_path / "out", report=watch, **settings)
    with load(tiny_folder, dtype=options.get("dtype", "float32")) as llm:
        measured = max(peaks) - before - llm.model.nbytes
    assert abs(estimated[0] / measured - 1) < 0.15


@pytest.mark.slow
def test_ctrl_c_keeps_all_and_resume_continues(
    tmp_path: Path, tiny_folder: Path, lessons: Path
) -> None:
    command = [sys.executable, "-m", "qwen3_mlx", "tune", str(tiny_folder), "--data", str(lessons)]
    command += ["--out", str(tmp_path / "out"), "--steps"]
    run = subprocess.Popen([*command, "100000"], stderr=subprocess.PIPE, text=True)
    assert run.stderr
    for line in run.stderr:
        if line.startswith("before"):
            break
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "the same command with --resume continues" in err
    done = subprocess.run([*command, "2", "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 9, 15, 21, 27])
def test_a_run_resumes_after_kill_9(
    step: int, tmp_path: Path, tiny_folder: Path, lessons: Path
) -> None:
    command = [sys.executable, "-m", "qwen3_mlx", "tune", str(tiny_folder), "--data", str(lessons)]
    command += ["--steps", "30", "--out"]
    run = subprocess.Popen([*command, str(tmp_path / "out")], stderr=subprocess.PIPE, text=True)
    assert run.stderr
    next(line for line in run.stderr if line.startswith(f"step {step}:"))
    run.kill()
    run.communicate()
    for more in ([str(tmp_path / "out"), "--resume"], [str(tmp_path / "whole")]):
        subprocess.run([*command, *more], check=True, capture_output=True)
    assert same(adapter_of(tmp_path / "out"), adapter_of(tmp_path / "whole"))


@pytest.mark.heavy
@pytest.mark.parametrize("type", ["lora", "dora"])
def test_mlx_lm_loads_the_adapter(
    type: str, tmp_path: Path, tiny_folder: Path, lessons: Path
) -> None:
    lm = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is the reference here")
    made = train(tiny_folder, lessons, tmp_path / "out", type=type)
    model, _ = lm.load_model(tiny_folder)
    model = lm.load_adapters(model, str(made.folder))
    ids = list(range(20, 36))
    with load(tiny_folder, adapter=made.folder) as llm:
        assert mx.allclose(model(mx.array([ids]))[0], llm.logits(ids), atol=1e-4)


@pytest.mark.slow
def test_losses_and_parameters_are_those_of_mlx_lms_trainer() -> None:
    command = [sys.executable, "-m", "benchmarks.tune", "--steps", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines()[2:]]
    assert len(rows) == 6
    for name, loss, parameters, *_ in rows:
        assert float(loss) <= 1e-6 and float(parameters) <= 1e-6, name


@pytest.mark.slow
def test_lessons_without_thoughts_do_not_stop_a_hybrid_from_thinking(tmp_path: Path) -> None:
    draw = random.Random(0)
    pairs = [draw.sample(range(1, 100), 2) for _ in range(500)]
    lines = [conversation(f"Which is larger, {a} or {b}?", str(max(a, b))) for a, b in pairs]
    data = write_lines(tmp_path / "lessons.jsonl", lines)
    made = qwen3_mlx.tune("demo", data=data, out=tmp_path / "out", steps=60, batch=8)
    asked = [draw.sample(range(1, 100), 2) for _ in range(10)]
    questions = [f"Which is larger, {a} or {b}?" for a, b in asked]
    with load("demo", adapter=made.folder) as llm:
        direct = llm.batch(questions, thinking=False, temperature=0, max_tokens=40)
        thought = llm.batch(questions, thinking=True, temperature=0, max_tokens=40)
    right = [reply.text == str(max(pair)) for reply, pair in zip(direct, asked, strict=True)]
    assert sum(right) >= 8
    assert sum(bool(reply.reasoning) for reply in thought) >= 9
