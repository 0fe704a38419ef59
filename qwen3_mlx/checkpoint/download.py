"""Fetches files of the hub into its library's cache, so that a download that broke is resumed.

The library begins a file anew in each process: its partial files have names of their own. Here the
partial file is named after the content, and goes on where it ends by an HTTP Range, which the hub
takes for what it stores in Xet, too; what is whole lies where the library finds it.
"""

import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from threading import Event as Flag
from threading import Lock
from typing import Any

from qwen3_mlx.errors import CheckpointError

Progress = Callable[[int, int], None]
_log = logging.getLogger(__name__)
_TRIES = 5  # in a row that bring nothing
_PAUSE = 1.0  # seconds before a try, when the one before brought nothing
_WORKERS = 4
_RESERVE = 100_000_000  # bytes of disk that are left free
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PASSING = (408, 429, 500, 502, 503, 504)  # states of a hub that will be over


@dataclass(frozen=True, slots=True)
class _File:
    """A file to fetch: its name and address, its length, and where the library looks for it."""

    name: str
    url: str
    size: int
    blob: Path

    @property
    def partial(self) -> Path:
        """The file that grows; its name is that of the content, so no other content goes on in it.

        The library counts and removes *.incomplete as its own.
        """
        return self.blob.with_name(f"{self.blob.name}.qwen3.incomplete")

    @property
    def here(self) -> int:
        """The bytes that earlier downloads left."""
        return min(self.partial.stat().st_size, self.size) if self.partial.exists() else 0


def download(
    name: str, commit: str, files: Sequence[str], progress: Progress | None = None
) -> None:
    """Fetch `files` of a commit of the hub's model `name`, resuming what is there in part.

    `progress` is called with (bytes here, bytes in all), from other threads. Files whose length the
    hub does not tell are left to its library.

    Raises:
        CheckpointError: the disk has no room for them, the hub stops answering, or what it sent
            does not have its checksum.
    """
    wanted = _files(name, commit, files)
    if not wanted:
        return
    total, here = sum(file.size for file in wanted), sum(file.here for file in wanted)
    _refuse_full_disk(name, wanted, total - here)
    _log.info("downloading %s: %d bytes of %d are here", name, here, total)
    stopped, lock = Flag(), Lock()

    def count(new: int) -> None:
        nonlocal here
        with lock:
            here += new
            try:
                if progress:
                    progress(here, total)
            except BaseException:  # the caller's own, which ends the download
                stopped.set()
                raise

    with ThreadPoolExecutor(_WORKERS, "download") as pool:
        try:
            fetching = [pool.submit(_fetch, file, count, stopped) for file in wanted]
            for done in as_completed(fetching):
                done.result()
        except BaseException:  # a file failed, or Ctrl-C: the others end at their next piece
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def _files(name: str, commit: str, files: Sequence[str]) -> list[_File]:
    """Ask the hub for the length and the content's name of each file; leave out what is here."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name

    storage = Path(constants.HF_HUB_CACHE).expanduser()
    blobs = storage / repo_folder_name(repo_id=name, repo_type="model") / "blobs"
    found: dict[Path, _File] = {}
    for file in files:
        url = hf_hub_url(name, file, revision=commit)
        about = get_hf_file_metadata(url, retry_on_errors=True)
        if about.etag and about.size and about.size <= constants.MAX_HTTP_DOWNLOAD_SIZE:
            blob = blobs / about.etag
            if not blob.exists():
                found[blob] = _File(file, url, about.size, blob)  # two names may have one content
    return list(found.values())


def _refuse_full_disk(name: str, files: Sequence[_File], needed: int) -> None:
    folder = files[0].blob.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free - _RESERVE:
        raise CheckpointError(
            f"{name} needs {needed / 1e9:,.2f} GB more, and the disk of {folder} has "
            f"{free / 1e9:,.2f} GB free; make room, or set HF_HOME to a folder of another disk"
        )


def _fetch(file: _File, count: Callable[[int], None], stopped: Flag) -> None:
    """Fetch one file, trying again while that brings something."""
    file.blob.parent.mkdir(parents=True, exist_ok=True)
    with file.partial.open("ab+") as target, _alone_with(target):
        if file.blob.exists():  # another process was faster
            count(file.size)
            return
        target.truncate(file.here)
        failures = 0
        while (before := target.seek(0, 2)) < file.size and not stopped.is_set():
            try:
                _read(file, target, count, stopped)
            except Exception as error:
                failures = 0 if target.seek(0, 2) > before else failures + 1
                if stopped.is_set() or not _may_pass(error):
                    raise
                if failures == _TRIES:
                    raise CheckpointError(
                        f"the hub stopped sending {file.name} after {before / 1e6:,.1f} of "
                        f"{file.size / 1e6:,.1f} MB ({error}); the same command goes on from there"
                    ) from error
                _log.info("%s: %s; trying again", file.name, error)
                stopped.wait(_PAUSE if failures else 0)
        if stopped.is_set():
            return
        _check(file, target)
        file.partial.replace(file.blob)


def _read(file: _File, target: BufferedRandom, count: Callable[[int], None], stopped: Flag) -> None:
    """Append what is still missing, or all of it where the hub cannot send a part."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    start = target.seek(0, 2)
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    request: Any = get_session().stream(  # of httpx or httpx2, as the library's version has it
        "GET", file.url, headers=headers, follow_redirects=True, timeout=timeout
    )
    with request as response:
        hf_raise_for_status(response)
        if start and response.status_code != 206:
            target.truncate(0)
            count(-start)
        for chunk in response.iter_bytes():
            target.write(chunk)
            target.flush()  # or a process that is ended now would lose it
            count(len(chunk))
            if stopped.is_set():
                return
    if target.seek(0, 2) < file.size:
        raise EOFError("the hub ended the transfer early")


def _may_pass(error: Exception) -> bool:
    """Return whether another try may help: the connection broke, or the hub is busy."""
    if isinstance(error, OSError) and error.errno is not None:  # of the disk
        return False
    response = getattr(error, "response", None)
    return response is None or response.status_code in _PASSING


def _check(file: _File, target: BufferedRandom) -> None:
    """Compare length and checksum, which large files are named by, and drop what differs."""
    sound = target.seek(0, 2) == file.size
    if sound and _SHA256.fullmatch(file.blob.name):
        target.seek(0)
        sound = hashlib.file_digest(target, "sha256").hexdigest() == file.blob.name
    if not sound:
        file.partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"{file.name} came with other bytes than the hub's checksum says; try again"
        )


@contextmanager
def _alone_with(target: BufferedRandom) -> Iterator[None]:
    """Wait until no other process writes to this file; closing it lets the next one in."""
    import fcntl

    with suppress(OSError):  # a file system without locks; the checksum finds what that mixes
        fcntl.flock(target, fcntl.LOCK_EX)
    yield


def no_bar() -> type:
    """Create a class of progress bars that show nothing, for calls of the hub's library."""
    from huggingface_hub.utils import tqdm

    class NoBar(tqdm):
        def __init__(self, *positional: Any, **named: Any) -> None:
            super().__init__(*positional, **named | {"disable": True})

    return NoBar
