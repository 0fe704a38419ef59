"""Tools of an MCP server: the model calls the calculator that mcp_calculator.py serves."""

import sys
from pathlib import Path

from qwen3_mlx import SamplingParams, load, mcp


def main() -> None:
    """Ask for a sum, which the model hands to the server's tool, and print all messages."""
    script = Path(__file__).parent / "mcp_calculator.py"
    config = {"mcpServers": {"sums": {"command": sys.executable, "args": [str(script)]}}}
    with mcp.connect(config) as servers, load() as llm:
        greedy = SamplingParams(temperature=0)
        reply = llm.run(
            "What is 1234 + 4321?", tools=servers.tools, thinking=False, sampling=greedy
        )
        for message in reply.messages:
            for call in message.get("tool_calls", []):
                print(f"{call['function']['name']}({call['function']['arguments']})")
            if message["content"]:
                print(f"{message['role']}: {message['content']}")


if __name__ == "__main__":
    main()
