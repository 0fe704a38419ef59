"""Program of the trial process that compiles grammars; see `qwen3_mlx.text.grammar_trial`.

It is run by its path and needs only llguidance. A message is its length in 8 bytes, big-endian, and
JSON: a request has a grammar, the CPU seconds that it may take and the parser limits; the answer is
the error message, "" if there is none. A grammar that takes longer, or overflows the stack or the
memory, ends the process: the kernel enforces each of these limits.
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

STACK = 7 << 18  # bytes; less than the stack of any thread that compiles the grammar afterwards
MEMORY = 3 << 27  # bytes
IDLE = 60.0  # seconds without a request after which the process ends


def serve(connection: socket.socket) -> None:
    """Answer requests until the other end closes or the idle timeout has passed."""
    from llguidance import LLTokenizer

    # The cost depends on the grammar, hardly on the vocabulary: one of single bytes is enough.
    vocabulary = LLTokenizer("byte")
    connection.settimeout(IDLE)
    with contextlib.suppress(OSError):  # the other end is gone or idle
        while message := receive(connection):
            request = json.loads(message)
            # SIGPROF kills the process when its CPU time is used up, within llguidance as well.
            signal.setitimer(signal.ITIMER_PROF, request["seconds"])
            problem = check(request["grammar"], vocabulary, request["limits"])
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.sendall(framed(json.dumps(problem).encode()))


def check(grammar: str, vocabulary: "LLTokenizer", limits: dict[str, Any]) -> str:
    """Return the error message of a grammar, "" if it compiles."""
    from llguidance import LLMatcher, LLParserLimits

    try:
        limited = LLParserLimits(**limits)
        matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limited)
        problem: str = matcher.get_error()
        matcher.compute_bitmask()  # for its time alone; a grammar without any text is refused later
    except Exception as error:  # noqa: BLE001 - any error means that it is not a grammar
        return str(error)
    return problem


def framed(message: bytes) -> bytes:
    """Return a message with its length in front, as it is sent."""
    return len(message).to_bytes(8) + message


def receive(connection: socket.socket) -> bytes:
    """Return the next message, or b"" at the end of the connection."""
    size, got = 8, bytearray()
    while len(got) < size:
        if not (more := connection.recv(min(size - len(got), 1 << 20))):
            return b""
        got += more
        if size == 8 and len(got) == 8:
            size += int.from_bytes(got)
    return bytes(got[8:])


def main() -> None:
    """Set the limits of the process, and serve the socket that is its standard input."""
    sys.path.append(sys.argv[1])  # where llguidance is
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # macOS accepts the limit but does not enforce it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    # The main thread's stack may be larger than that of the thread that compiles for use.
    threading.stack_size(STACK)
    thread = threading.Thread(target=serve, args=[socket.socket(fileno=0)])
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
