"""`qwen3 ps`: the servers that run on this machine, those that were killed, and other programs."""

import json
import os
import re
import socket
import ssl
import stat
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from tests.cli.harness import call
from tests.server.harness import write_certificate

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sessions of our own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("platformdirs.user_runtime_path", lambda name: tmp_path / name)
    return tmp_path / "qwen3-mlx"


def seen(capsys: Captured) -> list[dict[str, Any]]:
    code, out, err = call(["ps", "--json"], capsys)
    assert (code, err) == (0, "")
    content: list[dict[str, Any]] = json.loads(out)
    return content


def written(runtime: Path, **more: Any) -> Path:
    """Write the entry of a server that is not there."""
    runtime.mkdir(exist_ok=True)
    entry = {"pid": os.getpid(), "host": "127.0.0.1", "port": 9, "model": "gone", "started": 1.0}
    file = runtime / "1-9.json"
    file.write_text(json.dumps(entry | more))
    return file


@pytest.mark.skipif(sys.platform == "darwin", reason="there, the folder is not of the session")
def test_a_server_with_a_key_is_seen_until_it_is_gone(runtime: Path, capsys: Captured) -> None:
    assert call(["ps"], capsys) == (
        0,
        "",
        "No server of yours is running; qwen3 serve starts one.\n",
    )
    command = [sys.executable, "-m", "qwen3_mlx", "serve", "--port", "0", "--api-key", "secret"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        url = ""
        while "is served at" not in url:
            url = server.stderr.readline()
        url = re.findall(r"http://\S+", url)[0]
        (row,) = seen(capsys)
        assert (row["pid"], row["url"]) == (server.pid, url)
        assert (row["model"], row["health"]["status"]) == ("qwen3-demo", "ok")
        _, out, _ = call(["ps"], capsys)
        header, line = out.splitlines()
        assert header.split()[:4] == ["pid", "model", "address", "state"]
        assert line.split()[:5] == [str(server.pid), "qwen3-demo", url, "ok", "0"]
        (file,) = runtime.iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(runtime.stat().st_mode) == 0o700
        assert "secret" not in file.read_text()
        server.kill()  # the next test ends one in peace
        server.communicate(timeout=60)
    assert list(runtime.iterdir()) == [file]
    assert seen(capsys) == []
    assert list(runtime.iterdir()) == []


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform == "darwin", reason="there, the folder is not of the session")
def test_a_server_with_a_certificate(runtime: Path, tmp_path: Path, capsys: Captured) -> None:
    cert, key = write_certificate(tmp_path)
    command = [sys.executable, "-m", "qwen3_mlx", "serve", "--port", "0"]
    command += ["--tls-cert", str(cert), "--tls-key", str(key)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        url = ""
        while "is served at" not in url:
            url = server.stderr.readline()
        url = re.findall(r"https://\S+", url)[0]
        trust = ssl.create_default_context(cafile=str(cert))
        body = {"messages": [{"role": "user", "content": "What is 12 + 34?"}], "stream": True}
        origin = {"Origin": url}  # its own page's
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=origin, verify=trust)
        assert answer.status_code == 200 and answer.text.endswith("[DONE]\n\n")
        (entry,) = seen(capsys)
        assert entry["url"] == url and entry["health"]["status"] == "ok"
        with socket.create_connection(("127.0.0.1", entry["port"])) as plain:  # and HTTP is nothing
            plain.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            plain.settimeout(30)
            assert b"200" not in plain.recv(1000)
        assert httpx.get(f"{url}/health", verify=trust).status_code == 200
        server.terminate()
        assert "Traceback" not in server.communicate(timeout=60)[1]
    assert list(runtime.iterdir()) == []


@pytest.mark.parametrize(
    "entry",
    [
        {},  # this process runs, and nothing listens at port 9
        {"pid": 2**22 + 1},  # more than a process can have
        {"pid": "x"},
        {"more": 1},
    ],
)
def test_stale_and_broken_entries_are_removed(
    entry: dict[str, Any], runtime: Path, capsys: Captured
) -> None:
    file = written(runtime, **entry)
    assert seen(capsys) == [] and not file.exists()
    file.write_text("{")
    assert seen(capsys) == [] and not file.exists()


@pytest.mark.parametrize("kind", ["silent", "other"])
def test_what_else_listens_there(
    kind: str, runtime: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that hangs is shown; a program of another kind is none."""
    monkeypatch.setattr("qwen3_mlx.server.running._TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        written(runtime, port=listener.getsockname()[1])
        if kind == "silent":
            _, out, _ = call(["ps"], capsys)
            assert "does not answer" in out
            return
        listener.settimeout(10)

        def answer() -> None:
            client, _ = listener.accept()
            client.recv(1000)
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")
            client.close()

        (thread := Thread(target=answer)).start()
        assert seen(capsys) == []
        thread.join()


def test_the_folder_of_another_user_is_not_used(
    runtime: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(runtime)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert seen(capsys) == [] and file.exists()
