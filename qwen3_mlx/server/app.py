"""The application: all routes over one engine, behind the guard."""

import asyncio
from collections.abc import Iterator
from importlib.resources import files
from threading import Lock
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from qwen3_mlx.api.llm import LLM
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.server.anthropic import routes as anthropic
from qwen3_mlx.server.errors import ApiError, from_status
from qwen3_mlx.server.guard import REQUEST_ID, AccessLog, Guard, note_error
from qwen3_mlx.server.health import health_of
from qwen3_mlx.server.ollama import routes as ollama
from qwen3_mlx.server.openai import routes as openai
from qwen3_mlx.server.request_body import reference
from qwen3_mlx.server.service import Service
from qwen3_mlx.server.settings import Settings
from qwen3_mlx.server.wire import RequestModel
from qwen3_mlx.version import __version__

_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# Nothing from elsewhere, nothing inline, no frames around it.
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


def make_app(llm: LLM, settings: Settings) -> tuple[FastAPI, Service]:
    """Make the application for a loaded checkpoint.

    Raises:
        Qwen3Error: the checkpoint cannot think as the settings want it to.
    """
    llm.thinking.resolve(settings.thinking)
    if settings.thinking_budget is not None and not llm.thinking.can_think:
        raise Qwen3Error("this checkpoint cannot think; leave thinking_budget out")
    service = Service(llm, settings)
    app = FastAPI(
        title="qwen3-mlx",
        version=__version__,
        docs_url=None,  # those pages load from elsewhere
        redoc_url=None,
        openapi_url=None,  # see _describe
    )
    app.include_router(openai.routes(service))
    app.include_router(anthropic.routes(service))
    app.include_router(ollama.routes(service))
    _add_health(app, service)
    _add_page(app)
    _add_errors(app)
    _describe(app)
    app.add_middleware(Guard, settings=settings, keys=service.keys)
    if settings.cors_origins:  # around the guard, so that pages may read what it says
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["warnings", "Retry-After", REQUEST_ID],
        )
    app.add_middleware(AccessLog)
    return app, service


def _describe(app: FastAPI) -> None:
    """Describe the bodies that `entry` reads, and no form of errors that is never sent."""
    writing = Lock()

    def description() -> dict[str, Any]:
        with writing:
            if app.openapi_schema is None:
                made = get_openapi(title=app.title, version=app.version, routes=app.routes)
                schemas = made["components"]["schemas"]
                for body in _bodies(RequestModel):
                    within = f"{reference(body)}/$defs/{{model}}"
                    schemas[body.__name__] = body.model_json_schema(ref_template=within)
                app.openapi_schema = made
            return app.openapi_schema

    @app.get("/openapi.json", include_in_schema=False)
    async def described() -> JSONResponse:
        return JSONResponse(await asyncio.to_thread(description))  # which takes a second at first

    app.openapi = description  # type: ignore[method-assign]


def _bodies(kind: type[RequestModel]) -> Iterator[type[RequestModel]]:
    for body in kind.__subclasses__():
        yield body
        yield from _bodies(body)


def _add_health(app: FastAPI, service: Service) -> None:
    @app.head("/health", include_in_schema=False)  # as wget --spider asks
    @app.get("/health", tags=["Operations"])
    async def health() -> JSONResponse:
        """Say that the server is at work, and how much; 503 when it is not."""
        found = health_of(service)
        return JSONResponse(found, 200 if found["status"] == "ok" else 503)


def _add_page(app: FastAPI) -> None:
    folder = files("qwen3_mlx") / "server" / "page"
    page = {
        entry.name: (entry.read_bytes(), _TYPES[f".{entry.name.rpartition('.')[2]}"])
        for entry in folder.iterdir()
    }

    def served(name: str) -> Response:
        if name not in page:
            raise ApiError(404, "there is nothing at this address")
        content, kind = page[name]
        return Response(content, media_type=kind, headers=_PAGE_HEADERS)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index() -> Response:
        return served("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        return served(name)


def _add_errors(app: FastAPI) -> None:
    def answered(request: Request, error: ApiError) -> JSONResponse:
        note_error(request.scope, error)
        return error.response(request.url.path)

    @app.exception_handler(ApiError)
    async def chunks_for(request: Request, error: ApiError) -> JSONResponse:
        return answered(request, error)

    @app.exception_handler(HTTPException)
    async def known(request: Request, error: HTTPException) -> JSONResponse:
        return answered(request, from_status(error.status_code, error.detail, error.headers))
