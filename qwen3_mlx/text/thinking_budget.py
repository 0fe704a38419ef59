"""Thinking budget and repetition guard, as a decoding constraint.

The rules of the budget follow Qwen's documentation and the problems reported for other engines:

- Tokens that the model chooses inside the thinking count; the tags and forced tokens do not.
- At the limit the hand-off is forced as one chunk: Qwen's own text, then the closing tag. The
  tokens of an incomplete character are rolled back first.
- A reply that would end within the thinking is also handed off, so that there is an answer. Until
  a visible character of the answer has come, the reply can neither end nor think again.
- A tool call ends the thinking if the reply ends with the call.
- A reply thinks once: after the thinking is closed or the answer has begun, its tags are text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from qwen3_mlx.text.repetition import RepetitionDetector
from qwen3_mlx.text.sections import Section, SectionTracker
from qwen3_mlx.text.thinking import CLOSE, OPEN, Thinking
from qwen3_mlx.text.tokenizer import Tokenizer
from qwen3_mlx.text.tool_calls import ToolCallSyntax

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Qwen's documentation, "Thinking budget" (its technical report prints a stray dot after the tag).
HAND_OFF = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the "
    f"thinking directly now.\n{CLOSE}\n\n"
)
_PLAIN_CLOSE = f"\n{CLOSE}\n\n"
# Reserved for the answer: at most 256 tokens, and at most a quarter of the room for the reply.
_MAX_ANSWER_RESERVE, _ANSWER_SHARE = 256, 4


def hand_off_ids(tokenizer: Tokenizer, thinking: Thinking, message: str | None) -> list[int]:
    """Return the ids that close the thinking; `message` None is Qwen's text, "" the tag alone.

    Raises:
        ValueError: the message has an opening tag, or more than one closing tag.
    """
    if message is None:
        text = HAND_OFF
    else:
        text = message if CLOSE in message else message + _PLAIN_CLOSE
    before, _, after = text.partition(CLOSE)
    if CLOSE in after or OPEN in text:
        raise ValueError(f"thinking_budget_message must have at most one {CLOSE}: {message!r}")
    assert thinking.close_id is not None
    return [*tokenizer.encode_plain(before), thinking.close_id, *tokenizer.encode_plain(after)]


def budget_within(
    budget: int, max_tokens: int, hand_off: Sequence[int], min_answer: int = 1
) -> int:
    """Return the part of `budget` that leaves room for the hand-off and an answer, in tokens.

    Raises:
        ValueError: no part of it does.
    """
    rest = max_tokens - 1 - len(hand_off)  # 1: the tag that opens the thinking
    answer = max(min_answer, min(_MAX_ANSWER_RESERVE, rest // _ANSWER_SHARE))
    if rest < answer:
        raise ValueError(
            f"max_tokens={max_tokens} leaves no room for an answer: closing the thinking takes "
            f"{1 + len(hand_off)} tokens, and the answer at least {min_answer}"
        )
    return min(budget, rest - answer)


@dataclass(frozen=True, slots=True)
class ThinkingLimits:
    """Limits of one reply: at most `budget` tokens of thinking; with `guard`, no endless loop.

    `message` is the text that closes the thinking, as `hand_off_ids` takes it.
    """

    message: str | None
    budget: int | None
    guard: bool

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        thinking: Thinking,
        *,
        budget: int | None,
        message: str | None,
        max_tokens: int,
        guard: bool,
        min_answer: int = 1,
        bends: bool = False,
    ) -> "ThinkingLimits":
        """Create the limits of a request, with room for an answer within `max_tokens`.

        A budget that `bends` adapts: with little room the thinking is closed by the tag alone, and
        with none there is no budget.

        Raises:
            ValueError: a budget that does not bend leaves no room, or the message is not valid.
        """
        if thinking.close_id is None:
            return cls(message, None, guard)
        hand_off = hand_off_ids(tokenizer, thinking, message)
        if budget is None:
            return cls(message, None, guard)
        if not bends:
            within = budget_within(budget, max_tokens, hand_off, min_answer)
            return cls(message, within, guard)
        closings = {message: hand_off, "": hand_off_ids(tokenizer, thinking, "")}
        if message is None and len(hand_off) * _ANSWER_SHARE > max_tokens:
            del closings[message]  # Qwen's text would take the room of the answer
        for closing, ids in closings.items():
            try:
                return cls(closing, budget_within(budget, max_tokens, ids, min_answer), guard)
            except ValueError:
                continue
        return cls("", None, guard)


@dataclass(slots=True)
class _State:
    """State of a reply; copied for every token, so that tokens can be rolled back."""

    spent: int = 0  # tokens of thinking that the model chose
    forced_tokens: int = 0  # tokens of the hand-off that `advance` has not seen yet
    closed_by: str | None = None
    looped: bool = False
    called: bool = False  # True if the thinking ends with a tool call so far


class ThinkingBudget:
    """A `Constraint` of the engine that enforces the `ThinkingLimits` of one reply."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        thinking: Thinking | None,
        sections: SectionTracker,
        limits: ThinkingLimits,
        *,
        end_ids: frozenset[int],
        calls: ToolCallSyntax | None = None,
    ) -> None:
        """Create the constraint, which passes the tokens of the reply to `sections`."""
        self.rollback = 0
        self._tokenizer = tokenizer
        self._thinking = thinking
        self._sections = sections
        self._limits = limits
        self._end_ids = end_ids
        self._call_close_id = calls.close_id if calls else None
        self._close_requested = False
        self._pending_close: str | None = None
        self._state = _State()
        self._history: list[_State] = []
        self._repetition = RepetitionDetector() if limits.guard else None
        self._check_limits()

    @property
    def finished(self) -> bool:
        """True if the answer is in a loop."""
        return self._state.looped and not self._sections.inside

    @property
    def needs_mask(self) -> bool:
        """True if some tokens are masked: the thinking was closed and the answer is still empty."""
        closed = self._sections.last.section is Section.CLOSED
        return closed and self._state.closed_by is not None

    @property
    def closed_by(self) -> str | None:
        """Reason for a forced close of the thinking: budget, end, loop or request; else None."""
        return self._state.closed_by

    def looped(self) -> bool:
        """Return whether a loop has ended the thinking or the answer."""
        return self._state.closed_by == "loop" or self.finished

    @property
    def details(self) -> dict[str, str]:
        """Entries for `Finish.details`: the reason of a forced close, and a loop in the answer."""
        closed = {"thinking_closed_by": self.closed_by} if self.closed_by else {}
        return closed | ({"ended_by": "loop"} if self.finished else {})

    def finish_thinking(self) -> None:
        """Close the thinking within a step, or as soon as it begins; callable from any thread."""
        # Only a flag: the worker thread owns all other state and reads this after the next token.
        self._close_requested = True

    def advance(self, ids: Sequence[int]) -> None:
        """Append the next tokens, and set `rollback` if some of them must be removed."""
        self.rollback = 0
        for token in ids:
            self._history.append(self._state)
            state = self._state = replace(self._state)
            was_inside = self._sections.inside
            self._sections.advance(token)
            chosen = state.forced_tokens == 0
            state.forced_tokens -= not chosen
            # Forced tokens are recorded, too (a rewind counts them), but never count as a loop.
            state.looped = self._repetition is not None and self._repetition.add(token) and chosen
            if not (was_inside and self._sections.inside):
                continue  # a tag, or a token of the answer
            now = self._sections.last
            if token not in self._end_ids:
                state.spent += chosen
                if token == self._call_close_id:
                    state.called = True
                elif now.text.strip():
                    state.called = False
            elif not state.called and self._limits.budget is not None:
                # A reply that ends with a call has an answer: the call. Any other end is rolled
                # back, with the tokens of an incomplete character before it.
                self._pending_close, self.rollback = "end", now.undecoded + 1
        self._check_limits()

    def rewind(self, count: int) -> None:
        """Remove the last `count` tokens."""
        if count:
            self._remove(count)
        self._pending_close = None

    def forced_tokens(self) -> list[int]:
        """Return the hand-off if the thinking must be closed now, else nothing."""
        if self._pending_close is None:
            return []
        assert self._thinking
        ids = hand_off_ids(self._tokenizer, self._thinking, self._limits.message)
        # The engine returns forced ids through `advance`; they are counted so as not to be charged.
        self._state.closed_by = self._pending_close
        self._state.forced_tokens, self._pending_close = len(ids), None
        return ids

    def mask(self) -> "NDArray[np.uint32] | None":
        """Return a mask of all tokens but the end tokens and the tag that opens the thinking."""
        words = ~self.no_mask()
        for token in (*self._end_ids, self._sections.open_id):
            if token is not None:
                words[token // 32] &= ~np.uint32(1 << token % 32)
        return words

    def lookahead_masks(self, ids: Sequence[int]) -> "list[NDArray[np.uint32] | None]":
        """Return the mask of the next token alone: only the first token of an answer has one."""
        return [self.mask()]

    def no_mask(self) -> "NDArray[np.uint32]":
        """Return a mask that allows no token, 32 ids to a word."""
        return np.zeros(-(-len(self._tokenizer) // 32), dtype=np.uint32)

    def _check_limits(self) -> None:
        """Decide whether the thinking must end here; roll back the tokens not decoded yet."""
        state, budget = self._state, self._limits.budget
        if self._sections.inside and not state.forced_tokens and self._pending_close is None:
            if budget is not None and state.spent >= budget:
                self._pending_close = "budget"
            elif self._close_requested:
                self._pending_close = "request"
            elif state.looped:
                self._pending_close = "loop"
            # The hand-off must not follow half a character: its bytes would decode to U+FFFD.
            self.rollback = self._sections.last.undecoded if self._pending_close else 0
        if self.rollback:
            # The tokens are removed here already: the engine does not call `rewind` for them.
            self._remove(self.rollback)

    def _remove(self, count: int) -> None:
        self._state = self._history[-count]
        del self._history[-count:]
        self._sections.rewind(count)
        if self._repetition:
            self._repetition.rewind(count)
