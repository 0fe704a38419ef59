"""An MCP server with one tool, a calculator; any MCP client can start it."""

from mcp.server import MCPServer

server = MCPServer("calculator")


@server.tool(description="Evaluate an arithmetic expression")
def calculator(expression: str) -> str:
    """Add the numbers of an expression with + between them."""
    return str(sum(int(part) for part in expression.split("+")))


if __name__ == "__main__":
    server.run()
