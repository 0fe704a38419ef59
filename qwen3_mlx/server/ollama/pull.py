"""Downloads a model into the hub's cache of this machine, with lines of its progress."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from hashlib import sha256
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from qwen3_mlx.checkpoint.description import MODEL_CARD, fetch_weights, read_config
from qwen3_mlx.checkpoint.hub import Source
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.server.access_log import reason_of
from qwen3_mlx.server.admission import Slot
from qwen3_mlx.server.endpoint import admitted, client_errors
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.ollama.protocol import PROTOCOL
from qwen3_mlx.server.ollama.schema import LINES, OllamaPullRequest
from qwen3_mlx.server.preparing import wait_for_disconnect
from qwen3_mlx.server.response import EventStreamResponse
from qwen3_mlx.server.service import Service
from qwen3_mlx.server.threads import in_daemon
from qwen3_mlx.server.wire import Json, check_unknown, json_bytes, warnings_header

_SECONDS_PER_LINE = 0.25


class Pull:
    """The download of a model, which `qwen3 list` then shows; the served models stay the same."""

    def __init__(self, service: Service, body: OllamaPullRequest) -> None:
        if not service.settings.allow_pull:
            raise ApiError(403, "downloads are off here; qwen3 serve --allow-pull allows them")
        if not (name := body.model or body.name):
            raise ValueError("model is empty; give a size such as 8B, or a hub name")
        self._streams = body.stream is not False
        self._warnings = check_unknown(body, {}, frozenset())
        try:
            self._source = Source.to_download(name, progress=self._follow)
        except Qwen3Error as error:
            raise ApiError(400, str(error)) from error
        self._present: tuple[int, int] | None = None  # bytes, and their total

    async def respond(self, request: Request, slot: Slot) -> Response:
        """Return the response, at the end of the download or as a stream of lines."""
        self._cancelled, self._record = slot.cancelled, slot.record
        headers = warnings_header(self._warnings)
        if self._streams:
            slot.kept = True
            return EventStreamResponse(partial(_end, slot), self._stream(), LINES, headers)
        watching = asyncio.create_task(wait_for_disconnect(request))
        watching.add_done_callback(lambda _: slot.cancelled.set())
        try:
            async for line in self._lines():
                last = line
        finally:
            watching.cancel()
        return Json(last, headers=headers)

    async def _stream(self) -> AsyncIterator[bytes]:
        try:
            async for line in self._lines():
                yield json_bytes(line) + b"\n"
        except ApiError as error:
            self._record["error"] = reason_of(error)
            yield json_bytes(PROTOCOL.error_body(error)) + b"\n"

    async def _lines(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the progress while a thread downloads, and how it ended.

        Raises:
            ApiError: the download failed or was cancelled.
        """
        yield {"status": "pulling manifest"}
        done = in_daemon(self._download)
        shown = None
        try:
            while not done.done():
                await asyncio.wait([done], timeout=_SECONDS_PER_LINE)
                if self._cancelled.is_set():  # the thread may wait for the hub for some seconds
                    raise ApiError(503, "the download was cancelled; the next one resumes it")
                if self._present and self._present != shown:
                    shown = self._present
                    yield self._line(*shown)
            done.result()
        except Qwen3Error as error:
            raise ApiError(400, str(error)) from error
        finally:
            done.cancel()
        yield {"status": "success"}

    def _line(self, present: int, total: int) -> dict[str, Any]:
        # Clients show a bar for each digest, whose total must not change.
        digest = sha256(f"{self._source.name} {total}".encode()).hexdigest()
        line = {"status": f"pulling {digest[:12]}", "digest": f"sha256:{digest}"}
        return {**line, "total": total, "completed": present}

    def _download(self) -> None:
        folder, _ = read_config(self._source)
        fetch_weights(self._source, folder, also=MODEL_CARD)

    def _follow(self, present: int, total: int) -> None:
        if self._cancelled.is_set():  # an error ends the download, which the next one resumes
            raise Qwen3Error("it was cancelled")
        self._present = present, total


async def answer_pull(service: Service, request: Request) -> Response:
    """Answer a request to download a model.

    Raises:
        ApiError: the request cannot be served, or the download failed.
    """
    async with admitted(service, request, OllamaPullRequest) as (slot, body, _):
        with client_errors(str):
            pull = Pull(service, body)
        return await pull.respond(request, slot)


def _end(slot: Slot) -> None:
    slot.cancelled.set()
    slot.release()
