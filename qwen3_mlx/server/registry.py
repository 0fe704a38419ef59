"""The protocols that are served, and the owner of each path."""

from qwen3_mlx.server.anthropic.protocol import PROTOCOL as ANTHROPIC
from qwen3_mlx.server.ollama.protocol import PROTOCOL as OLLAMA
from qwen3_mlx.server.openai.protocol import PROTOCOL as OPENAI
from qwen3_mlx.server.protocol import Protocol

PROTOCOLS = (OPENAI, ANTHROPIC, OLLAMA)


def protocol_of(path: str) -> Protocol:
    """Return the protocol that a path belongs to."""
    owners = [protocol for protocol in PROTOCOLS if path.startswith(protocol.paths)]
    return max(owners, key=lambda protocol: len(protocol.paths))
