"""Prefixes on disk: what was read once is there after a restart, and nothing else is believed."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlx.core as mx
import pytest

from qwen3_mlx import Qwen3Error, load
from qwen3_mlx.cache.disk import DiskPrefixes
from qwen3_mlx.cache.quantized import CACHE_FORMATS
from qwen3_mlx.checkpoint.fingerprint import fingerprint
from qwen3_mlx.cli.main import main
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.sampling_params import SamplingParams
from qwen3_mlx.files import ShardWriter, read_header_and_metadata
from qwen3_mlx.model.qwen3 import Qwen3
from tests.support import TinyQwen3, assert_close, make_model, prefill, random_ids, write_tiny

IDS = random_ids(400)
LIMIT = 10**9
GREEDY = SamplingParams(temperature=0.0)
LONG = "Repeat these words: " + "apple pear plum " * 50


def write(disk: DiskPrefixes, model: Qwen3, ids: list[int]) -> None:
    cache = model.make_cache()
    prefill(model, cache, ids, 128)
    assert disk.write(ids, cache, lambda: False)


def engine_for(model: TinyQwen3, disk: DiskPrefixes | None = None) -> Engine:
    return Engine(model, vocabulary=1088, cache_format=model.cache_format, disk=disk)


def kept(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("name", CACHE_FORMATS)
def test_what_is_restored_is_what_was_read(name: str, dtype: mx.Dtype, tmp_path: Path) -> None:
    model = make_model()
    model.set_dtype(dtype)
    model.cache_format = CACHE_FORMATS[name]
    write(DiskPrefixes(tmp_path, "a", limit=LIMIT), model, IDS)
    disk, cache = DiskPrefixes(tmp_path, "a", limit=LIMIT), model.make_cache()
    assert disk.match_length(IDS, 399) == disk.read(IDS, 399, cache) == 399
    assert {layer.offset for layer in cache} == {399}
    fresh = model.make_cache()
    prefill(model, fresh, IDS, 128)
    for layer in fresh:
        layer.truncate(399)
    for one, other in zip(cache, fresh, strict=True):
        assert all(mx.array_equal(a, b) for a, b in zip(one.state, other.state, strict=True))
    ids = mx.array([IDS[399:]])
    assert_close(model(ids, cache), model(ids, fresh), 0.0)


def test_a_part_of_it_is_given_too(tmp_path: Path) -> None:
    model = make_model()
    write(disk := DiskPrefixes(tmp_path, "a", limit=LIMIT), model, IDS)
    other = IDS[:300] + random_ids(50, seed=9)
    assert disk.read(other, 349, cache := model.make_cache()) == 300
    fresh = model.make_cache()
    prefill(model, fresh, IDS[:300], 300)
    assert_close(cache[1].state[1], fresh[1].state[1])
    assert disk.read(IDS[:200], 199, model.make_cache()) == 0  # so few are read again at once


def test_what_is_another_models_or_broken_is_ignored(tmp_path: Path) -> None:
    model = make_model()
    write(DiskPrefixes(tmp_path, "a", limit=LIMIT), model, IDS)
    (file,) = kept(tmp_path)
    whole = file.read_bytes()

    def found() -> int:
        return DiskPrefixes(tmp_path, "a", limit=LIMIT).match_length(IDS, 400)

    assert found() == 400
    assert DiskPrefixes(tmp_path, "b", limit=LIMIT).match_length(IDS, 400) == 0
    header = int.from_bytes(whole[:8], "little")
    for broken in (
        whole[:-1],
        whole + b"\0",
        whole[:4],
        b"",
        b"\xff" * 100,
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{}",
        whole[: 8 + header // 2],
        whole.replace(b'"qwen3_mlx_prefix":"2"', b'"qwen3_mlx_prefix":"1"'),
    ):
        file.write_bytes(broken)
        assert found() == 0
    file.write_bytes(whole)
    disk = DiskPrefixes(tmp_path, "a", limit=LIMIT)
    file.unlink()  # another process made room
    assert disk.read(IDS, 400, cache := model.make_cache()) == 0
    assert cache[0].offset == 0
    assert disk.match_length(IDS, 400) == 0


def test_a_write_is_seen_whole_or_not_at_all(tmp_path: Path) -> None:
    model, cache = make_model(), make_model().make_cache()
    prefill(model, cache, IDS, 128)
    disk = DiskPrefixes(tmp_path, "a", limit=LIMIT)
    answers = iter([False] * 3 + [True])
    assert not disk.write(IDS, cache, lambda: next(answers))
    assert not kept(tmp_path)
    assert disk.is_worth_saving(IDS)
    assert disk.write(IDS, cache, lambda: False)
    assert not disk.is_worth_saving(IDS)
    assert not disk.is_worth_saving(IDS[:300])
    (file,) = kept(tmp_path)
    assert file.stat().st_mode & 0o777 == 0o600
    assert isinstance(mx.load(str(file)), dict)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qwen3_mlx.cache.disk.os.fsync", no_space)
    disk = DiskPrefixes(tmp_path, "a", limit=LIMIT)
    with pytest.raises(OSError, match="No space left"):
        write(disk, make_model(), IDS)
    assert not kept(tmp_path)


def test_a_kill_in_the_middle_is_cleared_away(tmp_path: Path) -> None:
    """kill -9 while a process writes one file after another, and one half-written for sure."""
    program = (
        "import sys; from pathlib import Path; import qwen3_mlx\n"
        "from qwen3_mlx.cache.disk import DiskPrefixes\n"
        "from tests.support import make_model, prefill, random_ids\n"
        "model = make_model(); disk = DiskPrefixes(Path(sys.argv[1]), 'a', limit=10**9)\n"
        "caches = []\n"
        "for seed in range(2):\n"
        "    caches.append(model.make_cache())\n"
        "    prefill(model, caches[-1], random_ids(500, seed=seed), 500)\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    for seed, cache in enumerate(caches):\n"
        "        disk.write(random_ids(500, seed=seed), cache, lambda: False)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        half = tmp_path / f"prefix-half.safetensors.{process.pid}.new"
    half.write_bytes(b"half")
    other_half = half.with_name(f"prefix-half.safetensors.{process.pid}.a_b.new")
    other_half.write_bytes(b"half")
    living = tmp_path / f"prefix-living.safetensors.{os.getpid()}.new"
    living.write_bytes(b"another process is at it")
    disk = DiskPrefixes(tmp_path, "a", limit=LIMIT)
    assert not half.exists()
    assert not other_half.exists()
    assert living.exists()
    found = [disk.match_length(random_ids(500, seed=seed), 500) for seed in range(2)]
    assert set(found) <= {0, 500}
    assert 500 in found


def test_the_folder_is_bounded(tmp_path: Path) -> None:
    model = make_model()
    write(DiskPrefixes(tmp_path, "a", limit=LIMIT), model, IDS)
    (first,) = kept(tmp_path)
    size = first.stat().st_size
    os.utime(first, (1, 1))
    disk = DiskPrefixes(tmp_path, "b", limit=2 * size + 1000)
    write(disk, model, second := random_ids(400, seed=2))
    write(disk, model, third := random_ids(400, seed=3))
    assert len(kept(tmp_path)) == 2
    assert not first.exists()  # the one that was not used for longest, of whatever model
    for file in kept(tmp_path):
        os.utime(file, (1, 1))
    disk.read(second, 400, model.make_cache())
    write(disk, model, random_ids(400, seed=4))
    assert disk.match_length(second, 400) == 400
    assert disk.match_length(third, 400) == 0
    small = DiskPrefixes(tmp_path / "small", "a", limit=size // 2)
    write(small, model, IDS)
    assert not kept(tmp_path / "small")  # what is larger than all is not written


def test_a_longer_one_takes_the_place_of_its_start(tmp_path: Path) -> None:
    model = make_model()
    disk = DiskPrefixes(tmp_path, "a", limit=LIMIT)
    write(disk, model, IDS[:300])
    write(disk, model, IDS)
    assert len(kept(tmp_path)) == 1
    assert disk.match_length(IDS, 400) == 400


@pytest.mark.parametrize("name", CACHE_FORMATS)
def test_an_engine_goes_on_from_it(name: str, tmp_path: Path) -> None:
    model = make_model()
    model.cache_format = CACHE_FORMATS[name]

    def answer() -> tuple[list[int], int]:
        disk = DiskPrefixes(tmp_path, "a", limit=LIMIT)
        restored = disk.match_length(IDS, 399)
        engine = engine_for(model, disk)
        return list(engine.stream(IDS, max_tokens=20, sampling=GREEDY)), restored

    assert answer()[1] == 0
    plain = list(engine_for(model).stream(IDS, max_tokens=20, sampling=GREEDY))
    assert answer() == (plain, 399)


def test_a_new_process_need_not_read_it_again(tiny_folder: Path, tmp_path: Path) -> None:
    replies = []
    for _ in range(2):
        with load(tiny_folder, prompt_cache=tmp_path / "kept") as llm:
            replies.append(llm.chat(LONG, max_tokens=8, sampling=GREEDY))
    assert replies[0].usage.cached_tokens == 0
    assert replies[1].usage.cached_tokens == replies[1].usage.prompt_tokens - 1
    assert replies[0].text + replies[0].reasoning == replies[1].text + replies[1].reasoning
    for changed in ({"bits": 8}, {"kv_bits": 8}, {"dtype": "bfloat16"}):
        with load(tiny_folder, prompt_cache=tmp_path / "kept", **changed) as llm:
            assert not llm.chat(LONG, max_tokens=1).usage.cached_tokens
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("where", ["ids", "first", "middle", "checksum", "dtype"])
def test_a_damaged_prompt_is_read_anew(
    where: str, tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def reply() -> tuple[str, int]:
        with load(tiny_folder, prompt_cache=tmp_path) as llm:
            reply = llm.chat(LONG, max_tokens=8, sampling=GREEDY)
            return reply.text + reply.reasoning, reply.usage.cached_tokens

    right, _ = reply()
    (file,) = kept(tmp_path)
    whole = file.read_bytes()
    tensors, _ = read_header_and_metadata(file)
    if where == "dtype":
        damaged = whole.replace(b'"F32"', b'"I32"', 1)
    else:
        place = {
            "ids": tensors["ids"].start + tensors["ids"].nbytes - 1,  # the last one's
            "first": tensors["0.0"].start,
            "middle": len(whole) // 2,
            "checksum": len(whole) - 1,
        }[where]
        damaged = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    file.write_bytes(damaged)
    assert reply() == (right, 0)
    assert ["it was damaged, and is removed" in record.message for record in caplog.records] == [
        True
    ]
    assert kept(tmp_path) == [file]
    assert file.read_bytes() == whole  # written anew
    caplog.clear()
    assert reply()[1]
    assert not caplog.records


def test_a_file_that_was_cut_off_is_told_of(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with load(tiny_folder, prompt_cache=tmp_path) as llm:
        llm.chat(LONG, max_tokens=1)
    (file,) = kept(tmp_path)
    file.write_bytes(file.read_bytes()[:-1000])
    with load(tiny_folder, prompt_cache=tmp_path) as llm:
        assert not llm.chat(LONG, max_tokens=1).usage.cached_tokens
    (told,) = [record.getMessage() for record in caplog.records]
    assert str(file) in told and "is not used" in told


def test_an_earlier_versions_files_are_left_alone(tiny_folder: Path, tmp_path: Path) -> None:
    with load(tiny_folder, prompt_cache=tmp_path) as llm:
        llm.chat(LONG, max_tokens=1)
    (file,) = kept(tmp_path)
    old = tmp_path / "prefix-old.safetensors"
    old.write_bytes(file.read_bytes().replace(b'prefix":"2"', b'prefix":"1"'))
    file.unlink()
    os.utime(old, (1, 1))
    with load(tiny_folder, prompt_cache=tmp_path) as llm:
        assert not llm.chat(LONG, max_tokens=1).usage.cached_tokens
    assert kept(tmp_path) == sorted([file, old])
    room = 1.5 * file.stat().st_size / 1e9
    with load(tiny_folder, prompt_cache=tmp_path, prompt_cache_gb=room) as llm:
        llm.chat("another " + LONG, max_tokens=1)
    assert old not in kept(tmp_path)


def test_files_of_others_in_the_folder_are_left_alone(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / f"prefix-a.safetensors.{10**20}.x.new").touch()
    (tmp_path / "prefix-a.safetensors.4194303.q.new").mkdir()
    with load(tiny_folder, prompt_cache=tmp_path) as llm:
        assert llm.chat("Hello", max_tokens=2).usage.completion_tokens
    assert len(list(tmp_path.iterdir())) == 2


def test_models_of_one_process_share_a_folder(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Both write the same prompt at the same time: each waits for the other in the middle."""
    both = threading.Barrier(2, timeout=60)
    append = ShardWriter.append

    def meet(writer: ShardWriter, name: str, rows: mx.array) -> None:
        if name == "0.0":
            both.wait()
        append(writer, name, rows)

    monkeypatch.setattr(ShardWriter, "append", meet)
    with load(tiny_folder, prompt_cache=tmp_path) as one:
        with load(tiny_folder, prompt_cache=tmp_path) as other:
            for llm in (one, other):
                llm.chat(LONG, max_tokens=1)
            one.close()
    monkeypatch.undo()
    assert not caplog.records
    assert len(kept(tmp_path)) == 1
    with load(tiny_folder, prompt_cache=tmp_path) as llm:
        assert llm.chat(LONG, max_tokens=1).usage.cached_tokens


@pytest.mark.heavy
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("no memory"), TypeError("what?")])
@pytest.mark.parametrize("method", ["read", "write", "match_length", "is_worth_saving"])
def test_whatever_fails_on_disk_work_goes_on(
    method: str,
    error: Exception,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with load(tiny_folder, prompt_cache=tmp_path) as llm:
        right = llm.chat(LONG, max_tokens=4, sampling=GREEDY)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(DiskPrefixes, method, fail)
    with load(tiny_folder, prompt_cache=tmp_path) as llm:
        for _ in range(2):
            reply = llm.chat(LONG, max_tokens=4, sampling=GREEDY)
            assert (reply.text, reply.reasoning) == (right.text, right.reasoning)
        llm.chat("another " + LONG, max_tokens=4)
    assert caplog.records


def test_when_it_cannot_be_written_work_goes_on(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with load(tiny_folder, prompt_cache=tmp_path / "kept") as llm:
        shutil.rmtree(tmp_path / "kept")
        (tmp_path / "kept").write_text("no folder any more")
        for _ in range(2):
            llm.chat(LONG, max_tokens=1)
        llm.chat("another " + LONG, max_tokens=1)
    assert [record.message[:38] for record in caplog.records] == [
        "prompts are no longer kept on disk: [E"
    ]


def test_an_identity_is_of_all_that_matters(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    first = fingerprint(folder, config, [])
    assert first == fingerprint(write_tiny(tmp_path / "copy"), config, [])
    assert first != fingerprint(folder, config, ["8 bits"])
    assert first != fingerprint(folder, {**config, "rope_theta": 1.0}, [])
    assert first != fingerprint(write_tiny(tmp_path / "b", seed=2), config, [])
    (folder / "chat_template.jinja").write_text("another")
    assert first != fingerprint(folder, config, [])


def test_wrong_folders_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (file := tmp_path / "file").write_text("")
    with pytest.raises(Qwen3Error, match="prompt_cache: .*file is a file; name a folder"):
        load(prompt_cache=file)
    with pytest.raises(Qwen3Error, match="cannot be used: Not a directory; name another folder"):
        load(prompt_cache=file / "in")
    with pytest.raises(ValueError, match="prompt_cache_gb must be more than 0"):
        load(prompt_cache=tmp_path, prompt_cache_gb=0)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(SystemExit) as ended:
        main(["--prompt-cache", str(file), "Hello"])
    assert ended.value.code == 1
    assert "--prompt-cache: " in capsys.readouterr().err.splitlines()[-1]
