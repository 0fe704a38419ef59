"""Structured output: the answer and the tool calls follow a grammar once the thinking is closed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen3_mlx.text.grammar import GrammarState, allows
from qwen3_mlx.text.sections import SectionTracker
from qwen3_mlx.text.thinking_budget import ThinkingBudget
from qwen3_mlx.text.tokenizer import Tokenizer
from qwen3_mlx.text.tool_calls import ToolCallSyntax

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_CLOSING_SEARCH_MARGIN = 32  # tokens in which a lost closing may be found again
_CLOSING_WATCH = 300  # tokens left below which the shortest closing is tracked


@dataclass(frozen=True, slots=True)
class ToolCallRule:
    """How tools may be called: text between the tags follows the grammar that `grammar` creates.

    With `must` the answer tags with a call; with `only_one` the reply ends after the first call.
    """

    calls: ToolCallSyntax
    grammar: Callable[[], GrammarState]
    must: bool = False
    only_one: bool = False


class GrammarConstraint:
    """A `Constraint` of the engine: `ThinkingBudget` for the thinking, then grammars.

    The answer follows the grammar `answer`, if there is one, and tool calls follow `calling`.
    Near `max_tokens`, a token that leaves too little room to end the answer is rolled back and the
    closing is forced. The closing is also forced when a loop is detected. A tool call is never
    closed this way: half an argument is a different order, so a call without room stays cut off.
    """

    def __init__(
        self,
        budget: ThinkingBudget,
        sections: SectionTracker,
        tokenizer: Tokenizer,
        *,
        thinks: bool,
        max_tokens: int,
        answer: GrammarState | None = None,
        calling: ToolCallRule | None = None,
    ) -> None:
        """Create the constraint; with `thinks` the reply may open the thinking itself."""
        self.rollback = 0  # number of the last tokens to roll back
        self._budget = budget
        self._sections = sections
        self._thinks = thinks and sections.open_id is not None and not sections.inside
        self._break_ids = tokenizer.encode("\n\n")
        self._max_tokens = max_tokens
        self._answer = answer
        self._call_rule = calling
        self._calls = calling.calls if calling else None
        self._call_closed = False  # True once a call has been closed
        # None inside the thinking and after a call: only the thinking budget applies there.
        self._active = None if sections.inside else answer
        # The active grammar and its length before each token, so that any token can be rolled back.
        self._history: list[tuple[GrammarState | None, int]] = []
        self._forcing_text = False  # True if the next tokens are forced and of no grammar
        self._break_pending = False  # True if the break after the thinking is to be forced
        # Tokens that end the answer from here, as far as they were searched and found.
        self._closing_ids: list[int] | None = None
        self._closing = False

    @property
    def finished(self) -> bool:
        """True if the grammar is complete, or the answer is in a loop."""
        if self._call_closed and self._call_rule and self._call_rule.only_one:
            return True
        # A complete call does not end the reply: its closing tag is forced next.
        if self._active is None or self._in_call:
            return self._budget.finished
        whole = self._active.complete or (self._closing and self._active.may_end)
        # A grammar that accepts the empty text has not answered anything before its first token.
        return whole and self._active.read > 0

    @property
    def needs_mask(self) -> bool:
        """True if only some tokens may come next."""
        return self._active is not None or self._must_call or self._budget.needs_mask

    def advance(self, ids: Sequence[int]) -> None:
        """Append the next tokens, and set `rollback` if some of them must be removed."""
        # The engine passes the forced tokens in one call, so the flag holds for these ids only.
        inside, forced = self._sections.inside, self._forcing_text
        self._forcing_text = False
        self._budget.advance(ids)
        for token in ids:
            self._history.append((self._active, self._active.read if self._active else 0))
            self._advance_grammar(token, forced=forced)
        self.rollback = self._budget.rollback
        if self.rollback:
            # The budget has rewound itself already; only the grammar has to follow.
            self._rewind_grammar(self.rollback)
            if self.rollback != len(ids):
                self._closing_ids = None  # it belongs to a longer text
        elif (
            self._open_answer and not self._closing and self._must_close_earlier(self._open_answer)
        ):
            # The known closing is one of the text before these ids, so all of these are removed.
            self.rollback = len(ids)
            self.rewind(len(ids))
            self._closing = True
        elif inside != self._sections.inside:
            self._active = None if self._sections.inside else self._answer
            # A hand-off brings its own line break. After a tag that the model wrote, the break is
            # forced: the grammar has no text before the answer, the chat template has one.
            answering = self._active is not None or self._must_call
            self._break_pending = not self._sections.inside and not forced and answering

    def rewind(self, count: int) -> None:
        """Remove the last `count` tokens."""
        self._budget.rewind(count)
        self._rewind_grammar(count)

    def forced_tokens(self) -> list[int]:
        """Return the tokens that must come next."""
        if ids := self._budget.forced_tokens():
            self._forcing_text = True
        elif self._break_pending:
            ids, self._break_pending, self._forcing_text = self._break_ids, False, True
        elif self._must_call:
            ids = tags if len(tags := self._opening_tags()) == 1 else []
        elif self._active:
            ids = self._forced_by(self._active)
        return ids

    def mask(self) -> "NDArray[np.uint32] | None":
        """Return the mask of the tokens that may come next, 32 ids to a word, or None for all."""
        if self._active is None and not self._must_call:
            return self._budget.mask()
        mask = self._active.mask() if self._active else self._budget.no_mask()
        # The grammar does not know the tags (control tokens are no text), so they are added here.
        for token in self._opening_tags():
            mask[token // 32] |= type(mask[0])(1 << token % 32)
        return mask

    def lookahead_masks(self, ids: Sequence[int]) -> "list[NDArray[np.uint32] | None]":
        """Return the masks of the next token and of those after `ids`, until a token is forced."""
        active = self._active
        if active is None or self._opening_tags():
            return [self.mask()]  # a tag would change the grammar: what follows is not known
        # The draft tokens are only tried: the grammar is rewound, whichever of them are accepted.
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

    def _opening_tags(self) -> list[int]:
        """Return the tags that may open the thinking or a call in place of the answer."""
        if not self._must_call and (
            self._active is not self._answer or self._active is None or self._active.read
        ):
            return []
        tags = [self._calls.open_id] if self._calls else []
        if self._thinks and not self._history:
            assert self._sections.open_id is not None
            tags.append(self._sections.open_id)
        return tags

    def _advance_grammar(self, token: int, *, forced: bool) -> None:
        """Append a token to the active grammar, or switch the grammar at the tags of a call."""
        calls = self._calls
        # Thinking, the hand-off and the tag that opens the thinking are not text of any grammar.
        if self._sections.inside or forced or token == self._sections.open_id:
            return
        if self._call_rule and token == self._call_rule.calls.open_id and not self._in_call:
            # Each call has a grammar of its own, so a rollback finds the answer's where it stood.
            self._active, self._closing_ids = self._call_rule.grammar(), None
        elif calls and token == calls.close_id:
            self._active = self._closing_ids = None
            self._call_closed = True
        elif self._active:
            self._active.advance(token)

    @property
    def _must_call(self) -> bool:
        """True if only a call may come next, or the thinking before it."""
        return (
            self._call_rule is not None
            and self._call_rule.must
            and not self._call_closed
            and not self._sections.inside
            and not self._in_call
        )

    @property
    def _in_call(self) -> bool:
        return self._active is not None and self._active is not self._answer

    @property
    def _open_answer(self) -> GrammarState | None:
        """The grammar of the answer while the answer is being written, else None."""
        return None if self._in_call else self._active

    def _forced_by(self, active: GrammarState) -> list[int]:
        if self._in_call and active.complete:
            assert self._calls
            return [self._calls.close_id]
        if self._closing and self._closing_ids:
            ids, self._closing_ids = self._closing_ids, None
            return ids
        # Forcing the first tokens of the answer would leave the model no way to think or to call.
        return [] if self._opening_tags() else active.forced_tokens()

    def _must_close_earlier(self, active: GrammarState) -> bool:
        """Return whether the last tokens must be removed to close the answer; track the closing."""
        left = self._max_tokens - len(self._history)
        # A search walks the grammar to an end after each token: too much work for a whole reply.
        if left > _CLOSING_WATCH and not self._budget.finished:
            return False
        before, end = self._closing_ids, active.closing()
        if self._budget.finished and end is not None:
            self._closing, self._closing_ids = True, end
            return False
        if end is not None and len(end) <= left:
            self._closing_ids = end
            return False
        # The search may fail here and succeed after the next tokens. The known closing is one of
        # the text before these, and only these can be removed: the earlier ones have been shown.
        if end is None and left > len(before or ()) + _CLOSING_SEARCH_MARGIN:
            self._closing_ids = None
            return False
        return before is not None

    def _rewind_grammar(self, count: int) -> None:
        """Restore the grammar before the last `count` tokens."""
        if not count:
            return
        before, read = self._history[-count]
        del self._history[-count:]
        # A grammar entered within the removed tokens starts over: the answer's is entered again.
        if self._active and self._active is not before:
            self._active.rewind(0)
        if before:
            before.rewind(read)
        self._active = before
