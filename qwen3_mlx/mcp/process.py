"""The process of an MCP server: started, fed and read a line at a time, and ended."""

import asyncio
import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from qwen3_mlx.mcp.config import ServerConfig

if TYPE_CHECKING:
    from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
    from mcp.shared.message import SessionMessage

    Incoming = SessionMessage | Exception
    Streams = tuple[MemoryObjectReceiveStream[Incoming], MemoryObjectSendStream[SessionMessage]]

_MAX_LINE = 16 * 2**20  # bytes of a message; results with pictures have megabytes
_MAX_UNANSWERED = 10_000  # lines between two answers: progress, log messages, noise
_KEPT = 4_096  # bytes of stderr
_CHUNK = 65_536
_PAUSE_SECONDS = 0.01  # between two reads of stderr, so that a flood of it takes little time
_OURS = ("initialize", "server/discover")  # requests that a client makes
_GRACE_SECONDS = 2.0  # until a process that was asked to end is forced to, as in the SDK


class ServerProcess:
    """The SDK's transport to a server that is started here: JSON messages, one a line.

    Not the SDK's own, because any process may be named as a server: what is no message, lines that
    never end and any amount of stderr cost bounded time and memory, and nothing of it is printed.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._flaw = ""
        self._stderr = b""

    @property
    def ending(self) -> str:
        """Why the process is of no use any more, with the last line that it wrote to stderr."""
        lines = self._stderr.decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        why = self._flaw or "it has closed the connection"
        return f"{why}: {last}" if last else why

    async def __aenter__(self) -> "Streams":
        """Start the process and return the streams of messages from and to it.

        Raises:
            OSError: it cannot be started.
        """
        from anyio import create_memory_object_stream
        from mcp.client.stdio import get_default_environment
        from mcp.shared.message import SessionMessage

        self._process = await asyncio.create_subprocess_exec(
            str(self._config.command),
            *self._config.args,
            env=get_default_environment() | self._config.env,
            cwd=self._config.cwd,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_MAX_LINE,
            start_new_session=True,  # so that Ctrl-C reaches us alone, and children end with it
        )
        to_client, received = create_memory_object_stream[SessionMessage | Exception](0)
        sent, to_server = create_memory_object_stream[SessionMessage](0)
        self._streams = (to_client, received, sent, to_server)
        self._tasks = [
            asyncio.create_task(self._keep_stderr()),
            asyncio.create_task(self._read(to_client)),
            asyncio.create_task(self._write(to_server)),
        ]
        return received, sent

    async def _keep_stderr(self) -> None:
        assert self._process.stderr
        while chunk := await self._process.stderr.read(_CHUNK):
            self._stderr = (self._stderr + chunk)[-_KEPT:]
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _read(self, to_client: "MemoryObjectSendStream[Incoming]") -> None:
        from anyio import BrokenResourceError, ClosedResourceError
        from mcp.shared.message import SessionMessage
        from mcp_types import (
            JSONRPCError,
            JSONRPCRequest,
            JSONRPCResponse,
            jsonrpc_message_adapter,
        )

        assert self._process.stdout
        unanswered = 0
        # Closed at the end, whatever it is; the errors say that the client has gone.
        with to_client, suppress(BrokenResourceError, ClosedResourceError):
            try:
                async for line in self._process.stdout:
                    unanswered += 1
                    with suppress(ValueError):  # noise
                        message = jsonrpc_message_adapter.validate_json(line, by_name=False)
                        if isinstance(message, JSONRPCRequest) and message.method in _OURS:
                            self._flaw = "it sends back what it is sent: it is no MCP server"
                            break
                        await to_client.send(SessionMessage(message))
                        if isinstance(message, JSONRPCResponse | JSONRPCError):
                            unanswered = 0
                    if unanswered > _MAX_UNANSWERED:
                        self._flaw = f"it wrote over {_MAX_UNANSWERED:,} lines without an answer"
                        break
            except ValueError:
                self._flaw = f"it wrote a line of more than {_MAX_LINE:,} bytes"
            if self._flaw:
                self._signal(signal.SIGKILL)
            # The end comes with its reason, which may be on stderr.
            await asyncio.wait(self._tasks[:1], timeout=_GRACE_SECONDS / 10)
        while await self._process.stdout.read(_CHUNK):  # a full pipe would keep it from ending
            pass

    async def _write(self, to_server: "MemoryObjectReceiveStream[SessionMessage]") -> None:
        assert self._process.stdin
        with to_server, suppress(OSError):  # closed when the process has closed its end
            async for sent in to_server:
                text = sent.message.model_dump_json(by_alias=True, exclude_unset=True)
                self._process.stdin.write(f"{text}\n".encode())
                await self._process.stdin.drain()
        self._process.stdin.close()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    async def __aexit__(self, *_: Any) -> None:
        """End the process and its children, by the end of its input or else by signals."""
        for stream in self._streams:
            stream.close()  # ends the tasks that write and read
        for number in (None, signal.SIGTERM, signal.SIGKILL):
            if number:
                self._signal(number)
            # Also waits for the ends of its pipes, which its children may hold.
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _GRACE_SECONDS)
                break
        await asyncio.wait(self._tasks, timeout=_GRACE_SECONDS)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
