"""Resumable downloads from the Hugging Face hub into the cache of its library.

The hub's library starts every file anew in each process, because its partial files have random
names. Here the partial file is named after the content and is resumed by an HTTP Range request,
which the hub also supports for files stored in Xet. Complete files lie where the library finds
them.
"""

import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedRandom, BufferedReader
from pathlib import Path
from threading import Event as Flag
from threading import Lock
from typing import Any

from qwen3_mlx.arguments import Progress
from qwen3_mlx.errors import CheckpointError

_log = logging.getLogger(__name__)
_MAX_FAILURES = 5  # tries in a row that bring no bytes
_PAUSE = 1.0  # seconds before the next try, if the last one brought no bytes
_PATIENCE = 0.5  # seconds between two calls of `progress`, if no bytes come
_WORKERS = 4  # files downloaded at once
_RESERVED_BYTES = 100_000_000  # of the disk, left free
_SHA256, _SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
_RETRYABLE_STATUS = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class _File:
    """A file to fetch: its name, URL, size in bytes, and path in the library's cache."""

    name: str
    url: str
    size: int
    blob: Path

    @property
    def partial(self) -> Path:
        """Path of the partial file.

        It is named after the content, so that only the same content is resumed. The hub's library
        counts and removes *.incomplete as its own files.
        """
        return self.blob.with_name(f"{self.blob.name}.qwen3.incomplete")

    @property
    def received(self) -> int:
        """Bytes that earlier downloads left."""
        return min(self.partial.stat().st_size, self.size) if self.partial.exists() else 0


def download(
    name: str, commit: str, files: Sequence[str], progress: Progress | None = None
) -> None:
    """Load `files` of a commit of the hub's model `name`; partial files are resumed.

    `progress` is called with (bytes present, total bytes), from other threads. Files whose length
    the hub does not state are left to its library.

    Raises:
        CheckpointError: the disk has no room, the hub stops responding, or the data do not match
            their checksum.
    """
    wanted = _files(name, commit, files)
    if not wanted:
        return
    total, received = sum(file.size for file in wanted), sum(file.received for file in wanted)
    _refuse_full_disk(name, wanted, total - received)
    _log.info("downloading %s: %d bytes of %d are present", name, received, total)
    stopped, lock = Flag(), Lock()

    def count(new: int) -> None:
        nonlocal received
        with lock:
            received += new
            try:
                if progress:
                    progress(received, total)
            except BaseException:  # raised by the caller's callback: it ends the download
                stopped.set()
                raise

    with ThreadPoolExecutor(_WORKERS, "download") as pool:
        try:
            pending = {pool.submit(_fetch, file, count, stopped) for file in wanted}
            while pending:
                done, pending = wait(pending, _PATIENCE, FIRST_EXCEPTION)
                for fetched in done:
                    fetched.result()
                count(0)  # `progress` may end a download that stalls, too
        except BaseException:  # a file failed, or Ctrl-C: the others stop after their next chunk
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def _files(name: str, commit: str, files: Sequence[str]) -> list[_File]:
    """Return the files that are not in the cache, with the size and content hash from the hub."""
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
                # Keyed by the content: files with the same content are fetched once.
                found[blob] = _File(file, url, about.size, blob)
    return list(found.values())


def _refuse_full_disk(name: str, files: Sequence[_File], needed: int) -> None:
    folder = files[0].blob.parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free - _RESERVED_BYTES:
        raise CheckpointError(
            f"{name} needs {needed / 1e9:,.2f} GB more, and the disk of {folder} has "
            f"{free / 1e9:,.2f} GB free; make room, or set HF_HOME to a folder of another disk"
        )


def _fetch(file: _File, count: Callable[[int], None], stopped: Flag) -> None:
    """Load one file, and check it."""
    file.blob.parent.mkdir(parents=True, exist_ok=True)
    with file.partial.open("ab+") as target, _exclusive(target):
        if file.blob.exists():  # another process has completed it
            count(file.size)
            return
        target.truncate(file.received)
        _read_to_end(file, target, count, stopped)
        if stopped.is_set():
            return
        _check(file, target)
        file.partial.replace(file.blob)


def _read_to_end(
    file: _File, target: BufferedRandom, count: Callable[[int], None], stopped: Flag
) -> None:
    """Read the missing bytes; retry until several tries in a row bring none."""
    failures = 0
    while (before := target.seek(0, 2)) < file.size and not stopped.is_set():
        try:
            _read(file, target, count, stopped)
        except Exception as error:
            failures = 0 if target.seek(0, 2) > before else failures + 1
            if stopped.is_set() or not _is_retryable(error):
                raise
            if failures == _MAX_FAILURES:
                raise CheckpointError(
                    f"the hub stopped sending {file.name} after {before / 1e6:,.1f} of "
                    f"{file.size / 1e6:,.1f} MB ({first_line(error)}); "
                    "the same command goes on from there"
                ) from error
            _log.info("%s: %s; trying again", file.name, error)
            stopped.wait(_PAUSE if failures else 0)


def read_range(name: str, commit: str, file: str, start: int, stop: int) -> tuple[bytes, int]:
    """Return the bytes [start, stop) of a file on the hub, fewer at its end, and its total bytes.

    Nothing is stored.

    Raises:
        CheckpointError: the hub does not state the file's length.
    """
    from huggingface_hub import hf_hub_url

    found = bytearray()
    with _get(hf_hub_url(name, file, revision=commit), f"{start}-{stop - 1}") as response:
        is_part = response.status_code == 206
        before = 0 if is_part else start  # a hub that sends no parts begins at the first byte
        for chunk in response.iter_bytes():
            found += chunk
            if len(found) >= before + stop - start:
                break
        headers = response.headers
        stated = headers.get("Content-Range" if is_part else "Content-Length", "")
    total = stated.rpartition("/")[2]
    if not total.isdecimal():
        raise CheckpointError(f"the hub does not state the length of {file}; download it whole")
    return bytes(found[before : before + stop - start]), int(total)


@contextmanager
def _get(url: str, part: str = "") -> Iterator[Any]:
    """Request a file, or the part `first-last` of it; yield the response."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if part:
        headers["Range"] = f"bytes={part}"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    request: Any = get_session().stream(  # of httpx or httpx2, by the version of the library
        "GET", url, headers=headers, follow_redirects=True, timeout=timeout
    )
    with request as response:
        hf_raise_for_status(response)
        yield response


def _read(file: _File, target: BufferedRandom, count: Callable[[int], None], stopped: Flag) -> None:
    """Append the missing bytes to the partial file, or restart it if the hub sends no part."""
    start = target.seek(0, 2)
    with _get(file.url, f"{start}-" if start else "") as response:
        if start and response.status_code != 206:
            target.truncate(0)
            count(-start)
        for chunk in response.iter_bytes():
            target.write(chunk)
            target.flush()  # keeps the bytes if the process is killed
            count(len(chunk))
            if stopped.is_set():
                return
    if target.seek(0, 2) < file.size:
        raise EOFError("the hub ended the transfer early")


def _is_retryable(error: Exception) -> bool:
    """Return whether a retry may help: the connection broke, or the hub is busy."""
    if isinstance(error, OSError) and error.errno is not None:  # an error of the disk
        return False
    response = getattr(error, "response", None)
    return response is None or response.status_code in _RETRYABLE_STATUS


def damaged_files(folder: Path) -> list[str]:
    """Return the files of a cached checkpoint whose content does not match their checksum."""
    found = []
    for file in sorted(path for path in folder.iterdir() if path.is_symlink()):
        with file.open("rb") as content:
            if not _matches(content, file.resolve().name):
                found.append(file.name)
    return found


def _matches(content: BufferedReader | BufferedRandom, name: str) -> bool:
    """Return whether a file has the checksum that the hub names it by.

    That is SHA-256 for large files and git's SHA-1 for others; some mirrors give a plain SHA-1.
    """
    size = content.seek(0, 2)
    starts: list[Callable[[], Any]] = []
    if _SHA256.fullmatch(name):
        starts = [hashlib.sha256]
    elif _SHA1.fullmatch(name):
        starts = [lambda: hashlib.sha1(b"blob %d\0" % size), hashlib.sha1]
    for start in starts:
        content.seek(0)
        if hashlib.file_digest(content, start).hexdigest() == name:
            return True
    return not starts


def _check(file: _File, target: BufferedRandom) -> None:
    """Check size and checksum of a partial file; remove it if they differ."""
    if target.seek(0, 2) != file.size or not _matches(target, file.blob.name):
        file.partial.unlink(missing_ok=True)
        raise CheckpointError(f"{file.name} does not match the hub's checksum; try again")


@contextmanager
def _exclusive(target: BufferedRandom) -> Iterator[None]:
    """Wait until no other process writes to this file, and lock it until it is closed."""
    import fcntl

    with suppress(OSError):  # no locks on this file system; mixed writes fail the checksum
        fcntl.flock(target, fcntl.LOCK_EX)
    yield


def first_line(error: Exception) -> str:
    """Return the first line of an error's message; errors of the hub's library have several."""
    return str(error).strip().split("\n")[0]


def silent_progress_bar() -> type:
    """Create a progress bar class that shows nothing, for calls of the hub's library."""
    from huggingface_hub.utils import tqdm

    class NoBar(tqdm):
        def __init__(self, *positional: Any, **named: Any) -> None:
            super().__init__(*positional, **named | {"disable": True})

    return NoBar
