"""Keeps a reply on its way: a budget for the thinking, an end to loops, an answer after it all.

It knows ids only, so it can steer while the text is still being put together. Its rules for a
budget are those that Qwen's documentation and the trouble of others have taught:

- Tokens that the model chooses inside the thinking count; the tags and what is forced do not.
- At the limit the hand-off is forced, as one chunk: Qwen's own text, then the closing tag. A
  character of which bytes are missing is taken back first.
- A reply that would end within the thinking is handed off, too, so that there is an answer; until a
  visible character of it is there, it can neither end nor think again.
- A call of a tool ends the thinking, if the reply ends with it.
- A reply thinks once: when the thinking is closed or the answer has begun, its tags are text.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from qwen3_mlx.text.repetition import RepetitionDetector
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
_MOST_ANSWER, _ANSWER_SHARE = 256, 4  # tokens kept free for it, at most; its part of all


def hand_off_ids(tokenizer: Tokenizer, thinking: Thinking, message: str | None) -> list[int]:
    """Give the ids that close the thinking; `message` None is Qwen's text, "" the tag alone.

    Raises:
        ValueError: the message has tags in its midst.
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
    budget: int, max_tokens: int, hand_off: Sequence[int], least_answer: int = 1
) -> int:
    """Give the part of a budget that leaves room for the hand-off and an answer.

    Raises:
        ValueError: there is none.
    """
    rest = max_tokens - 1 - len(hand_off)  # 1: the tag that opens the thinking
    answer = max(least_answer, min(_MOST_ANSWER, rest // _ANSWER_SHARE))
    if rest < answer:
        raise ValueError(
            f"max_tokens={max_tokens} leaves no room for an answer: to close the thinking takes "
            f"{1 + len(hand_off)} tokens, and the answer at least {least_answer}"
        )
    return min(budget, rest - answer)


@dataclass(frozen=True, slots=True)
class ThinkingLimits:
    """What a reply is held to: at most `budget` tokens of thinking, and no endless repetition.

    `hand_off` are the ids that close the thinking.
    """

    hand_off: Sequence[int]
    budget: int | None
    guard: bool

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        thinking: Thinking | None,
        *,
        budget: int | None,
        message: str | None,
        max_tokens: int,
        guard: bool,
        least_answer: int = 1,
        bends: bool = False,
    ) -> "ThinkingLimits":
        """Make them of what was asked; an answer finds room within `max_tokens`.

        Where there is little of it, a budget that `bends` is closed by the tag alone; where there
        is none, it is given up.

        Raises:
            ValueError: there is none otherwise, or the message does not close the thinking.
        """
        if thinking is None or thinking.close_id is None:
            return cls((), None, guard)
        hand_off = hand_off_ids(tokenizer, thinking, message)
        if budget is None:
            return cls(hand_off, None, guard)
        if not bends:
            return cls(hand_off, budget_within(budget, max_tokens, hand_off, least_answer), guard)
        closings = [hand_off, hand_off_ids(tokenizer, thinking, "")]
        if message is None and len(hand_off) * _ANSWER_SHARE > max_tokens:
            del closings[0]  # Qwen's words would take the room of the answer
        for closing in closings:
            try:
                return cls(closing, budget_within(budget, max_tokens, closing, least_answer), guard)
            except ValueError:
                continue
        return cls(closings[-1], None, guard)


@dataclass(slots=True)
class _State:
    """Where a reply stands; copied for every token, so that tokens can be taken back."""

    inside: bool
    spent: int = 0  # tokens of thinking that the model chose
    unseen: int = 0  # of the last tokens, those that are bytes of an unfinished character
    bytes_held: bytes = b""
    forced_tokens: int = 0  # tokens of the hand-off that are still to come back
    closed_by: str | None = None
    over: bool = False  # whether the thinking is, so that its tags are text
    answered: bool = False  # whether a visible character of the answer is there
    looped: bool = False
    called: bool = False  # whether a call of a tool was the last thing in the thinking


class ThinkingBudget:
    """A `Constraint` of the engine: holds one reply to its limits."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        thinking: Thinking | None,
        limits: ThinkingLimits,
        *,
        inside: bool,
        answering: bool = False,
        end_ids: frozenset[int],
        calls: ToolCallSyntax | None = None,
    ) -> None:
        """Begin; the prompt may end `inside` the thinking, or `answering` already."""
        self.rollback = 0
        self._tokenizer = tokenizer
        self._open_id = thinking.open_id if thinking else None
        self._close_id = thinking.close_id if thinking else None
        self._limits = limits
        self._end_ids = end_ids
        self._call_close_id = calls.close_id if calls else None
        self._ruled_out = end_ids | ({self._open_id} if self._open_id is not None else set())
        self._asked = False
        self._due: str | None = None
        self._now = _State(inside, over=answering)
        self._before: list[_State] = []
        self._loops = RepetitionDetector() if limits.guard else None
        self._look()

    @property
    def inside(self) -> bool:
        """Whether the reply is thinking."""
        return self._now.inside

    @property
    def finished(self) -> bool:
        """Whether the answer goes in circles."""
        return self._now.looped and not self._now.inside

    @property
    def needs_mask(self) -> bool:
        """Whether some tokens are ruled out: the thinking was closed, and nothing is answered."""
        now = self._now
        return now.closed_by is not None and not now.inside and not now.answered

    @property
    def closed_by(self) -> str | None:
        """What has closed the thinking, if it was not the model: budget, end, loop or request."""
        return self._now.closed_by

    @property
    def looped(self) -> bool:
        """Whether going in circles has ended the thinking or the answer."""
        return self._now.closed_by == "loop" or self.finished

    @property
    def details(self) -> dict[str, str]:
        """What `Finish` tells: what has closed the thinking, and that a loop ended the answer."""
        closed = {"thinking_closed_by": self.closed_by} if self.closed_by else {}
        return closed | ({"ended_by": "loop"} if self.finished else {})

    def finish_thinking(self) -> None:
        """Close the thinking within a step, or as soon as it begins; from any thread."""
        self._asked = True

    def advance(self, ids: Sequence[int]) -> None:
        """Take the next tokens."""
        self.rollback = 0
        for token in ids:
            self._before.append(self._now)
            self._now = replace(self._now)
            self._step(token)
        self._look()

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens taken."""
        if count:
            self._now = self._before[-count]
            del self._before[-count:]
            if self._loops:
                self._loops.rewind(count)
        self._due = None

    def forced_tokens(self) -> list[int]:
        """Give the hand-off, when it is due."""
        if self._due is None:
            return []
        ids = self._limits.hand_off
        self._now.closed_by = self._due
        self._now.forced_tokens, self._due = len(ids), None
        return list(ids)

    def mask(self) -> "NDArray[np.uint32] | None":
        """Allow all but the end tokens, and to think again."""
        words = ~self.no_mask()
        for token in self._ruled_out:
            words[token // 32] &= ~np.uint32(1 << token % 32)
        return words

    def lookahead_masks(self, ids: Sequence[int]) -> "list[NDArray[np.uint32] | None]":
        """Give the mask for the next token: only the first of an answer has one."""
        return [self.mask()]

    def no_mask(self) -> "NDArray[np.uint32]":
        """Give a mask that allows nothing yet."""
        return np.zeros(-(-len(self._tokenizer) // 32), dtype=np.uint32)

    def _step(self, token: int) -> None:
        now = self._now
        chosen = now.forced_tokens == 0
        now.forced_tokens -= not chosen
        now.looped = self._loops is not None and self._loops.add(token) and chosen
        if token == self._open_id and not now.inside and not now.over:
            now.inside, now.unseen, now.bytes_held = True, 0, b""
        elif token == self._close_id and now.inside:
            now.inside, now.unseen, now.bytes_held, now.over = False, 0, b"", True
        elif token in self._end_ids:
            if now.inside and not now.called and self._limits.budget is not None:
                self._due, self.rollback = "end", now.unseen + 1
        else:
            text = self._text_of(token)
            if token == self._call_close_id:
                now.called = True
            elif text.strip():
                now.called = False
            if now.inside:
                now.spent += chosen
            elif text.strip():
                now.answered = now.over = True

    def _text_of(self, token: int) -> str:
        """Give the text that a token completes, and note what it leaves incomplete."""
        now, decoder = self._now, codecs.getincrementaldecoder("utf-8")(errors="replace")
        text = decoder.decode(now.bytes_held + self._tokenizer.token_bytes(token))
        now.bytes_held = decoder.getstate()[0]
        now.unseen = now.unseen + 1 if now.bytes_held and not text else 0
        return text

    def _look(self) -> None:
        """See whether the thinking must end here; what of it has not been seen is taken back."""
        now, budget = self._now, self._limits.budget
        if now.inside and not now.forced_tokens and self._due is None:
            if budget is not None and now.spent >= budget:
                self._due = "budget"
            elif self._asked:
                self._due = "request"
            elif now.looped:
                self._due = "loop"
            self.rollback = now.unseen if self._due else 0
        if self.rollback:
            self._now = self._before[-self.rollback]
            del self._before[-self.rollback :]
            if self._loops:
                self._loops.rewind(self.rollback)
