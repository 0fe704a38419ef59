"""Downloads by Ollama's protocol, from a hub of the tests' own."""

import json
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event as Flag
from typing import Any
from urllib.parse import urlsplit

import httpx
import ollama
import pytest

from qwen3_mlx import LLM
from tests.checkpoint.harness import COMMIT, Hub, hub_of
from tests.checkpoint.harness import serving as serving_hub
from tests.server.harness import until, until_idle
from tests.server.serving import Served, serving

TINY = "someone/tiny"


@contextmanager
def allowed(demo: LLM, folder: Path, home: Path, kind: type[Hub] = Hub) -> Iterator[Served]:
    """Serve the demo with downloads allowed, from a hub that has the model of a folder."""
    with (
        serving_hub(folder, kind) as (endpoint, _),
        hub_of(home, endpoint),
        serving(demo, allow_pull=True) as served,
    ):
        yield served


@pytest.fixture(scope="module")
def model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with a model card, as the hub has it."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    shutil.copytree(tiny_folder, folder)
    (folder / "README.md").write_text("# Tiny")
    return folder


def lines_of(response: httpx.Response) -> list[dict[str, Any]]:
    """Return the lines of a stream."""
    assert response.status_code == 200
    return [json.loads(line) for line in response.text.splitlines()]


def test_a_model_is_pulled_with_its_progress(demo: LLM, model: Path, tmp_path: Path) -> None:
    with allowed(demo, model, tmp_path) as served:
        first, *between, last = lines_of(served.post("/api/pull", {"model": TINY}))
        assert first == {"status": "pulling manifest"} and last == {"status": "success"}
        totals: dict[str, int] = {}
        for line in between:
            digest = line["digest"].removeprefix("sha256:")
            assert line["status"] == f"pulling {digest[:12]}" and len(digest) == 64
            assert totals.setdefault(digest, line["total"]) == line["total"] >= line["completed"]
        snapshot = tmp_path / f"hub/models--someone--tiny/snapshots/{COMMIT}"
        weights = "model.safetensors"
        assert (snapshot / weights).read_bytes() == (model / weights).read_bytes()
        # It is here now, which takes no line of progress; without a stream there is one line.
        again = lines_of(served.post("/api/pull", {"model": TINY}))
        assert [line["status"] for line in again] == ["pulling manifest", "success"]
        response = served.post("/api/pull", {"name": TINY, "stream": False, "wings": 2})
        assert response.json() == {"status": "success"}
        assert "unknown field 'wings'" in response.headers["warnings"]
        with ollama.Client(host=served.url) as client:
            assert [part.status for part in client.pull(TINY, stream=True)][-1] == "success"


def test_what_cannot_be_pulled_is_said(demo: LLM, model: Path, tmp_path: Path) -> None:
    with allowed(demo, model, tmp_path) as served:
        for name, complaint in (
            (None, "model is empty"),
            ("qwen3:8b", "nor one of the sizes"),
            ("demo", "part of this package"),
            (str(tmp_path), "a folder here"),
        ):
            response = served.post("/api/pull", {"model": name})
            assert response.status_code == 400 and complaint in response.json()["error"]
        unknown = {"model": "someone/unknown"}
        *_, last = lines_of(served.post("/api/pull", unknown))
        assert "the hub has no someone/unknown" in last["error"]
        response = served.post("/api/pull", {**unknown, "stream": False})
        assert response.status_code == 400 and response.json() == last


class Hanging(Hub):
    """Sends a part of the weights, then nothing until `go_on` is set."""

    go_on = Flag()

    def _send_file(self, content: bytes, name: str, *, body: bool) -> None:
        if not body or name != "model.safetensors":
            super()._send_file(content, name, body=body)
            return
        super()._send_file(content, name, body=False)
        self.wfile.write(content[:50_000])
        self.wfile.flush()
        self.go_on.wait(60)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_the_download(
    demo: LLM, model: Path, tmp_path: Path, stream: bool
) -> None:
    def has_part() -> bool:
        with suppress(FileNotFoundError):  # it gets its name meanwhile
            return any(file.stat().st_size == 50_000 for file in tmp_path.rglob("*.incomplete"))
        return False

    Hanging.go_on.clear()
    body = json.dumps({"model": TINY, "stream": stream})
    head = f"POST /api/pull HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with allowed(demo, model, tmp_path, Hanging) as served:
        try:
            url = urlsplit(served.url)
            with socket.create_connection((url.hostname, url.port)) as client:
                client.sendall(f"{head}{body}".encode())
                until(has_part)
                assert served.server.service.active == 1
            until_idle(served)
            assert has_part()  # the next download goes on from there
        finally:
            Hanging.go_on.set()
