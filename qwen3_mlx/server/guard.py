"""Access control: checks the host, the origin, the API key and the size of each request.

A web page can send requests to this machine, and if it points a host name of its own here (DNS
rebinding), the browser takes them for same-origin requests. So the Host header must be a name of
this server, and the Origin header, if there is one, must be this server or an allowed origin. The
name of this machine is accepted where the server listens on the network: no page from elsewhere can
have that name, because it has no dot or ends in .local.
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
_CLIENT_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::[0-9]*)?")
# A quotation that was truncated extends to the end.
_QUOTED = re.compile(r"""(?<!\w)(?:'(?:[^'\\]|\\.)*+(?:'|\\?$)|"(?:[^"\\]|\\.)*+(?:"|\\?$))""")
# After these comes a message of a library or a template, which may quote the request.
_CITED = re.compile(r"((?:schema|regex|grammar|choice|refuses these messages): ).*")
_MAX_LOGGED = 200  # characters of an error, and of a path
_FOREIGN_SITES = ("cross-site", "same-site")  # values of Sec-Fetch-Site


class Guard:
    """Refuses requests that fail a check; counts the memory of the bodies of the others."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: Keys) -> None:
        self._app = app
        self._settings = settings
        self._keys = keys
        self._bodies = BodyMemoryLimit(settings)
        self._hosts = {"localhost", settings.host.lower(), *map(str.lower, settings.allowed_hosts)}
        if not settings.local:
            self._hosts |= own_names()
        self._hosts.discard("")  # stands for all interfaces, and is not a name

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
            await self._app(scope, _counting(receive, body), send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        sent = headers.get("host", "")
        host = _host_name(sent)
        if not self._is_own_host(host):
            hint = f"; --allow-host {host} makes it one" if host else ""
            raise ApiError(403, f"{host or sent!r} is not a name of this server{hint}")
        origin = headers.get("origin")
        # A POST without Origin may come from a foreign page; Sec-Fetch-Site shows that.
        if origin is None and scope["method"] == "POST":
            if headers.get("sec-fetch-site") in _FOREIGN_SITES:
                origin = "another site"
        if origin and not self._is_allowed_origin(origin, f"{scope['scheme']}://{sent}"):
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
        key = token if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        number = self._keys.find(key)
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

    def _is_own_host(self, host: str) -> bool:
        """Return whether a Host is this server's; an IP address is, since DNS cannot rebind it."""
        if host in self._hosts or host.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True

    def _is_allowed_origin(self, origin: str, own: str) -> bool:
        allowed = self._settings.cors_origins
        return "*" in allowed or origin in allowed or origin.lower() == own.lower()


class AccessLog:
    """Gives each request an id, and logs a line of JSON for it, without its content."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

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
                # Anthropic's clients read the id under another name.
                if scope["path"].startswith("/v1/messages"):
                    headers["request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = status or 499
            record.setdefault("error", "the client went away")
        except Exception as error:  # noqa: BLE001 - a failed request must not stop the server
            _log.error("%s: %s", type(error).__name__, error)
            _log.debug("a request failed", exc_info=error)
            note_error(scope, ApiError.of(error))
            if not status:
                await ApiError.of(error).response(scope["path"])(scope, receive, send_with_id)
        finally:
            elapsed = round((time.perf_counter() - started) * 1e3, 1)
            path = scope["path"][:_MAX_LOGGED]
            fields = {"method": scope["method"], "path": path, "status": status, "ms": elapsed}
            write_record(
                {"id": request_id, "client": address_of(scope.get("client")), **fields, **record}
            )


def _counting(receive: Receive, body: BodyMemory) -> Receive:
    """Return a `receive` that adds the size of each piece to `body`."""

    async def counting() -> Message:
        message = await receive()
        body.grow(len(message.get("body", b"")))
        return message

    return counting


def write_record(record: Mapping[str, Any]) -> None:
    """Write a line to the access log."""
    access.info(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **record}))


def note_error(scope: Scope, error: ApiError) -> None:
    """Record the reason of an error for the access log."""
    scope.setdefault("record", {})["error"] = reason_of(error)


def reason_of(error: ApiError) -> str:
    """Return the message of an error for the log, without quotations of the request."""
    first = error.message.partition("\n")[0]
    return _CITED.sub(r"\1...", _QUOTED.sub("'...'", first))[:_MAX_LOGGED]


def address_of(client: tuple[str, int] | None) -> str | None:
    """Return the address of a client; None if it comes by a Unix socket."""
    return client[0] if client else None


def _caller(scope: Scope) -> str:
    """Return the key under which a client is counted: an address, or the /64 network of IPv6."""
    address = address_of(scope.get("client")) or ""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped:
            return str(ip.ipv4_mapped)
        return str(ipaddress.ip_network((ip, 64), strict=False))
    return address


def _id_of(scope: Scope) -> str:
    """Return the request id that the client or a proxy sent, or a new one."""
    sent = Headers(scope=scope).get(REQUEST_ID, "")
    return sent if _CLIENT_ID.fullmatch(sent) else f"req_{secrets.token_hex(12)}"


def _host_name(host: str) -> str:
    """Return the name in a Host header, in lower case and without the port; "" if malformed."""
    match = _HOST.fullmatch(host)
    return (match[1] or match[2]).lower() if match else ""
