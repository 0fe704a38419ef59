"""What the tests of this room share."""

import base64
import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, TextIO

import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub import constants
from numpy.typing import NDArray

from qwen3_mlx.cli.main import main
from qwen3_mlx.files import read_json
from tests.support import (
    Stored,
    as_bfloat16,
    float_of,
    read_weights,
)

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
        inside = [file for file in self.folder.rglob("*") if file.is_file()]
        names = [str(file.relative_to(self.folder)) for file in inside]
        names += ["pytorch_model.bin", "README.md"]
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
            name = path.split("/", 5)[-1]
            if body:
                self.asked.append(name)
            self._send_file((self.folder / name).read_bytes(), name, body=body)
        else:
            self._send(b'{"error": "not found"}', status=404, error="RepoNotFound")

    def _send_file(self, content: bytes, name: str, *, body: bool) -> None:
        self._send(content if body else b"", length=len(content), etag=_hash(content))

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


@contextmanager
def serving(folder: Path, kind: type[Hub] = Hub, **more: object) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder as someone/tiny: give the hub's address and the list of what is downloaded."""
    asked: list[str] = []
    handler = type("Tiny", (kind,), {"folder": folder, "asked": asked, "given": GIVEN, **more})
    GIVEN.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def hub_of(home: Path, endpoint: str) -> Iterator[None]:
    """Let the hub's library, which has read its variables already, use a cache and an address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "ENDPOINT", endpoint)
        address = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", "hf_token")
        patch.setenv("NO_PROXY", "*")
        yield


def qwen3(
    *arguments: str,
    home: Path,
    endpoint: str,
    err: io.StringIO | None = None,
    stdin: TextIO | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run it in this process, which saves a second; the library has read its variables already."""
    out, err = io.StringIO(), io.StringIO() if err is None else err
    handler = logging.StreamHandler(err)
    with (
        pytest.MonkeyPatch.context() as patch,
        hub_of(home, endpoint),
        open(os.devnull) as nothing,
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        patch.delenv("QWEN3_MODEL", raising=False)
        patch.setattr(sys, "stdin", stdin or nothing)
        logging.getLogger("qwen3_mlx").addHandler(handler)
        logging.getLogger("huggingface_hub").addHandler(handler)
        try:
            main(arguments)
            code: object = 0
        except SystemExit as ended:
            code = ended.code
        finally:
            logging.getLogger("qwen3_mlx").removeHandler(handler)
            logging.getLogger("huggingface_hub").removeHandler(handler)
    return subprocess.CompletedProcess(
        arguments, int(str(code or 0)), out.getvalue(), err.getvalue()
    )


INDEX = "model.safetensors.index.json"


def shards_of(folder: Path, *, index: bool) -> None:
    """Write other weights beside a checkpoint's own, in two shards."""
    weights = {name: 2 * array for name, array in read_weights(folder).items()}
    names = sorted(weights)
    places: dict[str, str] = {}
    for shard in (1, 2):
        file = f"model-{shard:05}-of-00002.safetensors"
        part = {name: weights[name] for name in names[shard - 1 :: 2]}
        mx.save_safetensors(str(folder / file), part)
        places |= dict.fromkeys(part, file)
    if index:
        (folder / INDEX).write_text(json.dumps({"weight_map": places}))


Array = NDArray[Any]


def scales_of(random: np.random.RandomState, shape: tuple[int, ...], dtype: str) -> Stored:
    values = random.uniform(0.001, 0.1, shape).astype(np.float32)
    return as_stored(values, dtype)


def as_stored(values: Array, dtype: str) -> Stored:
    if dtype == "BF16":
        return dtype, as_bfloat16(values)
    return dtype, values.astype({"F16": np.float16, "F32": np.float32}[dtype])


def packed_along(values: Array, bits: int, axis: int) -> Array:
    """Pack values along an axis, the first in the lowest bits of its word."""
    values = np.moveaxis(values, axis, 0)
    count = 32 // bits
    words = np.zeros((values.shape[0] // count, *values.shape[1:]), np.uint32)
    for place in range(count):
        words |= values[place::count].astype(np.uint32) << np.uint32(bits * place)
    return np.moveaxis(words, 0, axis).view(np.int32)


def make_gptq(
    inputs: int, outputs: int, bits: int, order: str = "sorted", seed: int = 0, version: int = 1
) -> tuple[dict[str, Stored], Array]:
    """Pack random numbers as gptqmodel does: version 1 has the zeros' words less 0x1111... ."""
    random = np.random.RandomState(seed)
    groups = inputs // 128
    q = random.randint(0, 1 << bits, (inputs, outputs))
    zeros = random.randint(0, 1 << bits, (groups, outputs))
    scales = scales_of(random, (groups, outputs), "F16")
    stored_zeros = packed_along(zeros, bits, 1)
    if version == 1:
        ones = sum(1 << bit for bit in range(0, 32, bits))
        stored_zeros = (stored_zeros.view(np.uint32) - np.uint32(ones)).view(np.int32)
    index = np.arange(inputs) // 128
    if order == "permuted":
        index = random.permutation(index)
    expected = np.zeros((outputs, inputs), np.float32)
    for i in range(inputs):
        number = (q[i] - zeros[index[i]]).astype(np.float32)
        expected[:, i] = number * float_of(scales)[index[i]]
    tensors = {
        "qweight": ("I32", np.ascontiguousarray(packed_along(q, bits, 0))),
        "qzeros": ("I32", np.ascontiguousarray(stored_zeros)),
        "scales": scales,
        "g_idx": ("I32", index.astype(np.int32)),
    }
    if order == "missing":
        del tensors["g_idx"]
    return tensors, expected


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def with_head(source: Path, folder: Path, *, like: str, tie: bool = True) -> Path:
    """Copy a tied checkpoint, and give it a head: a copy of the embedding, or another."""
    shutil.copytree(source, folder)
    weights = read_weights(folder)
    copy = weights[EMBEDDING]
    weights[HEAD] = copy if like == "copy" else copy.at[-1].add(0.5)  # the last row alone
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tie}))
    return folder
