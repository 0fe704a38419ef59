"""Work that only saves time or memory: where it fails, the engine goes on without it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

_log = logging.getLogger(__name__)


@contextmanager
def best_effort(action: str) -> Iterator[None]:
    """Log an error of the block, which does `action`, and go on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - see above
        _log.warning("%s failed, and is done without: %s", action, str(error) or repr(error))


def free_buffers() -> None:
    """Return the memory of freed arrays to the system."""
    with best_effort("freeing memory"):
        mx.clear_cache()
