"""Long prefixes on disk: what was read once is there after a restart.

Each is a safetensors file: the ids, what every layer's cache keeps of them, and last a checksum of
all before it. Its header says for which model, template and cache it was made, and what does not
say the same is left alone. A file takes its name when it is whole, so what was cut off in the
middle is never believed, and cleared away at the next start. One that was damaged is removed.
"""

import hashlib
import json
import logging
import os
import tempfile
import zlib
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.cache.prefix import common_prefix
from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.files import ShardWriter, TensorSpec, read_header_and_metadata

_log = logging.getLogger(__name__)
_VERSION = "2"
_LEAST = 256  # tokens; less is read again before anybody notices
_PATTERN = "prefix-*.safetensors"
_CHECKSUM, _CHECKSUM_BYTES = "checksum", 4  # the last tensor
_BLOCK = 1 << 20  # bytes read at once


@dataclass(frozen=True, slots=True)
class _Entry:
    file: Path
    ids: "array[int]"  # quoted: not to be subscripted at run time before Python 3.12


class DiskPrefixes:
    """The prefixes of one model in a folder, which others may share."""

    def __init__(self, folder: Path, identity: str, *, limit: int) -> None:
        """Look what is there; the files of all models together shall take at most `limit` bytes.

        `identity` stands for all that keys and values depend on, besides the ids.

        Raises:
            OSError: the folder cannot be made or read.
        """
        self._folder = folder
        self._header = {"qwen3_mlx_prefix": _VERSION, "identity": identity}
        self._limit = limit
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in folder.glob(f"{_PATTERN}.*.new"):
            process = file.name.split(".")[2]
            with suppress(OSError):  # of a folder that somebody has called so
                if process.isdecimal() and not _alive(int(process)):
                    file.unlink()
        self._entries = [entry for file in folder.glob(_PATTERN) if (entry := self._entry(file))]

    def match_length(self, ids: Sequence[int], most: int) -> int:
        """Count the ids at the start, at most `most`, that `read` would give."""
        return self._longest(ids, most)[0]

    def read(self, ids: Sequence[int], most: int, caches: Sequence[KVCache]) -> int:
        """Fill empty `caches`, one a layer, with the longest start of `ids` that is here.

        At most `most` tokens; says how many: 0 if it cannot be read after all.
        """
        tokens, entry = self._longest(ids, most)
        if entry is None:
            return 0
        try:
            if not _intact(entry.file):
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
        except Exception as error:  # noqa: BLE001 - all can be read anew
            if not isinstance(error, FileNotFoundError):  # another process may have made room
                reason = str(error) or repr(error)
                _log.warning("a kept prompt is read anew: %s: %s", entry.file, reason)
            self._entries.remove(entry)
            return 0
        for cache, kept in zip(caches, parts, strict=True):
            cache.restore(kept)
        return tokens

    def _longest(self, ids: Sequence[int], most: int) -> tuple[int, _Entry | None]:
        """Give the entry with the most of the first `most` ids, and how many; 0 if they are few."""
        sought, best, longest = array("i", ids[:most]), None, _LEAST - 1
        for entry in self._entries:
            if (found := common_prefix(entry.ids, sought)) > longest:
                best, longest = entry, found
        return (longest, best) if best else (0, None)

    def wants(self, ids: Sequence[int]) -> bool:
        """Say whether these ids are worth a file, and in none yet."""
        return len(ids) >= _LEAST and self.match_length(ids, len(ids)) < len(ids)

    def write(
        self, ids: Sequence[int], caches: Sequence[KVCache], interrupted: Callable[[], bool]
    ) -> bool:
        """Save what `caches` keep of `ids`, their first tokens, in place of shorter starts of them.

        False if `interrupted` came true before it was done, and nothing is left of it.

        Raises:
            OSError: it cannot be written.
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
        # Several processes, or several models of one, may be writing the same prompt.
        handle, path = tempfile.mkstemp(".new", f"{file.name}.{os.getpid()}.", self._folder)
        new = Path(path)  # open to the owner alone
        try:
            with os.fdopen(handle, "wb") as out:
                planned = [
                    TensorSpec(n, part.dtype, tuple(part.shape)) for n, part in tensors.items()
                ]
                planned.append(TensorSpec(_CHECKSUM, mx.uint32, (1,)))
                summed = _Summed(out)
                writer = ShardWriter(summed, planned, self._header)
                for name, part in tensors.items():  # one at a time, so that memory hardly grows
                    if interrupted():
                        return False
                    writer.append(name, part)
                writer.append(_CHECKSUM, mx.array([summed.checksum], dtype=mx.uint32))
                out.flush()
                os.fsync(out.fileno())
            new.replace(file)
        finally:
            new.unlink(missing_ok=True)
        shorter = [one for one in self._entries if common_prefix(one.ids, numbers) == len(one.ids)]
        for entry in shorter:
            self._entries.remove(entry)
            if entry.file != file:
                entry.file.unlink(missing_ok=True)
        self._entries.append(_Entry(file, numbers))
        self._make_room()
        return True

    def _entry(self, file: Path) -> _Entry | None:
        """Read the header and the ids of a file; None if it is another model's, or not whole."""
        try:
            tensors, metadata = read_header_and_metadata(file)
            if metadata != self._header:
                return None
            stored, ids = tensors["ids"], array("i")
            with file.open("rb") as stream:
                stream.seek(stored.start)
                ids.frombytes(stream.read(stored.nbytes))
        except FileNotFoundError:  # another process has made room
            return None
        except (OSError, CheckpointError, KeyError, ValueError) as error:
            _log.warning("a kept prompt cannot be read, and is not used: %s: %s", file, error)
            return None
        return _Entry(file, ids)

    def _make_room(self) -> None:
        """Remove those that were not used for longest, until all fit."""
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


class _Summed:
    """Passes on what is written to a file from its start to its end, and sums it up."""

    def __init__(self, out: BinaryIO) -> None:
        self.checksum = 0
        self._out = out

    def seek(self, place: int) -> None:
        assert place == self._out.tell()

    def write(self, data: bytes) -> None:
        self.checksum = zlib.crc32(data, self.checksum)
        self._out.write(data)


def _intact(file: Path) -> bool:
    """Say whether a file is as it was written: its last bytes are the checksum of all before."""
    left, checksum, block = file.stat().st_size - _CHECKSUM_BYTES, 0, memoryview(bytearray(_BLOCK))
    with file.open("rb", buffering=0) as stream:
        while left > 0 and (count := stream.readinto(block[: min(left, _BLOCK)])):
            checksum, left = zlib.crc32(block[:count], checksum), left - count
        return stream.read() == checksum.to_bytes(_CHECKSUM_BYTES, "little")


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass  # it is another user's, or no number of a process
    return True
