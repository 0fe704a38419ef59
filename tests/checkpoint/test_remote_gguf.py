"""Planning of GGUF files on a hub, of which the headers alone are downloaded."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen3_mlx.checkpoint import gguf_file
from tests.checkpoint.harness import Hub, qwen3, serving

GOLDEN = Path(__file__).parents[1] / "golden/formats"
MODEL = "someone/tiny"
OPTIONS = ("--memory", "16", "--json")
LONG = 3 << 20  # bytes behind the tensors, which nobody needs


class Ranges(Hub):
    """Sends the parts of files that are asked for, and counts the bytes that it sends."""

    sent: list[int]
    sends_parts = True

    def _send_file(self, content: bytes, name: str, *, body: bool) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        if not (body and asked and self.sends_parts):
            super()._send_file(content, name, body=body)
            return
        first, last = int(asked[1]), int(asked[2])
        part = content[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)
        self.sent.append(len(part))


def served(tmp_path: Path, case: str) -> Path:
    """Copy the files of a case, each with bytes behind its tensors."""
    folder = tmp_path / "served"
    folder.mkdir()
    for file in (GOLDEN / case).glob("*.gguf"):
        (folder / file.name).write_bytes(file.read_bytes() + bytes(LONG))
    return folder


def plan(folder: Path, tmp_path: Path, **more: Any) -> tuple[Any, str, list[int], list[str]]:
    """Plan what a hub serves; return the plan, stderr, the parts sent, and the files asked for."""
    sent: list[int] = []
    with serving(folder, Ranges, sent=sent, **more) as (address, asked):
        done = qwen3("plan", MODEL, *OPTIONS, home=tmp_path / "home", endpoint=address)
    assert done.returncode in (0, 1)
    return json.loads(done.stdout or "null"), done.stderr, sent, asked


@pytest.mark.parametrize("case", ["gguf_narrow_q4_k_m", "gguf_moe_q4_k_m", "gguf_split_bf16"])
def test_planning_downloads_headers_alone(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN3_HOME", str(tmp_path / "qwen3"))
    folder = served(tmp_path, case)
    files = sorted(folder.iterdir())
    found, err, sent, asked = plan(folder, tmp_path)
    assert not err
    assert (sorted(asked), sent) == ([file.name for file in files], len(files) * [1 << 20])
    # Nothing is stored that could be taken for the file, or for its description.
    assert not [*tmp_path.glob("home/**/*.gguf"), *tmp_path.glob("qwen3/gguf/*")]
    local = qwen3("plan", str(files[0]), *OPTIONS, home=tmp_path, endpoint="")
    assert found == {**json.loads(local.stdout), "model": MODEL}
    assert "as it is" in found["weights"]


@pytest.mark.parametrize("sends_parts", [True, False])
def test_more_is_read_until_the_header_is_complete(
    sends_parts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "_FIRST_BYTES", 1_000)
    folder = served(tmp_path, "gguf_narrow_q4_k_m")
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    found, err, sent, asked = plan(folder, tmp_path, sends_parts=sends_parts)
    assert found, err
    last_name = whole.rindex(b"output_norm.weight")
    if sends_parts:
        assert sum(sent[:-1]) < last_name < sum(sent) < 2 * last_name + 1_000
        assert len(asked) > 3


def test_a_downloaded_file_is_planned_without_the_hub(tmp_path: Path) -> None:
    folder = served(tmp_path, "gguf_narrow_q4_k_m")
    options: Any = {"home": tmp_path / "home"}
    sent: list[int] = []
    with serving(folder, Ranges, sent=sent) as (address, _):
        before = qwen3("plan", MODEL, *OPTIONS, endpoint=address, **options)
        done = qwen3("Hi", "-n", "2", "-q", "-m", MODEL, endpoint=address, **options)
        assert done.returncode == 0, done.stderr  # all of it was downloaded
    after = qwen3("plan", MODEL, *OPTIONS, endpoint="http://127.0.0.1:9", **options)
    assert json.loads(after.stdout) == json.loads(before.stdout)
    assert len(sent) == 1


def test_a_split_file_beside_the_same_in_one_piece(tmp_path: Path) -> None:
    folder = served(tmp_path, "gguf_split_bf16")
    shutil.copy(next((GOLDEN / "gguf_narrow_q4_k_m").glob("*.gguf")), folder / "tiny-BF16.gguf")
    found, err, *_ = plan(folder, tmp_path)
    assert found, err


def _cut(length: int) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(file.read_bytes()[:length])


@pytest.mark.parametrize(
    ("case", "damage", "complaint"),
    [
        ("gguf_narrow_q4_k_m", _cut(15_000), "is truncated, or has a broken header"),
        ("gguf_narrow_q4_k_m", _cut(100_000), "is truncated: .*weight ends after it"),
        ("gguf_narrow_q4_k_m", lambda file: file.write_bytes(b"<html>"), "is no GGUF file"),
        ("gguf_split_bf16", Path.unlink, f"{MODEL} lacks .*00003.gguf: all parts are needed"),
    ],
)
def test_what_is_broken_is_one_sentence(
    case: str, damage: Callable[[Path], object], complaint: str, tmp_path: Path
) -> None:
    folder = served(tmp_path, case)
    damage(max(folder.iterdir()))
    found, err, *_ = plan(folder, tmp_path)
    assert found is None and err.count("\n") == 1
    assert re.search(complaint, err), err


def test_a_header_without_an_end_is_not_downloaded_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "_FIRST_BYTES", 1_000)
    monkeypatch.setattr(gguf_file, "_MAX_BYTES", 20_000)
    folder = served(tmp_path, "gguf_narrow_q4_k_m")
    (file,) = folder.iterdir()
    whole, key = file.read_bytes(), b"general.architecture"
    place = whole.index(key) + len(key) + 4  # the length of the text behind the key
    file.write_bytes(whole[:place] + (LONG // 2).to_bytes(8, "little") + whole[place + 8 :])
    found, err, sent, _ = plan(folder, tmp_path)
    assert found is None and "has a broken header" in err
    assert sum(sent) < 100_000
