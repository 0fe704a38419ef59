"""The state of a text in its grammar: which tokens may come next, and how the text can end.

After each token, llguidance computes which tokens of the vocabulary may come next, in much less
than a millisecond. A few grammars take a hundred times as long: the replies that follow them are
ended.
"""

import re
import time
from collections.abc import Callable, Mapping
from textwrap import shorten
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from numpy.typing import NDArray

_MAX_CLOSING = 400  # tokens
_MAX_PROBED = 100  # tokens
_SOURCE_EXCERPT = re.compile(
    r"\n<|\n +\d+ \| |; following special tokens|; consider making|; try avoiding|: \(And "
)
_SIMPLER = "try a simpler one, with fewer alternatives, optional parts or repetitions"
_MAX_MESSAGE = 300  # characters
_MAX_TRIED = 16  # bytes; with more candidates none is tried
# Bytes that end a value or begin the shortest one; then any byte, where none of these may come.
_CLOSERS = b'"}],0/' + b"nulltruefalse" + b": -." + bytes(range(97, 123)) + bytes(range(256))
# CPU seconds that following a text may take: at first, and in addition for each step. All replies
# wait for it, as it runs on the engine's thread. A mask takes 0.001 s, or much less.
_AT_FIRST, _A_STEP = 0.5, 0.01


class TimeLimit:
    """Counts the CPU time of following a text and checks it against a limit per step."""

    def __init__(self) -> None:
        self.taken = 0.0  # seconds
        self.steps = 0
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.thread_time()

    def __exit__(self, *_: object) -> None:
        self.taken += time.thread_time() - self._began
        self.steps += 1

    def __str__(self) -> str:
        return f"{self.taken:.1f} s for {self.steps} steps"

    @property
    def too_slow(self) -> bool:
        """True if it has taken more time than allowed."""
        return self.taken > _AT_FIRST + _A_STEP * self.steps


class GrammarState:
    """The state of one text in its grammar; the engine uses it through `GrammarConstraint`.

    A failure at run time, such as an expression that unfolds to too much, raises a ValueError,
    which ends the reply. If the grammar has a `spare`, the text continues in that, with a warning.
    """

    def __init__(
        self,
        matcher: "LLMatcher",
        vocabulary: int,
        byte_ids: Mapping[int, int],
        *,
        name: str,
    ) -> None:
        self.warnings: list[str] = []  # parts that are not enforced
        self.spare: Callable[[], GrammarState] | None = None
        self._ids: list[int] = []
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._byte_ids = byte_ids
        self._name = name
        self._pace = TimeLimit()

    def copy(self, warnings: list[str]) -> "GrammarState":
        """Return a copy in the same state; failures of the copy are added to `warnings`."""
        made = GrammarState(
            self._matcher.deep_copy(), self._vocabulary, self._byte_ids, name=self._name
        )
        made.spare, made.warnings, made._ids = self.spare, warnings, self._ids[:]
        return made

    @property
    def read(self) -> int:
        """Number of tokens appended so far."""
        return len(self._ids)

    @property
    def complete(self) -> bool:
        """True if nothing can follow the text."""
        return bool(self._matcher.is_stopped())

    @property
    def may_end(self) -> bool:
        """True if the text may end here."""
        return bool(self._matcher.is_accepting())

    def advance(self, token: int) -> None:
        """Append the next token, which the mask must allow."""
        if not self._matcher.is_stopped():
            self._ids.append(token)
            with self._pace:
                self._matcher.consume_token(token)
            self._recover()

    def rewind(self, read: int) -> None:
        """Return to the state after the first `read` tokens."""
        if self.read > read:
            self._matcher.rollback(self.read - read)
            del self._ids[read:]

    def forced_tokens(self) -> list[int]:
        """Return the tokens that must come next, where only one text is possible."""
        with self._pace:
            ids = [] if self.complete else list(self._matcher.compute_ff_tokens())
        return self.forced_tokens() if self._recover() else ids

    def mask(self) -> "NDArray[np.uint32]":
        """Return the ids that may come next, 32 to a word; end tokens where the text may end."""
        with self._pace:
            mask = _mask_of(self._matcher, self._vocabulary)
        return self.mask() if self._recover() else mask

    def unsupported(self) -> list[str]:
        """Return the parts of a schema that are not enforced; unknown `format`s are annotations."""
        found = map(line_of, self._matcher.get_grammar_warnings())
        return [warning for warning in found if not warning.startswith("Unknown format")]

    def probe(self) -> None:
        """Raise the ValueError, if any, that occurs on the likeliest way to an end of the text."""
        probed = self.copy([])
        probed._walk(_MAX_PROBED)
        probed._recover()

    def _recover(self) -> bool:
        """Continue in the spare grammar if this one has failed; return whether it has failed.

        Raises:
            ValueError: it has failed, and there is no spare in which the text can continue.
        """
        if self._pace.too_slow:
            problem = f"it has taken {self._pace}, too long; {_SIMPLER}"
        elif not self._matcher.is_error():
            return False
        elif (found := self._matcher.get_error()).startswith("NoExtension"):
            problem = "no text matches it"
        else:
            problem = f"{line_of(found)}; {_SIMPLER}"
        place = f" (seen after {self.read} tokens)" if self.read else ""
        complaint = f"{self._name}: {problem}{place}"
        if self.spare is None:
            raise ValueError(complaint)
        # The spare starts empty, so it has to consume the text so far. It has a fresh time limit,
        # and no spare of its own: if it fails as well, the reply ends.
        self._matcher, self._pace, self.spare = self.spare()._matcher, TimeLimit(), None
        self._matcher.consume_tokens(self._ids)
        self.warnings.append(f"the schema of a tool was not enforced in a call: {complaint}")
        return self._recover() or True

    def closing(self, max_tokens: int = _MAX_CLOSING) -> list[int] | None:
        """Return at most `max_tokens` tokens that end the text, or None if none were found."""
        walked = self.copy([])
        walked._pace = self._pace  # the search delays the same text, so its time counts
        return walked._walk(max_tokens)

    def _walk(self, max_tokens: int) -> list[int] | None:
        """Advance to a near end of the text and return the tokens, as described in `closing`."""
        matcher, ids = self._matcher, list[int]()
        while not matcher.is_accepting():
            if len(ids) >= max_tokens or matcher.is_error() or self._pace.too_slow:
                return None
            # Forced tokens first: they are free of choice, so they cannot lead away from an end.
            with self._pace:
                if not (more := list(matcher.compute_ff_tokens())):
                    more = self._token_towards_end(matcher)
                if more:
                    matcher.consume_tokens(more)
            if not more:
                return None
            ids += more
        return ids

    def _token_towards_end(self, matcher: "LLMatcher") -> list[int]:
        """Return the byte that ends the text, or else the one likeliest to bring the end near."""
        mask = _mask_of(matcher, self._vocabulary)
        near = [self._byte_ids[byte] for byte in _CLOSERS if byte in self._byte_ids]
        possible = [token for token in dict.fromkeys(near) if allows(mask, token)]
        for token in possible if len(possible) <= _MAX_TRIED else ():
            after = matcher.deep_copy()
            after.consume_token(token)
            if after.is_accepting():
                return [token]
        return possible[:1]


def line_of(text: str) -> str:
    """Return the message of an llguidance error without the sources and states it quotes."""
    return shorten(_SOURCE_EXCERPT.split(text)[0], _MAX_MESSAGE, placeholder=" ...")


def allows(mask: "NDArray[np.uint32]", token: int) -> bool:
    """Return whether a mask allows a token."""
    return bool(mask[token // 32] >> token % 32 & 1)


def _mask_of(matcher: "LLMatcher", vocabulary: int) -> "NDArray[np.uint32]":
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

    bits = allocate_token_bitmask(1, vocabulary)
    fill_next_token_bitmask(matcher, bits, 0)
    words: NDArray[np.uint32] = bits[0].view(np.uint32)
    return words
