"""`qwen3 ps`: the servers of this user that run on this machine."""

import json
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from qwen3_mlx.cli.console import format_bytes, note, print_table
from qwen3_mlx.cli.options import Json
from qwen3_mlx.server.running import RunningServer, running_servers

_HEADER = ("pid", "model", "address", "state", "requests", "memory", "tokens/s", "up")


def ps(*, as_json: Json = False) -> None:
    """Show the servers that run on this machine: loaded models, address, requests, memory.

    API keys are not needed. Servers of other users are not shown.
    """
    found = running_servers()
    if as_json:
        rows = [{**asdict(entry), "url": entry.url, "health": state} for entry, state in found]
        print(json.dumps(rows, indent=1))
    elif found:
        print_table(_HEADER, (_cells(entry, state) for entry, state in found))
    else:
        note("No server of yours is running; qwen3 serve starts one.")


def _cells(entry: RunningServer, state: dict[str, Any] | None) -> list[str]:
    head = [str(entry.pid), entry.model, entry.url]
    if state is None:
        return [*head, "does not answer", "-", "-", "-", "-"]
    waiting = f", {state['waiting']} waiting" if state["waiting"] else ""
    loaded = [model["name"] for model in state["models"] if model["state"] == "loaded"]
    head[1] = ", ".join(loaded) or f"{entry.model}, not loaded"
    return [
        *head,
        state["status"],
        f"{state['running']}{waiting}",
        format_bytes(state["memory"]["used"]),
        f"{state['tokens_per_second']:,.1f}",
        str(timedelta(seconds=int(state["uptime_seconds"]))),
    ]
