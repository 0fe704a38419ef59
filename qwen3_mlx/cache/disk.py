"""Long prefixes on disk: what was read once is there after a restart.

Each is a safetensors file: the ids, and what every layer's cache keeps of them. Its header says for
which model, template and cache it was made, and what does not say the same is left alone. A file
takes its name when it is whole, so what was cut off in the middle is never believed, and cleared
away at the next start.
"""

import hashlib
import json
import logging
import os
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.cache.prefix import common_prefix
from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.files import Planned, ShardWriter, read_described

_log = logging.getLogger(__name__)
_VERSION = "1"
_LEAST = 256  # tokens; less is read again before anybody notices
_PATTERN = "prefix-*.safetensors"


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
            process = file.suffixes[-2][1:]
            if process.isdecimal() and not _alive(int(process)):
                file.unlink(missing_ok=True)
        self._entries = [entry for file in folder.glob(_PATTERN) if (entry := self._entry(file))]

    def common(self, ids: Sequence[int], most: int) -> int:
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
            stored: Any = mx.load(str(entry.file))
            count = (len(stored) - 1) // len(caches)  # beside the ids
            parts = [
                [stored[f"{layer}.{n}"][:, :, :tokens] for n in range(count)]
                for layer in range(len(caches))
            ]
            mx.eval(parts)
            os.utime(entry.file)
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            _log.debug("%s cannot be read: %s", entry.file, error)
            self._entries.remove(entry)  # another process may have made room
            return 0
        for cache, kept in zip(caches, parts, strict=True):
            cache.fill(kept)
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
        return len(ids) >= _LEAST and self.common(ids, len(ids)) < len(ids)

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
        new = file.with_name(f"{file.name}.{os.getpid()}.new")
        try:
            with open(new, "wb", opener=_for_the_owner) as out:
                planned = [Planned(n, part.dtype, tuple(part.shape)) for n, part in tensors.items()]
                writer = ShardWriter(out, planned, self._header)
                for name, part in tensors.items():  # one at a time, so that memory hardly grows
                    if interrupted():
                        return False
                    writer.append(name, part)
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
            tensors, metadata = read_described(file)
            if metadata != self._header:
                return None
            stored, ids = tensors["ids"], array("i")
            with file.open("rb") as stream:
                stream.seek(stored.start)
                ids.frombytes(stream.read(stored.nbytes))
        except (OSError, CheckpointError, KeyError, ValueError):
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


def _for_the_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is another user's
    return True
