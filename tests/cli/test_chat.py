"""`qwen3 chat`, as a person or a script meets it."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from pypdf import PageObject, PdfWriter

from qwen3_mlx import LLM
from qwen3_mlx.cli.attachments import read_attachment
from qwen3_mlx.cli.chat_commands import run
from qwen3_mlx.cli.chat_session import ChatSession
from qwen3_mlx.cli.conversation_log import ConversationLog
from qwen3_mlx.cli.desktop import copy, edit
from qwen3_mlx.cli.recorder import Recorder
from qwen3_mlx.cli.screen import Screen
from qwen3_mlx.cli.tool_file import load_functions
from qwen3_mlx.errors import Qwen3Error
from tests.cli.harness import Terminal, piped

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
    return piped(["chat", *options], "\n".join(lines))


def talk_apart(*lines: str) -> subprocess.CompletedProcess[str]:
    """Do it in a process of its own, as users do."""
    clean = {key: value for key, value in os.environ.items() if key != "QWEN3_MODEL"}
    return subprocess.run(
        CHAT,
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=clean,
    )


@pytest.mark.heavy
def test_piped_lines_are_turns_and_stdout_has_the_answers(tmp_path: Path) -> None:
    file, tool = tmp_path / "talk.json", tmp_path / "tool.py"
    tool.write_text(TOOL)
    done = talk_apart(
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
        "/system none",
        f"/load {file}",
        f"/tools {tool}",
        "What is 1234 + 4321?",
        "/tools",
        "/tools none",
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
        "The system prompt is: You are helpful.\nSaved: ",
        "The system prompt is: You are helpful.\nNo system prompt.\n",
        "5 messages.",
        "may call calculator.",
        "calculator: Evaluate an arithmetic expression\nNo tools.\n",
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
    for room, called in ((25, False), (200, True)):
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
        f"/save {tmp_path / 'no' / 'talk.json'}",
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
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stdout.startswith("5 + 6 = 11\n")
    for words in (
        "qwen3: /budget takes a number of tokens, not 'many'",
        "qwen3: there is no command /stast; did you mean /stats? //stast says it",
        "qwen3: nothing has been asked yet: the conversation has no user message",
        "qwen3: /save takes a file",
        f"qwen3: {tmp_path / 'no' / 'talk.json'} cannot be used: No such file or directory\n",
        "qwen3: /edit takes the new text of the last message",
        f"qwen3: there is no file {tmp_path / 'none'}\n",
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
    assert none.returncode == 1 and f"there is no file {tmp_path / 'none'}" in none.stderr


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


def test_commands(tmp_path: Path) -> None:
    file, left, right = (tmp_path / name for name in ("notes.txt", "left.json", "right.json"))
    file.write_text("What is 5 + 6?")
    (tmp_path / "raw").write_bytes(b"a\0b")
    done = talk(
        "/NOTHINK",
        "/set temperature=0",
        "/set top-k 5",
        "/set top_k",
        "/set seed many",
        "/set temperature 300",
        "/set colour 1",
        "/set temprature 1",
        "/set budget -3",
        "/budget 7",
        "/set",
        "/set thinking off",
        "/set",
        "/model",
        f"/model {tmp_path}/none",
        f"/file {tmp_path}/none",
        f"/file {tmp_path}",
        f"/file {tmp_path}/raw",
        f"/file '{file}'",
        "/file",
        "/file none",
        f"/file {file}",
        "Answer!",
        "/branch",
        "/edit What is 1 + 1?",
        f"/save {right}",
        "/branch 1",
        "/branch 3",
        f"/save {left}",
        "/new",
        "/copy",
    )
    assert done.returncode == 1  # nothing was there to copy
    for words in (
        "temperature is 0.\ntop_k is 5.\ntop_k is 20 (the model's default).\n",
        "qwen3: seed takes a number, not 'many'",
        "qwen3: temperature must be from 0 to 100, not 300",
        "qwen3: there is no setting colour; known: temperature, ",
        "qwen3: there is no setting temprature; did you mean temperature?\n",
        "qwen3: budget must be at least 0, not -3\n",
        "top_p               0.95 (the model's default)\n",
        "thinking            on (the model's default)\nbudget              7\n",
        "top_p               0.8 (the model's default)\n",
        "max_tokens          the model's default\n",
        "thinking is off.",
        "temperature         0\n",
        "budget              the model's default",
        "demo, context 8,192 tokens",
        "none' is no folder here",
        f"qwen3: no file {tmp_path}/none",
        f"qwen3: {tmp_path} is a folder or a device",
        "raw is neither text in UTF-8 nor a PDF",
        "; sent with your next message.\nnotes.txt: ",  # shown twice
        "No files.",
        "This is branch 2; ",
        "This is branch 1; ",
        "qwen3: there is no branch 3; the last one is 2",
        "A new conversation.",
        "qwen3: there is no answer to copy",
    ):
        assert words in done.stderr, words
    assert said(left) == ["notes.txt:\n```\nWhat is 5 + 6?\n```\n\nAnswer!"]
    assert said(right) == ["What is 1 + 1?"]


def test_each_conversation_of_a_chat_is_recorded(demo: LLM, tmp_path: Path) -> None:
    session = ChatSession(
        lambda _: nullcontext(demo),
        None,
        Screen(show_thinking=False),
        options={"thinking": False},
        recorder=Recorder(ConversationLog(tmp_path / "log.db"), None),
        quiet=True,
    )
    with session:
        run(session, ["What is 1 + 2?", "/new", "What is 2 + 2?", "/branch", "Who are you?"])
    with ConversationLog(tmp_path / "log.db") as log:
        roles = [[message["role"] for message in log.messages(number)] for number in (1, 2, 3)]
        assert roles == [["user", "assistant"]] * 2 + [["user", "assistant"] * 2]
        assert {summary.model for summary in log.summaries()} == {"demo"}


@pytest.mark.heavy
def test_it_says_what_goes_on(home: Path) -> None:
    assert talk("What is 1 + 2?", options=("--no-thinking",)).returncode == 0
    said = "Goes on with 1: What is 1 + 2? (2 messages, 20"
    assert said in talk("/exit", options=("-c",)).stderr
    assert talk("/exit", options=("-c", "-q")).stderr == ""
    assert said in talk("/load 1").stderr
    with Terminal([*CHAT, "-c"]) as chat:
        chat.wait(said, "\n> What is 1 + 2?\n1 + 2 = 3\n>")
        chat.type("/load 1\r")
        chat.wait(said, "\n> What is 1 + 2?\n1 + 2 = 3\n>")
        chat.type("\x04")
        assert chat.end() == 0


def test_a_pdf_is_read_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "paper.pdf"
    writer = PdfWriter()
    writer.add_blank_page(200, 200)
    writer.write(file)
    with pytest.raises(Qwen3Error, match="has no text; its pages may be pictures"):
        read_attachment(file)
    monkeypatch.setattr(PageObject, "extract_text", lambda _: "Some ``` words")
    assert read_attachment(file) == "paper.pdf:\n````\nSome ``` words\n````"
    file.write_bytes(b"%PDF-1.7 and nothing else")
    with pytest.raises(Qwen3Error, match="cannot be read as a PDF"):
        read_attachment(file)
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(Qwen3Error, match="reading a PDF needs pypdf: .* install"):
        read_attachment(file)


def test_copying_and_editing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, copied = tmp_path / "xclip", tmp_path / "copied"
    program.write_text(f"#!/bin/sh\ncat > {copied}\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("DISPLAY", ":0")
    for name in ("SSH_CONNECTION", "WAYLAND_DISPLAY", "VISUAL"):
        monkeypatch.delenv(name, raising=False)
    if not shutil.which("pbcopy"):
        assert copy("é") == "xclip" and copied.read_text("utf-8") == "é"
    monkeypatch.setenv("SSH_CONNECTION", "there")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert copy("é") == "the terminal"
    monkeypatch.setenv(
        "EDITOR", f'{sys.executable} -c \'import sys; open(sys.argv[1], "a").write("!")\''
    )
    assert edit("Hello") == "Hello!"
    for editor, words in (("false", "failed with code 1"), ("/none", "cannot be run")):
        monkeypatch.setenv("EDITOR", editor)
        with pytest.raises(Qwen3Error, match=words):
            edit("Hello")


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


@pytest.mark.heavy
def test_nothing_that_is_pasted_or_typed_is_lost(home: Path, tmp_path: Path) -> None:
    file, part = tmp_path / "talk.json", tmp_path / "my part.md"
    part.write_text("What is in the file")
    with Terminal([*CHAT, "--temperature", "0"]) as chat:
        chat.wait("\n>")
        chat.paste(PASTE)
        chat.type("\r")  # one message of four lines
        chat.wait("thought for ", " = ", "\n>")
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
        chat.wait("Saved: ", "\n>")
        chat.type("never sent\x03")
        chat.wait("\n>")
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
        chat.wait("thought for ", " = ")
        chat.type("\x04")
        assert chat.end() == 0


@pytest.mark.parametrize(
    ("option", "is_kept"),
    [("--no-log", False), pytest.param("--log", True, marks=pytest.mark.slow)],
)
def test_what_is_not_recorded_is_not_in_the_history(option: str, is_kept: bool, home: Path) -> None:
    with Terminal([*CHAT, option]) as chat:
        chat.wait("\n>")
        chat.type(f"/help {option}\r")
        chat.wait("list the commands", "\n>")
        chat.type("\x1b[A")
        chat.wait(f"/help {option}")  # all the same in this chat
        chat.type("\x03\x04")
        assert chat.end() == 0
    history = home / "chat_history"
    assert (history.exists() and option in history.read_text()) == is_kept


@pytest.mark.heavy
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
