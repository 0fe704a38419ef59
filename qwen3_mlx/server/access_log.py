"""The access log: a line of JSON for each request, with an id and without its content."""

import json
import logging
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.metrics import Metrics
from qwen3_mlx.server.registry import protocol_of
from qwen3_mlx.server.wire import Json

_log = logging.getLogger(__name__)
_access = logging.getLogger("qwen3_mlx.server.access")
REQUEST_ID = "x-request-id"
_CLIENT_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
# A quotation that was truncated extends to the end.
_QUOTED = re.compile(r"""(?<!\w)(?:'(?:[^'\\]|\\.)*+(?:'|\\?$)|"(?:[^"\\]|\\.)*+(?:"|\\?$))""")
# After these comes a message of a library or a template, which may quote the request.
_CITED = re.compile(r"((?:schema|regex|grammar|choice|refuses these messages): ).*")
_MAX_LOGGED = 200  # characters of an error, and of a path


class AccessLog:
    """Gives each request an id, logs a line of JSON for it without its content, and counts it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; send an error response if the application fails."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        record = scope.setdefault("record", {})
        request_id = _id_of(scope)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = request_id
                if own_header := protocol_of(scope["path"]).request_id_header:
                    headers[own_header] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = status or 499
            record.setdefault("error", "the client went away")
        except Exception as error:  # noqa: BLE001 - a failed request must not stop the server
            _log.error("%s: %s", type(error).__name__, error)
            _log.debug("a request failed", exc_info=error)
            response = error_response(scope, ApiError.of(error))
            if not status:
                await response(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - started
            self._metrics.add_request(scope, status, seconds, record)
            elapsed = round(seconds * 1e3, 1)
            path = scope["path"][:_MAX_LOGGED]
            fields = {"method": scope["method"], "path": path, "status": status, "ms": elapsed}
            write_record(
                {"id": request_id, "client": address_of(scope.get("client")), **fields, **record}
            )


def write_record(record: Mapping[str, Any]) -> None:
    """Write a line to the access log."""
    _access.info(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **record}))


def error_response(scope: Scope, error: ApiError) -> Json:
    """Return an error in the form of its protocol, and record its reason for the access log."""
    scope.setdefault("record", {})["error"] = reason_of(error)
    body = protocol_of(scope["path"]).error_body(error)
    return Json(body, error.status, headers=dict(error.headers or {}))


def reason_of(error: ApiError) -> str:
    """Return the message of an error for the log, without quotations of the request."""
    first = error.message.partition("\n")[0]
    return _CITED.sub(r"\1...", _QUOTED.sub("'...'", first))[:_MAX_LOGGED]


def address_of(client: tuple[str, int] | None) -> str | None:
    """Return the address of a client; None if it comes by a Unix socket."""
    return client[0] if client else None


def _id_of(scope: Scope) -> str:
    """Return the request id that the client or a proxy sent, or a new one."""
    sent = Headers(scope=scope).get(REQUEST_ID, "")
    return sent if _CLIENT_ID.fullmatch(sent) else f"req_{secrets.token_hex(12)}"
