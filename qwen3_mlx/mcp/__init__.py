"""Tools of MCP servers: `connect` starts the servers that a configuration names."""

from qwen3_mlx.mcp.servers import Call as Call
from qwen3_mlx.mcp.servers import Servers as Servers
from qwen3_mlx.mcp.servers import connect as connect
