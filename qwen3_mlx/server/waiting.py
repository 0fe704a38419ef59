"""The wait of a request for its model, which is being loaded or makes room for another."""

import asyncio
import math
import time
from typing import Any

from fastapi import Request

from qwen3_mlx.server.admission import Slot
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.models import Lease
from qwen3_mlx.server.preparing import wait_for_disconnect
from qwen3_mlx.text.fair_queue import POLL_SECONDS


async def wait_for_model(
    lease: Lease, request: Request, slot: Slot, patience: float | None
) -> bool:
    """Wait until a model can be used, at most `patience` s; return whether it can.

    Raises:
        ApiError: it cannot be loaded, or the wait was given up.
    """
    if not lease.ready.done():
        end = time.monotonic() + (math.inf if patience is None else patience)
        disconnected = asyncio.create_task(wait_for_disconnect(request))
        awaited: list[asyncio.Future[Any]] = [lease.ready, disconnected]
        try:
            while not lease.ready.done() and time.monotonic() < end:
                await asyncio.wait(awaited, timeout=POLL_SECONDS, return_when="FIRST_COMPLETED")
                if disconnected.done():
                    raise ApiError(499, "the client went away")
                check_cancelled(slot)
        finally:
            disconnected.cancel()
        if not lease.ready.done():
            return False
    lease.ready.result()
    return True


def check_cancelled(slot: Slot) -> None:
    """Raise an ApiError (503) if the server has cancelled the request."""
    if slot.cancelled.is_set():
        raise ApiError(503, "the server is shutting down", code="unavailable")
