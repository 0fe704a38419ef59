"""Who may come in: by the name they call us, the page they come from, their key, their size.

A page in a browser can send requests to this machine, and a name of its own that it has pointed
here (DNS rebinding) makes them look like its own. So the name must be one of ours, and a page that
says where it comes from must be ours or one that was allowed.
"""

import hmac
import ipaddress
import json
import logging
import time
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.settings import Settings

_log = logging.getLogger(__name__)
access = logging.getLogger("qwen3_mlx.server.access")
OPEN_PATHS = ("/health", "/")
OPEN_FOLDER = "/page/"
_ELSEWHERE = ("cross-site", "same-site")  # than the page, a browser says


class Guard:
    """Lets in what may come in."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._hosts = {"localhost", settings.host.lower(), *map(str.lower, settings.allowed_hosts)}
        self._key = settings.api_key.encode() if settings.api_key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(Headers(scope=scope), scope["path"], scope["method"])
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        await self._app(scope, self._measured(receive), send)

    def _check(self, headers: Headers, path: str, method: str) -> None:
        host = _name(f"//{headers.get('host', '')}")
        if not self._is_ours(host):
            raise ApiError(
                403, f"{host!r} is not a name of this server; --allow-host {host} makes it one"
            )
        origin = headers.get("origin")
        if origin is None and method == "POST" and headers.get("sec-fetch-site") in _ELSEWHERE:
            origin = "elsewhere"  # a page that a browser let go without saying which
        if origin and not self._may_come_from(origin, headers["host"]):
            raise ApiError(
                403, f"pages of {origin} may not use this server; --cors-origin {origin} lets them"
            )
        if int(headers.get("content-length") or 0) > self._settings.max_body:
            raise self._too_large()
        if path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            return
        self._check_key(headers)

    def _check_key(self, headers: Headers) -> None:
        if self._key is None:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self._key):
            raise ApiError(
                401,
                "a key is needed: send Authorization: Bearer KEY, with the server's --api-key",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _is_ours(self, host: str) -> bool:
        """Say whether a name is one of ours; an address is, for nobody else can point it here."""
        if host in self._hosts or host.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True

    def _may_come_from(self, origin: str, host: str) -> bool:
        allowed = self._settings.cors_origins
        return "*" in allowed or origin in allowed or _parts(origin).netloc == host

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the request is larger than {self._settings.max_body:,} bytes (--max-body)"
        )

    def _measured(self, receive: Receive) -> Receive:
        size = 0

        async def measured() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._settings.max_body:
                raise HTTPException(413, self._too_large().message)
            return message

        return measured


class AccessLog:
    """Writes a line of JSON for each request, without what was said in it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, and answer it in any case."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        record = scope.setdefault("record", {})

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:  # noqa: BLE001 - a server does not die of a request
            _log.error("%s: %s", type(error).__name__, error)
            _log.debug("a request failed", exc_info=error)
            if not status:
                await ApiError.of(error).response(scope["path"])(scope, receive, watched)
        finally:
            line = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "ms": round((time.perf_counter() - started) * 1e3, 1),
                **record,
            }
            access.info(json.dumps(line))


def _name(url: str) -> str:
    return (_parts(url).hostname or "").lower()


def _parts(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # as of "http://["
        return urlsplit("")
