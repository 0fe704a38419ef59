"""API keys: one set at the start, or those of a key file, which may have names and limits."""

import hmac
import logging
import stat
import time
from dataclasses import dataclass
from pathlib import Path

_log = logging.getLogger(__name__)
_POLL_SECONDS = 1.0  # between two checks of the key file
_OTHER_USERS = stat.S_IRWXG | stat.S_IRWXO
_NO_LIMIT = "-"
_FORM = "KEY, or NAME KEY [REQUESTS [TOKENS]] with limits per minute, - for none"


@dataclass(frozen=True, slots=True)
class Key:
    """An API key, with the name for logs, and what its holder may do in a minute (None: any)."""

    name: str
    secret: bytes
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    @property
    def is_limited(self) -> bool:
        """True if there is a limit."""
        return (self.requests_per_minute, self.tokens_per_minute) != (None, None)


class Keys:
    """Checks API keys. A key file has one a line; empty lines and lines of # are skipped.

    A change of the file takes effect within a second; while the file is invalid, the previous keys
    stay in effect.
    """

    def __init__(self, key: str | None, file: Path | None) -> None:
        """Accept one key, or the keys of a file; with neither, no key is needed.

        Raises:
            ValueError: the file cannot be read, has no key, or has an invalid line.
        """
        self._file = file
        self._keys = [Key("1", key.encode())] if key is not None else []
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

    def find(self, given: str) -> Key | None:
        """Return the valid key that was given, or None; the time taken reveals no key."""
        self._reload_if_changed()
        sent = given.strip().encode("utf-8", "surrogateescape")
        # All of them, in constant time.
        equal = [hmac.compare_digest(sent, key.secret) for key in self._keys]
        return self._keys[equal.index(True)] if any(equal) else None

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


def read_keys(file: Path) -> list[Key]:
    """Return the keys of a file; one without a name is called by its number, from 1.

    Raises:
        ValueError: the file cannot be read, has no key, or has an invalid line.
    """
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ValueError(f"the key file {file} cannot be read: {reason}") from error
    keys: list[Key] = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            key = _key(words if len(words) > 1 else [str(len(keys) + 1), *words])
        except ValueError:
            raise ValueError(
                f"line {number} of {file} is not {_FORM}; in printable ASCII"
            ) from None
        if key.name in {other.name for other in keys}:
            raise ValueError(f"line {number} of {file} repeats the name {key.name}")
        keys.append(key)
    if not keys:
        raise ValueError(f"there is no key in {file}: write one a line")
    return keys


def is_key(key: str) -> bool:
    """Return whether a string can be a key: printable ASCII without spaces, as in a header."""
    return key.isascii() and key.isprintable() and " " not in key and bool(key)


def _key(words: list[str]) -> Key:
    """Return the key of a line with a name; ValueError if it has another form."""
    name, secret, *limits = words
    requests, tokens = (
        _limit(word) for word in [*limits, _NO_LIMIT, _NO_LIMIT][: max(2, len(limits))]
    )
    if not (is_key(name) and is_key(secret)):
        raise ValueError
    return Key(name, secret.encode(), requests, tokens)


def _limit(word: str) -> int | None:
    """Return a limit of a key file; ValueError if it is no number of at least 1 and no dash."""
    if word == _NO_LIMIT:
        return None
    if (limit := int(word)) < 1:
        raise ValueError
    return limit


def _state(file: Path | None) -> tuple[int, ...]:
    """Return what changes when the file is replaced or written to."""
    try:
        info = file.stat() if file else None
    except OSError:
        info = None
    return (info.st_mtime_ns, info.st_size, info.st_ino) if info else ()
