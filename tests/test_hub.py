"""Loading by a hub's name, from a hub of our own on this machine."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Serves one model, someone/tiny, as the hub's web interface does."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        names = [*(file.name for file in self.folder.iterdir()), "pytorch_model.bin", "README.md"]
        if path.startswith("/api/models/someone/tiny/tree/"):
            tree = [{"type": "file", "path": name, "size": 1, "oid": COMMIT} for name in names]
            self._send(json.dumps(tree).encode())
        elif path.startswith("/api/models/someone/tiny"):
            siblings = [{"rfilename": name} for name in names]
            model = {"id": "someone/tiny", "sha": COMMIT, "siblings": siblings}
            self._send(json.dumps(model).encode())
        elif path.startswith("/someone/tiny/resolve/"):
            name = path.split("/")[-1]
            if body:
                self.asked.append(name)
            content = (self.folder / name).read_bytes()
            self._send(content if body else b"", length=len(content), etag=_hash(content))
        else:
            self._send(b'{"error": "not found"}', status=404, error="RepoNotFound")

    def _send(
        self,
        content: bytes,
        *,
        status: int = 200,
        length: int | None = None,
        etag: str = "",
        error: str = "",
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.send_header("X-Repo-Commit", COMMIT)
        if etag:
            self.send_header("ETag", f'"{etag}"')
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _hash(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(tiny_folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Give the address of a running hub, and the list of what is downloaded from it."""
    asked: list[str] = []
    handler = type("Tiny", (Hub,), {"folder": tiny_folder, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def ask(name: str, home: Path, endpoint: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qwen3_mlx", "Hello", "-n", "4", "-q", "--model", name],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PATH": "", "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "*", **more},
    )


def test_only_the_files_needed_are_downloaded_once(
    hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, asked = hub
    done = ask("someone/tiny", tmp_path, address)
    assert done.returncode == 0, done.stderr
    assert sorted(asked) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    asked.clear()
    assert ask("someone/tiny", tmp_path, address, HF_HUB_OFFLINE="1").returncode == 0
    assert asked == []


def test_planning_fetches_the_config_alone(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = hub
    done = subprocess.run(
        [sys.executable, "-m", "qwen3_mlx", "plan", "someone/tiny"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PATH": "", "HF_HOME": str(tmp_path), "HF_ENDPOINT": address, "NO_PROXY": "*"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("someone/tiny: 0.3 million weights")
    assert asked == ["config.json"]


@pytest.mark.parametrize(
    ("name", "offline", "complaint"),
    [
        ("someone/other", "0", "the hub has no someone/other, or it is private"),
        ("someone/tiny", "1", "is not downloaded yet and the hub cannot be reached"),
    ],
)
def test_what_the_hub_cannot_give(
    name: str, offline: str, complaint: str, hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    done = ask(name, tmp_path, hub[0], HF_HUB_OFFLINE=offline)
    assert done.returncode == 1
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout


def test_a_hub_that_is_not_there(tmp_path: Path) -> None:
    done = ask("someone/tiny", tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "the hub cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr
