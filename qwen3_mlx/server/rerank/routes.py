"""Routes of reranking: one endpoint at the addresses of all clients."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qwen3_mlx.server.endpoint import answer_request
from qwen3_mlx.server.openai.protocol import PROTOCOL
from qwen3_mlx.server.openapi import route_schema
from qwen3_mlx.server.rerank.endpoint import Rerank
from qwen3_mlx.server.rerank.schema import RankOut, RerankOut, RerankRequest
from qwen3_mlx.server.service import Service


def routes(service: Service) -> APIRouter:
    """Create the routes."""
    router = PROTOCOL.router("")
    schema = route_schema(RerankRequest, RerankOut | list[RankOut])

    @router.post("/v1/rerank", **schema)  # of Jina's clients
    @router.post("/v2/rerank", **schema)  # of Cohere's
    @router.post("/rerank", **schema)  # of vLLM's, infinity's and TEI's
    async def rerank(request: Request) -> Response:
        """Score documents for a query with a reranker; the best comes first."""
        return await answer_request(service, request, RerankRequest, Rerank)

    return router
