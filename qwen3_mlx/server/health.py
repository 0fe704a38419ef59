"""What an operator, or a balancer of loads, wants to know of a server."""

import time
from typing import Any

from qwen3_mlx.server.service import Service
from qwen3_mlx.version import __version__

_STUCK = 120  # seconds without a step, though there is work


def health_of(service: Service) -> dict[str, Any]:
    """Return what a server is doing; it waits for nothing."""
    doing = service.llm.activity()
    stuck = doing.silent > _STUCK or service.preparing.is_stuck
    return {
        "status": "stopping" if service.stopping else "stuck" if stuck else "ok",
        "model": service.settings.model,
        "version": __version__,
        "uptime_seconds": round(time.monotonic() - service.started, 1),
        "context_length": service.context,
        "active": service.active,
        "max_requests": service.settings.max_requests,
        "preparing": service.preparing.state,
        "running": doing.running,
        "waiting": doing.waiting,
        "tokens_per_second": doing.tokens_per_second,
        "memory": {
            "used": doing.device_bytes,
            "caches": doing.cache_bytes,
            "caches_limit": doing.cache_limit,
        },
    }
