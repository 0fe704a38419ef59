"""The description of the API, /openapi.json.

Bodies and errors are described by reference to their models. FastAPI would describe only bodies
that it parses itself, and a validation error that is never sent. It would also create a validator
for each error of each route, which takes longer than the rest of the application.
"""

import asyncio
from collections.abc import Iterator, Sequence
from threading import Lock
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse

from qwen3_mlx.server.wire import RequestModel, WireModel


def json_content(model: type[WireModel]) -> dict[str, Any]:
    """Return the content of a JSON request or response, as OpenAPI describes it."""
    return {"application/json": {"schema": {"$ref": _reference(model)}}}


def route_schema(
    body: type[RequestModel], response: Any = None, stream: str | None = None
) -> dict[str, Any]:
    """Return the keywords of a route that declare its body, its response, and its stream."""
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": json_content(body)}},
        "response_model": response,
        "responses": {200: {"content": {stream: {}}}} if stream else {},
    }


def add_description(app: FastAPI, errors: Sequence[type[WireModel]]) -> None:
    """Add /openapi.json, with the schemas of all bodies and of the given errors."""
    lock = Lock()

    def description() -> dict[str, Any]:
        with lock:
            if app.openapi_schema is None:
                schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
                schemas = schema["components"]["schemas"]
                for model in (*_bodies(RequestModel), *errors):
                    within = f"{_reference(model)}/$defs/{{model}}"
                    schemas[model.__name__] = model.model_json_schema(ref_template=within)
                app.openapi_schema = schema
            return app.openapi_schema

    @app.get("/openapi.json", include_in_schema=False)
    async def described() -> JSONResponse:
        return JSONResponse(await asyncio.to_thread(description))  # the first call takes a second

    app.openapi = description  # type: ignore[method-assign]


def _bodies(kind: type[RequestModel]) -> Iterator[type[RequestModel]]:
    for body in kind.__subclasses__():
        yield body
        yield from _bodies(body)


def _reference(model: type[WireModel]) -> str:
    return f"#/components/schemas/{model.__name__}"
