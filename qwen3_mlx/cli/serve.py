"""`qwen3 serve`: the model for any client, and a page to talk to."""

import errno
import logging
import os
import socket
import sys
import webbrowser
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from qwen3_mlx.cli.console import note
from qwen3_mlx.cli.load_options import (
    Bits,
    Context,
    Dequantize,
    Draft,
    Dtype,
    KvBits,
    Model,
    PromptCache,
    Revision,
    load,
    option,
)
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.extras import install_command
from qwen3_mlx.model.sizes import full_name
from qwen3_mlx.server.keys import read_keys
from qwen3_mlx.server.settings import REASONING_FIELDS, Settings, own_names

_EVERYWHERE = ("", "0.0.0.0", "::")
_ELSEWHERE = ("192.0.2.1", 9)  # an address of no machine (RFC 5737)
_BACKLOG = 128
_MODEL, _NET, _REPLY, _LOAD = "Model", "Who may come in", "Replies", "Work"


def serve(  # noqa: PLR0913 - one parameter an option
    model: Model = None,
    revision: Revision = None,
    bits: Bits = None,
    dtype: Dtype = None,
    dequantize: Dequantize = None,
    kv_bits: KvBits = None,
    draft: Draft = None,
    prompt_cache: PromptCache = None,
    context: Context = None,
    name: Annotated[
        str | None, option("--name", panel=_MODEL, text="What clients are to call the model.")
    ] = None,
    host: Annotated[
        str,
        option("--host", panel=_NET, text="The address to listen at; 0.0.0.0 is the network."),
    ] = "127.0.0.1",
    port: Annotated[
        int, option("--port", "-p", panel=_NET, text="0 is any; otherwise 8080.", min=0, max=65535)
    ] = 8080,
    api_key: Annotated[
        str | None,
        option("--api-key", panel=_NET, text="Let in who has this key.", envvar="QWEN3_API_KEY"),
    ] = None,
    key_file: Annotated[
        Path | None,
        option("--key-file", panel=_NET, text="Let in who has a key of this file, one a line."),
    ] = None,
    trust_proxy: Annotated[
        list[str] | None,
        option(
            "--trust-proxy",
            panel=_NET,
            text="Believe the proxy at this address who its clients are; may be repeated.",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        option("--allow-host", panel=_NET, text="Another name of this machine; may be repeated."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        option("--cors-origin", panel=_NET, text="Let pages of this origin in; * is all."),
    ] = None,
    max_body: Annotated[
        int,
        option("--max-body", panel=_NET, text="The largest request, in MB. Otherwise 32.", min=1),
    ] = 32,
    thinking: Annotated[
        bool | None,
        option("--thinking/--no-thinking", panel=_REPLY, text="Where a request says nothing."),
    ] = None,
    thinking_budget: Annotated[
        int | None,
        option("--thinking-budget", panel=_REPLY, text="At most so many tokens, likewise."),
    ] = None,
    reasoning_field: Annotated[
        str,
        option(
            "--reasoning-field",
            panel=_REPLY,
            text=f"Where OpenAI's clients find the thinking: {', '.join(REASONING_FIELDS)}.",
        ),
    ] = "both",
    max_requests: Annotated[
        int,
        option("--max-requests", panel=_LOAD, text="Replies at once and waiting. Otherwise 64."),
    ] = 64,
    max_per_client: Annotated[
        int | None,
        option(
            "--max-per-client",
            panel=_LOAD,
            text="Of those, one client's. Otherwise 3/4, or all where only this machine is served.",
        ),
    ] = None,
    request_timeout: Annotated[
        float | None,
        option(
            "--request-timeout",
            panel=_LOAD,
            text="Seconds after which a reply ends as it is. Otherwise without limit.",
        ),
    ] = None,
    shutdown: Annotated[
        float,
        option("--shutdown", panel=_LOAD, text="Seconds for replies to end in. Otherwise 10."),
    ] = 10.0,
    log_content: Annotated[
        bool, option("--log-content", panel=_LOAD, text="Log prompts and replies, too.")
    ] = False,
    open_page: Annotated[
        bool, option("--open", panel=_LOAD, text="Open the page in a browser.")
    ] = False,
    quiet: Annotated[
        bool, option("--quiet", "-q", panel=_LOAD, text="No line for each request.")
    ] = False,
) -> None:
    """Serve the model to clients of OpenAI's, Anthropic's and Ollama's API, and a page to talk to.

    [bold]qwen3 serve[/bold]   the demo model, at http://127.0.0.1:8080
    [bold]qwen3 serve --model 8B --api-key secret --host 0.0.0.0[/bold]   for the network.
    [bold]curl localhost:8080/v1/chat/completions -H 'Content-Type: application/json'
    -d '{"messages": [{"role": "user", "content": "Hello"}]}'[/bold]   asks it.

    Ctrl-C lets replies come to their end, twice does not. Each request is a line of JSON on stderr.
    """
    if not (find_spec("fastapi") and find_spec("uvicorn")):
        raise Qwen3Error(f"the server needs more packages: {install_command('server')}")
    settings = Settings(
        model=name or _name_of(model),
        host=host,
        api_key=api_key or None,
        key_file=key_file,
        trusted_proxies=trust_proxy or (),
        allowed_hosts=allow_host or (),
        cors_origins=cors_origin or (),
        thinking=thinking,
        thinking_budget=thinking_budget,
        reasoning_field=reasoning_field,
        max_requests=max_requests,
        max_per_client=max_per_client,
        request_timeout=request_timeout,
        max_body=max_body << 20,
        shutdown=shutdown,
        log_content=log_content,
    )
    if key_file is not None:
        read_keys(key_file)  # what is wrong with them is said before the model is loaded
    listener = _listen(host, port)
    url = _url_of(listener)

    def ready() -> None:
        note(f"{settings.model} is at {url} - open it to talk to it; Ctrl-C ends it")
        note(f"for clients: OpenAI {url}/v1 · Anthropic {url} · Ollama {url}")
        if host in _EVERYWHERE:
            port = listener.getsockname()[1]
            others = " · ".join(f"http://{name}:{port}" for name in _network_names())
            note(f"from the network: {others}")
        if api_key is None and key_file is None and not settings.local:
            note("whoever reaches this machine may use it: --api-key KEY keeps others out")
        if open_page and (sys.platform == "darwin" or "DISPLAY" in os.environ):
            webbrowser.open(url)

    serving = import_module("qwen3_mlx.server.run")  # FastAPI, for this alone
    llm = load(
        model,
        quiet=quiet,
        revision=revision,
        bits=bits,
        dtype=dtype,
        dequantize=dequantize,
        kv_bits=kv_bits,
        draft=draft,
        prompt_cache=prompt_cache,
        context=context,
    )
    _log_to_stderr(quiet=quiet)
    with llm, listener:
        serving.serve(llm, settings, listener, ready)


def _name_of(model: str | None) -> str:
    if model is None:
        return "qwen3-demo"
    name = full_name(model)
    folder = Path(name)
    return folder.resolve().name if folder.is_dir() else name


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        number = error.errno or 0
        words = os.strerror(number) if number > 0 else error.strerror or error
        way_out = "--port takes another, 0 any"
        if number not in (errno.EADDRINUSE, errno.EACCES):
            way_out = "--host takes an address of this machine"
        raise Qwen3Error(f"cannot listen at {host}, port {port}: {words}; {way_out}") from error


def _url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    shown = "127.0.0.1" if host == "0.0.0.0" else "::1" if host == "::" else host
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def _network_names() -> list[str]:
    """Return how other machines may reach this one: its address, and its name."""
    names = sorted(name for name in own_names() if name.endswith(".local"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking, suppress(OSError):
        asking.connect(_ELSEWHERE)  # which sends nothing, and finds the way there
        names.insert(0, asking.getsockname()[0])
    return names


def _log_to_stderr(*, quiet: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("qwen3_mlx.server").addHandler(handler)
    logging.getLogger("qwen3_mlx.server").setLevel(
        logging.DEBUG if os.environ.get("QWEN3_DEBUG") else logging.INFO
    )
    logging.getLogger("qwen3_mlx.server.access").disabled = quiet
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # what matters is told by our own
