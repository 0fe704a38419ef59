"""`qwen3 list`, `pull`, `rm` and `show`: a hub of our own, a cache, and folders of checkpoints."""

import hashlib
import json
import os
import pty
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen3_mlx import backend
from qwen3_mlx.cli.options import complete_model
from qwen3_mlx.model.sizes import SIZES
from tests.checkpoint.harness import COMMIT, Hub, qwen3, serving
from tests.support import DEMO, write_tiny

GGUF_CASE = next((Path(__file__).parents[1] / "golden/formats/gguf_narrow_q4_k_m").glob("*.gguf"))
NOWHERE = "http://127.0.0.1:9"
OTHER = "f" * 40


class Place:
    """A home without models, and a hub."""

    def __init__(self, home: Path, hub: Path, address: str) -> None:
        self.home, self.hub, self.address = home, hub, address
        self.cache = home / "hub"

    def run(self, *words: str, offline: bool = False) -> tuple[int, str, str]:
        endpoint = NOWHERE if offline else self.address
        done = qwen3(*words, home=self.home, endpoint=endpoint)
        return done.returncode, done.stdout, done.stderr

    def rows(self) -> dict[str, dict[str, Any]]:
        code, out, err = self.run("list", "--json", offline=True)
        assert (code, err) == (0, "")
        return {row["model"]: row for row in json.loads(out)}


def write_aliases(text: str) -> None:
    (Path(os.environ["QWEN3_HOME"]) / "config.toml").write_text(f"[aliases]\n{text}\n")


@pytest.fixture
def place(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("QWEN3_MODELS", raising=False)
    hub = tmp_path / "served"
    shutil.copytree(tiny_folder, hub)
    (hub / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("QWEN3_HOME", str(tmp_path / "home"))
    with serving(hub) as (address, _):
        yield Place(tmp_path / "home", hub, address)


def test_a_new_machine_says_what_to_do(place: Place) -> None:
    code, out, err = place.run("list", offline=True)
    assert (code, out) == (0, "")
    assert err == ("No model is here yet: qwen3 plan recommends one, qwen3 pull 8B downloads it.\n")
    assert place.run("list", "--json", offline=True)[:2] == (0, "[]\n")


def test_a_model_is_pulled_listed_used_and_removed(place: Place) -> None:
    code, out, err = place.run("pull", "someone/tiny")
    assert code == 0
    folder = Path(out.strip())
    assert folder == place.cache / f"models--someone--tiny/snapshots/{COMMIT}"
    assert (folder / "model.safetensors").is_file() and (folder / "README.md").is_file()
    assert err.startswith("someone/tiny is here: ") and "downloaded and verified" in err
    again = place.run("pull", "someone/tiny")
    assert again == (0, out, "someone/tiny is here already, and nothing is newer.\n")
    code, out, err = place.run("pull", "someone/tiny", offline=True)
    assert code == 0 and "the hub cannot be reached" in err
    assert place.run("pull", "-q", "someone/tiny") == (0, out, "")

    code, out, _ = place.run("list")
    header, row = out.splitlines()
    assert header.split()[:4] == ["model", "size", "format", "context"]
    assert row.startswith("someone/tiny  ") and row.endswith("  hub")
    assert "incomplete" not in row and "whole" in row
    long_ago = time.time() - 1e7
    os.utime(folder / "tokenizer.json", (long_ago, long_ago))
    before = place.rows()["someone/tiny"]
    assert before["last_used"] < time.strftime("%Y-%m-%d")
    assert place.run("Hello", "-n", "2", "-q", "-m", "someone/tiny")[0] == 0
    assert place.rows()["someone/tiny"]["last_used"] > before["last_used"]

    size = place.rows()["someone/tiny"]["bytes"]
    code, out, err = place.run("rm", "someone/tiny")
    assert code == 1 and "--yes does it without a question" in err
    code, out, err = place.run("rm", "someone/tiny", "--yes", offline=True)
    assert (code, out) == (0, "")
    assert f"Freed {size / 1e6:,.1f} MB." in err
    assert place.rows() == {} and not (place.cache / "models--someone--tiny").exists()
    code, _, err = place.run("rm", "someone/tiny", "--yes")
    assert code == 1
    assert err == "qwen3: someone/tiny is not in the hub's cache; qwen3 list shows what is\n"


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("\n", 1), ("\x04", 1)])
def test_rm_asks_at_a_terminal(answer: str, code: int, place: Place) -> None:
    assert place.run("pull", "-q", "someone/tiny")[0] == 0
    master, terminal = pty.openpty()
    os.write(master, answer.encode())
    with open(terminal) as stdin:
        done = qwen3("rm", "someone/tiny", home=place.home, endpoint=NOWHERE, stdin=stdin)
    os.close(master)
    assert (done.returncode, done.stdout) == (code, "")
    assert "someone/tiny: all of it, " in done.stderr and "Remove and free " in done.stderr
    assert "Traceback" not in done.stderr and "bug" not in done.stderr
    assert ("someone/tiny" in place.rows()) == bool(code)


def second_revision(place: Place) -> None:
    """Add a revision without a branch, which shares all files but one."""
    folder = place.cache / "models--someone--tiny"
    shutil.copytree(folder / "snapshots" / COMMIT, folder / "snapshots" / OTHER, symlinks=True)
    own = folder / "snapshots" / OTHER / "notes.txt"
    own.write_text(1000 * "n")


def test_rm_of_one_revision_keeps_the_other(place: Place) -> None:
    assert place.run("pull", "-q", "someone/tiny")[0] == 0
    second_revision(place)
    assert place.run("rm", "someone/tiny", "--revision", "", "--yes")[0] == 1
    code, _, err = place.run("rm", "someone/tiny", "--revision", "dev", "--yes")
    assert code == 1
    assert f"is here with {COMMIT[:12]} (main), {OTHER[:12]}, not with revision 'dev'" in err
    code, _, err = place.run("rm", "someone/tiny", "--revision", OTHER[:7], "--yes")
    assert code == 0
    assert err == f"someone/tiny: revision {OTHER[:12]}, 0.0 MB\nFreed 0.0 MB.\n"
    assert [path.name for path in place.cache.glob("*/snapshots/*")] == [COMMIT]
    assert place.run("Hello", "-n", "2", "-q", "-m", "someone/tiny", offline=True)[0] == 0


def test_rm_touches_models_of_the_cache_alone(place: Place, monkeypatch: Any) -> None:
    assert place.run("pull", "-q", "someone/tiny")[0] == 0
    (snapshot,) = place.cache.glob("models--*/snapshots/*")
    data = place.cache / "datasets--someone--tiny/snapshots" / COMMIT
    data.mkdir(parents=True)
    (data / "data.txt").write_text("kept")
    folder = write_tiny(place.home / "own")
    studio = place.home / ".lmstudio/models/someone/tiny"
    shutil.copytree(folder, studio)
    monkeypatch.setenv("QWEN3_MODELS", str(folder))
    for name, words in (
        (str(folder), f"is a folder outside of the hub's cache; to delete it: rm -r {folder}\n"),
        ("~/own", f"~/own is a folder outside of the hub's cache; to delete it: rm -r {folder}\n"),
        (str(studio), "LM Studio removes it"),
        (str(snapshot), "is in the hub's cache; give its name, someone/tiny"),
        (str(place.cache), "is a folder outside"),
        ("./nothing", "is a folder outside of the hub's cache\n"),
        ("demo", "demo is part of this package and cannot be removed"),
        ("../../x", "is a folder outside"),
        ("~nobody-here/x", "is a folder outside"),
        ("someone/other", "is not in the hub's cache"),
        ("someone--tiny", "'someone--tiny' is no hub name such as"),
        ("", "'' is no hub name such as"),
        ("8B", "Qwen/Qwen3-8B-MLX-4bit is not in the hub's cache"),
    ):
        code, out, err = place.run("rm", name, "--yes")
        assert (code, out) == (1, ""), name
        assert words in err and err.count("\n") == 1, err
    # The second name is wrong: nothing is removed.
    assert place.run("rm", "someone/tiny", "someone/other", "--yes")[0] == 1
    assert len(place.rows()) == 3
    assert place.run("rm", "someone/tiny", "--yes")[0] == 0
    assert (data / "data.txt").read_text() == "kept"
    assert len(place.rows()) == 2


def test_a_damaged_model_is_named(place: Place) -> None:
    assert place.run("pull", "-q", "someone/tiny")[0] == 0
    (snapshot,) = place.cache.glob("models--*/snapshots/*")
    (snapshot / "config.json").resolve().unlink()
    (place.cache / "notes.txt").write_text("of a user")
    code, out, err = place.run("list", offline=True)
    assert (code, out) == (0, "")
    assert err.splitlines()[1].startswith("not listed, because it is damaged: Blob missing")
    assert "notes.txt" not in err
    code, _, err = place.run("rm", "someone/tiny", "--yes")
    assert code == 1 and "someone/tiny is damaged: Blob missing" in err
    assert place.run("pull", "-q", "someone/tiny")[0] == 0  # mends it
    assert place.rows()["someone/tiny"]["complete"]


def test_a_download_that_was_interrupted_is_listed_and_removed(place: Place) -> None:
    assert place.run("pull", "-q", "someone/tiny")[0] == 0
    (snapshot,) = place.cache.glob("models--*/snapshots/*")
    blob = (snapshot / "model.safetensors").resolve()
    (snapshot / "model.safetensors").unlink()
    blob.rename(blob.with_name(f"{blob.name}.qwen3.incomplete"))
    row = place.rows()["someone/tiny"]
    assert not row["complete"] and row["bytes"] > 500_000
    assert ", incomplete" in place.run("list")[1]
    assert place.run("pull", "-q", "someone/tiny")[0] == 0  # goes on from the partial file
    assert place.rows()["someone/tiny"]["complete"]


def test_damage_is_found(place: Place) -> None:
    folder = Path(place.run("pull", "-q", "someone/tiny")[1].strip())
    code, _, err = place.run("pull", "--verify", "someone/tiny", offline=True)
    assert code == 0 and err.startswith("All checksums are right.\n")
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x7f")
    code, out, err = place.run("pull", "--verify", "someone/tiny")
    assert (code, out) == (1, "")
    assert err.startswith("qwen3: someone/tiny: model.safetensors does not match its checksum; ")


class Damaging(Hub):
    """Names small files as git does, and sends the config with another byte."""

    def _send_file(self, content: bytes, name: str, *, body: bool) -> None:
        etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        sent = content.replace(b"{", b"[") if name == "config.json" else content
        self._send(sent if body else b"", length=len(content), etag=etag)


def test_damage_in_transfer_is_found_in_small_files_too(place: Place) -> None:
    with serving(place.hub, Damaging) as (place.address, _):
        code, out, err = place.run("pull", "someone/tiny")
    assert (code, out) == (1, "")
    assert err == "qwen3: config.json does not match the hub's checksum; try again\n"


def test_folders_are_listed_by_their_paths(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(place.home / "models/a/tiny")
    write_tiny(place.home / ".lmstudio/models/someone/tiny")
    other = place.home / "models/llama"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    broken = place.home / "models/broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "qwen3", "hidden_size": -1}')
    (place.home / "models/gguf").mkdir()
    roots = f"~/models{os.pathsep}{place.home}/models/a{os.pathsep}/nowhere"
    monkeypatch.setenv("QWEN3_MODELS", roots)
    code, out, err = place.run("list", offline=True)
    assert (code, err) == (0, "QWEN3_MODELS: /nowhere is no folder\n")
    rows = [line.split() for line in out.splitlines()[1:]]
    assert [row[0] for row in rows] == [
        "~/.lmstudio/models/someone/tiny",
        "~/models/a/tiny",
        "~/models/broken",
    ]
    assert "cannot be read" in out
    assert place.run("Hello", "-q", "-n", "2", "-m", rows[1][0])[0] == 0
    assert f"{place.home}/models/a/tiny" in complete_model(str(place.home))


def test_gguf_files_are_listed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = GGUF_CASE.parent
    repo = place.cache / "models--someone--tiny-GGUF"
    snapshot = repo / "snapshots" / OTHER
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(OTHER)
    for name in ("tiny-Q4_K_M.gguf", "tiny-other.gguf"):
        shutil.copy(GGUF_CASE, snapshot / name)
    (snapshot / "llama.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("QWEN3_MODELS", str(folder))
    rows = place.rows()
    names = ["someone/tiny-GGUF:tiny-Q4_K_M", "someone/tiny-GGUF:tiny-other"]
    assert [*rows][:2] == names and f"{folder}:{GGUF_CASE.stem}" in rows
    assert all(row["complete"] and row["bytes"] for row in rows.values())
    assert place.run("plan", names[0], "--json", offline=True)[0] == 0


def test_lm_studio_elsewhere(place: Place) -> None:
    (place.home / ".lmstudio-home-pointer").write_text(f"{place.home}/studio\n")
    (place.home / "studio").mkdir()
    settings = {"downloadsFolder": f"{place.home}/big"}
    (place.home / "studio/settings.json").write_text(json.dumps(settings))
    write_tiny(place.home / "big/someone/tiny")
    assert [row["where"] for row in place.rows().values()] == ["LM Studio"]


def test_names_complete(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.run("pull", "-q", "someone/tiny")[0] == 0
    write_aliases('mine = "someone/tiny"')
    monkeypatch.setenv("_QWEN3_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_CWORD", "2")
    for typed, offered in (("-m ", {"mine", *SIZES, "demo", "someone/tiny"}), ("rm 0.", {"0.6B"})):
        monkeypatch.setenv("COMP_WORDS", f"qwen3 {typed}")
        assert set(place.run()[1].split()) == offered


def test_aliases_name_models_everywhere(place: Place) -> None:
    write_aliases('mine = "someone/tiny"')
    for words in (("pull", "-q"), ("show",), ("plan",), ("rm", "--yes")):
        code, out, err = place.run(*words, "mine")
        assert code == 0, err
        assert "tiny" in out + err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("pull", "someone/other"), "the hub has no someone/other"),
        (("pull", "7B"), "nor one of the sizes 0.6B"),
        (("pull", "demo"), "demo is part of this package; pull takes a size or a hub name"),
        (("pull", str(DEMO)), "is a folder here; pull takes a size or a hub name"),
        (("pull",), "Missing argument 'MODEL'"),
        (("rm",), "Missing argument 'MODEL'"),
        (("show", "someone/other"), "the hub has no someone/other"),
        (("pul", "8B"), "did you mean qwen3 pull?"),
    ],
)
def test_what_is_wrong_is_one_line(words: tuple[str, ...], complaint: str, place: Place) -> None:
    code, out, err = place.run(*words)
    assert code and not out
    assert complaint in err and err.count("\n") == 1


def test_pulling_offline_is_one_line(place: Place) -> None:
    code, out, err = place.run("pull", "someone/tiny", offline=True)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "is not downloaded yet and the hub cannot be reached" in err


def test_pull_says_before_that_a_model_does_not_fit(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN3_MEMORY", "0.1")
    _, out, err = place.run("pull", "someone/tiny")
    assert out and err.startswith("It needs 0.5 GB with 2,048 tokens, and This process can have")


def test_the_doctor_tells_of_models_disk_and_hub(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matmul_speed", "memory_bandwidth"):
        monkeypatch.setattr(backend, name, lambda: 1e12)
    monkeypatch.setenv("COLUMNS", "200")
    home = place.home / "own"
    monkeypatch.setenv("QWEN3_HOME", str(home))
    code, out, _ = place.run("doctor", offline=True)
    assert code == 0 and "none here: qwen3 plan, then pull" in out
    assert f"{home}/conversations.db (none yet)\n" in re.sub(" +\n", "\n", out)
    assert f"{home}/chat_history (none yet)" in out and not home.exists()
    home.mkdir()
    (home / "config.toml").touch()
    assert f"{place.cache}, " in out and "GB free on its disk" in out
    assert f"{NOWHERE} cannot be reached (" in out
    assert place.run("pull", "-q", "someone/tiny")[0] == 0
    _, out, _ = place.run("doctor")
    assert re.search(rf"settings +{home}/config.toml *\n", out)
    assert "1 here, 0.0 GB: qwen3 list" in out and "cannot be reached" not in out


# --- show ---------------------------------------------------------------------------------------


def shown(place: Place, *words: str, offline: bool = False) -> dict[str, Any]:
    code, out, err = place.run("show", *words, "--json", offline=offline)
    assert code == 0, err
    content: dict[str, Any] = json.loads(out)
    return content


def test_show_fetches_no_weights(place: Place) -> None:
    facts = shown(place, "someone/tiny")
    assert facts["model"] == "someone/tiny" and not facts["downloaded"]
    assert (facts["chat"], facts["thinking"], facts["tools"]) == (True, "hybrid", True)
    assert facts["licence"] == "apache-2.0"
    assert facts["weight_bytes"] > 0 and facts["fits"] == facts["context"]
    assert not list(place.cache.glob("*/snapshots/*/*.safetensors"))
    code, out, _ = place.run("show", "someone/tiny")
    assert "the weights are not downloaded" in out and "thinking on and off; tools yes" in out


def test_show_of_the_demo_and_of_a_conversion(place: Place) -> None:
    assert shown(place)["model"] == "demo"
    output = place.home / "mixed"
    assert place.run("convert", str(DEMO), str(output), "--recipe", "mixed")[0] == 0
    facts = shown(place, str(output))
    assert facts["format"].endswith(", mixed") and facts["quantization"] == "MLX"
    assert sum(facts["formats"]["mlp.down_proj"].values()) == facts["layers"]


def test_show_of_a_size_without_the_hub(place: Place) -> None:
    code, out, err = place.run("show", "30b-a3b", offline=True)
    assert code == 0 and "only the published" in err
    out = " ".join(out.split())
    assert "8 of 128 experts a token" in out and "4 bits x 48" in out
    assert shown(place, "8B", offline=True)["weight_bytes"] == 4_607_731_712
