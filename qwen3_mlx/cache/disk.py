"""Prefix cache on disk: the KV caches of long prompts survive a restart.

Each prefix is a safetensors file: the ids, the state of every layer's cache, and last a checksum of
everything before it. The header names the model, template and cache format of the file; files with
another header are ignored and left in place. A file takes its name when it is complete, so an
interrupted write is never read, and is removed at the next start. A damaged file is removed.
"""

import hashlib
import json
import logging
import os
import zlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import mlx.core as mx

from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.cache.prefix import common_prefix
from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.files import ShardWriter, TensorSpec, atomic_write, read_header_and_metadata

_log = logging.getLogger(__name__)
_VERSION = "2"
_MIN_TOKENS = 256  # prefill of fewer tokens takes no noticeable time
_PATTERN = "prefix-*.safetensors"
_CHECKSUM, _CHECKSUM_BYTES = "checksum", 4  # the last tensor
_READ_BYTES = 1 << 20  # read at once to compute a checksum


@dataclass(frozen=True, slots=True)
class _Entry:
    file: Path
    ids: "array[int]"  # quoted: not to be subscripted at run time before Python 3.12


class DiskPrefixes:
    """The prefixes of one model in a folder; other models and processes may share the folder."""

    def __init__(self, folder: Path, identity: str, *, limit: int) -> None:
        """Create the folder if needed and scan it.

        The files of all models together take at most `limit` bytes. `identity` represents
        everything that keys and values depend on, besides the ids.

        Raises:
            OSError: the folder cannot be created or read.
        """
        self._folder = folder
        self._header = {"qwen3_mlx_prefix": _VERSION, "identity": identity}
        self._limit = limit
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in folder.glob(f"{_PATTERN}.*.new"):
            process = file.name.split(".")[2]
            with suppress(OSError):  # a folder may have such a name
                if process.isdecimal() and not _is_alive(int(process)):
                    file.unlink()
        self._entries = [entry for file in folder.glob(_PATTERN) if (entry := self._entry(file))]

    def match_length(self, ids: Sequence[int], max_tokens: int) -> int:
        """Return the number of leading ids, at most `max_tokens`, that `read` would restore."""
        return self._longest(ids, max_tokens)[0]

    def read(self, ids: Sequence[int], max_tokens: int, caches: Sequence[KVCache]) -> int:
        """Restore the longest stored prefix of the first `max_tokens` ids into empty `caches`.

        `caches` has one cache a layer. Return the number of tokens; 0 if the file cannot be read.
        """
        tokens, entry = self._longest(ids, max_tokens)
        if entry is None:
            return 0
        try:
            if not _is_intact(entry.file):
                entry.file.unlink(missing_ok=True)
                raise ValueError("it was damaged, and is removed")
            stored: Any = mx.load(str(entry.file))
            count = (len(stored) - 2) // len(caches)  # beside the ids and the checksum
            parts = [
                [stored[f"{layer}.{n}"][:, :, :tokens] for n in range(count)]
                for layer in range(len(caches))
            ]
            mx.eval(parts)
            os.utime(entry.file)
        except Exception as error:  # noqa: BLE001 - prefill can always replace a stored prefix
            if not isinstance(error, FileNotFoundError):  # another process may have evicted it
                reason = str(error) or repr(error)
                _log.warning("a kept prompt is read anew: %s: %s", entry.file, reason)
            self._entries.remove(entry)
            return 0
        for cache, kept in zip(caches, parts, strict=True):
            cache.restore(kept)
        return tokens

    def _longest(self, ids: Sequence[int], max_tokens: int) -> tuple[int, _Entry | None]:
        """Return the longest stored prefix of `ids`, up to `max_tokens`: its length and its entry.

        The length is 0 if no entry has at least `_MIN_TOKENS` of them.
        """
        wanted, best, longest = array("i", ids[:max_tokens]), None, _MIN_TOKENS - 1
        for entry in self._entries:
            if (found := common_prefix(entry.ids, wanted)) > longest:
                best, longest = entry, found
        return (longest, best) if best else (0, None)

    def is_worth_saving(self, ids: Sequence[int]) -> bool:
        """Return whether these ids are enough to be worth a file, and no file has all of them."""
        return len(ids) >= _MIN_TOKENS and self.match_length(ids, len(ids)) < len(ids)

    def write(
        self, ids: Sequence[int], caches: Sequence[KVCache], interrupted: Callable[[], bool]
    ) -> bool:
        """Write the state of `caches` for `ids`, their first tokens, to a file.

        Stored prefixes of `ids` are replaced by it. A file larger than the limit is not written.
        Return False if `interrupted` became true before the end; nothing is left then.

        Raises:
            OSError: the file cannot be written.
        """
        tensors = {"ids": mx.array(list(ids), dtype=mx.int32)}
        tensors |= {
            f"{layer}.{n}": part[:, :, : len(ids)]
            for layer, cache in enumerate(caches)
            for n, part in enumerate(cache.state)
        }
        if sum(part.nbytes for part in tensors.values()) > self._limit:
            return True
        numbers = array("i", ids)
        digest = hashlib.sha256(json.dumps(self._header).encode() + numbers.tobytes()).hexdigest()
        file = self._folder / f"prefix-{digest[:32]}.safetensors"
        try:
            self._write(file, tensors, interrupted)
        except _Interrupted:
            return False
        shorter = [one for one in self._entries if common_prefix(one.ids, numbers) == len(one.ids)]
        for entry in shorter:
            self._entries.remove(entry)
            if entry.file != file:
                entry.file.unlink(missing_ok=True)
        self._entries.append(_Entry(file, numbers))
        self._make_room()
        return True

    def _write(
        self, file: Path, tensors: Mapping[str, mx.array], interrupted: Callable[[], bool]
    ) -> None:
        specs = [TensorSpec(name, part.dtype, tuple(part.shape)) for name, part in tensors.items()]
        specs.append(TensorSpec(_CHECKSUM, mx.uint32, (1,)))
        # Several processes, or several models of one process, may be writing the same prompt.
        suffix = f".{os.getpid()}.{uuid4().hex}.new"
        with atomic_write(file, suffix=suffix, private=True) as out:
            checked = _ChecksumFile(out)
            writer = ShardWriter(checked, specs, self._header)
            for name, part in tensors.items():  # one at a time, to bound the memory
                if interrupted():
                    raise _Interrupted
                writer.append(name, part)
            writer.append(_CHECKSUM, mx.array([checked.checksum], dtype=mx.uint32))

    def _entry(self, file: Path) -> _Entry | None:
        """Read the header and the ids of a file; None if another model wrote it, or it is damaged.

        A file that cannot be read is logged, and stays.
        """
        try:
            tensors, metadata = read_header_and_metadata(file)
            if metadata != self._header:
                return None
            stored, ids = tensors["ids"], array("i")
            with file.open("rb") as stream:
                stream.seek(stored.start)
                ids.frombytes(stream.read(stored.nbytes))
        except FileNotFoundError:  # another process has evicted it
            return None
        except (OSError, CheckpointError, KeyError, ValueError) as error:
            _log.warning("a kept prompt cannot be read, and is not used: %s: %s", file, error)
            return None
        return _Entry(file, ids)

    def _make_room(self) -> None:
        """Remove the least recently used files, of any model, until the others fit the limit."""
        found = []
        for file in self._folder.glob(_PATTERN):
            with suppress(OSError):
                found.append((file.stat().st_mtime, file.stat().st_size, file))
        held = sum(size for _, size, _ in found)
        for _, size, file in sorted(found):
            if held <= self._limit:
                return
            file.unlink(missing_ok=True)
            held -= size
            self._entries = [entry for entry in self._entries if entry.file != file]


class _Interrupted(Exception):
    """Ends a write before its end, so that nothing is left of the file."""


class _ChecksumFile:
    """A file written from start to end that computes the checksum of its bytes."""

    def __init__(self, out: BinaryIO) -> None:
        self.checksum = 0
        self._out = out

    def seek(self, place: int) -> None:
        assert place == self._out.tell()

    def write(self, data: bytes) -> None:
        self.checksum = zlib.crc32(data, self.checksum)
        self._out.write(data)


def _is_intact(file: Path) -> bool:
    """Return whether the last bytes of a file are the checksum of all bytes before them."""
    left, checksum = file.stat().st_size - _CHECKSUM_BYTES, 0
    block = memoryview(bytearray(_READ_BYTES))
    with file.open("rb", buffering=0) as stream:
        while left > 0 and (count := stream.readinto(block[: min(left, _READ_BYTES)])):
            checksum, left = zlib.crc32(block[:count], checksum), left - count
        return stream.read() == checksum.to_bytes(_CHECKSUM_BYTES, "little")


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass  # the process is another user's, or the number is none of a process
    return True
