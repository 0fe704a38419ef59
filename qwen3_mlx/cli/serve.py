"""`qwen3 serve`: serves a model over HTTP, with a chat page."""

import errno
import logging
import os
import re
import socket
import sys
import webbrowser
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from qwen3_mlx.checkpoint.adapter_formats import refuse_other
from qwen3_mlx.checkpoint.description import read_config
from qwen3_mlx.checkpoint.hub import Source
from qwen3_mlx.checkpoint.local import last_used, local_models
from qwen3_mlx.cli.console import Bar, note
from qwen3_mlx.cli.option_groups import option, with_options
from qwen3_mlx.cli.options import (
    NGRAM,
    Models,
    SamplingOptions,
    ServedOptions,
    follow_if_launched,
    load_model,
)
from qwen3_mlx.cli.service_file import install_service
from qwen3_mlx.cli.tool_use import served_tools
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.extras import install_command
from qwen3_mlx.model.sizes import hub_name
from qwen3_mlx.server.duration import read_duration
from qwen3_mlx.server.keys import read_keys
from qwen3_mlx.server.running import registered, url_of
from qwen3_mlx.server.settings import (
    REASONING_FIELDS,
    Settings,
    check_certificate,
    model_name,
    own_names,
)

_ADAPTER_NAME = re.compile(r"[\w.-]+")
_ALL_INTERFACES = ("", "0.0.0.0", "::")
_OTHER_NETWORK = ("192.0.2.1", 9)  # reserved for documentation (RFC 5737): no machine has it
_BACKLOG = 128  # connections
_PACKAGES = ("fastapi", "prometheus_client", "uvicorn")  # of the extra `server`
_USES = {  # of a server, by the kind of its model
    "chat": "open it to chat",
    "embedding": "vectors at /v1/embeddings and /api/embed",
    "reranker": "scores at /v1/rerank",
}
_NETWORK, _THINKING = "Network and access", "Thinking"
_LIMITS, _DISPLAY = "Limits", "Display and logs"


@with_options
def serve(  # noqa: PLR0913 - one parameter an option
    *,
    model: Models = None,
    models_from: Annotated[
        str | None,
        option(
            panel="Model",
            text="list: serve all models that qwen3 list finds, loaded on demand.",
        ),
    ] = None,
    loading: ServedOptions,
    adapter: Annotated[
        list[str] | None,
        option(
            panel="Model",
            metavar="NAME=DIR",
            text="Also serve the first model with this adapter (LoRA), as MODEL:NAME; may be "
            "repeated. Without NAME= its replies all use it.",
        ),
    ] = None,
    name: Annotated[
        str | None, option(panel="Model", text="Name of the default model shown to clients.")
    ] = None,
    keep_alive: Annotated[
        str | None,
        option(
            panel="Model",
            text="Close a model that was idle for so long, such as 30m (default: never).",
        ),
    ] = None,
    defaults: SamplingOptions,
    host: Annotated[
        str, option(panel=_NETWORK, text="Address to listen on; 0.0.0.0 for the network.")
    ] = "127.0.0.1",
    port: Annotated[
        int,
        option(
            "--port",
            "-p",
            panel=_NETWORK,
            text="Port to listen on; 0 is any free port (default: 8080).",
            min=0,
            max=65535,
        ),
    ] = 8080,
    api_key: Annotated[
        str | None, option(panel=_NETWORK, text="Require this API key.", envvar="QWEN3_API_KEY")
    ] = None,
    key_file: Annotated[
        Path | None,
        option(
            "--keys",
            "--key-file",
            panel=_NETWORK,
            text="Require an API key of this file: a line has KEY, or NAME KEY [REQUESTS [TOKENS]] "
            "with limits per minute.",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None, option(panel=_NETWORK, text="Serve HTTPS with this certificate chain (PEM).")
    ] = None,
    tls_key: Annotated[
        Path | None,
        option(panel=_NETWORK, text="Private key of the certificate, unless its file has it."),
    ] = None,
    trust_proxy: Annotated[
        list[str] | None,
        option(
            panel=_NETWORK,
            text="Take client addresses from the proxy at this address; may be repeated.",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        option(panel=_NETWORK, text="Also answer to this host name; may be repeated."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        option(panel=_NETWORK, text="Allow web pages of this origin, * is any; may be repeated."),
    ] = None,
    allow_pull: Annotated[
        bool,
        option(
            "--allow-pull",
            panel=_NETWORK,
            text="Let clients download models to this machine (Ollama's /api/pull).",
        ),
    ] = False,
    mcp: Annotated[
        list[Path] | None,
        option(
            panel=_NETWORK,
            metavar="mcp.json",
            text="Offer tools of MCP servers in the page, which asks before each call; "
            "may be repeated.",
        ),
    ] = None,
    max_body: Annotated[
        int, option(panel=_LIMITS, text="Maximum request size in MiB (default: 32).", min=1)
    ] = 32,
    reasoning_field: Annotated[
        str,
        option(
            panel=_THINKING,
            text=f"Field of the thinking in OpenAI responses: {', '.join(REASONING_FIELDS)}.",
        ),
    ] = "both",
    max_requests: Annotated[
        int, option(panel=_LIMITS, text="Maximum requests, running and waiting (default: 64).")
    ] = 64,
    max_per_client: Annotated[
        int | None,
        option(
            panel=_LIMITS,
            text="Maximum of those per client (default: 3/4; all if only this machine is served).",
        ),
    ] = None,
    request_timeout: Annotated[
        float | None,
        option(panel=_LIMITS, text="Seconds after which a reply is cut off (default: no limit)."),
    ] = None,
    shutdown: Annotated[
        float,
        option(panel=_LIMITS, text="Seconds for replies to finish at shutdown (default: 10)."),
    ] = 10.0,
    log_content: Annotated[
        bool, option("--log-content", panel=_DISPLAY, text="Log prompts and replies, too.")
    ] = False,
    open_page: Annotated[
        bool, option("--open", panel=_DISPLAY, text="Open the chat page in a browser.")
    ] = False,
    install: Annotated[
        bool,
        option(
            "--install",
            panel=_DISPLAY,
            text="Write a service of the system that starts this server at login, and exit.",
        ),
    ] = False,
    quiet: Annotated[
        bool,
        option("--quiet", "-q", panel=_DISPLAY, text="No progress bars and no log of requests."),
    ] = False,
) -> None:
    """Serve a model over the OpenAI, Anthropic and Ollama APIs, with a chat page.

    [bold]qwen3 serve[/bold]   serve the demo model at http://127.0.0.1:8080.
    [bold]qwen3 serve --model 8B --api-key secret --host 0.0.0.0[/bold]   serve the network.
    [bold]qwen3 serve -m 8B -m Qwen/Qwen3-Embedding-0.6B[/bold]   serve two models.
    [bold]curl localhost:8080/v1/chat/completions -H 'Content-Type: application/json'
    -d '{"messages": [{"role": "user", "content": "Hello"}]}'[/bold]   send a request.

    Thinking and sampling options hold for requests that set none of their own.
    Ctrl-C lets running replies finish; a second Ctrl-C does not wait.
    Each request is logged as a line of JSON on stderr.
    """
    if not all(map(find_spec, _PACKAGES)):
        raise Qwen3Error(f"the server needs more packages: {install_command('server')}")
    if models_from not in (None, "list"):
        raise ValueError(f"--models-from must be list, not {models_from!r}")
    models: list[str | None] = [*(model or ())]
    found, complaints = local_models() if models_from else ([], [])
    if not models:
        recent = last_used(found)
        models = [recent.name if recent else None]
    clustered = _is_clustered(loading, several=bool(models[1:] or models_from or keep_alive))
    follow_if_launched(loading)
    settings = Settings(
        model=name or model_name(models[0]),
        model_keep_alive=read_duration(-1 if keep_alive is None else keep_alive, "--keep-alive"),
        host=host,
        api_key=api_key or None,
        key_file=key_file,
        tls_cert=tls_cert,
        tls_key=tls_key,
        trusted_proxies=trust_proxy or (),
        allowed_hosts=allow_host or (),
        cors_origins=cors_origin or (),
        reasoning_field=reasoning_field,
        max_requests=max_requests,
        max_per_client=max_per_client,
        request_timeout=request_timeout,
        max_body=max_body << 20,
        shutdown=shutdown,
        log_content=log_content,
        allow_pull=allow_pull,
        **defaults.keywords(),
    )
    adapters = _adapters(adapter or ())
    _check_access(settings, has_tools=bool(mcp))
    if install:
        _check_startable(models, loading, adapters, mcp or ())
        install_service(sys.argv[1:])
        return
    listener = _listen(host, port)

    def ready(others: Sequence[str]) -> None:
        _announce(settings, listener, llm.kind, others, sources[0].names[1:])
        if open_page and (sys.platform == "darwin" or "DISPLAY" in os.environ):
            webbrowser.open(_url_of(settings, listener))

    serving = import_module("qwen3_mlx.server.run")  # FastAPI, which only this command needs
    describing = import_module("qwen3_mlx.server.model_source")
    options = {**asdict(loading), "adapter": adapters}
    with ExitStack() as stack:
        stack.enter_context(listener)
        with Bar("downloading", in_bytes=True) as bar:
            sources = []
            if not clustered:
                sources = describing.stated_sources(
                    models, options, settings.model, None if quiet else bar
                )
        with describing.room_for(sources[1:], beside=sources[0]) if sources else nullcontext():
            llm = stack.enter_context(
                load_model(models[0], loading, adapters=adapters, quiet=quiet)
            )
        aliases = describing.aliases_of(models[0])
        sources = sources or [describing.ModelSource.of(llm, settings.model, aliases)]
        _log_to_stderr(quiet=quiet)
        tools = stack.enter_context(served_tools(mcp or (), llm, yes=True, quiet=quiet))
        if models_from:
            for complaint in complaints:
                note(complaint)
            sources += describing.local_sources(found, options, sources)
        others = [source.name for source in sources[1:]]
        with registered(*_address_of(settings, listener), settings.model):
            serving.serve(llm, settings, listener, partial(ready, others), sources, tools)


def _is_clustered(loading: ServedOptions, *, several: bool) -> bool:
    """Return whether several machines hold the model.

    Raises:
        ValueError: there are several models as well, or the one would be closed and loaded again.
    """
    clustered = bool(loading.hosts or loading.hostfile)
    if clustered and several:
        raise ValueError(
            "--hosts serves one model, which stays loaded: leave --keep-alive, --models-from and "
            "other models out"
        )
    return clustered


def _adapters(stated: Sequence[str]) -> str | dict[str, str] | None:
    """Return the adapters as `load` takes them: one for all replies, or several by name.

    Raises:
        ValueError: one of several has no name, or that of another, or one that is no name.
    """
    if len(stated) == 1 and "=" not in stated[0]:
        return stated[0]
    adapters: dict[str, str] = {}
    for name, _, folder in (pair.partition("=") for pair in stated):
        if not folder or not _ADAPTER_NAME.fullmatch(name) or name in adapters:
            raise ValueError(f"--adapter takes NAME=DIR, with another name for each, not {name}")
        adapters[name] = folder
    return adapters or None


def _check_access(settings: Settings, *, has_tools: bool) -> None:
    """Check what would be wrong with the access of clients once the model is loaded.

    Raises:
        Qwen3Error, ValueError: a file is wrong, or all clients of the network could call tools.
    """
    has_key = settings.api_key is not None
    if settings.key_file is not None:
        has_key = bool(read_keys(settings.key_file))
    if settings.tls_cert is not None:
        check_certificate(settings.tls_cert, settings.tls_key)
    if has_tools and not has_key and not settings.local:
        raise ValueError(
            f"with --mcp and --host {settings.host} every client of the network could call the "
            "tools; --api-key KEY lets only yours do so"
        )


def _check_startable(
    models: Sequence[str | None],
    loading: ServedOptions,
    adapters: str | Mapping[str, str] | None,
    mcp: Sequence[Path],
) -> None:
    """Check that a later start finds the models, adapters and MCP servers; no weights are fetched.

    Raises:
        Qwen3Error, ValueError: it would not.
    """
    for model in filter(None, models):
        read_config(Source(hub_name(model), loading.revision))
    if loading.draft not in (None, NGRAM):
        read_config(Source(hub_name(loading.draft)))
    for adapter in adapters.values() if isinstance(adapters, Mapping) else filter(None, [adapters]):
        refuse_other(Source(adapter))
    for file in mcp:
        import_module("qwen3_mlx.mcp.config").read_servers(file)


def _announce(
    settings: Settings,
    listener: socket.socket,
    kind: str,
    others: Sequence[str],
    adapted: Sequence[str],
) -> None:
    """Write the addresses at which clients reach the server, and who has access."""
    url = _url_of(settings, listener)
    note(f"{settings.model} is served at {url} ({_USES[kind]}); Ctrl-C stops the server")
    if adapted:
        note(f"with adapters: {', '.join(adapted)}")
    if others:
        note(f"loaded when a request names them: {', '.join(others)}")
    note(f"for clients: OpenAI {url}/v1 · Anthropic {url} · Ollama {url}")
    if settings.host in _ALL_INTERFACES:
        port = listener.getsockname()[1]
        others = " · ".join(f"{settings.scheme}://{name}:{port}" for name in _network_names())
        note(f"from the network: {others}")
    if settings.api_key is None and settings.key_file is None and not settings.local:
        note("no API key is set, so every client of the network has access: see --api-key KEY")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else error.strerror or error
        hint = "--port takes another, 0 any"
        if number not in (errno.EADDRINUSE, errno.EACCES):
            hint = "--host takes an address of this machine"
        raise Qwen3Error(f"cannot listen at {host}, port {port}: {reason}; {hint}") from error


def _address_of(settings: Settings, listener: socket.socket) -> tuple[str, str, int]:
    """Return scheme, host and port by which this machine reaches the server."""
    host, port = listener.getsockname()[:2]
    host = "127.0.0.1" if host == "0.0.0.0" else "::1" if host == "::" else host
    return settings.scheme, host, port


def _url_of(settings: Settings, listener: socket.socket) -> str:
    return url_of(*_address_of(settings, listener))


def _network_names() -> list[str]:
    """Return the address and the `.local` names by which other machines may reach this one."""
    names = sorted(name for name in own_names() if name.endswith(".local"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(_OTHER_NETWORK)  # UDP: sends nothing, but chooses the local address
        names.insert(0, probe.getsockname()[0])
    return names


def _log_to_stderr(*, quiet: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("qwen3_mlx.server").addHandler(handler)
    logging.getLogger("qwen3_mlx.server").setLevel(
        logging.DEBUG if os.environ.get("QWEN3_DEBUG") else logging.INFO
    )
    logging.getLogger("qwen3_mlx.server.access").disabled = quiet
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # our own log has what matters
