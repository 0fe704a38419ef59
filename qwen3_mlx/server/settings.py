"""Server configuration."""

import ipaddress
import math
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from qwen3_mlx.engine.sampling_params import SamplingParams
from qwen3_mlx.model.sizes import hub_name

REASONING_FIELDS = ("both", "reasoning_content", "reasoning", "none")
_CLIENT_SHARE = 3 / 4  # of `max_requests`, for one client where there may be others
_HOST = re.compile(r"[a-z0-9_]([a-z0-9._-]*[a-z0-9_])?", re.IGNORECASE)
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Server configuration, fixed at the start.

    `key_file` has one key a line (see `keys`). With several keys, or limits, a client is identified
    by its key, otherwise by its address, which a proxy in `trusted_proxies` may forward.
    `tls_cert` is a certificate chain in PEM for HTTPS, and `tls_key` its private key, None if the
    same file has it. `max_per_client` limits the replies of one client, running and waiting; None
    is three quarters of `max_requests`, or all of them where only this machine is served. A reply
    that is not complete after `request_timeout` ends as it is; one without a first token fails with
    504.
    `model` is the name that clients see of the default model. A model that is idle is closed after
    `model_keep_alive`. `thinking` and `thinking_budget` are the defaults for a request that sets
    neither; `seed` and each field of `sampling` hold for requests that do not set it.
    `reasoning_field` is where OpenAI's clients find the thinking. `allow_pull` lets clients of
    Ollama's API download models to this machine. Times are in seconds, sizes in bytes.

    Raises:
        ValueError: a value is out of its range.
    """

    model: str
    host: str = "127.0.0.1"
    api_key: str | None = None
    key_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    trusted_proxies: Sequence[str] = ()
    allowed_hosts: Sequence[str] = ()
    cors_origins: Sequence[str] = ()
    thinking: bool | None = None
    thinking_budget: int | None = None
    seed: int | None = None
    sampling: SamplingParams = SamplingParams()
    reasoning_field: str = "both"
    max_requests: int = 64  # running and waiting
    max_per_client: int | None = None
    request_timeout: float | None = None
    max_body: int = 32 << 20
    keep_alive: float = 5.0  # between keep-alives on a stream that has no events
    shutdown: float = 10.0  # for running replies to finish
    model_keep_alive: float = math.inf
    log_content: bool = False
    allow_pull: bool = False

    def __post_init__(self) -> None:
        if self.reasoning_field not in REASONING_FIELDS:
            raise ValueError(
                f"reasoning_field must be one of {', '.join(REASONING_FIELDS)}, "
                f"not {self.reasoning_field!r}"
            )
        if self.max_requests < 1:
            raise ValueError(f"max_requests must be at least 1, not {self.max_requests}")
        if self.max_per_client is not None and self.max_per_client < 1:
            raise ValueError(f"max_per_client must be at least 1, not {self.max_per_client}")
        timeout = self.request_timeout
        if timeout is not None and not 0 < timeout < math.inf:
            raise ValueError(f"request_timeout must be more than 0 seconds, not {timeout}")
        if not 0 <= self.shutdown < math.inf:
            raise ValueError(f"shutdown must be 0 seconds or more, not {self.shutdown}")
        if self.thinking_budget is not None and self.thinking_budget < 0:
            raise ValueError(f"thinking_budget must be at least 0, not {self.thinking_budget}")
        if self.thinking is False and self.thinking_budget is not None:
            raise ValueError("thinking_budget is for thinking, which thinking=False switches off")
        self._check_access()
        self._check_names()

    def _check_access(self) -> None:
        if self.api_key is not None and not self.api_key.isascii():
            raise ValueError("api_key must be plain ASCII: it travels in a header")
        if self.api_key is not None and self.key_file is not None:
            raise ValueError(
                "a key_file and an api_key (QWEN3_API_KEY) are two sources of keys; give one"
            )
        if self.tls_key is not None and self.tls_cert is None:
            raise ValueError("tls_key is the key of a certificate; name that as tls_cert")

    def _check_names(self) -> None:
        for origin in self.cors_origins:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"allowed origin {origin!r} is not an origin; "
                    "write https://example.com or http://localhost:3000, or * for all"
                )
        for name in self.allowed_hosts:
            if not _HOST.fullmatch(name):
                raise ValueError(
                    f"allowed host {name!r} is not a host name; "
                    "write mac.local, without http:// and without a port"
                )
        for proxy in self.trusted_proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError:
                raise ValueError(
                    f"trusted proxy {proxy!r} is not an address; "
                    "write 127.0.0.1, or 10.0.0.0/8 for a network"
                ) from None

    @property
    def scheme(self) -> str:
        """The scheme of the server's addresses."""
        return "http" if self.tls_cert is None else "https"

    @property
    def local(self) -> bool:
        """True if the server listens on a loopback address only."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def max_replies_per_client(self) -> int:
        """Number of replies that one client may have, running and waiting."""
        if self.max_per_client is not None:
            return min(self.max_per_client, self.max_requests)
        one_user = self.local and not self.trusted_proxies and self.key_file is None
        return self.max_requests if one_user else math.ceil(self.max_requests * _CLIENT_SHARE)


def check_certificate(cert: Path, key: Path | None) -> None:
    """Check that a certificate chain and its private key can be used.

    Raises:
        ValueError: a file cannot be read, the key needs a password, or they do not fit together.
    """
    import ssl  # takes 10 ms, which --help need not wait for

    def refuse_password() -> NoReturn:
        raise ValueError(f"the key {key or cert} has a password; write it without one")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, refuse_password)
    except ssl.SSLError as error:
        where = f"{cert} and {key} have" if key else f"{cert} has"
        reason = (error.reason or str(error)).replace("_", " ").lower()
        raise ValueError(f"{where} no certificate with its key in PEM: {reason}") from error
    except OSError as error:
        missing = next(
            (file for file in (cert, key) if file and not os.access(file, os.R_OK)), cert
        )
        raise ValueError(f"the certificate {missing} cannot be read: {error.strerror}") from error


def own_names() -> set[str]:
    """Return the names by which the local network may know this machine."""
    name = socket.gethostname().split(".")[0].lower()
    return {name, f"{name}.local"} if name else set()


def model_name(model: str | None) -> str:
    """Return the name by which clients see a folder, file, hub name or size; None is the demo."""
    if model is None:
        return "qwen3-demo"
    name = hub_name(model)
    path = Path(name)
    if path.is_file():
        return path.stem
    return path.resolve().name if path.is_dir() else name
