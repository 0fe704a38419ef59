"""The application: the routes of all protocols, the page and /health, behind the guard."""

from collections.abc import Sequence
from http import HTTPStatus
from importlib.resources import files

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from qwen3_mlx.api.llm import LLM
from qwen3_mlx.server.access_log import REQUEST_ID, AccessLog, error_response
from qwen3_mlx.server.anthropic import routes as anthropic
from qwen3_mlx.server.errors import ApiError, from_status
from qwen3_mlx.server.guard import Guard
from qwen3_mlx.server.health import health_of
from qwen3_mlx.server.metrics import CONTENT_TYPE
from qwen3_mlx.server.model_source import ModelSource
from qwen3_mlx.server.ollama import routes as ollama
from qwen3_mlx.server.openai import routes as openai
from qwen3_mlx.server.openapi import add_description
from qwen3_mlx.server.registry import PROTOCOLS, protocol_of
from qwen3_mlx.server.rerank import routes as rerank
from qwen3_mlx.server.responses import routes as responses
from qwen3_mlx.server.served_tools import routes as tool_routes
from qwen3_mlx.server.service import Service
from qwen3_mlx.server.settings import Settings
from qwen3_mlx.text.described_tool import DescribedTool
from qwen3_mlx.version import __version__

_TYPES = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "txt": "text/plain",
}
# The page loads nothing from other hosts and nothing inline, and cannot be framed.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def make_app(
    llm: LLM,
    settings: Settings,
    sources: Sequence[ModelSource] = (),
    tools: Sequence[DescribedTool] = (),
) -> tuple[FastAPI, Service]:
    """Create the application for a loaded checkpoint, the first of the `sources` if there are any.

    Without sources the checkpoint is the only one, and is never closed. The page offers `tools`.

    Raises:
        Qwen3Error: the checkpoint cannot think as the settings require.
        ValueError: a token of the settings' `logit_bias` is not in the vocabulary.
    """
    service = Service(llm, settings, sources or [ModelSource.of(llm, settings.model)])
    app = FastAPI(
        title="qwen3-mlx",
        version=__version__,
        docs_url=None,  # these pages load scripts from other hosts
        redoc_url=None,
        openapi_url=None,  # see add_description
    )
    protocols = (openai, responses, rerank, anthropic, ollama)
    routers = [*(protocol.routes(service) for protocol in protocols), tool_routes(service, tools)]
    for router in routers:
        app.include_router(router)
    _add_health(app, service)
    _add_page(app)
    _add_errors(app, [path for router in routers for path in _addresses(router)])
    add_description(app, [protocol.error_model for protocol in PROTOCOLS])
    app.add_middleware(Guard, settings=settings, keys=service.keys, quotas=service.quotas)
    if settings.cors_origins:  # outside the guard, so that pages can read its errors
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["warnings", "Retry-After", REQUEST_ID],
        )
    app.add_middleware(AccessLog, metrics=service.metrics)
    return app, service


def _add_health(app: FastAPI, service: Service) -> None:
    @app.head("/health", include_in_schema=False)  # used by wget --spider
    @app.get("/health", tags=["Operations"])
    async def health() -> JSONResponse:
        """Return the state and load of the server; 503 if it is stuck or shutting down."""
        state = health_of(service)
        return JSONResponse(state, 200 if state["status"] == "ok" else 503)

    @app.get("/metrics", tags=["Operations"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return counters, durations and memory in the text format of Prometheus."""
        return Response(service.metrics.render(health_of(service)), media_type=CONTENT_TYPE)


def _add_page(app: FastAPI) -> None:
    folder = files("qwen3_mlx") / "server" / "page"
    vendored = {f"vendor/{entry.name}": entry for entry in (folder / "vendor").iterdir()}
    entries = {entry.name: entry for entry in folder.iterdir() if entry.is_file()} | vendored
    page = {
        name: (entry.read_bytes(), _TYPES[name.rpartition(".")[2]])
        for name, entry in entries.items()
    }

    def served(name: str) -> Response:
        if name not in page:
            raise ApiError(404, "there is nothing at this address")
        content, kind = page[name]
        return Response(content, media_type=kind, headers=_PAGE_HEADERS)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index() -> Response:
        return served("index.html")

    @app.get("/page/{name:path}", include_in_schema=False)
    async def asset(name: str) -> Response:
        return served(name)


def _addresses(router: APIRouter) -> list[str]:
    """Return the addresses that are described and have no variable part."""
    routes = (route for route in router.routes if isinstance(route, APIRoute))
    return [route.path for route in routes if route.include_in_schema and "{" not in route.path]


def _add_errors(app: FastAPI, addresses: Sequence[str]) -> None:
    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
        return error_response(request.scope, error)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        converted = from_status(error.status_code, error.detail, error.headers)
        if error.status_code == HTTPStatus.NOT_FOUND:
            owner = protocol_of(request.url.path)
            known = ", ".join(path for path in addresses if protocol_of(path) is owner)
            converted = ApiError(404, f"{converted.message}; there are {known}")
        return error_response(request.scope, converted)
