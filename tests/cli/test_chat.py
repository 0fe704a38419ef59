"""`qwen3 chat`, as a person or a script meets it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_mlx import LLM
from qwen3_mlx.cli.tool_file import load_functions
from qwen3_mlx.errors import Qwen3Error
from tests.cli.harness import Terminal

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
        "/stast",
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
        "qwen3: there is no command /stast; did you mean /stats? //stast says it",
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


# --- in a terminal --------------------------------------------------------------------------------

PASTE = "What is 1 + 2?\nWhat is 3 + 4?\n\nWhat is 7 + 8?\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QWEN3_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def said(file: Path) -> list[str]:
    """Return what the user said in a saved conversation."""
    messages = json.loads(file.read_text())["messages"]
    return [message["content"] for message in messages if message["role"] == "user"]


def test_nothing_that_is_pasted_or_typed_is_lost(home: Path, tmp_path: Path) -> None:
    file, part = tmp_path / "talk.json", tmp_path / "my part.md"
    part.write_text("What is in the file")
    with Terminal([*CHAT, "--seed", "1"]) as chat:
        chat.wait("\n>")
        chat.paste(PASTE)
        chat.type("\r")  # one message of four lines
        chat.wait("7 + 8 = 15", "thought for ", "\n>")
        chat.type("/NoThink\r")
        chat.wait("Thinking is off.")
        chat.type("/usr/bin/python fails\x1b\rwith 2\r")
        chat.wait("I am a tiny demo model", "\n>")
        chat.type("//budget is a\\\rcommand\r")  # a backslash before Enter begins a line, too
        chat.wait("I am a tiny demo model", "\n>")
        chat.type(f"/fi\t{tmp_path}/my\t\r")
        chat.wait("my part.md: ", "sent with your next message")
        chat.type("Who are you?\r")
        chat.wait("I am a tiny demo model", "\n>")
        chat.type(f"/save {file}\r")
        chat.wait("Saved: ")
        chat.type("never sent\x03")
        chat.type("\x04")
        assert chat.end() == 0
    assert said(file) == [
        PASTE.rstrip(),
        "/usr/bin/python fails\nwith 2",
        "/budget is a\ncommand",
        "my part.md:\n```\nWhat is in the file\n```\n\nWho are you?",
    ]
    history = home / "chat_history"
    assert [path.stat().st_mode & 0o777 for path in (home, history)] == [0o700, 0o600]

    with Terminal(CHAT) as chat:  # another run
        chat.wait("\n>")
        chat.type("\x1b[A")
        chat.wait("never sent")
        chat.type("\x03")
        chat.wait("\n>")
        chat.type("\x123 + 4")
        chat.wait("What is 7 + 8?")
        chat.type("\r\r")
        chat.wait("+ 8 = ")
        chat.type("\x04")
        assert chat.end() == 0


def test_what_is_typed_while_it_answers_is_in_the_next_prompt(
    tiny_folder: Path, home: Path, tmp_path: Path
) -> None:
    file = tmp_path / "talk.json"
    options = ["--seed", "1", "--no-thinking", "-m", str(tiny_folder)]  # whose replies are long
    with Terminal([*CHAT, *options]) as chat:
        chat.wait("\n>")
        chat.type("Hello\r")
        chat.wait_for_change()
        chat.type("ahead é\r")
        chat.paste("one\ntwo")
        chat.wait_for_change()
        chat.type("\x03")  # ends the answer, not the chat
        chat.wait("stopped", "> ahead é", ". one", ". two")
        chat.type("\r")
        chat.wait_for_change()
        chat.type("\x03")
        chat.wait("stopped", "\n>")
        chat.type(f"/save {file}\r")
        chat.wait("Saved: ")
        chat.type("\x04")
        assert chat.end() == 0
    assert said(file) == ["Hello", "ahead é\none\ntwo"]


LISTEN = """
from threading import Event
from qwen3_mlx.cli.line_editor import LineEditor
pressed = Event()
with LineEditor(None, {}) as editor:
    with editor.typing_ahead(pressed.set):
        print("listening")
        assert pressed.wait(60)
        print("pressed")
    print(f"{editor.read()!r} was typed")
"""


def test_the_enter_key_is_heard() -> None:
    with Terminal([sys.executable, "-c", LISTEN]) as program:
        program.wait("listening")
        program.type("\r")
        program.wait("pressed")
        program.wait("\n>")
        program.type("x\r")
        program.wait("'x' was typed")
        assert program.end() == 0
