"""The user's settings: what beats what, presets, aliases, and what `qwen3 config` shows."""

from pathlib import Path
from typing import Any, NoReturn

import pytest

import qwen3_mlx
from qwen3_mlx import LLM
from tests.cli.harness import call

Capture = pytest.CaptureFixture[str]

_CODER = """
[presets.coder]
system = "Answer with code."
temperature = 1
top_p = 0.5
thinking = false
max_tokens = 7
stop = ["END"]
"""


@pytest.fixture
def config(home: Path) -> Path:
    home.mkdir()
    return home / "config.toml"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The models that were to be loaded."""
    models: list[str | None] = []

    def load(model: str | None, **_: Any) -> NoReturn:
        models.append(model)
        raise ValueError("loaded")

    monkeypatch.setattr(qwen3_mlx, "load", load, raising=False)
    return models


def test_flags_beat_the_environment_and_that_the_file(
    config: Path, loaded: list[str | None], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    config.write_text('model = "fast"\n[aliases]\nfast = "4B"\ndeep = "8B"\n')
    call(["Hello"], capsys)
    call(["chat"], capsys)
    call(["eval", "perplexity"], capsys)
    monkeypatch.setenv("QWEN3_MODEL", "0.6B")
    call(["Hello"], capsys)
    call(["Hello", "-m", "deep"], capsys)
    assert loaded == ["4B", "4B", "4B", "0.6B", "8B"]


def test_a_preset_is_beaten_by_flags(
    config: Path, tiny_folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text(_CODER)
    seen: dict[str, Any] = {}

    def conversation(self: LLM, **options: Any) -> NoReturn:
        seen.update(options)
        raise ValueError("seen")

    monkeypatch.setattr(LLM, "conversation", conversation)
    words = ["Hello", "--preset", "coder", "-t", "0.3", "--thinking", "-m", str(tiny_folder)]
    assert call(words, capsys)[2].endswith("qwen3: seen\n")
    assert (seen["thinking"], seen["max_tokens"], seen["stop"]) == (True, 7, ["END"])
    assert (seen["sampling"].temperature, seen["sampling"].top_p) == (0.3, 0.5)
    system = {"role": "system", "content": "Answer with code."}
    assert seen["messages"] == [system]
    seen.clear()
    call(["chat", "--preset", "coder", "-m", str(tiny_folder)], capsys)
    assert (seen["thinking"], seen["max_tokens"], seen["messages"]) == (False, 7, [system])


def test_config_shows_where_values_come_from(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def rows() -> list[list[str]]:
        return [line.split(maxsplit=1) for line in call(["config"], capsys)[1].splitlines()[2:]]

    assert call(["config", "--path"], capsys) == (0, f"{config}\n", "")
    assert call(["config"], capsys)[1].startswith(f"{config} (there is none)\n")
    assert [[part.strip() for part in row] for row in rows()] == [
        ["model", "demo  (default)"],
        ["log", "true  (default)"],
    ]
    config.write_text(f'log = false\nmodel = "fast"\n[aliases]\nfast = "4B"\n{_CODER}')
    shown = {name: value.strip() for name, value in rows()}
    assert shown["model"] == "fast  (the file)" and shown["log"] == "false  (the file)"
    assert shown["aliases.fast"] == "4B  (the file)"
    assert shown["presets.coder.thinking"] == "false  (the file)"
    assert shown["presets.coder.stop"] == '["END"]  (the file)'
    monkeypatch.setenv("QWEN3_MODEL", "8B")
    assert ["model", "8B  (QWEN3_MODEL)"] in [[name, value.strip()] for name, value in rows()]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("modle = '4B'", "there is no key modle; did you mean model?"),
        ("zzz = 1", "there is no key zzz; known: model, log, aliases, presets"),
        ("model = 4", "model must be text, not 4"),
        ("log = 'no'", "log must be true or false, not 'no'"),
        ("aliases = ['4B']", "aliases must be a table, not ['4B']"),
        ("[aliases]\nfast = 4", "aliases.fast must be text, not 4"),
        ("[presets.a]\ntemprature = 1", "there is no key presets.a.temprature; did you mean temp"),
        ("[presets.a]\npreset = 'b'", "there is no key presets.a.preset"),
        ("[presets.a]\ntemperature = 'hot'", "presets.a.temperature must be a number, not 'hot'"),
        ("[presets.a]\ntop_k = 1.5", "presets.a.top_k must be a whole number, not 1.5"),
        ("[presets.a]\nmax_tokens = true", "presets.a.max_tokens must be a whole number, not True"),
        ("[presets.a]\nstop = 'x'", "presets.a.stop must be a list of texts, not 'x'"),
        ("[presets.a]\ntop_p = 7", "presets.a: top_p must be"),
        ("model = ", "cannot be read: Invalid value (at end of document)"),
    ],
)
def test_wrong_settings_are_one_sentence(
    text: str, complaint: str, config: Path, capsys: Capture
) -> None:
    config.write_text(text)
    for words in (["Hello"], ["config"]):
        code, out, err = call(words, capsys)
        assert (
            code == 1
            and err.startswith(f"qwen3: {config}: {complaint}"[: len(err)])
            or (err.startswith(f"qwen3: {config} {complaint}"))
        )
        assert err.count("\n") == 1 and not out
    assert call(["--help"], capsys)[0] == 0


def test_presets_are_named_and_take_tools(config: Path, capsys: Capture) -> None:
    code, _, err = call(["Hello", "--preset", "x"], capsys)
    assert (code, err) == (1, f"qwen3: there is no preset 'x'; {config} defines none\n")
    tools = config.parent / "tools.py"
    config.write_text('[presets.a]\ntools = "tools.py"\n')
    code, _, err = call(["Hello", "--preset", "x"], capsys)
    assert (code, err) == (1, "qwen3: there is no preset 'x'; known: a\n")
    assert call(["Hello", "--preset", "a"], capsys)[2] == f"qwen3: {tools} is not a Python file\n"
    config.write_text('[presets.a]\nmcp = ["mcp.json"]\n')
    file = config.parent / "mcp.json"
    err = call(["Hello", "--preset", "a"], capsys)[2]
    assert f"qwen3: {file} cannot be read: No such file or directory\n" in err
    config.write_text('[presets.a]\nmcp = "mcp.json"\n')
    assert "must be a list of paths of files" in call(["Hello", "--preset", "a"], capsys)[2]


def test_aliases_of_aliases(config: Path, capsys: Capture) -> None:
    config.write_text('[aliases]\na = "b"\nb = "demo"\ntiny = "4B"\nx = "y"\ny = "x"\n')
    assert call(["show", "a"], capsys)[1] == call(["show", "demo"], capsys)[1] != ""
    circle = f"qwen3: {config}: the aliases x -> y -> x stand for each other\n"
    for words in (["Hello", "-m", "x"], ["rm", "x"]):
        assert call(words, capsys) == (1, "", circle)
    for words in (["Hello", "-m", "tny"], ["plan", "tny"]):
        wanted = "qwen3: there is no model 'tny'; did you mean the alias tiny?\n"
        assert call(words, capsys) == (1, "", wanted)


# --- completion of a shell ------------------------------------------------------------------------


def completed(typed: str, capsys: Capture) -> str:
    """What bash offers for the last word."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMP_WORDS", typed)
        patch.setenv("COMP_CWORD", str(typed.count(" ")))
        patch.setenv("_QWEN3_COMPLETE", "complete_bash")
        code, out, err = call([], capsys)
    assert (code, err) == (0, "")
    return " ".join(out.split())


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("qwen3 ch", "chat"),
        ("qwen3 --preset ", "coder"),
        ("qwen3 What --preset c", "coder"),
        ("qwen3 -m f", "fast"),
        ("qwen3 chat --model 8", "8B"),
        ("qwen3 bench f", "fast"),
        ("qwen3 logs s", "search show"),
        ("qwen3 --schem", "--schema"),
        ("qwen3 --install", "--install-completion"),
        ("qwen3 caht", ""),
    ],
)
def test_shells_complete(typed: str, offered: str, config: Path, capsys: Capture) -> None:
    config.write_text(f'[aliases]\nfast = "4B"\n{_CODER}')
    assert completed(typed, capsys) == offered


def test_shells_complete_in_spite_of_wrong_settings(config: Path, capsys: Capture) -> None:
    config.write_text("modle = 1")
    assert completed("qwen3 -m 32", capsys) == "32B"
