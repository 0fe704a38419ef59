"""The state of the server, for operators and load balancers."""

import math
import time
from typing import Any

from qwen3_mlx.server.models import ServedModel
from qwen3_mlx.server.service import Service
from qwen3_mlx.version import __version__

_STUCK = 120  # seconds without a step although requests are running


def health_of(service: Service) -> dict[str, Any]:
    """Return the state of the server and of its models, without waiting for an engine."""
    pool = service.models
    activities = [llm.activity() for _, llm in pool.loaded]
    stuck = any(activity.seconds_since_step > _STUCK for activity in activities)
    stuck = stuck or service.preparing.is_stuck

    status = "stuck" if stuck else "ok"
    if service.stopping:
        status = "stopping"
    if service.failure:
        status = "down"

    def total(field: str) -> Any:
        return sum(getattr(activity, field) for activity in activities)

    return {
        "status": status,
        **({"reason": str(service.failure)} if service.failure else {}),
        "model": pool.default.name,
        "models": [_state_of(model, pool.seconds_left(model)) for model in pool.models],
        "version": __version__,
        "uptime_seconds": round(time.monotonic() - service.started, 1),
        "context_length": pool.default.context,
        "active": service.active,
        "max_requests": service.settings.max_requests,
        "preparing": service.preparing.state,
        "computing": service.computing.state,
        "running": total("running"),
        "waiting": total("waiting"),
        "tokens_per_second": round(total("tokens_per_second"), 1),
        "memory": {
            # Of the process, so each engine reports the same.
            "used": max((activity.device_bytes for activity in activities), default=0),
            "caches": total("cache_bytes"),
            "caches_limit": total("cache_limit"),
        },
    }


def _state_of(model: ServedModel, seconds: float) -> dict[str, Any]:
    """Return the state of a model; null for what it has only while it is loaded."""
    caches = model.llm.activity().cache_bytes if model.llm else 0
    return {
        "name": model.name,
        "kind": model.kind,
        "state": model.state,
        "requests": model.leases + len(model.waiting),
        "bytes": model.weight_bytes + caches if model.llm else 0,
        "seconds_left": round(seconds, 1) if model.llm and seconds < math.inf else None,
    }
