"""The header of a GGUF file: metadata, and the tensors by their names in the network.

The library's reader makes an array of each of the vocabulary's 300,000 strings, which takes 13 s.
The layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.files import Entry

_MAGIC, _VERSIONS, _ALIGNMENT = b"GGUF", (2, 3), 32
_MAX_AXES = 4
_MAX_COUNT = 10_000_000  # of keys, tensors, and entries of an array
_FIRST_BYTES, _MAX_BYTES = 1 << 20, 1 << 27  # read of a remote header at first, and at most
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
# Types of tensors, by their numbers in ggml.
TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    20: "IQ4_NL",
    23: "IQ4_XS",
    30: "BF16",
}
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.switch_mlp.gate_proj",
    "ffn_up_exps": "mlp.switch_mlp.up_proj",
    "ffn_down_exps": "mlp.switch_mlp.down_proj",
}
_FUSED = "attn_qkv"  # rows of q, k and v, in newer files
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
_ARCHITECTURES = ("qwen3", "qwen3moe")


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The metadata of a file, and its tensors by their names in the network."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Entry]


def read_gguf(file: Path, first: Mapping[str, Any] = MappingProxyType({})) -> GgufHeader:
    """Read the header of a GGUF file; of a part `first` is the metadata of the first part.

    Raises:
        CheckpointError: the file cannot be read, is truncated or broken, is not of a Qwen3, or has
            a tensor of a type that is not read.
    """
    with (
        _checked(file),
        file.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as raw,
    ):
        return _Reader(file, raw, len(raw), first).header()


def read_remote_gguf(
    file: Path,
    read: Callable[[int, int], tuple[bytes, int]],
    first: Mapping[str, Any] = MappingProxyType({}),
) -> GgufHeader:
    """Read the header of a GGUF file that is not on disk; see `read_gguf`.

    `read` takes an interval of bytes, [start, stop), and returns them with the total bytes of the
    file. It is called with intervals of growing length until the header is complete.
    """
    raw, size = read(0, _FIRST_BYTES)
    with _checked(file):
        while True:
            try:
                return _Reader(file, raw, size, first).header()
            except EOFError:
                if len(raw) > _MAX_BYTES:
                    raise ValueError("its header has no end") from None
                more, _ = read(len(raw), 2 * len(raw))
                if not more:
                    raise ValueError("it ends before its stated length") from None
                raw += more


@contextmanager
def _checked(file: Path) -> Iterator[None]:
    """Raise a CheckpointError for a file that cannot be read, or has a broken header."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except (struct.error, ValueError, KeyError, IndexError, TypeError, MemoryError) as error:
        raise CheckpointError(
            f"{file} is truncated, or has a broken header; download it again"
        ) from error


def gguf_tensors(file: Path, first: Path) -> Mapping[str, Entry]:
    """Return the tensors of a GGUF file, or of a part of one; a header is read once.

    Raises:
        CheckpointError: as `read_gguf` does.
    """
    try:
        states = [(part, part.stat().st_size, part.stat().st_mtime_ns) for part in (file, first)]
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error
    return _tensors_of(*states)


@lru_cache(maxsize=16)  # the parts of a split file
def _tensors_of(file: tuple[Path, int, int], first: tuple[Path, int, int]) -> Mapping[str, Entry]:
    return read_gguf(file[0], _naming(first) if file != first else {}).tensors


@lru_cache(maxsize=1)
def _naming(first: tuple[Path, int, int]) -> Mapping[str, Any]:
    """Return the metadata of a first part that the names of all parts depend on."""
    return without_lists(read_gguf(first[0]).metadata)


def without_lists(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the metadata of a first part that other parts need; the vocabulary is not."""
    return {key: value for key, value in metadata.items() if not isinstance(value, list)}


class _Reader:
    """Reads values one after another; a `ValueError` or `struct.error` means a broken file.

    `raw` may be the beginning of the file alone, which has `size` bytes; an `EOFError` means that
    the header ends after it.
    """

    def __init__(
        self, file: Path, raw: mmap.mmap | bytes, size: int, first: Mapping[str, Any]
    ) -> None:
        self._file = file
        self._first = first
        self._raw = raw
        self._size = size
        self._place = 0

    def header(self) -> GgufHeader:
        if self._raw[:4] != _MAGIC:
            raise CheckpointError(f"{self._file} is no GGUF file")
        self._place = 4
        version = self._one("I")
        if version not in _VERSIONS:
            raise CheckpointError(f"{self._file} is GGUF version {version}, and 2 and 3 are read")
        num_tensors, num_keys = self._count(), self._count()
        metadata = {}
        for _ in range(num_keys):
            key = self._string()
            if key in metadata:
                raise CheckpointError(f"{self._file} states {key} twice; download it again")
            metadata[key] = self._value(self._one("I"))
        tensors = dict(self._tensor() for _ in range(num_tensors))
        if len(tensors) < num_tensors:
            raise ValueError("a tensor is there twice")
        self._check_family(metadata)
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError("its alignment is no number of bytes")
        start = -(-self._place // alignment) * alignment
        entries = {
            name: replace(entry, start=entry.start + start) for name, entry in tensors.items()
        }
        for name, entry in entries.items():
            if entry.start + entry.nbytes > self._size:
                raise CheckpointError(
                    f"{self._file} is truncated: {name} ends after it; download it again"
                )
        renamed = [*_renamed(self._file, entries, {**self._first, **metadata})]
        if len(named := dict(renamed)) < len(renamed):
            raise ValueError("a tensor is there twice, fused and by itself")
        return GgufHeader(metadata, named)

    def _check_family(self, metadata: Mapping[str, Any]) -> None:
        key = "general.architecture"
        family = metadata.get(key, self._first.get(key))  # parts need not state it
        if family not in _ARCHITECTURES or family != self._first.get(key, family):
            raise CheckpointError(
                f"{self._file} is of a {family}, and only qwen3 and qwen3moe are read, all parts "
                "of one kind"
            )

    def _one(self, code: str) -> Any:
        (value,) = self._unpack(code)
        return value

    def _unpack(self, code: str) -> tuple[Any, ...]:
        return struct.unpack_from(f"<{code}", self._raw, self._skip(struct.calcsize(f"<{code}")))

    def _skip(self, length: int) -> int:
        """Move after the next `length` bytes; return where they begin."""
        start, self._place = self._place, self._place + length
        if self._place > self._size:
            raise ValueError("its header ends after the file")
        if self._place > len(self._raw):
            raise EOFError
        return start

    def _count(self) -> int:
        count = int(self._one("Q"))
        if count > _MAX_COUNT:
            raise ValueError(f"it counts {count:,} entries")
        return count

    def _string(self) -> str:
        length = self._one("Q")
        start = self._skip(length)
        return self._raw[start : self._place].decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._one(_SCALARS[kind])
        kind, count = self._one("I"), self._count()
        if kind == _STRING:
            return [self._string() for _ in range(count)]
        return list(self._unpack(f"{count}{_SCALARS[kind]}"))

    def _tensor(self) -> tuple[str, Entry]:
        """Read the entry of a tensor; its start counts from the beginning of the data."""
        name, axes = self._string(), self._one("I")
        if not 1 <= axes <= _MAX_AXES:
            raise ValueError("a tensor has too many axes, or none")
        shape = tuple(self._one("Q") for _ in range(axes))[::-1]  # the fastest axis comes first
        kind, start = self._one("I"), self._one("Q")
        if kind not in TYPES:
            raise CheckpointError(
                f"{self._file}: {name} has the type {kind} of ggml, which is not read; take a file "
                f"of {', '.join(TYPES.values())}"
            )
        return name, Entry(self._file, TYPES[kind], shape, start)


def _renamed(
    file: Path, entries: Mapping[str, Entry], metadata: Mapping[str, Any]
) -> Iterator[tuple[str, Entry]]:
    """Yield the tensors by their names in the network; q, k and v one by one."""
    for name, entry in entries.items():
        match = _NAME.fullmatch(name)
        layer, module, kind = match.groups() if match else (None, "", "")
        before = f"model.layers.{layer}." if layer else ""
        if module == _FUSED:
            for part, rows in _fused_rows(metadata, entry):
                yield f"{before}self_attn.{part}.{kind}", rows
        elif module in _NAMES:
            yield f"{before}{_NAMES[module]}.{kind}", entry
        elif name != "rope_freqs.weight":  # computed from the metadata
            raise CheckpointError(f"{file} has a tensor {name}, which belongs to no Qwen3")


def _fused_rows(metadata: Mapping[str, Any], entry: Entry) -> Iterator[tuple[str, Entry]]:
    family = metadata["general.architecture"]
    keys = ("key_length", "head_count", "head_count_kv")
    sizes = [metadata[f"{family}.attention.{key}"] for key in keys]
    if not all(type(size) is int for size in sizes):
        raise ValueError("a count of heads is no number")
    head, heads, kv_heads = sizes
    q, kv = heads * head, kv_heads * head
    if q < 1 or kv < 1 or entry.shape[0] != q + 2 * kv:
        raise ValueError("a fused tensor has other rows than q, k and v")
    row = entry.nbytes // entry.shape[0]
    for part, first, count in (("q_proj", 0, q), ("k_proj", q, kv), ("v_proj", q + kv, kv)):
        shape = (count, *entry.shape[1:])
        yield part, replace(entry, shape=shape, start=entry.start + first * row)
