"""Holds an answer to a form: JSON, a pattern, calls of tools; once the thinking is closed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen3_mlx.text.grammar import GrammarState, allows
from qwen3_mlx.text.thinking import Thinking
from qwen3_mlx.text.thinking_budget import ThinkingBudget
from qwen3_mlx.text.tokenizer import Tokenizer
from qwen3_mlx.text.tool_calls import ToolCallSyntax

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_ROOM_TO_LOOK = 32  # tokens
_NEAR_THE_END = 300  # tokens; from here on it is looked at how many it takes to close


@dataclass(frozen=True, slots=True)
class ToolCallRule:
    """How tools may be called: what stands between the tags is held to what `grammar` gives.

    With `must` the answer begins with a call; with `only_one` it ends after the first.
    """

    calls: ToolCallSyntax
    grammar: Callable[[], GrammarState]
    must: bool = False
    only_one: bool = False


class GrammarConstraint:
    """A `Constraint` of the engine: `ThinkingBudget` for the thinking, grammars for what follows.

    Each answer is held to `answer`, if there is one, and the calls of tools to `calling`.
    When `max_tokens` come near, a token after which there would not be room to end the answer is
    taken back, and the end is forced; so it is when a loop is noticed. A call is never ended so:
    half an argument is another order, so a call that finds no room stays cut off.
    """

    def __init__(
        self,
        steering: ThinkingBudget,
        tokenizer: Tokenizer,
        thinking: Thinking | None,
        *,
        thinks: bool,
        max_tokens: int,
        answer: GrammarState | None = None,
        calling: ToolCallRule | None = None,
    ) -> None:
        """Begin; `thinks` says that the reply may open the thinking itself."""
        self.rollback = 0  # how many of the last tokens are to be taken back
        self._steering = steering
        self._open_id = thinking.open_id if thinking else None
        self._thinks = thinks and self._open_id is not None and not steering.inside
        self._break = tokenizer.encode("\n\n")
        self._max_tokens = max_tokens
        self._answer = answer
        self._calling = calling
        self._calls = calling.calls if calling else None
        self._called = False  # whether a call has been closed
        self._active = None if steering.inside else answer
        self._before: list[tuple[GrammarState | None, int]] = []
        self._given = False  # whether the tokens to come are forced, and no grammar's
        self._gap = False  # whether the line break after the thinking is still to come
        self._end: list[int] | None = None  # what would end the text now, where it is looked at
        self._closing = False

    @property
    def finished(self) -> bool:
        """Whether the form is filled, or the answer goes in circles."""
        if self._called and self._calling and self._calling.only_one:
            return True
        if self._active is None or self._in_a_call:
            return self._steering.finished
        whole = self._active.complete or (self._closing and self._active.may_end)
        return whole and self._active.read > 0

    @property
    def needs_mask(self) -> bool:
        """Whether only some tokens may come next."""
        return self._active is not None or self._awaits_call or self._steering.needs_mask

    def advance(self, ids: Sequence[int]) -> None:
        """Take the next tokens."""
        inside, given = self._steering.inside, self._given
        self._given = False
        self._steering.advance(ids)
        for token in ids:
            self._before.append((self._active, self._active.read if self._active else 0))
            self._follow(token, given=given)
        self.rollback = self._steering.rollback
        if self.rollback:
            self._go_back(self.rollback)
        elif self._answering and not self._closing and self._leaves_no_room(self._answering):
            self.rollback = len(ids)
            self.rewind(len(ids))
            self._closing = True
        elif inside != self._steering.inside:
            self._active = None if self._steering.inside else self._answer
            answering = self._active is not None or self._awaits_call
            self._gap = not self._steering.inside and not given and answering

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens taken."""
        self._steering.rewind(count)
        self._go_back(count)

    def forced_tokens(self) -> list[int]:
        """Give the tokens that must come next."""
        if ids := self._steering.forced_tokens():
            self._given = True
        elif self._gap:
            ids, self._gap, self._given = self._break, False, True
        elif self._awaits_call:
            ids = tags if len(tags := self._other_beginnings()) == 1 else []
        elif self._active:
            ids = self._forced_by(self._active)
        return ids

    def mask(self) -> "NDArray[np.uint32] | None":
        """Give the tokens that may come next."""
        if self._active is None and not self._awaits_call:
            return self._steering.mask()
        mask = self._active.mask() if self._active else self._steering.no_mask()
        for token in self._other_beginnings():
            mask[token // 32] |= type(mask[0])(1 << token % 32)
        return mask

    def lookahead_masks(self, ids: Sequence[int]) -> "list[NDArray[np.uint32] | None]":
        """Give the masks for the next token and those behind `ids`, as far as none is forced."""
        active = self._active
        if active is None or self._other_beginnings():
            return [self.mask()]
        read, masks = active.read, [active.mask()]
        for token in ids:
            if not allows(masks[-1], token):
                break
            active.advance(token)
            if active.complete or active.forced_tokens():
                break
            masks.append(active.mask())
        active.rewind(read)
        return list(masks)

    def _other_beginnings(self) -> list[int]:
        """Give the tags that may come instead of the answer: those of thinking and of a call."""
        if not self._awaits_call and (
            self._active is not self._answer or self._active is None or self._active.read
        ):
            return []
        begins = [self._calls.open_id] if self._calls else []
        if self._thinks and not self._before:
            assert self._open_id is not None
            begins.append(self._open_id)
        return begins

    def _follow(self, token: int, *, given: bool) -> None:
        calls = self._calls
        if self._steering.inside or given or token == self._open_id:
            return
        if self._calling and token == self._calling.calls.open_id and not self._in_a_call:
            self._active, self._end = self._calling.grammar(), None
        elif calls and token == calls.close_id:
            self._active = self._end = None
            self._called = True
        elif self._active:
            self._active.advance(token)

    @property
    def _awaits_call(self) -> bool:
        """Whether nothing but a call may come, or thinking before it."""
        return (
            self._calling is not None
            and self._calling.must
            and not self._called
            and not self._steering.inside
            and not self._in_a_call
        )

    @property
    def _in_a_call(self) -> bool:
        return self._active is not None and self._active is not self._answer

    @property
    def _answering(self) -> GrammarState | None:
        """The grammar of the answer, while that is being written."""
        return None if self._in_a_call else self._active

    def _forced_by(self, active: GrammarState) -> list[int]:
        if self._in_a_call and active.complete:
            assert self._calls
            return [self._calls.close_id]
        if self._closing and self._end:
            ids, self._end = self._end, None
            return ids
        return [] if self._other_beginnings() else active.forced_tokens()

    def _leaves_no_room(self, active: GrammarState) -> bool:
        """Say whether the answer must end as it was before the last tokens; know how, if so."""
        left = self._max_tokens - len(self._before)
        if left > _NEAR_THE_END and not self._steering.finished:
            return False
        before, end = self._end, active.closing()
        if self._steering.finished and end is not None:
            self._closing, self._end = True, end
            return False
        if end is not None and len(end) <= left:
            self._end = end
            return False
        # Where no end is found, it may be again after the next tokens, if there is room for those.
        return before is not None and left <= len(before) + _ROOM_TO_LOOK

    def _go_back(self, count: int) -> None:
        if not count:
            return
        before, read = self._before[-count]
        del self._before[-count:]
        if self._active and self._active is not before:
            self._active.rewind(0)
        if before:
            before.rewind(read)
        self._active = before
