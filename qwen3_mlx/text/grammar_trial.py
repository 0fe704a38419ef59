"""Compiles grammars, if a trial has shown that compiling them comes to an end.

A grammar of a few bytes can take hours, all memory or the stack, and nothing stops llguidance at
it; so each is compiled on trial once, by a process of its own that the kernel ends at a limit.
That has no vocabulary, starts in 0.1 s, takes 20 MB, and ends when it has been idle for a minute.
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
from qwen3_mlx.text.fair_queue import LOOK, Caller, FairQueue

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Bounds what a regular expression may unfold to: (a{1000}){1000} takes 0.7 s and 50 MB with the
# published vocabulary, and lists of 20,000 words still fit.
_LIMITS: Any = {"initial_lexer_fuel": 300_000, "verbose_errors": False}
# CPU seconds of a trial, and how many there may be at once. Sixty tools take 0.02 s, what is as
# large as is allowed 0.5 s: what takes longer than the first limit lets others go before.
LANES = ((0.25, 2), (2.0, 1))
_HANGS = 60.0  # seconds without an answer, on the clock: the machine is asleep or swaps
_MOST_TRIED = 4096  # grammars
_TRIES = 3

_log = logging.getLogger(__name__)
_Value = TypeVar("_Value")


class Kept(Generic[_Value]):
    """The latest results by their sources, of which it keeps no more than a hash."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[bytes, _Value] = OrderedDict()
        self._lock = Lock()

    def get(self, source: str) -> _Value | None:
        """Return what is kept, if anything is."""
        key = _key(source)
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key]

    def put(self, source: str, value: _Value) -> None:
        """Keep a result."""
        key = _key(source)
        with self._lock:
            self._kept[key] = value
            self._kept.move_to_end(key)
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)


def _key(source: str) -> bytes:
    return sha256(source.encode("utf-8", "surrogatepass")).digest()


class TrialCompiler:
    """Compiles for one vocabulary, which `make` makes: that takes a second, and frees no thread.

    What a trial has shown is kept; what is compiled is not, for all copies of a matcher share a
    lexer: it grows with each text, and when one text is too much for it, it fails for all.
    """

    def __init__(self, make: "Callable[[], LLTokenizer]") -> None:
        self._make = make
        self._made: LLTokenizer | None = None
        self._lock = Lock()
        self._tried: Kept[int | str] = Kept(_MOST_TRIED)  # the lane that served, or what is wrong

    def vocabulary(self) -> "LLTokenizer":
        """Return the vocabulary, made where it is first needed."""
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made

    def compile(self, grammar: str, caller: Caller) -> "LLMatcher":
        """Return a matcher at the beginning of a grammar.

        Raises:
            ValueError: llguidance refuses it, or it takes too much.
            Qwen3Error: the caller is gone.
        """
        if self._found(grammar) == 0:  # it is quick, and need not wait for what may not be
            with caller.waiting():
                return self.compile_untried(grammar)
        with caller.waiting():
            for number, lane in enumerate(_lanes()):
                with lane.helper(caller) as helper:
                    found = self._found(grammar)  # another caller's trial may have ended meanwhile
                    if found is None:
                        wrong = helper.wrong_with(grammar, lane.seconds, caller)
                        if wrong:
                            raise self._refusal(grammar, wrong)
                        if wrong is None:
                            continue
                        self._tried.put(grammar, number)
                    elif found != number:
                        continue
                    return self.compile_untried(grammar)
        raise self._refusal(
            grammar,
            f"it takes more than {LANES[-1][0]:g} s to compile; try a simpler one, with fewer "
            "alternatives, repetitions or expressions that are intersected",
        )

    def compile_untried(self, grammar: str) -> "LLMatcher":
        """Do as `compile` does with a grammar that is known to be harmless."""
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(**_LIMITS)
        made = LLMatcher(self.vocabulary(), grammar, log_level=0, limits=limits)
        if made.is_error():
            raise self._refusal(grammar, made.get_error())
        return made

    def _found(self, grammar: str) -> int | None:
        found = self._tried.get(grammar)
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def _refusal(self, grammar: str, wrong: str) -> ValueError:
        self._tried.put(grammar, wrong)
        return ValueError(wrong)


class _TrialProcess:
    """A process for trials; started where one is needed, and again after it has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._end: Callable[[], object] = lambda: None

    def wrong_with(self, grammar: str, seconds: float, caller: Caller) -> str | None:
        """Return what is wrong with a grammar, "" if nothing is; None if it takes too long.

        Raises:
            Qwen3Error: the caller is gone, or there is no answer.
        """
        asked = {"grammar": grammar, "seconds": seconds, "limits": _LIMITS}
        message = grammar_worker.framed(json.dumps(asked).encode())
        for _ in range(_TRIES if _command() else 0):
            try:
                process, connection = self._started()
                if found := _answer(connection, message, caller):
                    wrong: str = json.loads(found)
                    return wrong
            except BaseException:  # what it would answer is for nobody now
                self._end()
                raise
            code = process.wait()
            self._end()
            if code == -SIGPROF:
                return None
            if code == -SIGKILL:
                continue  # by what has nothing to do with the grammar, perhaps
            if code < 0:
                return "it takes more memory than there is, or is too deep; try a simpler one"
            if code > 0:
                _log.warning("the process that tries grammars ends with %d", code)
                break
            # It had ended because there was nothing to do: another one.
        else:
            if _command():
                raise Qwen3Error("the process that tries grammars ends again and again; try again")
        _log.warning("a grammar is compiled without a trial: what it takes has no bound")
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
                start_new_session=True,  # so that Ctrl-C is for the program alone
            )
        self._connection = ours
        self._end = weakref.finalize(self, _stop, self._process, ours)
        return self._process, ours


def _stop(process: "subprocess.Popen[bytes]", connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()


def _answer(connection: socket.socket, message: bytes, caller: Caller) -> bytes:
    """Return what the process answers, or nothing if it has ended."""
    connection.settimeout(_HANGS)
    try:
        connection.sendall(message)
        started = time.monotonic()
        connection.settimeout(LOOK)
        while True:
            try:
                connection.recv(1, socket.MSG_PEEK)
                break
            except TimeoutError:
                caller.check()
                if time.monotonic() - started > _HANGS:
                    raise
        connection.settimeout(_HANGS)
        return grammar_worker.receive(connection)
    except TimeoutError as error:
        raise Qwen3Error(
            f"the process that tries grammars has not answered for {_HANGS:g} s; try again"
        ) from error
    except ConnectionError:
        return b""


@cache
def _command() -> list[str]:
    """Return what starts a process for trials; nothing where Python is a part of an application."""
    found = find_spec("llguidance")
    if not sys.executable or getattr(sys, "frozen", False) or not found or not found.origin:
        return []
    folder = Path(found.origin).parent.parent
    return [sys.executable, "-I", "-S", grammar_worker.__file__, str(folder)]


class _Lane:
    """The processes for trials of one length."""

    def __init__(self, seconds: float, helpers: int) -> None:
        self.seconds = seconds
        self._turns = FairQueue(helpers)
        self._free: LifoQueue[_TrialProcess] = LifoQueue()
        for _ in range(helpers):
            self._free.put(_TrialProcess())

    @contextmanager
    def helper(self, caller: Caller) -> Iterator[_TrialProcess]:
        """Give a process to the caller, when it is its turn."""
        with self._turns.one(caller):
            helper = self._free.get()  # the one that was at work last: others may end
            try:
                yield helper
            finally:
                self._free.put(helper)


@cache
def _lanes() -> list[_Lane]:
    """Return the lanes of this process, which all vocabularies share."""
    return [_Lane(seconds, helpers) for seconds, helpers in LANES]
