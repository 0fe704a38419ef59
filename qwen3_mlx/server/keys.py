"""API keys: one that is set at the start, or those of a key file."""

import hmac
import logging
import stat
import time
from pathlib import Path

_log = logging.getLogger(__name__)
_POLL_SECONDS = 1.0  # between two checks of the key file
_OTHER_USERS = stat.S_IRWXG | stat.S_IRWXO


class Keys:
    """Checks API keys. A key file has one a line; empty lines and lines of # are skipped.

    A change of the file takes effect within a second; while the file is invalid, the previous keys
    stay in effect.
    """

    def __init__(self, key: str | None, file: Path | None) -> None:
        """Accept one key, or the keys of a file; with neither, no key is needed.

        Raises:
            ValueError: the file cannot be read, has no key, or has an invalid one.
        """
        self._file = file
        self._keys = [key.encode()] if key is not None else []
        self._checked_at, self._state = time.monotonic(), _state(file)
        if file is not None:
            self._keys = read_keys(file)
            if file.stat().st_mode & _OTHER_USERS:
                _log.warning("%s can be read by others: chmod 600 %s", file, file)

    @property
    def several(self) -> bool:
        """True if there are several keys, so that the key identifies the client."""
        return len(self._keys) > 1

    @property
    def required(self) -> bool:
        """True if a key is needed."""
        return bool(self._keys)

    def find(self, given: str) -> int | None:
        """Return the number of a valid key, from 1, or None; the time taken reveals no key."""
        self._reload_if_changed()
        sent = given.strip().encode("utf-8", "surrogateescape")
        equal = [hmac.compare_digest(sent, key) for key in self._keys]  # all, in constant time
        return equal.index(True) + 1 if any(equal) else None

    def _reload_if_changed(self) -> None:
        if self._file is None or time.monotonic() - self._checked_at < _POLL_SECONDS:
            return
        self._checked_at = time.monotonic()
        if (state := _state(self._file)) == self._state:
            return
        self._state = state
        try:
            self._keys = read_keys(self._file)
            _log.info("%s was read again: %d keys", self._file, len(self._keys))
        except ValueError as error:
            _log.warning("the keys stay as they were: %s", error)


def read_keys(file: Path) -> list[bytes]:
    """Return the keys of a file.

    Raises:
        ValueError: the file cannot be read, has no key, or has an invalid one.
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
                f"line {number} of {file} is not a key: one a line, printable ASCII without spaces"
            )
        keys.append(key.encode())
    if not keys:
        raise ValueError(f"there is no key in {file}: write one a line")
    return keys


def is_key(key: str) -> bool:
    """Return whether a string can be a key: printable ASCII without spaces, as in a header."""
    return key.isascii() and key.isprintable() and " " not in key and bool(key)


def _state(file: Path | None) -> tuple[int, ...]:
    """Return what changes when the file is replaced or written to."""
    try:
        info = file.stat() if file else None
    except OSError:
        info = None
    return (info.st_mtime_ns, info.st_size, info.st_ino) if info else ()
