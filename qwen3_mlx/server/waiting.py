"""The wait of a request for its model, or for a tool, outside the event loop."""

import asyncio
import math
import time
from typing import Any

from fastapi import Request

from qwen3_mlx.server.admission import Slot
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.preparing import wait_for_disconnect
from qwen3_mlx.text.fair_queue import POLL_SECONDS


async def wait_for(
    awaited: asyncio.Future[Any], request: Request, slot: Slot, patience: float | None = None
) -> bool:
    """Wait until a future is done, at most `patience` s; return whether it is.

    Raises:
        ApiError: the client went away, or the server has cancelled the request.
        Exception: that of the future.
    """
    if not awaited.done():
        end = time.monotonic() + (math.inf if patience is None else patience)
        disconnected = asyncio.create_task(wait_for_disconnect(request))
        try:
            while not awaited.done() and time.monotonic() < end:
                await asyncio.wait(
                    [awaited, disconnected], timeout=POLL_SECONDS, return_when="FIRST_COMPLETED"
                )
                if disconnected.done():
                    raise ApiError(499, "the client went away")
                check_cancelled(slot)
        finally:
            disconnected.cancel()
        if not awaited.done():
            return False
    awaited.result()
    return True


def check_cancelled(slot: Slot) -> None:
    """Raise an ApiError (503) if the server has cancelled the request."""
    if slot.cancelled.is_set():
        raise ApiError(503, "the server is shutting down", code="unavailable")
