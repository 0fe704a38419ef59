"""What the tests of this room share."""

from collections.abc import Callable, Sequence

from qwen3_mlx.text.events import Reasoning, Text, ToolCall, ToolCallDelta
from qwen3_mlx.text.parser import Emit, ReplyParser
from qwen3_mlx.text.sections import SectionTracker
from qwen3_mlx.text.template import ChatTemplate
from qwen3_mlx.text.thinking import Thinking
from qwen3_mlx.text.thinking_budget import ThinkingBudget, ThinkingLimits
from qwen3_mlx.text.tokenizer import Tokenizer
from qwen3_mlx.text.tool_calls import ToolCallSyntax
from tests.support import DEMO

TOKENIZER = Tokenizer(DEMO / "tokenizer.json")
TEMPLATE = ChatTemplate((DEMO / "chat_template.jinja").read_text())
THINKING = Thinking.of(TEMPLATE, TOKENIZER)

TOKENIZER = Tokenizer(DEMO / "tokenizer.json")
THINKING = Thinking.of(ChatTemplate((DEMO / "chat_template.jinja").read_text()), TOKENIZER)
OPEN, CLOSE = THINKING.open_id or 0, THINKING.close_id or 0
END = TOKENIZER.id_of("<|im_end|>") or 0
Chooser = Callable[[Sequence[int], Sequence[int]], int]


def new_parser(
    emit: Emit,
    *,
    thinking: Thinking | None = THINKING,
    inside: bool = False,
    stop: Sequence[str] = (),
    calls: ToolCallSyntax | None = None,
) -> ReplyParser:
    """Create a parser of its own, which no constraint goes before."""
    sections = SectionTracker(TOKENIZER, thinking, inside=inside)
    return ReplyParser(sections, emit, stop=stop, calls=calls)


class Reply:
    """What an engine makes of a chooser's tokens, and what the parser says of them."""

    def __init__(
        self,
        choose: Chooser,
        *,
        budget: int | None,
        guard: bool = False,
        inside: bool = False,
        most: int = 400,
        finish_at: int | None = None,
        message: str | None = None,
    ) -> None:
        self.reasoning = self.text = ""
        self.ids: list[int] = []
        self.ended = False
        self.began_inside = inside
        self._most = most
        limits = ThinkingLimits(message, budget, guard)
        ends = frozenset([END])
        sections = SectionTracker(TOKENIZER, THINKING, inside=inside, end_ids=ends)
        self.steering = ThinkingBudget(TOKENIZER, THINKING, sections, limits, end_ids=ends)
        self.parser = ReplyParser(sections, self._hear)
        self._force()
        while not self.ended:
            if finish_at is not None and len(self.ids) >= finish_at:
                self.steering.finish_thinking()
            self._take([choose(self.ids, self._ruled_out())])
            self._force()
        self.parser.close()

    def _ruled_out(self) -> list[int]:
        mask = self.steering.mask() if self.steering.needs_mask else None
        if mask is None:
            return []
        return [token for token in range(len(TOKENIZER)) if not mask[token // 32] >> token % 32 & 1]

    def _hear(self, event: Reasoning | Text | ToolCall | ToolCallDelta) -> None:
        if isinstance(event, Reasoning):
            self.reasoning += event.text
        elif isinstance(event, Text):
            self.text += event.text

    def _force(self) -> None:
        while not self.ended and (forced := self.steering.forced_tokens()):
            self._take(forced[: self._most - len(self.ids)])

    def _take(self, ids: list[int]) -> None:
        self.ids += ids
        self.steering.advance(ids)
        if unwanted := self.steering.rollback:
            del self.ids[len(self.ids) - unwanted :]
            if unwanted > len(ids):
                self.parser.rewind(unwanted - len(ids))
            return
        full = len(self.ids) >= self._most
        self.ended = ids[-1] == END or self.steering.finished or full
        self.parser.advance([token for token in ids if token != END])


CALLS = ToolCallSyntax.of(TEMPLATE, TOKENIZER, [])
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
BAD = "<tool_call>\nno JSON\n</tool_call>"


def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression

    Args:
        expression: the expression
    """
    numbers = [int(part) for part in expression.split("+")]
    return str(sum(numbers))
