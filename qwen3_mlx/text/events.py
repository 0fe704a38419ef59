"""What a generation says, piece by piece."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log probability, before sampling parameters and grammars change it.

    `top` are the likeliest in its place, with theirs. What was forced had no choice: 0, and none.
    """

    token: bytes
    logprob: float
    top: Sequence[tuple[bytes, float]] = ()


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """The tokens of a prompt: the first, and those that follow with their log probabilities.

    It comes before all else, where a prompt's log probabilities were asked for.
    """

    first: bytes
    others: Sequence[TokenLogprob] = ()


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the thinking, and its tokens where `logprobs` were asked for."""

    text: str
    tokens: Sequence[TokenLogprob] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer, and its tokens where `logprobs` were asked for."""

    text: str
    tokens: Sequence[TokenLogprob] = ()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool that the model wants called; `raw_arguments` are the arguments as it wrote them."""

    id: str
    name: str
    arguments: dict[str, Any]
    raw_arguments: str = ""


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a call's arguments as they are written, where `partial_calls` asks for them.

    The pieces of one `id` joined are the `raw_arguments` of the `ToolCall` that follows them.
    Without the last of them they are not JSON, so a call that is cut off, which no `ToolCall`
    follows, cannot be taken for a whole one.
    """

    id: str
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted. `completion_tokens` are all that the model chose, its end token included;
    `reasoning_tokens` of them stood between `<think>` and `</think>`.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The last event: why it ended (stop, length, tool_calls or cancelled), and what it took.

    `details` may tell more, such as which stop string ended the text.
    """

    reason: str
    usage: Usage
    details: dict[str, str] = field(default_factory=dict)


Event = PromptTokens | Reasoning | Text | ToolCall | ToolCallDelta | Finish
