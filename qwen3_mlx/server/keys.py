"""The keys that let clients in: one that was given at the start, or those of a file."""

import hmac
import logging
import stat
import time
from pathlib import Path

_log = logging.getLogger(__name__)
_EVERY = 1.0  # seconds from one look at the file to the next
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class Keys:
    """Checks keys. A file has one a line, beside empty lines and those that begin with #.

    What is written to the file later holds within a second; while it cannot be used, what it said
    before does.
    """

    def __init__(self, key: str | None, file: Path | None) -> None:
        """Take a key, read a file, or let everyone in.

        Raises:
            ValueError: the file cannot be read, or has no key or a wrong one.
        """
        self._file = file
        self._keys = [key.encode()] if key is not None else []
        self._looked, self._state = time.monotonic(), _state(file)
        if file is not None:
            self._keys = read_keys(file)
            if file.stat().st_mode & _OTHERS:
                _log.warning("%s can be read by others: chmod 600 %s", file, file)

    @property
    def several(self) -> bool:
        """Whether there are several, so that a key says who the client is."""
        return len(self._keys) > 1

    @property
    def demanded(self) -> bool:
        """Whether a key is needed at all."""
        return bool(self._keys)

    def find(self, given: str) -> int | None:
        """Return the number of a key, from 1, or None; the time it takes tells nothing of them."""
        self._look_again()
        sent = given.strip().encode("utf-8", "surrogateescape")
        same = [hmac.compare_digest(sent, key) for key in self._keys]
        return same.index(True) + 1 if any(same) else None

    def _look_again(self) -> None:
        if self._file is None or time.monotonic() - self._looked < _EVERY:
            return
        self._looked = time.monotonic()
        if (state := _state(self._file)) == self._state:
            return
        self._state = state
        try:
            self._keys = read_keys(self._file)
            _log.info("%s was read again: %d keys", self._file, len(self._keys))
        except ValueError as error:
            _log.warning("the keys stay as they were: %s", error)


def read_keys(file: Path) -> list[bytes]:
    """Return the keys in a file.

    Raises:
        ValueError: it cannot be read, or has no key or a wrong one.
    """
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ValueError(f"the key file {file} cannot be read: {reason}") from error
    keys = []
    for number, line in enumerate(lines, 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not is_key(key):
            raise ValueError(
                f"line {number} of {file} is no key: one a line, of printable ASCII without spaces"
            )
        keys.append(key.encode())
    if not keys:
        raise ValueError(f"there is no key in {file}: write one a line")
    return keys


def is_key(key: str) -> bool:
    """Whether it can be a key, which travels in a header."""
    return key.isascii() and key.isprintable() and " " not in key and bool(key)


def _state(file: Path | None) -> tuple[int, ...]:
    try:
        found = file.stat() if file else None
    except OSError:
        found = None
    return (found.st_mtime_ns, found.st_size, found.st_ino) if found else ()
