"""MCP servers for programs without an event loop: their tools are functions that any thread calls.

All connections live on one event loop, which has a thread of its own. Each server has a task there
that opens its connection, waits, and closes it: anyio's scopes must be left by the task that
entered them.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future, wait
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING, Any, Self, TypeVar

from qwen3_mlx.arguments import Progress
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.extras import install_command
from qwen3_mlx.mcp.config import ServerConfig, Source, read_servers, server_config
from qwen3_mlx.mcp.process import ServerProcess
from qwen3_mlx.mcp.results import result_text
from qwen3_mlx.text.described_tool import DescribedTool, allowed_name
from qwen3_mlx.text.tool_schema import properties_of

if TYPE_CHECKING:
    from httpx2 import Response
    from mcp import Client
    from mcp.client import Transport
    from mcp_types import Tool

_log = logging.getLogger(__name__)
T = TypeVar("T")

_SLICE_SECONDS = 0.2
_IDLE_SECONDS = 86_400.0  # that a stream of events may be silent: the SDK's 300 would end chats
_MAX_RESULT = 50_000  # characters
_MAX_PAGES = 50  # of a server's list of tools
# What one server may offer: more would fill a context window, or break the limits for all tools.
_MAX_TOOLS, _MAX_CHARACTERS, _MAX_PARAMETERS = 200, 100_000, 1_000
_MAX_REASON = 300  # characters of a server's own words in a message


@dataclass(frozen=True, slots=True)
class Call:
    """A call that the model requests.

    Attributes:
        server: the name of the server in the configuration.
        tool: the tool's name at the server.
        arguments: all arguments, as they will be sent.
    """

    server: str
    tool: str
    arguments: dict[str, Any]


def connect(
    *sources: Source,
    approve: Callable[[Call], bool] | None = None,
    max_result: int = _MAX_RESULT,
    progress: Progress | None = None,
) -> "Servers":
    """Start the MCP servers of configurations, and return them with their tools.

    Blocks until each server has listed its tools or has failed. A server that fails is left out,
    with a warning in the log; see `Servers.failed`.

    Args:
        sources: files in the notation that MCP clients share (`mcpServers`), or their content as
            dicts. They name commands, which are run: connect only what you trust.
        approve: called before each call of a tool, on the thread that calls it, which it may
            block. If it returns False, no call is made and the model reads that the user declined;
            if it raises a `Qwen3Error`, the model reads its message. None makes every call.
        max_result: the most characters of a result; the rest is cut off, and the model reads that.
        progress: called with (done, total) servers.

    Raises:
        Qwen3Error: a file cannot be read, two servers have the same name, or the packages of the
            extra `mcp` are missing.
    """
    try:  # here, because it takes a second, in which the event loop would stand still
        from mcp import Client  # noqa: F401 - earlier versions have none
    except ImportError as error:
        raise Qwen3Error(f"MCP servers need more packages: {install_command('mcp')}") from error
    entries: dict[str, Any] = {}
    for source in sources:
        for name, entry in read_servers(source).items():
            if name in entries:
                raise Qwen3Error(f"two MCP servers are called {name}: rename one of them")
            entries[name] = entry
    for name in ("mcp", "client"):  # the SDK's loggers: without a handler they print tracebacks
        logging.getLogger(name).addHandler(logging.NullHandler())
    servers = Servers(approve, max_result)
    try:
        servers._start(entries, progress)
    except BaseException:
        servers.close()
        raise
    return servers


class Servers:
    """Running MCP servers; created by `connect`. Use it as a context manager, or call `close`.

    Attributes:
        failed: why servers did not start, by their names.
    """

    def __init__(self, approve: Callable[[Call], bool] | None, max_result: int) -> None:
        self.failed: dict[str, str] = {}
        self._approve = approve
        self._max_result = max_result
        self._running: list[_Server] = []
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="mcp", daemon=True)
        self._thread.start()

    @property
    def tools(self) -> list[DescribedTool]:
        """The tools of all servers, for `tools=` of `LLM.run` and the like.

        A tool has the server's name in front, `server__tool`, where two are called alike.
        """
        return [
            DescribedTool(
                name=allowed_name(tool.name) or "_",
                server=server.name,
                description=tool.description or tool.title or "",
                parameters=tool.input_schema,
                function=partial(self._call, server, tool.name),
                start=partial(self._start_call, server, tool.name),
            )
            for server in self._running
            for tool in server.tools
        ]

    def close(self) -> None:
        """End all servers; each has some seconds to end by itself."""
        if self._loop.is_closed():
            return
        try:
            self._wait(self._submit(self._stop()))
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, entries: Mapping[str, Any], progress: Progress | None) -> None:
        starting = []
        for name, entry in entries.items():
            try:
                config = server_config(entry)
            except ValueError as error:
                self._fail(name, str(error))
                continue
            if unknown := config.unknown_keys:
                _log.warning("the MCP server %s: ignored: %s", name, ", ".join(unknown))
            server = _Server(name, config)
            self._running.append(server)
            starting.append((server, self._submit(server.start())))
        for done, (server, future) in enumerate(starting):
            if progress:
                progress(done, len(starting))
            try:
                self._wait(future)
            except Qwen3Error as error:
                self._running.remove(server)
                self._fail(server.name, str(error))
        if progress:
            progress(len(starting), len(starting))

    def _fail(self, name: str, why: str) -> None:
        self.failed[name] = why
        _log.warning("the MCP server %s did not start: %s", _printable(name), why)

    async def _stop(self) -> None:
        await asyncio.gather(*(server.stop() for server in self._running))

    def _call(self, server: "_Server", tool: str, arguments: dict[str, Any]) -> str:
        """Call a tool and return what the model reads: its result, or why there is none."""
        try:
            _check_arguments(arguments)
            if self._approve and not self._approve(Call(server.name, tool, arguments)):
                return "Error: the user declined this call"
            return self._wait(self._start_call(server, tool, arguments))
        except Qwen3Error as error:
            return f"Error: {error}"

    def _start_call(self, server: "_Server", tool: str, arguments: dict[str, Any]) -> Future[str]:
        return self._submit(server.call(tool, arguments, self._max_result))

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine on the loop."""
        if self._loop.is_closed():
            work.close()
            raise Qwen3Error("the MCP servers are closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _wait(self, future: Future[T]) -> T:
        """Return a result of the loop; Ctrl-C while waiting cancels it there, too.

        In slices, because a signal that another thread gets does not interrupt a wait.
        """
        try:
            while not wait([future], _SLICE_SECONDS).done:
                pass
            return future.result()
        except BaseException:
            future.cancel()
            raise


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _check_arguments(arguments: dict[str, Any]) -> None:
    """Check that the arguments of a call can be sent: a model may write half a character.

    Raises:
        Qwen3Error: they are not JSON, or not Unicode.
    """
    try:
        json.dumps(arguments, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise Qwen3Error(f"the arguments cannot be sent: {error}") from error


class _Server:
    """A server and its connection; the methods run on the event loop."""

    def __init__(self, name: str, config: ServerConfig) -> None:
        self.name = name
        self.tools: list[Tool] = []
        self._config = config
        self._client: Client | None = None
        self._task: asyncio.Task[None] | None = None
        self._process: ServerProcess | None = None
        self._refused = ""
        self._why_ended = ""

    async def start(self) -> None:
        """Connect and list the tools.

        Raises:
            Qwen3Error: that fails, or takes too long.
        """
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._live())
        await self._ready

    async def stop(self) -> None:
        """Close the connection, also one that is being opened."""
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def call(self, tool: str, arguments: dict[str, Any], max_result: int) -> str:
        """Call a tool and return what the model reads: its result, or why there is none."""
        try:
            if self._client is None:
                raise Qwen3Error(self._why_ended)
            async with asyncio.timeout(self._config.timeout):
                result = await self._client.call_tool(tool, arguments)
        except Exception as error:  # noqa: BLE001 - a call that fails must not end the chat
            return f"Error: the MCP server {self.name}: {self._reason(error)}"
        return result_text(result, max_result)

    async def _live(self) -> None:
        from mcp import Client

        try:
            async with AsyncExitStack() as stack:
                async with asyncio.timeout(self._config.timeout):
                    transport = await self._transport(stack)
                    self._client = await stack.enter_async_context(Client(transport, cache=None))
                    await self._list_tools(self._client)
                self._ready.set_result(None)
                await asyncio.Event().wait()  # until `stop`, or an end of the connection
        except Exception as error:  # noqa: BLE001 - one server must not end the others
            self._why_ended = self._reason(error)
            if not self._ready.done():
                self._ready.set_exception(Qwen3Error(self._why_ended))
        finally:
            self._client = None
            self._ready.cancel()  # if it is not done

    async def _transport(self, stack: AsyncExitStack) -> "Transport":
        config = self._config
        if config.transport == "stdio":
            self._process = ServerProcess(config)
            return self._process
        import httpx2
        from mcp.client.sse import sse_client
        from mcp.client.streamable_http import streamable_http_client

        assert config.url is not None
        if config.transport == "sse":
            return sse_client(config.url, dict(config.headers), config.timeout, _IDLE_SECONDS)
        http = httpx2.AsyncClient(
            headers=config.headers,
            timeout=httpx2.Timeout(config.timeout, read=_IDLE_SECONDS),
            event_hooks={"response": [self._note_status]},
        )
        await stack.enter_async_context(http)
        return streamable_http_client(config.url, http_client=http)

    async def _note_status(self, response: "Response") -> None:
        """Keep the status of a refused request, which the SDK's errors do not name."""
        if response.request.method == "POST":
            refused = f"HTTP {response.status_code} {response.reason_phrase}"
            self._refused = refused if response.is_error else ""

    async def _list_tools(self, client: "Client") -> None:
        cursor, characters, parameters = None, 0, 0
        for _ in range(_MAX_PAGES):
            page = await client.list_tools(cursor=cursor)
            for tool in page.tools:
                characters += len(json.dumps(tool.input_schema)) + len(tool.description or "")
                parameters += len(properties_of(tool.input_schema))
                if (
                    len(self.tools) == _MAX_TOOLS
                    or characters > _MAX_CHARACTERS
                    or parameters > _MAX_PARAMETERS
                ):
                    reason = "the MCP server %s offers too much: only its first %d tools are used"
                    _log.warning(reason, self.name, len(self.tools))
                    return
                self.tools.append(tool)
            cursor = page.next_cursor
            if cursor is None:
                return
        _log.warning("the MCP server %s: its list of tools does not end", self.name)

    def _reason(self, error: BaseException) -> str:
        """Return one line that says why a server failed."""
        from mcp import MCPError
        from mcp_types import CONNECTION_CLOSED

        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, TimeoutError):
            return f"it did not answer within {self._config.timeout:g} s"
        if isinstance(error, MCPError):
            reason = f"{self._refused}: {error}" if self._refused else str(error)
            if self._process and error.code == CONNECTION_CLOSED:
                reason = self._process.ending
        elif isinstance(error, OSError) and error.filename:
            reason = f"{error.strerror}: {error.filename}"
        else:  # of the SDK, in several lines
            reason = str(error).partition("\n")[0] or type(error).__name__
        # The server's own words, perhaps: nothing in them may steer a terminal.
        reason = " ".join(_printable(reason).split())
        return reason if len(reason) <= _MAX_REASON else f"{reason[:_MAX_REASON]} ..."
