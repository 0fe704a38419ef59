"""Compiles grammars after a trial, in a separate process, has shown that compiling them ends.

A grammar of a few bytes can take hours, all memory or the whole stack to compile, and llguidance
cannot be interrupted. So each grammar is compiled once in a trial process, which the kernel kills
at a limit. The process has no vocabulary, starts in 0.1 s, takes 20 MB, and ends after an idle
minute.
"""

import json
import logging
import socket
import subprocess
import sys
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from queue import LifoQueue
from signal import SIGKILL, SIGPROF
from threading import Lock
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.text import grammar_worker
from qwen3_mlx.text.fair_queue import POLL_SECONDS, Caller, FairQueue

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Bounds what a regular expression may unfold to: (a{1000}){1000} takes 0.7 s and 50 MB with the
# published vocabulary, and lists of 20,000 words still fit.
_LIMITS: Any = {"initial_lexer_fuel": 300_000, "verbose_errors": False}
# CPU seconds of a trial, and the number of trials at once. Sixty tools take 0.02 s, the largest
# grammar that is allowed 0.5 s. A grammar that exceeds the first limit moves to the second lane,
# so that it does not delay the short ones.
TRIAL_LANES = ((0.25, 2), (2.0, 1))
_ANSWER_TIMEOUT = 60.0  # seconds on the wall clock; the machine has slept, or it swaps
_MAX_REMEMBERED = 4096  # grammars whose verdict is kept
_MAX_ATTEMPTS = 3

_log = logging.getLogger(__name__)
_Value = TypeVar("_Value")


class ResultCache(Generic[_Value]):
    """Cache of the latest results by source text; only a hash of the text is stored."""

    def __init__(self, max_results: int) -> None:
        self._max_results = max_results
        self._results: OrderedDict[bytes, _Value] = OrderedDict()
        self._lock = Lock()

    def get(self, source: str) -> _Value | None:
        """Return the result for `source`, or None."""
        key = _key(source)
        with self._lock:
            if key not in self._results:
                return None
            self._results.move_to_end(key)
            return self._results[key]

    def put(self, source: str, value: _Value) -> None:
        """Store the result for `source`; evict the oldest one beyond the limit."""
        key = _key(source)
        with self._lock:
            self._results[key] = value
            self._results.move_to_end(key)
            if len(self._results) > self._max_results:
                self._results.popitem(last=False)


def _key(source: str) -> bytes:
    return sha256(source.encode("utf-8", "surrogatepass")).digest()


class TrialCompiler:
    """Compiles for one vocabulary, which `make` builds: that takes a second, and holds the GIL.

    Verdicts of trials are kept, matchers are not: all copies of a matcher share a lexer, which
    grows with each text, and when one text is too much for it, it fails for all of them.
    """

    def __init__(self, make: "Callable[[], LLTokenizer]") -> None:
        self._build = make
        self._built: LLTokenizer | None = None
        self._lock = Lock()
        # By grammar: the lane that sufficed, or the error message.
        self._verdicts: ResultCache[int | str] = ResultCache(_MAX_REMEMBERED)

    def vocabulary(self) -> "LLTokenizer":
        """Return the vocabulary; build it on first use."""
        with self._lock:
            if self._built is None:
                self._built = self._build()
            return self._built

    def compile(self, grammar: str, caller: Caller) -> "LLMatcher":
        """Return a matcher at the start of a grammar.

        Raises:
            ValueError: llguidance refuses it, or it takes too much time or memory.
            Qwen3Error: the caller is gone.
        """
        known = self._known_lane(grammar)
        with caller.waiting():
            if known == 0:  # known to be quick: no need to queue behind slower ones
                return self.compile_trusted(grammar)
            for number, lane in enumerate(_lanes()):
                if matcher := self._compile_in(lane, number, grammar, caller):
                    return matcher
        raise self._refusal(
            grammar,
            f"it takes more than {TRIAL_LANES[-1][0]:g} s to compile; try a simpler one, with "
            "fewer alternatives, repetitions or expressions that are intersected",
        )

    def _compile_in(
        self, lane: "_Lane", number: int, grammar: str, caller: Caller
    ) -> "LLMatcher | None":
        """Return a matcher of a grammar that compiles within the time limit of a lane, or None."""
        with lane.helper(caller) as helper:
            # Another caller's trial of the same grammar may have ended in the meantime.
            known = self._known_lane(grammar)
            if known is None:
                problem = helper.check(grammar, lane.seconds, caller)
                if problem:
                    raise self._refusal(grammar, problem)
                if problem is None:  # too long for this lane
                    return None
                self._verdicts.put(grammar, number)
            elif known > number:
                return None
            return self.compile_trusted(grammar)

    def compile_trusted(self, grammar: str) -> "LLMatcher":
        """Return a matcher at the start of a grammar that is known to be harmless."""
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(**_LIMITS)
        made = LLMatcher(self.vocabulary(), grammar, log_level=0, limits=limits)
        if made.is_error():
            raise self._refusal(grammar, made.get_error())
        return made

    def _known_lane(self, grammar: str) -> int | None:
        found = self._verdicts.get(grammar)
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def _refusal(self, grammar: str, problem: str) -> ValueError:
        self._verdicts.put(grammar, problem)
        return ValueError(problem)


class _TrialProcess:
    """A trial process; started when it is needed, and restarted after it has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._end: Callable[[], object] = lambda: None

    def check(self, grammar: str, seconds: float, caller: Caller) -> str | None:
        """Return the error message of a grammar, "" if it compiles, None if it takes too long.

        Raises:
            Qwen3Error: the caller is gone, or the process does not answer.
        """
        request = {"grammar": grammar, "seconds": seconds, "limits": _LIMITS}
        message = grammar_worker.framed(json.dumps(request).encode())
        for _ in range(_MAX_ATTEMPTS if _command() else 0):
            try:
                process, connection = self._started()
                if answer := _answer(connection, message, caller):
                    problem: str = json.loads(answer)
                    return problem
            except BaseException:  # a late answer must not be taken for that of the next request
                self._end()
                raise
            # No answer: the signal that ended the process tells which limit was reached.
            code = process.wait()
            self._end()
            if code == -SIGPROF:
                return None
            if code == -SIGKILL:
                continue  # perhaps killed for a reason other than the grammar
            if code < 0:
                return "it takes more memory than there is, or is too deep; try a simpler one"
            if code > 0:
                _log.warning("the trial process for grammars ended with status %d", code)
                break
            # It had ended because it was idle: start another one.
        else:
            if _command():
                raise Qwen3Error("the trial process for grammars keeps failing; try again")
        _log.warning("a grammar is compiled without a trial: its time and memory are not limited")
        return ""

    def _started(self) -> "tuple[subprocess.Popen[bytes], socket.socket]":
        if self._process and self._connection and self._process.poll() is None:
            return self._process, self._connection
        self._end()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                _command(),
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,  # so that Ctrl-C reaches this process alone
            )
        self._connection = ours
        self._end = weakref.finalize(self, _stop, self._process, ours)
        return self._process, ours


def _stop(process: "subprocess.Popen[bytes]", connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()


def _answer(connection: socket.socket, message: bytes, caller: Caller) -> bytes:
    """Return the answer of the process, or b"" if the process has ended."""
    connection.settimeout(_ANSWER_TIMEOUT)
    try:
        connection.sendall(message)
        _wait_for_answer(connection, caller)
        connection.settimeout(_ANSWER_TIMEOUT)
        return grammar_worker.receive(connection)
    except TimeoutError as error:
        raise Qwen3Error(
            f"the trial process for grammars has not answered for {_ANSWER_TIMEOUT:g} s; try again"
        ) from error
    except ConnectionError:
        return b""


def _wait_for_answer(connection: socket.socket, caller: Caller) -> None:
    """Wait for the first byte of the answer, as long as the caller waits."""
    connection.settimeout(POLL_SECONDS)
    started = time.monotonic()
    while True:
        try:
            connection.recv(1, socket.MSG_PEEK)
            return
        except TimeoutError:
            caller.check()
            if time.monotonic() - started > _ANSWER_TIMEOUT:
                raise


@cache
def _command() -> list[str]:
    """Return the command of a trial process; empty if Python is embedded in an application."""
    found = find_spec("llguidance")
    if not sys.executable or getattr(sys, "frozen", False) or not found or not found.origin:
        return []
    folder = Path(found.origin).parent.parent
    return [sys.executable, "-I", "-S", grammar_worker.__file__, str(folder)]


class _Lane:
    """The trial processes that share one time limit."""

    def __init__(self, seconds: float, helpers: int) -> None:
        self.seconds = seconds
        self._queue = FairQueue(helpers)
        self._free: LifoQueue[_TrialProcess] = LifoQueue()
        for _ in range(helpers):
            self._free.put(_TrialProcess())

    @contextmanager
    def helper(self, caller: Caller) -> Iterator[_TrialProcess]:
        """Lend a process to the caller when it is the caller's turn."""
        with self._queue.turn(caller):
            helper = self._free.get()  # the most recently used one, so that idle ones can end
            try:
                yield helper
            finally:
                self._free.put(helper)


@cache
def _lanes() -> list[_Lane]:
    """Return the lanes of this process, which all vocabularies share."""
    return [_Lane(seconds, helpers) for seconds, helpers in TRIAL_LANES]
