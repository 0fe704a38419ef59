"""Downloads from a hub that is slow, breaks off, or has more than the disk can hold."""

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event as Flag
from types import SimpleNamespace

import pytest

from qwen3_mlx.checkpoint import download
from qwen3_mlx.cli import console
from tests.checkpoint.harness import Hub, qwen3, serving

WEIGHTS = "model.safetensors"
ASK = ("Hello", "-n", "4", "-m", "someone/tiny")


class Breaking(Hub):
    """Sends parts of files, names them as the hub does its large ones, and may break off."""

    breaks: list[Callable[[Hub, bytes], bool]]
    ranges: list[str | None]

    def _send_file(self, content: bytes, name: str, *, body: bool) -> None:
        asked = self.headers["Range"]
        part = content
        if asked and "no ranges" not in self.ranges:
            part = content[int(asked.removeprefix("bytes=").removesuffix("-")) :]
        self.send_response(206 if len(part) < len(content) else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if not body:
            return
        if name == WEIGHTS:
            self.ranges.append(asked)
            if self.breaks and self.breaks.pop(0)(self, part):
                self.close_connection = True
                return
        self.wfile.write(part)


def after(length: int) -> Callable[[Hub, bytes], bool]:
    """Return a break that sends so many bytes first."""

    def send(hub: Hub, part: bytes) -> bool:
        hub.wfile.write(part[:length])
        return True

    return send


class Cache:
    """A running hub, and the library's cache that is filled from it."""

    def __init__(self, address: str, home: Path, content: bytes) -> None:
        self.address, self.home = address, home
        self.ranges: list[str | None] = []
        self.breaks: list[Callable[[Hub, bytes], bool]] = []
        self.blob = home / "hub/models--someone--tiny/blobs" / hashlib.sha256(content).hexdigest()
        self.partial = self.blob.with_name(f"{self.blob.name}.qwen3.incomplete")

    def ask(self, *more: str, err: io.StringIO | None = None) -> tuple[int, list[str]]:
        """Ask the model, which has it downloaded; return the exit code and the lines on stderr."""
        done = qwen3(*ASK, *more, home=self.home, endpoint=self.address, err=err)
        return done.returncode, done.stderr.splitlines()


@pytest.fixture
def cache(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    monkeypatch.setattr(download, "_PAUSE", 0.0)
    made = Cache("", tmp_path, (tiny_folder / WEIGHTS).read_bytes())
    more = {"breaks": made.breaks, "ranges": made.ranges}
    with serving(tiny_folder, Breaking, **more) as (made.address, _):
        yield made


def test_a_transfer_that_breaks_goes_on_where_it_was(cache: Cache) -> None:
    cache.breaks += [after(70_000), after(30_000), after(0), after(0)]
    assert cache.ask("-q") == (0, [])
    assert cache.ranges == [None, "bytes=70000-", *3 * ["bytes=100000-"]]
    assert hashlib.sha256(cache.blob.read_bytes()).hexdigest() == cache.blob.name
    assert not cache.partial.exists()
    assert cache.ask("-q") == (0, [])
    assert len(cache.ranges) == 5  # all of it is here


def test_a_hub_that_sends_nothing_more_is_one_sentence(cache: Cache) -> None:
    cache.breaks += [after(70_000), *20 * [after(0)]]
    code, (line,) = cache.ask("-q")
    assert code == 1
    assert line.startswith(f"qwen3: the hub stopped sending {WEIGHTS} after 0.1 of ")
    assert line.endswith("; the same command goes on from there")
    assert 3 <= len(cache.ranges) <= 8
    cache.breaks.clear()
    assert cache.ask("-q") == (0, [])
    assert cache.ranges[-1] == "bytes=70000-"


def test_ctrl_c_ends_a_download_that_the_next_command_resumes(cache: Cache) -> None:
    begun, go_on = Flag(), Flag()

    def hang(hub: Hub, part: bytes) -> bool:
        hub.wfile.write(part[:50_000])
        hub.wfile.flush()
        begun.set()
        go_on.wait(60)
        return True

    cache.breaks.append(hang)
    with subprocess.Popen(
        [sys.executable, "-m", "qwen3_mlx", *ASK],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            "PATH": "",
            "QWEN3_HOME": os.environ["QWEN3_HOME"],  # not the user's conversations
            "HF_HOME": str(cache.home),
            "HF_ENDPOINT": cache.address,
            "NO_PROXY": "*",
        },
    ) as process:
        try:
            assert begun.wait(60)
            while not (cache.partial.exists() and cache.partial.stat().st_size == 50_000):
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)  # while the hub still hangs
        finally:
            go_on.set()
    assert (process.returncode, out, err) == (130, "", "qwen3: interrupted\n")
    assert cache.ask("-q") == (0, [])
    assert cache.ranges == [None, "bytes=50000-"]


def test_a_hub_that_cannot_send_parts_begins_anew(cache: Cache) -> None:
    cache.ranges.append("no ranges")
    cache.breaks.append(after(70_000))
    assert cache.ask("-q") == (0, [])
    assert hashlib.sha256(cache.blob.read_bytes()).hexdigest() == cache.blob.name


def test_bytes_that_are_not_those_of_the_checksum_are_dropped(cache: Cache) -> None:
    cache.partial.parent.mkdir(parents=True)
    cache.partial.write_bytes(bytes(1000))
    code, (line,) = cache.ask("-q")
    assert (code, line) == (
        1,
        f"qwen3: {WEIGHTS} does not match the hub's checksum; try again",
    )
    assert cache.ask("-q") == (0, [])
    assert cache.ranges == ["bytes=1000-", None]


def test_a_disk_that_is_too_small_is_said_before_the_first_byte(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = SimpleNamespace(free=100_200_000)  # of which the tokenizer's file has room
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    code, (line,) = cache.ask()
    assert code == 1
    assert line.startswith("qwen3: someone/tiny needs 0.00 GB more, and the disk of ")
    assert line.endswith("0.10 GB free; make room, or set HF_HOME to a folder of another disk")
    assert cache.ranges == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_bar_shows_size_speed_and_time_left(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_BAR_DELAY_SECONDS", -1.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    cache.breaks.append(after(70_000))
    code, _ = cache.ask(err=(terminal := Terminal()))
    shown = terminal.getvalue()
    assert code == 0
    for word in ("downloading", "kB", "/s", ":"):
        assert word in shown
    assert "Fetching" not in shown and "trying" not in shown
    shutil.rmtree(cache.home)
    cache.breaks.append(after(70_000))
    code, _ = cache.ask("-q", err=(terminal := Terminal()))
    assert (code, terminal.getvalue()) == (0, "")


def test_a_callback_that_raises_ends_the_download(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def enough(bar: console.Bar, done: int, total: int) -> None:
        raise ZeroDivisionError("enough")

    monkeypatch.setattr(console.Bar, "__call__", enough)
    assert cache.ask() == (1, ["qwen3: downloading someone/tiny failed: enough"])
    assert cache.ranges == []  # the smaller files came first


def test_without_a_terminal_nothing_is_said_of_it(cache: Cache) -> None:
    cache.breaks.append(after(70_000))
    code, lines = cache.ask()
    assert code == 0
    assert len(lines) == 1 and "tokens/s" in lines[0]


def test_converting_shows_the_bar_too(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_BAR_DELAY_SECONDS", -1.0)
    monkeypatch.setenv("TERM", "xterm")
    words = ("convert", "someone/tiny", str(tmp_path / "out"))
    done = qwen3(*words, home=cache.home, endpoint=cache.address, err=(terminal := Terminal()))
    assert done.returncode == 0
    assert "downloading" in terminal.getvalue()
