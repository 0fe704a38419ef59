"""Recorded conversations: what is kept when, also after a kill, and `qwen3 logs`."""

import io
import json
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Barrier
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_mlx import load
from qwen3_mlx.api.conversation import read_messages
from qwen3_mlx.cli import recorder as recorder_module
from qwen3_mlx.cli.conversation_log import ConversationLog
from qwen3_mlx.cli.recorder import Recorder
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.text.events import Reasoning, Text
from tests.adapters import all_linear, mlx_tensors, write_mlx
from tests.cli.harness import QWEN3, call

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[ConversationLog]:
    with ConversationLog(tmp_path / "log.db") as opened:
        yield opened


def opened_again(log: ConversationLog) -> ConversationLog:
    """The log as another process has it, for a recorder to own."""
    return ConversationLog(log.path)


def said(*texts: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


# --- the command ----------------------------------------------------------------------------------


def test_a_question_is_recorded_and_goes_on(tiny_folder: Path, home: Path, capsys: Capture) -> None:
    options = ["-m", str(tiny_folder), "-n", "4", "--seed", "1", "--no-thinking"]
    _, first, err = call(["What is 1 + 2?", *options, "--system", "Be short."], capsys)
    assert f"Conversations are recorded in {home}/conversations.db" in err
    _, second, err = call(["-c", "And now?", *options[2:]], capsys)  # with the model it had
    assert "recorded in" not in err and "demo" not in err
    assert re.match(r"Goes on with 1: What is 1 \+ 2\? \(3 messages, [-\d]+ \d\d:\d\d\)\n", err)
    _, third, err = call(["What else?", "--continue", "1", *options[2:], "--no-log"], capsys)
    assert call(["Other", *options], capsys)[0] == 0
    code, out, _ = call(["logs"], capsys)
    lines = [re.split(" {2,}", line) for line in out.splitlines()]
    assert code == 0
    assert [(line[0], line[2], line[3]) for line in lines] == [
        ("ID", "model", "begins with"),
        ("2", tiny_folder.name, "Other"),
        ("1", tiny_folder.name, "What is 1 + 2?"),
    ]
    exported = json.loads(call(["logs", "export", "1", "--json"], capsys)[1])
    assert exported["model"] == str(tiny_folder.resolve())
    assert exported["messages"] == [
        {"role": "system", "content": "Be short."},
        *said("What is 1 + 2?", first[:-1], "And now?", second[:-1]),
    ]


def test_another_adapter_of_what_goes_on_is_named(
    tiny_folder: Path, tmp_path: Path, home: Path, capsys: Capture
) -> None:
    adapter = str(write_mlx(tmp_path / "adapter", mlx_tensors(all_linear())))
    options = ["-n", "1", "--no-thinking", "--adapter", adapter]
    assert call(["Hi", "-m", str(tiny_folder), *options], capsys)[0] == 0
    _, _, err = call(["-c", "And?", *options], capsys)
    assert "adapter" not in err.replace(adapter, "")
    _, _, err = call(["-c", "And?", *options[:3]], capsys)
    assert f"Its adapter changes: {adapter} so far, none from here on" in err
    _, _, err = call(["-c", "And?", *options], capsys)
    assert f"Its adapter changes: none so far, {adapter} from here on" in err


@pytest.mark.heavy
def test_a_chat_is_recorded_and_goes_on(
    home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chat(*lines: str, options: tuple[str, ...] = ()) -> list[str]:
        text = io.BytesIO("\n".join(lines).encode())
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(text))
        code, out, err = call(["chat", *options], capsys)
        assert code == 0, err
        return out.splitlines()

    assert chat("What is 1 + 2?", "/retry", "/edit What is 2 + 2?") == ["1 + 2 = 3"] * 2 + [
        "2 + 2 = 4"
    ]
    assert chat("What is 5 + 6?", options=("--continue",)) == ["5 + 6 = 11"]
    assert chat("What is 1 + 1?", options=("-c", "1", "--no-log", "-s", "Be short.")) == [
        "1 + 1 = 2"
    ]
    with ConversationLog.open() as log:
        contents = [message["content"] for message in log.messages(1)]
        assert contents == ["What is 2 + 2?", "2 + 2 = 4", "What is 5 + 6?", "5 + 6 = 11"]
        assert len(log.messages(1, replaced=True)) == 7
        assert log.messages(1)[1]["reasoning_content"]
    assert chat("What is 3 + 4?", "/search + 6", "/load 1", "What is 1 + 3?") == [
        "3 + 4 = 7",
        "1 + 3 = 4",
    ]
    with ConversationLog.open() as log:
        assert log.messages(1)[-2:] == [*said("What is 1 + 3?"), log.messages(1)[-1]]
        assert log.messages(2)[0]["content"] == "What is 3 + 4?" and len(log.summaries()) == 2
    code, _, err = call(["chat", "-c", "--load", "x.json"], capsys)
    assert code == 2 and "--load and --continue name two conversations" in err


def test_the_file_is_for_its_owner(tiny_folder: Path, home: Path, capsys: Capture) -> None:
    call(["Hello", "-m", str(tiny_folder), "-n", "2", "-q"], capsys)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    with ConversationLog.open():  # then there are files beside it
        files = list(home.iterdir())
        assert len(files) == 3
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_the_log_is_switched_off(tiny_folder: Path, home: Path, capsys: Capture) -> None:
    options = ["-m", str(tiny_folder), "-n", "2"]
    assert "recorded" not in call(["Hello", "--no-log", *options], capsys)[2]
    home.mkdir()
    (home / "config.toml").write_text("log = false\n")
    assert "recorded" not in call(["Hello", *options], capsys)[2]
    assert not (home / "conversations.db").exists()
    assert "recorded in" in call(["Hello", "--log", *options], capsys)[2]


def test_quiet_runs_leave_the_notice_to_the_next(
    tiny_folder: Path, home: Path, capsys: Capture
) -> None:
    options = ["-m", str(tiny_folder), "-n", "2"]
    assert call(["Hello", "-q", *options], capsys)[2] == ""
    assert "recorded in" in call(["Hello", *options], capsys)[2]


@pytest.mark.heavy
def test_killed_in_an_answer(tiny_folder: Path, home: Path) -> None:
    command = [*QWEN3, "Hello", "-m", str(tiny_folder), "-n", "2000", "--no-thinking", "-q"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout
        shown = process.stdout.read(100).decode(errors="ignore").rstrip("�")
        time.sleep(0.8)
        process.send_signal(signal.SIGKILL)
    with ConversationLog.open() as log:
        question, answer = log.messages(log.find().id)
    assert question == {"role": "user", "content": "Hello"}
    assert answer["role"] == "assistant" and answer["content"].startswith(shown)


@pytest.mark.parametrize(
    "words",
    [
        ["Hello", "-m", "nosuch"],
        ["Hello", "--thinking-budget", "-5"],
        ["Hello", "--bits", "7"],
        ["Hello", "--context", "8"],
        ["\udcff"],
        ["chat", "-s", "Be short."],
    ],
)
def test_what_is_refused_is_not_recorded(words: list[str], home: Path, capsys: Capture) -> None:
    """Neither as a conversation of its own, nor in the one that goes on."""
    assert bool(call([*words, "-q"], capsys)[0]) == ("chat" not in words)
    assert call(["logs"], capsys)[1] == ""
    assert call(["What is 1 + 2?", "-q", "--no-thinking"], capsys)[0] == 0
    before = call(["logs", "--json"], capsys)[1], call(["logs", "export"], capsys)[1]
    assert "1 + 2 = 3" in before[1] and before[0].count("\n") == 1
    call([*words, "-c", "-q"], capsys)
    assert (call(["logs", "--json"], capsys)[1], call(["logs", "export"], capsys)[1]) == before


def test_empty_conversations_of_earlier_versions(home: Path, capsys: Capture) -> None:
    assert call(["What is 1 + 2?", "-q", "--no-thinking"], capsys)[0] == 0
    with ConversationLog.open() as log, log.transaction() as database:
        columns = "(id, model, created, changed)"
        values = "(2, 'nosuch', '2026', '3000')"
        database.execute(f"INSERT INTO conversations {columns} VALUES {values}")
    assert call(["logs"], capsys)[1].count("\n") == 2
    assert call(["-c", "What is 2 + 2?", "-q", "--no-thinking"], capsys)[1] == "2 + 2 = 4\n"
    history = home / "chat_history"
    history.write_text("+Hello\n")
    code, _, err = call(["logs", "delete", "--all"], capsys)
    assert code == 1 and history.read_text()
    _, _, err = call(["logs", "delete", "--all", "-y"], capsys)
    assert err == "Deleted 1 conversation and the history of lines typed in chats.\n"
    assert history.read_text() == ""
    assert call(["logs", "show", "2"], capsys)[0] == 1


@pytest.mark.parametrize("damage", ["folder", "no database", "newer"])
def test_a_log_that_cannot_be_used(
    damage: str, tiny_folder: Path, home: Path, capsys: Capture
) -> None:
    """The answer comes all the same; what needs the log says what is wrong."""
    file = home / "conversations.db"
    home.mkdir()
    if damage == "folder":
        file.mkdir()
    elif damage == "newer":
        with sqlite3.connect(file) as database:
            database.execute("PRAGMA user_version = 99")
        database.close()
    else:
        file.write_text("no database " * 100)
    options = ["-m", str(tiny_folder), "-n", "2", "--seed", "1"]
    code, out, err = call(["Hello", *options], capsys)
    assert code == 0 and out
    assert err.startswith("qwen3: the conversation is not recorded: ")
    for words in (["logs"], ["-c", "Hello", *options]):
        code, out, err = call(words, capsys)
        assert (code, out) == (1, "") and str(file) in err and err.count("\n") == 1


def test_a_folder_that_cannot_be_created(tiny_folder: Path, home: Path, capsys: Capture) -> None:
    home.symlink_to(home.parent / "gone")
    options = ["-m", str(tiny_folder), "-n", "2", "--seed", "1"]
    code, out, err = call(["Hello", *options], capsys)
    assert code == 0 and out
    assert err.startswith(f"qwen3: the conversation is not recorded: the folder {home} cannot be ")
    code, out, err = call(["logs"], capsys)
    assert (code, out) == (1, "") and err.startswith(f"qwen3: the folder {home} cannot be created")


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (["-c", "Hello"], 1, "no conversation has been recorded"),
        (["-c", "7", "Hello"], 1, "there is no conversation 7; qwen3 logs lists them"),
        (["--continue=x", "Hello"], 1, "--continue takes the number of a conversation, not 'x'"),
        (["-c", "7"], 2, "give a prompt"),
        (["logs", "show"], 1, "no conversation has been recorded"),
        (["logs", "show", "x"], 2, "Invalid value for '[ID]'"),
        (["logs", "red", "pears"], 2, 'qwen3 logs search "red pears" (see qwen3 logs --help)'),
        (["logs", "serach", "x"], 2, "Did you mean 'search'?"),
        (["logs", "export", "1", "out.md"], 2, "'out.md' is not the number of a conversation; -o "),
        (["logs", "search", " "], 2, "give a word to search for"),
        (["logs", "delete"], 2, "name the conversations to delete"),
        (["logs", "delete", "1", "--all"], 2, "name the conversations to delete"),
        (["logs", "delete", "1"], 1, "there is no conversation 1"),
    ],
)
def test_what_is_not_there(
    words: list[str], code: int, complaint: str, home: Path, capsys: Capture
) -> None:
    found, out, err = call(words, capsys)
    assert (found, out) == (code, "")
    assert complaint in err and err.count("\n") == 1


def test_logs_search_show_export_and_delete(home: Path, tmp_path: Path, capsys: Capture) -> None:
    assert call(["logs"], capsys) == (0, "", "No conversation has been recorded.\n")
    with Recorder(ConversationLog.open(), "demo") as recorder:
        recorder.record([*said("About FISH?", "Trout.\n\n```\n0\n```"), *said("你好吗")])
    with Recorder(ConversationLog.open(), "demo") as recorder:
        answer = {"role": "assistant", "content": "4", "reasoning_content": "two\ntwos"}
        recorder.record([*said("a[0] + 2"), answer])
    for words, number, text in (("fish", 1, "About FISH?"), ("a[0] +", 2, "a[0] + 2")):
        table = call(["logs", "search", words], capsys)[1]
        head = "ID  last change       by    text\n"
        assert re.fullmatch(rf"{head}{number}   [-\d]+ \d\d:\d\d  user  {re.escape(text)}\n", table)
    assert call(["logs", "search", "你好"], capsys)[1].endswith("  user  你好吗\n")
    assert call(["logs", "search", '"'], capsys) == (0, "", "No message has these words.\n")
    shown = call(["logs", "show"], capsys)[1]
    assert shown.endswith("## User\n\na[0] + 2\n\n## Assistant\n\n4\n")
    file = tmp_path / "both.md"
    call(["logs", "export", "1", "2", "-o", str(file)], capsys)
    assert "> two\n> twos\n\n4\n" in file.read_text() and "```\n0\n```" in file.read_text()
    file = tmp_path / "one.json"
    call(["logs", "export", "1", "-o", str(file)], capsys)
    with load() as llm:
        assert llm.conversation(file=file).messages[0]["content"] == "About FISH?"
    code, _, err = call(["logs", "delete", "1"], capsys)
    assert code == 1 and "--yes does it without a question" in err
    assert call(["logs", "delete", "1", "--yes"], capsys)[2] == "Deleted 1 conversation.\n"
    assert not [file for file in home.iterdir() if b"FISH" in file.read_bytes()]
    assert call(["logs", "--json"], capsys)[1].count("\n") == 1


def test_what_was_replaced_is_shown_on_request(home: Path, capsys: Capture) -> None:
    with Recorder(ConversationLog.open(), "demo") as recorder:
        recorder.record(said("pears?", "wrong"))
        recorder.record(said("apples?", "right"))
    live, replaced = (
        said("apples?", "right"),
        [{**message, "replaced": True} for message in said("pears?", "wrong")],
    )
    assert json.loads(call(["logs", "export", "--json"], capsys)[1])["messages"] == live
    everything = call(["logs", "export", "--json", "--replaced"], capsys)[1]
    assert json.loads(everything)["messages"] == replaced + live
    (home / "export.json").write_text(everything)
    assert read_messages(home / "export.json") == live  # as a chat loads it
    note = "Replaced messages that are not shown: 2; --replaced shows them.\n"
    for command, err in (("show", note), ("export", "")):
        assert call(["logs", command], capsys)[2] == err
        assert call(["logs", command, "--replaced"], capsys)[2] == ""
        text = call(["logs", command], capsys)[1]
        assert "right" in text and "pears" not in text
        text = call(["logs", command, "--replaced"], capsys)[1]
        assert "## Assistant (replaced)\n\nwrong\n\n## User\n\napples?" in text
    assert "pears?" in call(["logs", "search", "pears"], capsys)[1]


def test_titles_are_what_was_asked_about_files(home: Path, tmp_path: Path, capsys: Capture) -> None:
    file, other = tmp_path / "notes.md", tmp_path / "other.txt"
    file.write_text("```\nnotes:\n```\n\nmore")
    other.write_text("other")
    options = ["-q", "--no-thinking", "-n", "1"]
    call(["What do they say?", "-f", str(file), "-f", str(other), *options], capsys)
    call(["-f", str(file), *options], capsys)
    titles = [
        json.loads(line)["title"] for line in call(["logs", "--json"], capsys)[1].splitlines()
    ]
    assert titles == ["notes.md: ```` ``` notes: ``` more ````", "What do they say?"]


def test_on_a_terminal(home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are cut to its width, and a question is asked before anything is deleted."""
    with Recorder(ConversationLog.open(), "demo") as recorder:
        recorder.record(said("many words " * 20))
    monkeypatch.setenv("COLUMNS", "60")
    for answer, left in (("n\n", 1), ("", 1), ("y\n", 0)):  # "" is Ctrl-D
        stdin = io.StringIO(answer)
        for stream in (stdin, sys.stdout):
            monkeypatch.setattr(stream, "isatty", lambda: True)
        monkeypatch.setattr("sys.stdin", stdin)
        table = call(["logs"], capsys)[1].splitlines()
        assert table[0].startswith("ID  last change") and table[1].startswith("1   2026")
        assert len(table[1]) <= 60
        code, _, err = call(["logs", "delete", "1"], capsys)
        assert "Delete 1 conversation? [y/N]" in err and "bug" not in err
        assert code == left
        with ConversationLog.open() as log:
            assert len(log.summaries()) == left
    assert call(["logs", "1"], capsys)[2].startswith("qwen3: there is no conversation 1")


def test_shown_on_a_terminal(home: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversation is shown as its Markdown means; nothing in it can steer the terminal."""
    with Recorder(ConversationLog.open(), "demo") as recorder:
        recorder.record(said("Bold \x1b[2J?", "It is **bold**."))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = call(["logs", "show"], capsys)[1]
    assert "**" not in shown and "\x1b[1mbold" in shown
    listed = call(["logs"], capsys)[1]
    assert "Bold" in listed and "\x1b[2J" not in shown + listed


# --- the file -------------------------------------------------------------------------------------


def test_pieces_are_stored_while_they_come(
    log: ConversationLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "_FLUSH_SECONDS", 0.01)
    with Recorder(opened_again(log), "demo") as recorder:
        recorder.record(said("Hi"))
        recorder.add(Reasoning("hm"))
        for piece in "abc":
            recorder.add(Text(piece))
            time.sleep(0.1)
        partial = {"role": "assistant", "content": "abc", "reasoning_content": "hm"}
        assert log.messages(1) == [*said("Hi"), partial]
        recorder.record(said("Hi", "abcd"))
        assert log.messages(1, replaced=True) == said("Hi", "abcd")
        assert len(log.search("abc")) == 1


def test_nothing_said_is_lost(log: ConversationLog) -> None:
    """A retry, an edit, and turns that are dropped for want of room."""
    with Recorder(opened_again(log), "demo") as recorder:
        recorder.record(said("one", "first"))
        recorder.record(said("one"))
        recorder.record(said("one", "second"))
        recorder.record(said("uno", "third"))
        assert log.messages(1) == said("uno", "third")
        recorder.record([*said("uno", "third", "two", "2", "three", "3")])
        system = {"role": "system", "content": "Be short."}
        recorder.record([system, *said("two", "2", "three", "3", "four")])
        assert log.messages(1) == [system, *said("two", "2", "three", "3", "four")]
        everything = [message["content"] for message in log.messages(1, replaced=True)]
        assert everything == (
            ["Be short.", "one", "first", "second", "uno", "third", "two", "2", "three", "3"]
            + ["four"]
        )
        recorder.record([system, *said("three", "3", "2", "three")])  # whatever it may be
        assert log.messages(1) == [system, *said("three", "3", "2", "three")]


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=5), max_size=6), st.data())
@settings(max_examples=20)
def test_the_last_messages_are_those_that_go_on(histories: list[list[str]], data: Any) -> None:
    with TemporaryDirectory() as folder, ConversationLog(Path(folder) / "log.db") as log:
        with Recorder(opened_again(log), "demo") as recorder:
            for texts in histories:
                system = [{"role": "system", "content": data.draw(st.sampled_from("ab"))}]
                messages = [*(system if data.draw(st.booleans()) else []), *said(*texts)]
                recorder.record(messages)
                assert log.messages(1) == (messages if recorder.conversation else [])


def test_two_that_go_on_with_one_conversation(log: ConversationLog) -> None:
    with Recorder(opened_again(log), "demo") as recorder:
        recorder.record(said("Hi", "Ho"))
    with Recorder(opened_again(log), "demo", conversation=1) as one:
        with Recorder(opened_again(log), "demo", conversation=1) as two:
            one.record(said("Hi", "Ho", "one"))
            two.record(said("Hi", "Ho", "two"))
            one.record(said("Hi", "Ho", "one", "1"))
    assert (one.conversation, two.conversation) == (1, 2)
    assert log.messages(1) == said("Hi", "Ho", "one", "1")
    assert log.messages(2) == said("Hi", "Ho", "two")


def test_many_at_once(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for _ in range(5):
            with Recorder(ConversationLog(tmp_path / "new.db"), "demo") as recorder:
                recorder.record(said(f"Hi {number}"))
                recorder.record(said(f"Hi {number}", "Ho"))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    with ConversationLog(tmp_path / "new.db") as log:
        assert len(log.summaries()) == 40 and len(log.search("Hi")) == 40


def test_many_create_the_file_at_once(tmp_path: Path) -> None:
    """As two terminals on the first day: each waits, where SQLite itself would fail at once."""
    together = Barrier(8)

    def open_new(number: int) -> None:
        together.wait()
        ConversationLog(tmp_path / f"{number}.db").close()

    with ThreadPoolExecutor(8) as pool:
        for number in range(40):
            list(pool.map(open_new, [number] * 8))


def test_a_failure_while_it_records_is_told_once(log: ConversationLog, capsys: Capture) -> None:
    """Such as a full disk; the chat goes on."""
    with Recorder(opened_again(log), "demo") as recorder:
        recorder.record(said("Hi"))
        with log.transaction() as database:
            database.execute("DROP TABLE search")
        for _ in range(2):
            recorder.add(Text("Ho"))
            recorder.record(said("Hi", "Ho"))
    err = capsys.readouterr().err
    assert err.startswith("qwen3: the conversation is not recorded: ") and err.count("\n") == 1


def test_a_conversation_deleted_elsewhere_goes_on_as_a_new_one(log: ConversationLog) -> None:
    with Recorder(opened_again(log), "demo") as recorder:
        recorder.record(said("Hi"))
        log.delete([1])
        recorder.record(said("Hi", "Ho"))
        assert [summary.id for summary in log.summaries()] == [2]
    with pytest.raises(Qwen3Error, match="no conversation 1"):
        log.find(1)
