"""`qwen3 chat`, as a person or a script meets it."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from threading import Event as Flag

import pytest

from qwen3_mlx import LLM
from qwen3_mlx.cli.screen import _end_of_block, on_enter_key
from qwen3_mlx.cli.tool_file import load_functions
from qwen3_mlx.errors import Qwen3Error

CHAT = [sys.executable, "-m", "qwen3_mlx", "chat"]
TOOL = '''
def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression

    Args:
        expression: the expression
    """
    return str(sum(int(part) for part in expression.split("+")))

def _hidden() -> None: ...
'''


def talk(*lines: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key != "QWEN3_MODEL"}
    return subprocess.run(
        [*CHAT, *options],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=clean,
    )


def test_piped_lines_are_turns_and_stdout_has_the_answers(tmp_path: Path) -> None:
    file, tool = tmp_path / "talk.json", tmp_path / "tool.py"
    tool.write_text(TOOL)
    done = talk(
        "/nothink",
        "What is 5 + 6?",
        "/system You are helpful.",
        '"""',
        "Who",
        'are you?"""',
        "/edit What is 2 + 2?",
        "/retry",
        f"/save {file}",
        "/system",
        f"/load {file}",
        f"/tools {tool}",
        "What is 1234 + 4321?",
        "/tools",
        "/stats",
        "/exit",
        "never",
    )
    assert done.returncode == 0
    answers = done.stdout.splitlines()
    assert answers[0] == "5 + 6 = 11"
    assert answers[1].startswith("I am a tiny demo model")
    assert answers[2:4] == ["2 + 2 = 4"] * 2
    assert "5555" in answers[4] and len(answers) == 5
    for words in (
        "Thinking is off.",
        "Saved: ",
        "5 messages.",
        "may call calculator.",
        "No tools.",
    ):
        assert words in done.stderr
    assert "6 replies" in done.stderr
    saved = json.loads(file.read_text())["messages"]
    assert [message["role"] for message in saved] == [
        "system",
        *["user", "assistant"] * 2,
    ]


def test_a_call_that_the_context_cuts_off_is_not_made(demo: LLM, tmp_path: Path) -> None:
    tool, trace = tmp_path / "tool.py", tmp_path / "trace"
    tool.write_text(
        TOOL.replace("    return", f"    open({str(trace)!r}, 'w').close()\n    return")
    )
    question = "What is 1234 + 4321?"
    prompt = demo.render(question, thinking=False, tools=load_functions(tool))
    tokens = len(demo.tokenizer.encode(prompt))
    for room, called in ((24, False), (200, True)):
        options = ("--no-thinking", "--context", str(tokens + room))
        done = talk(f"/tools {tool}", question, options=options)
        assert ("a tool call was cut off" in done.stderr) == (not called)
        assert trace.exists() == called and done.returncode == 0


def test_what_goes_wrong_is_told_and_the_conversation_goes_on(tmp_path: Path) -> None:
    done = talk(
        "/budget many",
        "/foo",
        "/retry",
        "/save",
        "/edit",
        f"/load {tmp_path / 'none'}",
        f"/tools {tmp_path / 'none.py'}",
        "/no_think What is 5 + 6?",
        "/budget 3",
        "What is 5 + 6? \\",
        "Answer!",
        "/budget",
        "/think",
        "/help",
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stdout.startswith("5 + 6 = 11\n")
    for words in (
        "qwen3: /budget takes a number of tokens, not 'many'",
        "There is no command /foo; /help lists the commands.",
        "qwen3: there is no turn -1: the conversation has 0",
        "qwen3: /save takes a file",
        "qwen3: /edit takes the new text of the last message",
        "is not a saved conversation",
        "is not a Python file",
        "Thinking takes at most 3 tokens.",
        "Thinking has no budget.",
        "Thinking is on.",
        "/stats              tokens and speed so far",
    ):
        assert words in done.stderr, words


def test_options_and_wrong_ones(tmp_path: Path) -> None:
    done = talk("What is 5 + 6?", options=("--no-thinking", "--context", "100"))
    assert done.stdout == "5 + 6 = 11\n"
    wrong = talk("Hi", options=("--context", "9999999"))
    assert wrong.returncode == 1 and "is beyond this model" in wrong.stderr
    none = talk("Hi", options=("--load", str(tmp_path / "none")))
    assert none.returncode == 1 and "is not a saved conversation" in none.stderr


def test_functions_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tool.py"
    file.write_text(TOOL)
    assert [function.__name__ for function in load_functions(file)] == ["calculator"]
    for text, words in (("x = 1", "defines no function"), ("1 / 0", "fails: ZeroDivisionError")):
        file.write_text(text)
        with pytest.raises(Qwen3Error, match=words):
            load_functions(file)
    file.write_text("async def later(x: str) -> str:\n    return x")
    done = talk(f"/tools {file}")
    assert "qwen3: the tool later is an async function" in done.stderr


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("one\n\ntwo", 5),
        ("one\ntwo", None),
        ("\n\none", None),
        ("```\na\n\nb", None),
        ("```\na\n\nb\n```\n\nc", 14),
        ("one\n", None),
    ],
)
def test_blocks_of_markdown_end_at_blank_lines(text: str, place: int | None) -> None:
    assert _end_of_block(text) == place


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *options: str) -> None:
        self._rest = ""
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.environ.pop("QWEN3_MODEL", None)
            os.environ.update(TERM="xterm", COLUMNS="80")
            os.execv(sys.executable, [*CHAT, *options])

    def until(self, words: str, seconds: float = 60) -> str:
        """Read until these words are there; what comes after them stays to be read."""
        end = time.monotonic() + seconds
        while words not in self._rest:
            assert time.monotonic() < end, self._rest
            if select.select([self.descriptor], [], [], 0.1)[0]:
                self._rest += os.read(self.descriptor, 65536).decode(errors="replace")
        before, words, self._rest = self._rest.partition(words)
        return before + words

    def type(self, keys: str) -> None:
        os.write(self.descriptor, keys.encode())


def test_in_a_terminal_thinking_is_timed() -> None:
    terminal = Terminal("--seed", "1")
    terminal.until("> ")
    terminal.type("What is 123 + 456?\n")
    seen = terminal.until("> ")
    for words in ("thinking (Enter: answer now)", "thought for ", "123 + 456 = 579"):
        assert words in seen
    terminal.type("\x04")
    assert os.waitpid(terminal.pid, 0)[1] == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(tiny_folder: Path) -> None:
    terminal = Terminal("--seed", "1", "-m", str(tiny_folder))  # whose replies are long
    terminal.until("> ")
    terminal.type("Hello\n")
    terminal.until("\x1b[?25l")  # the answer has begun
    terminal.type("\x03")
    terminal.until("stopped")
    terminal.until("> ")
    terminal.type("\x04")
    assert os.waitpid(terminal.pid, 0)[1] == 0


def test_the_enter_key_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    pressed = Flag()
    with open(theirs, encoding="utf-8", closefd=False) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        with on_enter_key(pressed.set):
            os.write(ours, b"x")
            assert not pressed.wait(0.3)
            os.write(ours, b"\n")
            assert pressed.wait(10)
    os.close(ours)
    os.close(theirs)
