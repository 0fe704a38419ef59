"""Who may come in: by the name they call us, the page they come from, their key, their size.

A page in a browser can send requests to this machine, and a name of its own that it has pointed
here (DNS rebinding) makes them look like its own. So the name must be one of ours, and a page that
says where it comes from must be ours or one that was allowed. This machine's own name is ours where
the network is served: no page from elsewhere can have it, for it has no dot, or ends in .local.
"""

import ipaddress
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

from qwen3_mlx.server.body_memory import BodyMemory, BodyMemoryLimit
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.keys import Keys
from qwen3_mlx.server.settings import ORIGIN, Settings, own_names

_log = logging.getLogger(__name__)
access = logging.getLogger("qwen3_mlx.server.access")
OPEN_PATHS = ("/health", "/")
OPEN_FOLDER = "/page/"
REQUEST_ID = "x-request-id"
_GIVEN_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::[0-9]*)?")
# To the end, where what is cited was cut short.
_QUOTED = re.compile(r"""(?<!\w)(?:'(?:[^'\\]|\\.)*+(?:'|\\?$)|"(?:[^"\\]|\\.)*+(?:"|\\?$))""")
# Behind these a library or a template speaks, and may cite what it was given.
_CITED = re.compile(r"((?:schema|regex|grammar|choice|refuses these messages): ).*")
_MOST_REASON = 200  # characters, and of an address
_ELSEWHERE = ("cross-site", "same-site")  # than the page, a browser says


class Guard:
    """Lets in what may come in."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: Keys) -> None:
        self._app = app
        self._settings = settings
        self._keys = keys
        self._bodies = BodyMemoryLimit(settings)
        self._hosts = {"localhost", settings.host.lower(), *map(str.lower, settings.allowed_hosts)}
        if not settings.local:
            self._hosts |= own_names()
        self._hosts.discard("")  # an address of all interfaces, which is no name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["caller"] = _caller(scope)
        try:
            self._check(scope, Headers(scope=scope))
        except ApiError as error:
            note_error(scope, error)
            await error.response(scope["path"])(scope, receive, send)
            return
        with self._bodies.one(scope["caller"]) as body:
            await self._app(scope, _measured(receive, body), send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        sent = headers.get("host", "")
        host = _name(sent)
        if not self._is_ours(host):
            hint = f"; --allow-host {host} makes it one" if host else ""
            raise ApiError(403, f"{host or sent!r} is not a name of this server{hint}")
        origin = headers.get("origin")
        if origin is None and scope["method"] == "POST":
            if headers.get("sec-fetch-site") in _ELSEWHERE:
                origin = "another site"  # which the browser does not name
        if origin and not self._may_come_from(origin, f"{scope['scheme']}://{sent}"):
            hint = f"{origin} lets them" if ORIGIN.fullmatch(origin) else "'*' lets all pages"
            raise ApiError(403, f"pages of {origin} may not use this server; --cors-origin {hint}")
        self._bodies.check(int(headers.get("content-length") or "0"))
        path = scope["path"]
        if path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            return
        self._check_key(scope, headers)

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        if not self._keys.demanded:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        number = self._keys.find(given)
        if number is None:
            raise ApiError(
                401,
                "a key is needed: send Authorization: Bearer KEY, with the server's --api-key",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self._keys.several:
            scope["caller"] = f"key {number}"
            scope.setdefault("record", {})["key"] = number

    def _is_ours(self, host: str) -> bool:
        """Say whether a name is one of ours; an address is, for nobody else can point it here."""
        if host in self._hosts or host.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True

    def _may_come_from(self, origin: str, own: str) -> bool:
        allowed = self._settings.cors_origins
        return "*" in allowed or origin in allowed or origin.lower() == own.lower()


class AccessLog:
    """Writes a line of JSON for each request, without what was said in it, and numbers it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, and answer it in any case."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        record = scope.setdefault("record", {})
        number = _id_of(scope)

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = number
                if scope["path"].startswith("/v1/messages"):  # by the name that its clients read
                    headers["request-id"] = number
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except ClientDisconnect:
            status = status or 499
            record.setdefault("error", "the client went away")
        except Exception as error:  # noqa: BLE001 - a server does not die of a request
            _log.error("%s: %s", type(error).__name__, error)
            _log.debug("a request failed", exc_info=error)
            note_error(scope, ApiError.of(error))
            if not status:
                await ApiError.of(error).response(scope["path"])(scope, receive, watched)
        finally:
            took = round((time.perf_counter() - started) * 1e3, 1)
            path = scope["path"][:_MOST_REASON]
            about = {"method": scope["method"], "path": path, "status": status, "ms": took}
            write_record(
                {"id": number, "client": address_of(scope.get("client")), **about, **record}
            )


def _measured(receive: Receive, body: BodyMemory) -> Receive:
    async def measured() -> Message:
        message = await receive()
        body.grow(len(message.get("body", b"")))
        return message

    return measured


def write_record(record: Mapping[str, Any]) -> None:
    """Write a line of the log of requests."""
    access.info(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **record}))


def note_error(scope: Scope, error: ApiError) -> None:
    """Leave the reason of a refusal for the log."""
    scope.setdefault("record", {})["error"] = reason_of(error)


def reason_of(error: ApiError) -> str:
    """Return the message of an error for the log, without what it quotes of the request."""
    first = error.message.partition("\n")[0]
    return _CITED.sub(r"\1...", _QUOTED.sub("'...'", first))[:_MOST_REASON]


def address_of(client: tuple[str, int] | None) -> str | None:
    """Return the address of a client, if it has one: behind a Unix socket none does."""
    return client[0] if client else None


def _caller(scope: Scope) -> str:
    """Return what stands for a client where it is counted: a network, of IPv6, is one client's."""
    address = address_of(scope.get("client")) or ""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((found, 64), strict=False))
    return address


def _id_of(scope: Scope) -> str:
    """Return the id that a client or a proxy gave to its request, or a new one."""
    given = Headers(scope=scope).get(REQUEST_ID, "")
    return given if _GIVEN_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"


def _name(host: str) -> str:
    """Return the name in a Host header, in lower case; nothing if there is more than a port."""
    found = _HOST.fullmatch(host)
    return (found[1] or found[2]).lower() if found else ""
