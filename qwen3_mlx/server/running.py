"""The servers of this user that run on this machine: each writes a file, and removes it at the end.

A file that a killed server has left behind is recognised by its process and by /health, and
removed by the next reader.
"""

import json
import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)
_APP = "qwen3-mlx"
_STATES = {
    "status",
    "models",
    "running",
    "waiting",
    "memory",
    "tokens_per_second",
    "uptime_seconds",
}
_TIMEOUT = 2  # seconds for the answer of /health


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server's entry: the process, the address for this machine, the model, the start (epoch)."""

    pid: int
    host: str
    port: int
    model: str
    started: float
    scheme: str = "http"

    @property
    def url(self) -> str:
        """The address at which this machine reaches the server."""
        return url_of(self.scheme, self.host, self.port)

    def health(self) -> dict[str, Any] | None:
        """Return what /health says, which needs no key; None if the server does not answer in time.

        Raises:
            ConnectionError: no server listens there, or another program.
        """
        import http.client
        import ssl

        connection = http.client.HTTPConnection(self.host, self.port, timeout=_TIMEOUT)
        if self.scheme == "https":  # on this machine; the certificate names another host
            connection = http.client.HTTPSConnection(
                self.host, self.port, timeout=_TIMEOUT, context=ssl._create_unverified_context()
            )
        try:
            connection.request("GET", "/health")
            content = json.loads(connection.getresponse().read())
        except TimeoutError:
            return None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ConnectionError(str(error)) from error
        finally:
            connection.close()
        if not isinstance(content, dict) or not content.keys() >= _STATES:
            raise ConnectionError("another program listens there")
        return content


def url_of(scheme: str, host: str, port: int) -> str:
    """Return the address of a server."""
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


@contextmanager
def registered(scheme: str, host: str, port: int, model: str) -> Iterator[None]:
    """Keep an entry for a server of this process while the block runs; failures are only logged."""
    file: Path | None = None
    entry = RunningServer(os.getpid(), host, port, model, time.time(), scheme)
    try:
        file = _folder(create=True) / f"{entry.pid}-{port}.json"
        file.unlink(missing_ok=True)
        with os.fdopen(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as stream:
            json.dump(asdict(entry), stream)
    except OSError as error:
        _log.debug("qwen3 ps will not show this server: %s", error)
    try:
        yield
    finally:
        if file:
            with suppress(OSError):
                file.unlink(missing_ok=True)


def running_servers() -> list[tuple[RunningServer, dict[str, Any] | None]]:
    """Return the servers of this user with what /health says; None if one does not answer in time.

    Files of servers that have ended are removed.
    """
    found = []
    try:
        files = sorted(_folder().glob("*.json"))
    except OSError:
        return []
    for file in files:
        try:
            entry = RunningServer(**json.loads(file.read_text("utf-8")))
            os.kill(entry.pid, 0)  # raises an OSError if there is no such process
            found.append((entry, entry.health()))
        except (OSError, ValueError, TypeError):
            with suppress(OSError):
                file.unlink(missing_ok=True)
    return sorted(found, key=lambda pair: pair[0].started)


def _folder(*, create: bool = False) -> Path:
    """Return the folder of the entries.

    Raises:
        PermissionError: it belongs to another user.
    """
    import platformdirs

    with warnings.catch_warnings():  # of its choice where no session has set the folder
        warnings.simplefilter("ignore")
        folder = platformdirs.user_runtime_path(_APP)
    if create:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.exists() and folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder
