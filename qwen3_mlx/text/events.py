"""Events of a reply: pieces of thinking and text, tool calls, and the end."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log probability, before sampling parameters and grammars change it.

    `top` are the likeliest tokens in its place, with their log probabilities. A forced token had no
    alternative: its log probability is 0, and `top` is empty.
    """

    token: bytes
    logprob: float
    top: Sequence[tuple[bytes, float]] = ()


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Tokens of the prompt: the first, and the others with their log probabilities.

    The first event of a reply, if the log probabilities of the prompt were requested.
    """

    first: bytes
    others: Sequence[TokenLogprob] = ()


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the thinking, and its tokens if `logprobs` were requested."""

    text: str
    tokens: Sequence[TokenLogprob] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer, and its tokens if `logprobs` were requested."""

    text: str
    tokens: Sequence[TokenLogprob] = ()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call by the model; `raw_arguments` is the text of the arguments as generated."""

    id: str
    name: str
    arguments: dict[str, Any]
    raw_arguments: str = ""


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a call's arguments while it is generated, if `partial_calls` is set.

    The joined pieces of one `id` are the `raw_arguments` of the `ToolCall` that follows them.
    Without the last piece they are not JSON: a call that is cut off, which no `ToolCall` follows,
    cannot be taken for a complete one.
    """

    id: str
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a reply.

    `completion_tokens` are all tokens that the model chose, its end token included;
    `reasoning_tokens` of them are between `<think>` and `</think>`.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The last event: the finish reason (stop, length, tool_calls or cancelled) and the usage.

    `details` may have more, such as the stop string that ended the text.
    """

    reason: str
    usage: Usage
    details: dict[str, str] = field(default_factory=dict)


Event = PromptTokens | Reasoning | Text | ToolCall | ToolCallDelta | Finish
