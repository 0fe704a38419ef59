"""Tools of MCP servers that the page offers to the model, and calls once its user allows that.

A call is made for whoever may send requests to this server, but not for the pages of other sites,
not even of those that may use the model.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request

from qwen3_mlx.server.endpoint import admitted
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.openai.protocol import PROTOCOL
from qwen3_mlx.server.openapi import route_schema
from qwen3_mlx.server.service import Service
from qwen3_mlx.server.waiting import wait_for
from qwen3_mlx.server.wire import Json, RequestModel, WireModel
from qwen3_mlx.text.described_tool import DescribedTool, with_unique_names
from qwen3_mlx.text.tool_calls import tool_schema


class ToolCallRequest(RequestModel):
    """`POST /v1/mcp/call`: a call as the model requested it."""

    name: str
    arguments: dict[str, Any] = {}


class ToolOut(WireModel):
    """A tool as requests to the model have it, and the name of its server."""

    type: str
    server: str
    function: dict[str, Any]


class ToolsOut(WireModel):
    """The tools of all servers."""

    object: str
    data: list[ToolOut]


class ToolResultOut(WireModel):
    """The text that the model is to read: the result, or why there is none."""

    content: str


def routes(service: Service, tools: Sequence[DescribedTool]) -> APIRouter:
    """Create the routes."""
    router = PROTOCOL.router("/v1/mcp")
    by_name = {tool.name: tool for tool in with_unique_names(tools, ())}

    def check_page(request: Request) -> None:
        if request.scope.get("foreign_page"):
            raise ApiError(403, "only the page of this server may use its tools")

    @router.get("/tools", response_model=ToolsOut)
    async def listed(request: Request) -> Json:
        """List the tools of the MCP servers that this server was started with."""
        check_page(request)
        data = [{**tool_schema(tool), "server": tool.server} for tool in by_name.values()]
        return Json({"object": "list", "data": data})

    @router.post("/call", **route_schema(ToolCallRequest, ToolResultOut))
    async def call(request: Request) -> Json:
        """Call a tool. It is not called if the client disconnects while it waits."""
        check_page(request)
        async with admitted(service, request, ToolCallRequest) as (slot, body, _):
            if not (tool := by_name.get(body.name)):
                raise ApiError(404, f"there is no tool {body.name!r:.100} here", param="name")
            slot.record["tool"] = tool.name
            calling = asyncio.wrap_future(tool.start(body.arguments))
            try:
                await wait_for(calling, request, slot)
                return Json({"content": calling.result()})
            finally:
                calling.cancel()

    return router
