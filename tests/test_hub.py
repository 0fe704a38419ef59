"""Loading by a hub's name, from a hub of our own on this machine."""

import base64
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.support import DEMO

GIVEN: dict[str, bytes] = {}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Serves one model, someone/tiny, as the hub's web interface does."""

    folder: Path
    asked: list[str]
    given: dict[str, bytes]

    def do_POST(self) -> None:
        """Take an upload, as small files are sent: in the body of a commit."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            answer: dict[str, object] = {"url": self._address()}
        elif self.path.startswith("/api/models/me/made/preupload/"):
            files = [
                {**file, "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            answer = {"files": files}
        elif self.path.startswith("/api/models/me/made/commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.given[line["value"]["path"]] = content
            answer = {"commitUrl": self._address() + "/commit/1", "commitOid": COMMIT}
        else:  # the check of a model card
            answer = {"errors": [], "warnings": []}
        self._send(json.dumps(answer).encode())

    def _address(self) -> str:
        return f"http://{self.headers['Host']}/me/made"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        names = [*(file.name for file in self.folder.iterdir()), "pytorch_model.bin", "README.md"]
        if path.startswith("/api/models/me/made"):
            self._send(json.dumps({"id": "me/made", "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith("/api/models/someone/tiny/tree/"):
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
    handler = type("Tiny", (Hub,), {"folder": tiny_folder, "asked": asked, "given": GIVEN})
    GIVEN.clear()
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


def qwen3(*arguments: str, home: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qwen3_mlx", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={
            "PATH": "",
            "HF_HOME": str(home),
            "HF_ENDPOINT": endpoint,
            "NO_PROXY": "*",
            "HF_TOKEN": "hf_token",
            "HF_HUB_DISABLE_XET": "1",
        },
    )


def test_converting_by_name_and_uploading(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = hub
    output = tmp_path / "made"
    arguments = ("convert", "someone/tiny", str(output), "--upload-to", "me/made")
    done = qwen3(*arguments, home=tmp_path / "home", endpoint=address)
    assert done.returncode == 0, done.stderr
    assert f"{address}/me/made/commit/1" in done.stdout.replace("\n", "")
    assert "pytorch_model.bin" not in asked
    assert {name: (output / name).read_bytes() for name in GIVEN} == GIVEN
    assert set(GIVEN) == {file.name for file in output.iterdir()}
    assert b"base_model: someone/tiny" in GIVEN["README.md"]


def test_an_upload_that_fails_is_one_line(tmp_path: Path) -> None:
    arguments = ("convert", str(DEMO), str(tmp_path / "made"), "--upload-to")
    done = qwen3(*arguments, "me/made", home=tmp_path, endpoint="http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.startswith("qwen3: uploading to me/made failed: ")
    assert (tmp_path / "made" / "config.json").is_file()  # what was made stays
    done = qwen3(*arguments, "no name", "--force", home=tmp_path, endpoint="http://127.0.0.1:9")
    assert done.stderr.startswith("qwen3: 'no name' is no hub name")
