"""The program of the process that compiles grammars on trial; see `qwen3_mlx.text.grammar_trial`.

It is run by its path, and needs nothing but llguidance. Each message is 8 bytes of its length and
the message: JSON of a grammar and of the CPU seconds that it may take, answered by what is wrong
with it. A grammar that takes longer ends the process, and so does one that overflows the stack or
the memory: the kernel sees to each of these.
"""

import contextlib
import json
import resource
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance import LLTokenizer

STACK = 7 << 18  # bytes; less than any thread has that compiles what was tried
MEMORY = 3 << 27  # bytes
IDLE = 60.0  # seconds, after which it ends


def serve(connection: socket.socket) -> None:
    """Try what comes, until nothing comes any more."""
    from llguidance import LLTokenizer

    # What takes long depends on the grammar, hardly on the vocabulary: single bytes will do.
    vocabulary = LLTokenizer("byte")
    connection.settimeout(IDLE)
    with contextlib.suppress(OSError):  # the other end is gone, or has nothing to ask
        while message := receive(connection):
            asked = json.loads(message)
            signal.setitimer(signal.ITIMER_PROF, asked["seconds"])
            wrong = wrong_with(asked["grammar"], vocabulary, asked["limits"])
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.sendall(framed(json.dumps(wrong).encode()))


def wrong_with(grammar: str, vocabulary: "LLTokenizer", limits: dict[str, Any]) -> str:
    """Return what is wrong with a grammar, "" if nothing is."""
    from llguidance import LLMatcher, LLParserLimits

    try:
        limited = LLParserLimits(**limits)
        matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limited)
        wrong: str = matcher.get_error()
        matcher.compute_bitmask()  # for its time alone: what comes to nothing is seen later
    except Exception as error:  # noqa: BLE001 - whatever it is, this is no grammar
        return str(error)
    return wrong


def framed(message: bytes) -> bytes:
    """Return a message as it is sent."""
    return len(message).to_bytes(8) + message


def receive(connection: socket.socket) -> bytes:
    """Return a message, or nothing at the end of all."""
    size, got = 8, bytearray()
    while len(got) < size:
        if not (more := connection.recv(min(size - len(got), 1 << 20))):
            return b""
        got += more
        if size == 8 and len(got) == 8:
            size += int.from_bytes(got)
    return bytes(got[8:])


def main() -> None:
    """Serve the socket that is the standard input."""
    sys.path.append(sys.argv[1])  # where llguidance is
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # macOS knows the limit and does not keep it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    threading.stack_size(STACK)
    thread = threading.Thread(target=serve, args=[socket.socket(fileno=0)])
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
