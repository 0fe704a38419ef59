"""The state of the server, for operators and load balancers."""

import time
from typing import Any

from qwen3_mlx.server.service import Service
from qwen3_mlx.version import __version__

_STUCK = 120  # seconds without a step although requests are running


def health_of(service: Service) -> dict[str, Any]:
    """Return the state of the server, without waiting for the engine."""
    activity = service.llm.activity()
    stuck = activity.seconds_since_step > _STUCK or service.preparing.is_stuck
    return {
        "status": "stopping" if service.stopping else "stuck" if stuck else "ok",
        "model": service.settings.model,
        "version": __version__,
        "uptime_seconds": round(time.monotonic() - service.started, 1),
        "context_length": service.context,
        "active": service.active,
        "max_requests": service.settings.max_requests,
        "preparing": service.preparing.state,
        "running": activity.running,
        "waiting": activity.waiting,
        "tokens_per_second": activity.tokens_per_second,
        "memory": {
            "used": activity.device_bytes,
            "caches": activity.cache_bytes,
            "caches_limit": activity.cache_limit,
        },
    }
