"""Access control: checks the host, the origin, the API key and the size of each request.

A web page can send requests to this machine, and if it points a host name of its own here (DNS
rebinding), the browser takes them for same-origin requests. So the Host header must be a name of
this server, and the Origin header, if there is one, must be this server or an allowed origin. The
name of this machine is accepted where the server listens on the network: no page from elsewhere can
have that name, because it has no dot or ends in .local.
"""

import ipaddress
import re
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen3_mlx.server.access_log import address_of, error_response
from qwen3_mlx.server.body_memory import BodyMemory, BodyMemoryLimit
from qwen3_mlx.server.errors import ApiError
from qwen3_mlx.server.keys import Keys
from qwen3_mlx.server.quotas import Quotas
from qwen3_mlx.server.settings import ORIGIN, Settings, own_names

_OPEN_PATHS = ("/health", "/")
_OPEN_FOLDER = "/page/"
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::[0-9]*)?")
_FOREIGN_SITES = ("cross-site", "same-site")  # values of Sec-Fetch-Site


class Guard:
    """Refuses requests that fail a check; counts the memory of the bodies of the others."""

    def __init__(self, app: ASGIApp, settings: Settings, keys: Keys, quotas: Quotas) -> None:
        self._app = app
        self._settings = settings
        self._keys = keys
        self._quotas = quotas
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
            await error_response(scope, error)(scope, receive, send)
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
        if origin and origin.lower() != f"{scope['scheme']}://{sent}".lower():
            scope["foreign_page"] = True
            if not {"*", origin}.intersection(self._settings.cors_origins):
                hint = f"{origin} lets them" if ORIGIN.fullmatch(origin) else "'*' lets all pages"
                raise ApiError(
                    403, f"pages of {origin} may not use this server; --cors-origin {hint}"
                )
        self._bodies.check(int(headers.get("content-length") or "0"))
        path = scope["path"]
        if path in _OPEN_PATHS or path.startswith(_OPEN_FOLDER):
            return
        self._check_key(scope, headers)

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        if not self._keys.required:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = token if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        found = self._keys.find(key)
        if found is None:
            raise ApiError(
                401,
                "a key is needed: send Authorization: Bearer KEY, with one of the server's "
                "(--api-key, --keys)",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        # Not the key's name: a change of the key file may give that to another key.
        scope["owner"] = sha256(key.strip().encode()).hexdigest()
        if self._keys.several or found.is_limited:
            scope["caller"] = f"key {found.name}"
            scope["key"] = found
            scope.setdefault("record", {})["key"] = found.name
        if scope["method"] == "POST":
            self._quotas.admit(found)

    def _is_own_host(self, host: str) -> bool:
        """Return whether a Host is this server's; an IP address is, since DNS cannot rebind it."""
        if host in self._hosts or host.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return True


def _counting(receive: Receive, body: BodyMemory) -> Receive:
    """Return a `receive` that adds the size of each piece to `body`."""

    async def counting() -> Message:
        message = await receive()
        body.grow(len(message.get("body", b"")))
        return message

    return counting


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


def _host_name(host: str) -> str:
    """Return the name in a Host header, in lower case and without the port; "" if malformed."""
    match = _HOST.fullmatch(host)
    return (match[1] or match[2]).lower() if match else ""
