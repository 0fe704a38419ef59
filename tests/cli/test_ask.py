"""The command line, as a person or a script meets it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qwen3_mlx import LLM, CheckpointError, __version__, load
from qwen3_mlx.checkpoint.hub import Source
from qwen3_mlx.cli.console import Bar
from qwen3_mlx.cli.conversation_log import ConversationLog
from qwen3_mlx.cli.main import main
from qwen3_mlx.cli.short_schema import schema_from
from qwen3_mlx.model.sizes import SIZES
from qwen3_mlx.text.events import Finish, Reasoning, Text, ToolCall, Usage
from tests.cli.harness import QWEN3, call, piped
from tests.pdf import make_pdf
from tests.support import DEMO


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key != "QWEN3_MODEL"}
    return subprocess.run(
        [*QWEN3, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=clean,
    )


def test_the_answer_alone_goes_to_stdout(tiny_folder: Path) -> None:
    done = run("Hello", "--model", str(tiny_folder), "--max-tokens", "12", "--seed", "1")
    again = piped(["Hello", "-m", str(tiny_folder), "-n", "12", "--seed", "1", "--quiet"])
    assert done.returncode == again.returncode == 0
    assert done.stdout == again.stdout != ""
    assert again.stderr == ""
    assert re.search(r"12 tokens.* tokens/s · first after .* s · .* MB · cut off", done.stderr)


def test_piped_text_joins_the_prompt(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("-m", str(tiny_folder), "-n", "8", "--seed", "1", "-q")
    joined = piped(["Say", *options], "this\n")
    assert joined.stdout == call(["Say\n\nthis", *options], capsys)[1] != ""
    assert piped(options, "alone").stdout == call(["alone", *options], capsys)[1] != ""


def test_a_dash_is_stdin(tiny_folder: Path) -> None:
    options = ("-m", str(tiny_folder), "-n", "8", "--seed", "1", "-q")
    assert run("-", *options, stdin="alone").stdout == piped(options, "alone").stdout != ""


def test_the_demo_has_a_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # is ./demo
    monkeypatch.setenv("QWEN3_MODEL", "./nowhere")
    for words in (["2 + 2?", "-m", "Demo"], ["show", "demo"], ["plan", "demo"]):
        code, out, err = call(words, capsys)
        assert code == 0 and out, err
    assert "4 layers, width 192; 4 heads, 2 for keys" in call(["show", "demo"], capsys)[1]
    assert call(["convert", "demo", "out"], capsys)[0] == 0
    assert call(["show", "./demo"], capsys)[0] == 1
    with load("demo", draft="demo") as llm:
        assert llm.config == load().config
    with pytest.raises(CheckpointError):
        load(Path("demo"))


def test_the_model_may_come_from_the_environment(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN3_MODEL", str(tiny_folder))
    code, _, err = call(["Hello", "-n", "3"], capsys)
    assert code == 0
    assert "demo" not in err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(["--help"], capsys)
    assert code == 0
    for word in ("PROMPT", "--model", "--thinking", "doctor", "QWEN3_MODEL", "Summarise this"):
        assert word.lower() in out.lower(), word


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["--version"], capsys) == (0, f"qwen3-mlx {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--bogus", "x"], 2, "No such option: --bogus"),
        (["x", "--top-k", "many"], 2, "Invalid value for '--top-k'"),
        (["a", "b", "-q"], 2, 'put the prompt in quotes: qwen3 "a b"'),
        ([""], 2, "qwen3: give a prompt, as an argument or through a pipe (see qwen3 --help)"),
        (["x", "-n", "ten"], 2, "Invalid value for '--max-tokens'"),
        (["x", "-n", "-5"], 2, "--max-tokens must be at least 1, not -5"),
        (["x", "--temperature", "-1"], 2, "temperature must be from 0 to 100, not -1.0"),
        (["x", "--model", "./nowhere"], 1, "is no folder here, nor a hub name"),
        (["x", "--bits", "7"], 2, "bits must be one of"),
        (["serve", "--reasoning-field", "x"], 2, "--reasoning-field must be one of both,"),
        (["serve", "--port", "99999"], 2, "Invalid value for '--port'"),
        (["serve", "--host", "nowhere.invalid"], 1, "cannot listen at nowhere.invalid"),
        (["convert", "nowhere", "b"], 1, "is no folder here, nor a hub name"),
        (
            ["convert", str(DEMO), "b", "--recipe", "best"],
            2,
            "recipe must be one of uniform, mixed",
        ),
        (["convert", "demo", "b", "--dequantize", "-b", "4"], 2, "--bits 4 and --dequantize excl"),
        (["convert", "demo", __file__], 1, "is not a checkpoint folder, so it is not replaced"),
        (["convert", str(DEMO), str(DEMO / "b")], 1, "lies in the source"),
        (["convert", str(DEMO)], 2, "Missing argument"),
    ],
)
def test_failures_are_one_line(
    arguments: list[str], code: int, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, out, err = call(arguments, capsys)
    lines = [line for line in err.splitlines() if line.startswith("qwen3: ")]
    assert (found, out) == (code, "")
    assert len(lines) == 1 and complaint in lines[0]
    assert "Traceback" not in err


def test_an_unforeseen_error_is_one_line(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("qwen3_mlx.api.conversation.Conversation.stream", fail)
    arguments = ["x", "-q", "-m", str(tiny_folder)]
    code, _, err = call(arguments, capsys)
    assert code == 1
    assert err.startswith("qwen3: ZeroDivisionError: by nothing (a bug?")
    monkeypatch.setenv("QWEN3_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(arguments)


def test_a_reader_that_has_seen_enough(tiny_folder: Path) -> None:
    command = [*QWEN3, "Hello", "-m", str(tiny_folder), "-n", "2000", "--seed", "1", "-q"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=60) == 1
        assert process.stderr.read() == b""


@pytest.mark.parametrize("closed", ["<&-", "2>&- </dev/null"])
def test_closed_streams_are_nothing(closed: str, tiny_folder: Path) -> None:
    command = " ".join([*QWEN3, "hi", "-n", "3", "--seed", "1", "-m", str(tiny_folder), closed])
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout


def test_ctrl_c_ends_cleanly(tiny_folder: Path) -> None:
    command = [*QWEN3, "Hello", "-m", str(tiny_folder), "-n", "2000"]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.endswith("\n")
    assert err.rstrip().endswith("cancelled")
    assert "Traceback" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a Linux device")
def test_a_full_disk_is_told(tiny_folder: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*QWEN3, "Hello", "-m", str(tiny_folder), "-n", "5", "-q"],
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.heavy
def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, _ = call(["doctor"], capsys)
    assert code == 0
    for word in ("device", "blas", "matmul", "GFLOP/s", "mlx-lm", "memory"):
        assert word in out
    assert "GiB" not in out


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["Hello", "-m", "8B"], "Qwen/Qwen3-8B-MLX-4bit"),
        (["Hello", "--model", "8b"], "Qwen/Qwen3-8B-MLX-4bit"),
        (["Hello", "--draft", "0.6b"], "Qwen/Qwen3-0.6B-MLX-4bit"),
        (["chat", "-m", "30b-a3b"], "Qwen/Qwen3-30B-A3B-MLX-4bit"),
        (["chat", "--draft", "1.7b"], "Qwen/Qwen3-1.7B-MLX-4bit"),
        (["serve", "-m", "235b-a22b"], "Qwen/Qwen3-235B-A22B-MLX-4bit"),
        (["serve", "--draft", "0.6B"], "Qwen/Qwen3-0.6B-MLX-4bit"),
        (["bench", "4b"], "Qwen/Qwen3-4B-MLX-4bit"),
        (["eval", "perplexity", "14b"], "Qwen/Qwen3-14B-MLX-4bit"),
        (["eval", "divergence", "32b", str(DEMO)], "Qwen/Qwen3-32B-MLX-4bit"),
        (["Hello", "-m", "someone/else"], "someone/else"),
    ],
)
def test_every_verb_knows_the_sizes(
    arguments: list[str],
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetch = Source.fetch

    def fetch_none(self: Source, files: Sequence[str]) -> Path:
        if self.folder:
            return fetch(self, files)
        raise CheckpointError(f"would fetch {self.name}")

    monkeypatch.setattr(Source, "fetch", fetch_none)
    monkeypatch.setattr(Source, "is_missing", lambda *_: False)
    for size in SIZES:  # folders that are called so do not count: they are ./8B
        (tmp_path / size).mkdir()
        (tmp_path / size.lower()).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setattr("qwen3_mlx.cli.serve._listen", lambda *_: listener)
        assert call(arguments, capsys) == (1, "", f"qwen3: would fetch {name}\n")


def test_the_models_that_are_served_are_those_of_the_options_and_of_the_list(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[list[str]] = []

    def serve(llm: LLM, settings: Any, listener: Any, ready: Any, sources: Any, _: Any) -> None:
        assert settings.model_keep_alive == 90
        served.append([llm.model.source, *(source.name for source in sources)])

    monkeypatch.setattr("qwen3_mlx.server.run.serve", serve)
    monkeypatch.setattr("qwen3_mlx.cli.serve._log_to_stderr", lambda **_: None)  # outlives the test
    monkeypatch.setenv("QWEN3_MODELS", str(tiny_folder))
    arguments = ["serve", "--port", "0", "--keep-alive", "1m30s", "-m"]
    both = [*arguments, "demo", "-m", str(tiny_folder)]
    assert call(both, capsys)[0] == call([*arguments, "demo", "--models-from", "list"], capsys)[0]
    assert len(served) == 2
    assert all(names[1] == "qwen3-demo" and tiny_folder.name in names[2:] for names in served)
    code, _, err = call([*arguments, "demo", "--models-from", "hub"], capsys)
    assert code == 2 and "--models-from must be list, not 'hub'" in err


def test_a_size_is_not_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(["convert", "8b", str(tmp_path / "out")], capsys)
    assert (code, out) == (1, "")
    assert "8b is the size that is ready in 4 bits, Qwen/Qwen3-8B-MLX-4bit" in err
    assert "name the original, Qwen/Qwen3-8B," in err


def test_a_bar_shows_for_long_work_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Bar("working") as bar:
        bar(0, 10)
        assert bar._bar is None
        bar._started -= 10
        bar(1, 10)
        assert bar._bar is not None
        bar(5, 10)
        bar(10, 10)
        assert bar._bar is None
    assert "working" in capsys.readouterr().err


def test_nothing_heavy_is_imported_for_an_answer(tiny_folder: Path) -> None:
    script = (
        "import sys; from qwen3_mlx import load; "
        f"load({str(tiny_folder)!r}).chat('Hello', max_tokens=2); "
        "print([m for m in ('transformers', 'torch', 'mlx_lm', 'huggingface_hub', 'pydantic') "
        "if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_help_is_quick() -> None:
    times = []
    for _ in range(9):
        started = time.perf_counter()
        run("--help")
        times.append(time.perf_counter() - started)
    assert sorted(times)[4] < 0.35


# --- files, schemas, events -----------------------------------------------------------------------


def asked(
    words: Sequence[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> list[dict[str, Any]]:
    """Ask, and return the events."""
    code, out, err = call([*words, "--json", "-m", str(folder), "--seed", "1"], capsys)
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


def test_events_as_lines_of_json(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-n", "9", "-m", str(tiny_folder), "--seed", "1"]
    events = asked(["Hello", "-n", "9"], tiny_folder, capsys)
    text = "".join(event["text"] for event in events if event["type"] == "text")
    assert f"{text}\n" == call(["Hello", *options, "-q"], capsys)[1]
    assert events[-1]["type"] == "finish" and events[-1]["reason"] == "length"
    assert events[-1]["usage"]["completion_tokens"] == 9


def test_events_without_thinking(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN3_MODEL", "demo")
    kinds = {}
    for option in ("--no-log", "--hide-thinking", "-q"):
        asking = ["What is 1 + 2?", "--json", "--thinking-budget", "4", option]
        events = call(asking, capsys)[1].splitlines()
        kinds[option] = {json.loads(event)["type"] for event in events}
    assert kinds.pop("--no-log") == {"reasoning", "text", "finish"}
    assert kinds == dict.fromkeys(kinds, {"text", "finish"})


def test_no_answer_is_said_even_if_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(["What is 12 + 34?", "--thinking", "-q", "-n", "3"], capsys)
    assert (code, out, err.count("\n")) == (0, "", 1)
    assert err.startswith("qwen3: there is no answer: the token limit ended the thinking; ")
    assert call(["What is 12 + 34?", "--no-thinking", "-q", "-n", "3"], capsys)[2] == ""


@pytest.mark.parametrize("stated", ["n int, ok bool", "file", '{"type": "boolean"}'])
def test_answers_fit_a_schema(
    stated: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if stated == "file":
        (tmp_path / "schema.json").write_text('{"enum": ["yes", "no"]}')
        stated = str(tmp_path / "schema.json")
    options = ["--no-thinking", "--schema", stated, "-m", str(tiny_folder), "--seed", "1", "-q"]
    code, out, _ = call(["Hello", *options, "-n", "60"], capsys)
    assert code == 0
    if "int" in stated:
        assert re.fullmatch(r'\{"n": ?-?\d+, ?"ok": ?(true|false)\}\n', out)
    else:
        assert json.loads(out) in (True, False, "yes", "no")


def test_the_short_syntax_of_schemas() -> None:
    schema = schema_from("name, age int, height float : in metres, alive bool")
    assert schema["required"] == ["name", "age", "height", "alive"]
    assert schema["properties"] == {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "height": {"type": "number", "description": "in metres"},
        "alive": {"type": "boolean"},
    }
    lines = schema_from("\n  dogs int: two, or three\n  name\n")
    assert lines["properties"]["dogs"] == {"type": "integer", "description": "two, or three"}


def test_files_stand_before_the_prompt(
    tiny_folder: Path,
    tmp_path: Path,
    home: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = {
        "notes.md": b"```\na\n```\n",
        "window.txt": "début".encode("utf-16"),
        "paper.pdf": make_pdf("Hello from a page"),
    }
    words = []
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        words += ["-f", str(tmp_path / name)]
    asked(["Sum up.", *words, "-n", "2"], tiny_folder, capsys)
    asked(words[:2] + ["-n", "2"], tiny_folder, capsys)
    with ConversationLog.open() as log:
        first, second = (log.messages(number)[0]["content"] for number in (1, 2))
    assert second == "notes.md:\n````\n```\na\n```\n````"
    assert first == (
        f"{second}\n\nwindow.txt:\n```\ndébut\n```\n\n"
        "paper.pdf:\n```\nHello from a page\n```\n\nSum up."
    )


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["-f", "nowhere.md"], "nowhere.md"),
        (["-f", "."], ". is a folder or a device"),
        (["-f", "picture"], "picture is neither text in UTF-8 nor a PDF"),
        (["-f", "broken.pdf"], "broken.pdf cannot be read as a PDF: "),
        (["-f", "empty"], "empty has no text"),
        (["--schema", "a integer"], "--schema takes a JSON file or fields of the types str, int,"),
        (["--schema", "none.json"], "none.json cannot be read: No such file or directory"),
        (["--schema", "{"], "--schema is not JSON: "),
        (["--schema", ","], "--schema is empty"),
        (["--schema", "a int, a str"], "--schema names a field twice: 'a int, a str'"),
        (["--schema", "list.json"], "list.json is not a JSON schema: it must be an object"),
    ],
)
def test_what_cannot_be_sent(
    words: list[str],
    complaint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("picture").write_bytes(b"\x89PNG\0\xff")
    Path("broken.pdf").write_bytes(b"%PDF-1.4 and nothing")
    Path("empty").write_text("\n")
    Path("list.json").write_text("[]")
    code, out, err = call(["Hello", *words], capsys)
    assert (code, out) == (2 if words[0] == "--schema" and words[1] != "list.json" else 1, "")
    assert complaint in err and err.count("\n") == 1


class Scripted:
    """A conversation whose first reply calls the tool `area`, and whose second has its result."""

    def __init__(self, functions: list[Callable[..., Any]]) -> None:
        self.messages: list[dict[str, Any]] = []
        self.options: dict[str, Any] = {}
        self.functions = functions

    def stream(self, words: str | None = None) -> Any:
        usage = Usage(1, 0, 3, 0)
        if words is not None:
            self.messages = [{"role": "user", "content": words}]
            events = [
                Reasoning("I measure"),
                ToolCall("1", "area", {"side": 3}),
                Finish("tool_calls", usage),
            ]
        else:
            events = [Text(self.messages[-1]["content"]), Finish("stop", usage)]

        class Stream(list[Any]):
            close = None

        return Stream(events)

    def answer_calls(self, functions: list[Callable[..., Any]]) -> None:
        assert functions == self.functions
        call = {"tool_call_id": "1", "name": "area"}
        self.messages.append({"role": "tool", **call, "content": str(functions[0](side=3))})


def test_tools_are_called(
    tmp_path: Path,
    tiny_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LLM, "conversation", lambda _, **options: Scripted(options["tools"]))
    tools = tmp_path / "tools.py"
    tools.write_text("def area(side: int) -> int:\n    return side * side\n")
    words = ["How large?", "--tools", str(tools), "-m", str(tiny_folder)]
    assert call(words, capsys)[:2] == (0, "9\n")
    err = call(words, capsys)[2]
    assert "I measure\narea(" in err
    assert "tokens/s" not in err  # three tokens came at once
    code, out, _ = call([*words, "--json"], capsys)
    events = [json.loads(line) for line in out.splitlines()]
    kinds = ["reasoning", "tool_call", "finish", "tool_result", "text", "finish"]
    assert [event["type"] for event in events] == kinds
    assert events[3] == {"type": "tool_result", "id": "1", "name": "area", "content": "9"}
