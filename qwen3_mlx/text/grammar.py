"""Where a text stands in its grammar: what may come next, and how it ends.

A grammar says after each token which may come next; the library does that for a whole vocabulary in
much less than a millisecond. A few grammars take a hundred times as long: they are cut off.
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

_MOST_CLOSING = 400  # tokens
_MOST_PROBED = 100  # tokens
_SHOWN = re.compile(
    r"\n<|\n +\d+ \| |; following special tokens|; consider making|; try avoiding|: \(And "
)
_SIMPLER = "try a simpler one, with fewer alternatives, optional parts or repetitions"
_LONGEST_LINE = 300  # characters
_FEW = 16  # bytes that may come next and are tried
# What ends a value, or begins the shortest; any byte serves where none of these may come.
_CLOSERS = b'"}],0/' + b"nulltruefalse" + b": -." + bytes(range(97, 123)) + bytes(range(256))
# CPU seconds that a text may take: all replies wait for each. A mask takes 0.001 s, or much less.
_AT_FIRST, _A_STEP = 0.5, 0.01


class Pace:
    """Counts the CPU time that it takes to follow a text, which may be so much for each step."""

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
        """Whether it has taken more than it may."""
        return self.taken > _AT_FIRST + _A_STEP * self.steps


class GrammarState:
    """Where a text stands in its grammar; met by the engine through `ThinkingBudget`.

    What fails at run time, such as an expression that unfolds to too much, is a ValueError: it ends
    the reply. If the grammar has a `spare`, the text goes on in that, with a warning.
    """

    def __init__(
        self,
        matcher: "LLMatcher",
        vocabulary: int,
        byte_ids: Mapping[int, int],
        *,
        name: str,
    ) -> None:
        self.warnings: list[str] = []  # what it does not enforce
        self.spare: Callable[[], GrammarState] | None = None
        self._taken: list[int] = []  # tokens
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._byte_ids = byte_ids
        self._name = name
        self._pace = Pace()

    def copy(self, warnings: list[str]) -> "GrammarState":
        """Return this grammar where it stands; what fails from there on is added to `warnings`."""
        made = GrammarState(
            self._matcher.deep_copy(), self._vocabulary, self._byte_ids, name=self._name
        )
        made.spare, made.warnings, made._taken = self.spare, warnings, self._taken[:]
        return made

    @property
    def read(self) -> int:
        """How many tokens were taken."""
        return len(self._taken)

    @property
    def complete(self) -> bool:
        """Whether nothing can come after what is there."""
        return bool(self._matcher.is_stopped())

    @property
    def may_end(self) -> bool:
        """Whether what is there is a whole."""
        return bool(self._matcher.is_accepting())

    def advance(self, token: int) -> None:
        """Take the next token, one that may come."""
        if not self._matcher.is_stopped():
            self._taken.append(token)
            with self._pace:
                self._matcher.consume_token(token)
            self._recover()

    def rewind(self, read: int) -> None:
        """Go back to where `read` tokens had been taken."""
        if self.read > read:
            self._matcher.rollback(self.read - read)
            del self._taken[read:]

    def forced_tokens(self) -> list[int]:
        """Give the tokens that alone can come next."""
        with self._pace:
            ids = [] if self.complete else list(self._matcher.compute_ff_tokens())
        return self.forced_tokens() if self._recover() else ids

    def mask(self) -> "NDArray[np.uint32]":
        """Give the ids that may come next, 32 to a word; end tokens where the text may end."""
        with self._pace:
            mask = _mask_of(self._matcher, self._vocabulary)
        return self.mask() if self._recover() else mask

    def unsupported(self) -> list[str]:
        """Return what of a schema is not enforced; an unknown `format` is but an annotation."""
        found = map(line_of, self._matcher.get_grammar_warnings())
        return [words for words in found if not words.startswith("Unknown format")]

    def probe(self) -> None:
        """Raise the ValueError that the likeliest way to an end of the text runs into, if any."""
        probed = self.copy([])
        probed._walk(_MOST_PROBED)
        probed._recover()

    def _recover(self) -> bool:
        """Go on in the spare grammar if this one has failed, and say whether it has.

        Raises:
            ValueError: it has, and there is no spare, or none in which the text goes on.
        """
        if self._pace.too_slow:
            words = f"it has taken {self._pace}, too long; {_SIMPLER}"
        elif not self._matcher.is_error():
            return False
        elif (found := self._matcher.get_error()).startswith("NoExtension"):
            words = "no text matches it"
        else:
            words = f"{line_of(found)}; {_SIMPLER}"
        place = f" (seen after {self.read} tokens)" if self.read else ""
        complaint = f"{self._name}: {words}{place}"
        if self.spare is None:
            raise ValueError(complaint)
        self._matcher, self._pace, self.spare = self.spare()._matcher, Pace(), None
        self._matcher.consume_tokens(self._taken)
        self.warnings.append(f"the schema of a tool was not enforced in a call: {complaint}")
        return self._recover() or True

    def closing(self, most: int = _MOST_CLOSING) -> list[int] | None:
        """Give tokens that end the text soon, at most `most`, or None if none were found."""
        walked = self.copy([])
        walked._pace = self._pace  # for it is the same text that waits
        return walked._walk(most)

    def _walk(self, most: int) -> list[int] | None:
        """Go on to an end of the text that is near; return the tokens as `closing` says."""
        matcher, ids = self._matcher, list[int]()
        while not matcher.is_accepting():
            if len(ids) >= most or matcher.is_error() or self._pace.too_slow:
                return None
            with self._pace:
                if not (more := list(matcher.compute_ff_tokens())):
                    more = self._towards_the_end(matcher)
                if more:
                    matcher.consume_tokens(more)
            if not more:
                return None
            ids += more
        return ids

    def _towards_the_end(self, matcher: "LLMatcher") -> list[int]:
        """Give the byte that ends the text, or else the likeliest to bring its end near."""
        mask = _mask_of(matcher, self._vocabulary)
        near = [self._byte_ids[byte] for byte in _CLOSERS if byte in self._byte_ids]
        possible = [token for token in dict.fromkeys(near) if allows(mask, token)]
        for token in possible if len(possible) <= _FEW else ():
            after = matcher.deep_copy()
            after.consume_token(token)
            if after.is_accepting():
                return [token]
        return possible[:1]


def line_of(text: str) -> str:
    """Return the sentence of an error of llguidance, without the sources and states it shows."""
    return shorten(_SHOWN.split(text)[0], _LONGEST_LINE, placeholder=" ...")


def allows(mask: "NDArray[np.uint32]", token: int) -> bool:
    """Say whether a mask allows a token."""
    return bool(mask[token // 32] >> token % 32 & 1)


def _mask_of(matcher: "LLMatcher", vocabulary: int) -> "NDArray[np.uint32]":
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

    bits = allocate_token_bitmask(1, vocabulary)
    fill_next_token_bitmask(matcher, bits, 0)
    words: NDArray[np.uint32] = bits[0].view(np.uint32)
    return words
