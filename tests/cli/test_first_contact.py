"""The first hour with the command: Ctrl-C at any moment, slips of the keyboard, what to install."""

import ast
import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer

from qwen3_mlx import LLM, SamplingParams, backend, extras, load
from qwen3_mlx.cli.error_wording import with_option_names
from qwen3_mlx.cli.main import _keywords, app
from tests.cli.harness import call

_ROOT = Path(__file__).parents[2]
KEYWORDS = _keywords()
# Runs in the command's process before all else: Ctrl-C comes when MODULE is about to be imported,
# or when the thread that loads calls FUNCTION, which then takes minutes.
_CUSTOMIZED = """
import os, signal, sys, threading, time

def press():
    os.kill(os.getpid(), signal.SIGINT)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ.get("MODULE"):
            press()

def profile(frame, event, _):
    if event == "call" and frame.f_code.co_name == os.environ["FUNCTION"]:
        time.sleep(0.2)  # a signal in the moment before a lock is waited for is seen after that
        press()
        time.sleep(300)

sys.meta_path.insert(0, Finder())
if "FUNCTION" in os.environ:
    threading.setprofile(profile)
"""


def interrupted(folder: Path, *command: str, **moment: str) -> subprocess.CompletedProcess[str]:
    """Run a command, which is interrupted at a moment."""
    (folder / "sitecustomize.py").write_text(_CUSTOMIZED)
    clean = {key: value for key, value in os.environ.items() if key != "QWEN3_MODEL"}
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,  # less than what was interrupted would take
        check=False,
        env=clean | {"PYTHONPATH": f"{folder}:{_ROOT}"} | moment,
    )


@pytest.fixture
def ways(tmp_path: Path) -> dict[str, list[str]]:
    """The ways to start the command."""
    script = tmp_path / "qwen3"  # as pip writes it
    script.write_text("from qwen3_mlx.__main__ import main\nmain()\n")
    return {
        "module": [sys.executable, "-m", "qwen3_mlx"],
        "script": [sys.executable, str(script)],
        "convert": [sys.executable, str(_ROOT / "convert.py")],
    }


@pytest.mark.parametrize(
    ("way", "module"),
    [
        ("module", "qwen3_mlx.backend"),
        ("module", "mlx.core"),
        ("module", "typer"),
        ("module", "rich.console"),
        ("script", "qwen3_mlx.backend"),
        ("script", "qwen3_mlx.__main__"),
        ("script", "qwen3_mlx.api.llm"),
        ("script", "tokenizers"),
        ("convert", "mlx.core"),
    ],
)
def test_ctrl_c_while_it_imports(
    way: str, module: str, ways: dict[str, list[str]], tmp_path: Path
) -> None:
    done = interrupted(tmp_path, *ways[way], "Hello", MODULE=module)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "qwen3: interrupted\n")


@pytest.mark.heavy
@pytest.mark.parametrize("verb", [["Hello"], ["chat"], ["serve", "--port", "0"]])
def test_ctrl_c_while_it_loads(
    verb: list[str], ways: dict[str, list[str]], tmp_path: Path, tiny_folder: Path
) -> None:
    command = [*ways["script"], *verb, "-m", str(tiny_folder)]
    done = interrupted(tmp_path, *command, FUNCTION="load_model")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "qwen3: interrupted\n")


def test_a_program_that_imports_the_package_keeps_its_signals(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import signal, qwen3_mlx\nprint(signal.getsignal(2) is signal.default_int_handler)\n"
    )
    assert interrupted(tmp_path, sys.executable, str(program)).stdout == "True\n"
    done = interrupted(tmp_path, sys.executable, str(program), MODULE="mlx.core")
    assert "KeyboardInterrupt" in done.stderr


def test_an_ignored_signal_stays_ignored(ways: dict[str, list[str]], tmp_path: Path) -> None:
    """As of a command in the background of a script."""
    line = f"trap '' INT; {shlex.join(ways['script'])} --version"
    done = interrupted(tmp_path, "sh", "-c", line, MODULE="mlx.core")
    assert (done.returncode, done.stderr) == (0, "")


# --- what is typed ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("caht", "chat"),
        ("plam 8B", "plan"),
        ("sreve --port 0", "serve"),
        ("evl perplexity", "eval"),
        ("docter", "doctor"),
        ("run 8B", "chat --model"),
        ("ls", "list"),
        ("models", "list"),
        ("download 8B", "pull"),
        ("remove 8B", "rm"),
        ("help", "--help"),
        ("uninstall 8B", "rm"),
        ("history", "logs"),
        ("settings", "config"),
        ("completion", "--install-completion"),
        ("version", "--version"),
    ],
)
def test_a_typo_of_a_verb_is_no_prompt(
    words: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(words.split(), capsys)
    typed = words.split(" --")[0]
    first = typed.split()[0]
    prompt = f"qwen3 -- {first}" if typed == first else f'qwen3 "{typed}"'
    assert (code, out) == (2, "")
    assert err == (
        f"qwen3: there is no command '{first}'; did you mean qwen3 {meant}? To send it as a "
        f"prompt: {prompt} (see qwen3 --help)\n"
    )


@pytest.mark.parametrize(
    "words", [["Hello"], ["What"], ["what is a chat?"], ["--", "caht"], ["-q", "caht"]]
)
def test_other_words_are_a_prompt(
    words: list[str], tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["-n", "2", "--seed", "1", "-m", str(tiny_folder)]
    code, out, _ = call([*words, *options] if words[0] != "--" else [*options, *words], capsys)
    assert code == 0 and out


def test_stray_words_want_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(["hi", "there", "-m", "8B", "friend"], capsys)
    assert (code, out) == (2, "")
    assert err == 'qwen3: put the prompt in quotes: qwen3 "hi there friend" (see qwen3 --help)\n'
    for words, hint in (
        ("What is 12 + 34?", ""),
        ("plam a day out", "; or did you mean qwen3 plan?"),
    ):
        code, out, err = call(words.split(), capsys)
        assert (code, out) == (2, "")
        assert err == f'qwen3: put the prompt in quotes: qwen3 "{words}"{hint} (see qwen3 --help)\n'


def test_an_address_that_is_not_here_is_no_matter_of_the_port(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, err = call(["serve", "--host", "192.0.2.1"], capsys)
    assert code == 1 and err.endswith("; --host takes an address of this machine\n")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("serve --max-body 0", "(see qwen3 serve --help)"),
        (
            "chat hello",
            "unexpected argument: hello; name the model with --model (see qwen3 chat --help)",
        ),
        (
            "serve 8B",
            "unexpected argument: 8B; name the model with --model (see qwen3 serve --help)",
        ),
        ("doctor me you", "unexpected argument: you (see qwen3 doctor --help)"),
        ("eval perplexity --tokens x", "(see qwen3 eval perplexity --help)"),
    ],
)
def test_a_word_too_many_for_a_verb(
    words: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(words.split(), capsys)
    assert (code, out) == (2, "") and err.endswith(f"{complaint}\n")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("7B", "8B"),
        ("Qwen3-8B", "8B"),
        ("qwen3:8b", "8B"),
        ("30b", "30B-A3B"),
        ("235B", "235B-A22B"),
        ("900B", None),
        ("qwen", None),
    ],
)
def test_a_wrong_size_lists_the_sizes(
    name: str, hint: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(["Hello", "-m", name], capsys)
    assert code == 1 and "nor one of the sizes 0.6B, 1.7B, 4B, 8B" in err
    assert err.endswith(f"nor demo; did you mean {hint}?\n" if hint else "nor demo\n")


def test_a_file_that_cannot_be_written_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def install(*_: Any) -> NoReturn:
        raise OSError(errno.EROFS, "Read-only file system", "/home/me/.bashrc")

    monkeypatch.setattr("typer.completion.install", install)
    monkeypatch.setattr("os.dup2", lambda *_: None)
    assert call(["--install-completion"], capsys) == (
        1,
        "",
        "qwen3: /home/me/.bashrc cannot be used: Read-only file system\n",
    )


def options_of(*words: str) -> dict[str, str | None]:
    command: Any = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    return {
        name: param.help
        for param in command.params
        if param.param_type_name == "option"
        for name in [*param.opts, *param.secondary_opts]
    }


def test_one_question_and_a_conversation_take_the_same_options() -> None:
    ask, chat = options_of("ask"), options_of("chat")
    shared = set(ask) & set(chat)
    assert {name: chat[name] for name in shared} == {name: ask[name] for name in shared}
    assert set(ask) - shared == {"--file", "-f", "--schema", "--json"}
    assert set(chat) - shared == {"--load"}


def test_every_verb_that_loads_a_model_takes_the_same_options() -> None:
    ask, serve = options_of("ask"), options_of("serve")
    once = {"--system", "-s", "--max-tokens", "-n", "--stop", "--hide-thinking", "--quiet", "-q"}
    once |= {"--preset", "--tools", "--mcp", "--yes", "--file", "-f", "--schema", "--json"}
    once |= {"--continue", "-c", "--log", "--no-log"}
    once |= {"--model", "-m", "--adapter"}  # of a server, several
    assert {name: serve.get(name) for name in set(ask) - once} == {
        name: ask[name] for name in set(ask) - once
    }
    assert {f"--{field.name.replace('_', '-')}" for field in fields(SamplingParams)} <= set(ask)
    loading = {"--revision", "--bits", "--dtype", "--dequantize", "--context", "--kv-bits"}
    for measurement in ("perplexity", "divergence"):
        found = options_of("eval", measurement)
        assert {name: found.get(name) for name in loading} == {name: ask[name] for name in loading}


def test_all_sampling_parameters_reach_the_sampler(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def conversation(self: LLM, **options: Any) -> NoReturn:
        seen.update(options)
        raise ValueError("seen")

    monkeypatch.setattr(LLM, "conversation", conversation)
    words = "Hello -t 1.5 --top-p 0.5 --top-k 7 --min-p 0.1 --seed 3 --presence-penalty 1"
    words += (
        " --frequency-penalty 0.5 --repetition-penalty 1.1 --logit-bias 5=-2 --logit-bias 6=1.5"
    )
    assert call([*words.split(), "-m", str(tiny_folder)], capsys)[0] == 1
    assert seen["seed"] == 3
    assert seen["sampling"] == SamplingParams(
        temperature=1.5,
        top_p=0.5,
        top_k=7,
        min_p=0.1,
        presence_penalty=1.0,
        frequency_penalty=0.5,
        repetition_penalty=1.1,
        logit_bias={5: -2.0, 6: 1.5},
    )
    for stated in ("5", "x=1", "5=", "5=1=2"):
        code, _, err = call(["Hello", "--logit-bias", stated], capsys)
        assert (code, err) == (
            2,
            f"qwen3: --logit-bias takes ID=BIAS, such as 42=-5, not {stated}\n",
        )


def test_quiet_chat_says_the_answers_alone(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["Hello", "Hello"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines, None) or _end())
    words = ["chat", "-q", "--no-thinking", "-n", "3", "-t", "0", "--dtype", "float16"]
    code, out, err = call([*words, "-m", str(tiny_folder)], capsys)
    assert (code, err) == (0, "") and len(out.splitlines()) >= 2


def _end() -> str:
    raise EOFError


def test_bytes_that_are_no_text_are_found_where_they_are_typed(
    demo: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(["repeat \udcff", "-q"], capsys)
    assert (code, err) == (1, "qwen3: the text is not valid Unicode at character 7; is it UTF-8?\n")
    turns = [{"role": "system", "content": "ok"}, {"role": "user", "content": "ab\udcff"}]
    with pytest.raises(ValueError, match=r"of messages\[1\] is not valid Unicode at character 2;"):
        demo.chat(turns)


def test_an_llm_says_what_it_is(tiny_folder: Path) -> None:
    with load(tiny_folder) as llm:
        assert repr(llm) == f"<LLM {tiny_folder}, context 2,048>"
    assert repr(llm) == "<LLM, closed>"


def test_misshapen_weights_are_named_once_for_all_layers(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "narrow"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    code, _, err = call(["Hello", "-m", str(folder)], capsys)
    assert code == 1 and err.count("model.layers.*.mlp.up_proj.weight is [128, 64] where") == 1
    assert "layers.0." not in err and len(err) < 600


# --- what the doctor says -----------------------------------------------------------------------


@pytest.mark.parametrize("blas", ["libopenblas.so.0", "MLX's own"])
def test_the_doctor_advises_only_what_is_missing(
    blas: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "on_gpu", lambda: False)
    monkeypatch.setattr(backend, "matmul_speed", lambda: 1e9)  # as on a busy machine
    monkeypatch.setattr(backend, "memory_bandwidth", lambda: 1e9)
    monkeypatch.setattr(backend, "BLAS", blas)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, _ = call(["doctor"], capsys)
    assert code == 0 and ("libopenblas0-pthread" in out) == (blas == "MLX's own")


# --- what errors advise -------------------------------------------------------------------------


def test_errors_name_options() -> None:
    for message, wanted in (
        ("x exists; --force (force=True) replaces it", "exists; --force replaces it"),
        ("bits=4 would fit (5 GB)", "--bits 4 would fit (5 GB)"),
        ('dtype="bfloat16" would fit', "--dtype bfloat16 would fit"),
        ("dequantize=False would fit", "--no-dequantize would fit"),
        ("thinking, which thinking=False switches off", ", which --no-thinking switches off"),
        ("take a smaller one, or draft='ngram'", "take a smaller one, or --draft ngram"),
        ("take one that has, or continue raw text with complete()", "take one that has"),
        ('load it with --dtype float32 (dtype="float32")', "load it with --dtype float32"),
        ("top_k must be from 0 to 2, not 3", "--top-k must be from 0 to 2, not 3"),
        (
            "prompt_cache: /x is a file; name a folder",
            "--prompt-cache: /x is a file; name a folder",
        ),
        ("x: max_tokens must be 1", "x: max_tokens must be 1"),
        ("http://x/?seed2=1 and folder=8 stay", "http://x/?seed2=1 and folder=8 stay"),
    ):
        assert with_option_names(message, KEYWORDS).endswith(wanted)


def _messages() -> dict[str, str]:
    """Every text that is raised, but for clients of the server, with 7 for what is filled in."""
    found = {}
    files = set((_ROOT / "qwen3_mlx").rglob("*.py"))
    for file in sorted(files - set((_ROOT / "qwen3_mlx" / "server").rglob("*.py"))):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                text = node.exc.args[0]
                parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                words = [
                    str(part.value) if isinstance(part, ast.Constant) else "7" for part in parts
                ]
                found[f"{file.name}:{node.lineno}"] = "".join(words)
    return found


def test_no_error_of_the_command_advises_python() -> None:
    messages = _messages()
    assert len(messages) > 200
    no_option = ("tool_choice=", "(continue_last=")  # nothing on the command line leads there
    python = re.compile(r"\b[a-z_]+\(\)|\b[a-z_]+=(?:True|False|None|\d|[\"'])")
    assert {
        place: words
        for place, words in messages.items()
        if python.search(with_option_names(words, KEYWORDS))
        and not any(map(words.count, no_option))
    } == {}


@pytest.mark.parametrize("pip", [True, False])
def test_what_to_install_exists_wherever_this_came_from(
    pip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda _: pip or None)
    command = shlex.split(extras.install_command("plot"))
    start = [sys.executable, "-m", "pip", "install"]
    if not pip:
        start = ["uv", "pip", "install", "--python", sys.executable]
    assert command[:-1] == start and re.fullmatch(r"matplotlib>=[\d.]+", command[-1])

    def missing(_: str) -> None:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "requires", missing)
    assert shlex.split(extras.install_command("plot"))[-1] == ".[plot]"


def test_nothing_advises_a_package_that_is_not_there() -> None:
    """On PyPI there is no qwen3-mlx."""
    for file in [_ROOT / "README.md", *_ROOT.glob("docs/*.md"), *_ROOT.glob("qwen3_mlx/**/*.py")]:
        assert not re.search(r"pip install\s+['\"]?qwen3-mlx", file.read_text("utf-8")), file
