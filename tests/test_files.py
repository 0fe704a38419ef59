"""Files that lie are refused in a sentence and at once; files written are whole or not there."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen3_mlx import CheckpointError
from qwen3_mlx.files import (
    STORED_AS,
    ShardWriter,
    TensorSpec,
    atomic_write,
    read_header,
    read_json,
    read_rows,
)

SLOWEST = 5.0  # seconds of CPU; a header is refused in far less
FUZZ = settings(
    max_examples=75, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def headed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def sound() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "none": {"dtype": "F8_E4M3", "shape": [0, 9], "data_offsets": [32, 32]},
        "one": {"dtype": "U64", "shape": [], "data_offsets": [32, 40]},
    }
    return headed(json.dumps(header).encode(), bytes(range(40)))


def check_refused_or_read(file: Path, raw: bytes) -> None:
    """Read the header; if that succeeds, every tensor must lie in the file."""
    file.write_bytes(raw)
    started = time.process_time()
    try:
        entries = read_header(file)
    except CheckpointError as error:
        assert str(file) in str(error)
        assert "\n" not in str(error)
        assert len(str(error)) < len(str(file)) + 300
        entries = {}
    for entry in entries.values():
        assert 8 <= entry.start <= entry.start + entry.nbytes <= len(raw)
    assert time.process_time() - started < SLOWEST


@FUZZ
@given(st.binary(max_size=200))
def test_any_bytes(tmp_path: Path, raw: bytes) -> None:
    check_refused_or_read(tmp_path / "x.safetensors", raw)
    check_refused_or_read(tmp_path / "x.safetensors", headed(raw))


@FUZZ
@given(st.data())
def test_sound_files_with_some_bytes_changed(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(sound())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw) + 3)))
    check_refused_or_read(tmp_path / "x.safetensors", bytes(raw[:cut]) + b"\0" * (cut - len(raw)))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "BF16", "U8", "__metadata__"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
)
fields = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F7", "U8"]) | json_values,
        "shape": st.lists(st.integers(-2, 5) | json_values, max_size=4) | json_values,
        "data_offsets": st.lists(st.integers(-4, 60), min_size=2, max_size=2) | json_values,
        "other": json_values,
    },
)


@FUZZ
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__", "\ud800", "x\ny"]), fields | json_values
    )
    | json_values,
    st.integers(0, 64),
)
def test_any_header(tmp_path: Path, header: Any, size: int) -> None:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    check_refused_or_read(tmp_path / "x.safetensors", headed(text, bytes(size)))


ABSURD: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "seven bytes": lambda: bytes(7),
    "a length of exabytes": lambda: headed(b"{}", length=1 << 63),
    "a length beyond the file": lambda: headed(b"{}", length=3),
    "no text": lambda: headed(b"\xff\xfe\xfd\xfc"),
    "nested without end": lambda: headed(b"[" * 200_000),
    "objects without end": lambda: headed(b'{"a":' * 100_000),
    "a number without end": lambda: headed(b'{"a":' + b"9" * 200_000 + b"}"),
    "axes without end": lambda: headed(
        b'{"a":{"dtype":"U8","data_offsets":[0,1],"shape":[' + b"9," * 2_000_000 + b"9]}}"
    ),
    "a product without end": lambda: headed(
        b'{"a":{"dtype":"U8","data_offsets":[0,1],"shape":['
        + b",".join([b"9" * 4000] * 1000)
        + b"]}}"
    ),
    "repeated": lambda: headed(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},' * 2, b"1"),
    "twice": lambda: headed(
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"1",
    ),
    "a gap": lambda: headed(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', b"12"),
    "an overlap": lambda: headed(
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
        b'"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}',
        b"123",
    ),
    "an overlap that makes up for a gap": lambda: headed(
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
        b'"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}',
        b"1234",
    ),
    "more data than told": lambda: sound() + b"\0",
    "less data than told": lambda: sound()[:-1],
    "true for one": lambda: headed(
        b'{"a":{"dtype":"U8","shape":[true],"data_offsets":[false,true]}}', b"1"
    ),
    "a fraction": lambda: headed(b'{"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}', b"1"),
    "a name of a page": lambda: headed(
        b'{"' + b"x" * 100_000 + b'":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', b"12"
    ),
    "a name over two lines": lambda: headed(
        b'{"x\\ny":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', b"12"
    ),
}


@pytest.mark.parametrize("kind", ABSURD)
def test_absurd_files_are_refused(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    check_refused_or_read(file, ABSURD[kind]())
    with pytest.raises(CheckpointError):
        read_header(file)


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    with file.open("wb") as stream:
        stream.write((3 << 30).to_bytes(8, "little"))
        stream.truncate(4 << 30)  # of which the disk holds nothing
    started = time.process_time()
    with pytest.raises(CheckpointError, match="truncated or no safetensors"):
        read_header(file)
    assert time.process_time() - started < SLOWEST


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(sound())
    entries = read_header(file)
    assert {name: entry.shape for name, entry in entries.items()} == {
        "a": (2, 3),
        "b": (4,),
        "none": (0, 9),
        "one": (),
    }
    assert np.array(read_rows(entries["a"], 1, 2)).tobytes() == bytes(range(12, 24))
    assert read_rows(entries["b"], 0, 1).dtype == mx.bfloat16
    with pytest.raises(CheckpointError, match="dtype U64"):
        read_rows(entries["one"], 0, 1)
    file.write_bytes(sound()[:-20])
    with pytest.raises(CheckpointError, match="become shorter"):
        read_rows(entries["b"], 0, 1)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_rows(entries["b"], 0, 1)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_header(file)


@FUZZ
@given(st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_json(tmp_path: Path, raw: bytes) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(raw)
    try:
        assert isinstance(read_json(file), dict)
    except CheckpointError as error:
        assert "config.json" in str(error)


# --- writing ------------------------------------------------------------------------------------

arrays = st.lists(
    st.tuples(
        st.sampled_from(list(STORED_AS)),
        st.lists(st.integers(1, 5), min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=5,
)


@FUZZ
@given(arrays, st.randoms(use_true_random=False))
def test_what_is_written_mlx_reads(tmp_path: Path, kinds: Any, random: Any) -> None:
    tensors = {
        f"tensor.{number}": (100 * mx.random.normal(shape)).astype(dtype)
        for number, (dtype, shape) in enumerate(kinds)
    }
    planned = [TensorSpec(name, array.dtype, tuple(array.shape)) for name, array in tensors.items()]
    file = tmp_path / "x.safetensors"
    with file.open("wb") as stream:
        writer = ShardWriter(stream, planned)
        left = {name: array.reshape(-1, array.shape[-1]) for name, array in tensors.items()}
        while left:  # tensors take turns, each in pieces of any size
            name = random.choice(sorted(left))
            count = random.randint(1, left[name].shape[0])
            writer.append(name, left[name][:count])
            left[name] = left[name][count:]
            if not left[name].shape[0]:
                del left[name]
    loaded: Any = mx.load(str(file), return_metadata=True)
    assert loaded[1] == {"format": "mlx"}
    assert loaded[0].keys() == tensors.keys()
    for name, array in tensors.items():
        assert loaded[0][name].dtype == array.dtype
        assert loaded[0][name].shape == array.shape
        assert mx.array_equal(loaded[0][name].view(mx.uint8), array.view(mx.uint8))
    entries = read_header(file)  # which keeps to the format's rules
    assert {name: entry.nbytes for name, entry in entries.items()} == {
        plan.name: plan.nbytes for plan in planned
    }
    assert min(entry.start for entry in entries.values()) % 8 == 0


def test_rows_that_lie_otherwise_in_memory_are_written_in_order(tmp_path: Path) -> None:
    array = mx.arange(12, dtype=mx.float32).reshape(3, 4)
    for number, laid in enumerate((array.T, array[:, ::2], array[::2], array[:, 1:2])):
        file = tmp_path / f"{number}.safetensors"
        with file.open("wb") as stream:
            ShardWriter(stream, [TensorSpec("x", laid.dtype, tuple(laid.shape))]).append("x", laid)
        loaded: Any = mx.load(str(file))
        assert mx.array_equal(loaded["x"], laid)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left"), ValueError])
def test_a_file_written_whole_or_not_at_all(error: Any, tmp_path: Path) -> None:
    file = tmp_path / "x"
    with pytest.raises(error if isinstance(error, type) else OSError), atomic_write(file) as out:
        out.write(b"some")
        raise error
    assert list(tmp_path.iterdir()) == []
    with atomic_write(file) as out:
        out.write(b"some")
        assert not file.exists()
    assert file.read_bytes() == b"some"
    with pytest.raises(KeyboardInterrupt), atomic_write(file) as out:
        raise KeyboardInterrupt
    assert file.read_bytes() == b"some"  # what was there stays
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_at_the_end_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), atomic_write(tmp_path / "x") as out:
        out.write(b"some")
    assert list(tmp_path.iterdir()) == []
