"""What the tests of this room, and of its users, share."""

import sys
from pathlib import Path
from typing import Any

from qwen3_mlx.mcp import Servers


def by_hand(*tools: str, **more: Any) -> dict[str, Any]:
    """Give the entry of a server by hand in a configuration."""
    script = Path(__file__).parent / "server.py"
    # -S: without site-packages Python starts in 10 ms.
    return {"command": sys.executable, "args": ["-S", str(script), ",".join(tools)], **more}


def call(servers: Servers, tool: str, /, **arguments: Any) -> str:
    """Call a tool by its name."""
    (found,) = (each for each in servers.tools if each.name == tool)
    return str(found(**arguments))
