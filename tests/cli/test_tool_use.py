"""Tools of MCP servers on the command line: what is asked for, shown and refused."""

import json
import sys
from pathlib import Path

import pytest

from qwen3_mlx.cli import tool_use
from qwen3_mlx.cli.ask import _show
from qwen3_mlx.cli.console import stderr_text
from qwen3_mlx.text.events import ToolCall
from tests.cli.harness import QWEN3, Terminal, call, piped
from tests.mcp.harness import by_hand

QUESTION = "What is 1234 + 4321?"
PLAIN = ["--no-thinking", "-t", "0"]


@pytest.fixture
def mcp_json(tmp_path: Path) -> Path:
    """The file of a server with the demo's calculator."""
    file = tmp_path / "mcp.json"
    file.write_text(json.dumps({"mcpServers": {"sums": by_hand("calculator")}}))
    return file


@pytest.mark.heavy
def test_without_a_terminal_no_call_is_made_unless_yes_allows_it(
    mcp_json: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [QUESTION, "--mcp", str(mcp_json), "--json", *PLAIN]
    for allowed in (False, True):
        code, out, err = call([*words, *["--yes"] * allowed], capsys)
        results = [json.loads(line) for line in out.splitlines()]
        (result,) = (each["content"] for each in results if each["type"] == "tool_result")
        assert code == 0 and "tools of MCP servers: 1, " in err
        assert ("without a terminal to ask at, no tool is called" in err) != allowed
        assert result == (
            "5555" if allowed else "Error: no tool is called here, because the user cannot be asked"
        )


@pytest.mark.heavy
def test_on_a_terminal_each_call_is_asked_for(mcp_json: Path) -> None:
    with Terminal([*QWEN3, "chat", "--mcp", str(mcp_json), "--no-log", *PLAIN]) as chat:
        chat.wait("tools of MCP servers: 1")
        for reply, answer in (("n", "= Error"), ("a", "5555"), ("", "5555")):
            chat.type(f"{QUESTION}\r")
            if reply:
                chat.wait(
                    'sums: calculator {\n "expression": "1234 + 4321"\n}\nCall it?', "[y/a/N]"
                )
                chat.type(f"{reply}\r")
            chat.wait(answer, "\n>")
        chat.type("/tools\r")
        chat.wait("calculator of sums: Evaluate an arithmetic expression")
        chat.type("/tools none\r")
        chat.wait("No tools.")
        chat.type(f"/tools {mcp_json}\r")
        chat.wait("tools of MCP servers: 1")
        chat.type("/exit\r")
        assert chat.end() == 0
        assert chat.text().count("Call it?") == 2
        # Each call is shown once: by its question, or without one.
        assert chat.text().count('"expression": "1234 + 4321"') == 3
        assert "calculator(" not in chat.text()


def test_a_call_that_its_question_shows_is_not_shown_before(
    capsys: pytest.CaptureFixture[str],
) -> None:
    events = [ToolCall("1", "a", {}, "{}"), ToolCall("2", "b", {}, "{}")]
    _show(iter(events), asked={"a"}, hide=False)
    assert capsys.readouterr().err == "b({})\n"


def test_a_question_without_the_tools_that_were_asked_for_is_not_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mcp.json"
    file.write_text(json.dumps({"mcpServers": {"one": {"command": 5}}}))
    code, out, err = call([QUESTION, "--mcp", str(file), "--yes", *PLAIN], capsys)
    assert (code, out) == (1, "")
    assert err.endswith(
        "qwen3: no MCP server has started, so there are no tools: leave --mcp out?\n"
    )
    done = piped(["chat", "--mcp", str(file), "-q", "--no-log", *PLAIN], QUESTION)
    assert done.returncode == 0 and done.stdout


def test_calls_without_end_are_stopped(
    mcp_json: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool_use, "_MAX_STEPS", 0)
    code, _, err = call([QUESTION, "--mcp", str(mcp_json), "--yes", *PLAIN], capsys)
    assert code == 1 and "the model still calls tools after 0 replies; it is stopped\n" in err


def test_nothing_is_hidden_in_the_question() -> None:
    assert tool_use._printable('{"a": "é\x1b[2J\u202e\u200b\x9b😀"}') == (
        '{"a": "é\\u001b[2J\\u202e\\u200b\\u009b😀"}'
    )


def test_tools_fit_the_context_or_are_refused(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mcp.json"
    file.write_text(json.dumps({"servers": {"many": by_hand(*(f"t{n}" for n in range(40)))}}))
    words = ["Hi", "--mcp", str(file), "-m", str(tiny_folder), "--context", "1500"]
    code, out, err = call(words, capsys)
    assert (code, out) == (1, "")
    assert (
        "tools of MCP servers: 40, 1,800 tokens of 1,500: " in err
        and "leave some servers out" in err
    )


def test_notes_cannot_steer_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    stderr_text("a\x1b]0;title\x07\n\tb")
    assert capsys.readouterr().err == "\x1b[2ma␛]0;title␇\n\tb\x1b[0m"
