"""A request that is ready for the engine: what `prepare` returns and `submit` takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen3_mlx.api.options import GenerationOptions
from qwen3_mlx.engine.sampling_params import SamplingParams
from qwen3_mlx.text.grammar import GrammarState
from qwen3_mlx.text.messages import Message
from qwen3_mlx.text.thinking import Thinking
from qwen3_mlx.text.thinking_budget import ThinkingLimits
from qwen3_mlx.text.tool_calls import ToolCallSyntax


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that is validated and complete: `ReplyGenerator.start` only submits it.

    Several replies can be started from one; each has copies of what has state.

    Attributes:
        prompt: the rendered text, or the ids of a raw prompt.
        ids: the token ids of the prompt.
        options: the options of the request; a copy may have another `seed` and `progress`.
        room: the most tokens of the reply; 0 only prefills the prompt.
        sampling: the sampling parameters, none of them None; those of `options` are among them.
        end_ids: the tokens that end the reply.
        limits: limits of the thinking, and whether loops are detected.
        thinking: the thinking modes of the checkpoint; None for raw text, whose tags are text.
        thinks: True if the reply begins with thinking.
        inside: True if the prompt ends inside the thinking.
        continued: the assistant's message that the reply continues, if any.
        messages: the normalised messages that the prompt was rendered from.
        tools: the descriptions of the tools.
        calls: how this checkpoint writes tool calls, if it is offered tools.
        answer_grammar: grammar of the answer; each reply gets a copy.
        call_grammar: grammar of a tool call; each call gets a copy.
        details: details that `Finish` passes on.
        client: key of the client, for fair scheduling.
        score_prompt: True if the first event is the prompt's own log probabilities.
        adapter: the number of the adapter to use, if any.
    """

    prompt: str | Sequence[int]
    ids: Sequence[int]
    options: GenerationOptions
    room: int
    sampling: SamplingParams
    end_ids: frozenset[int]
    limits: ThinkingLimits
    thinking: Thinking | None = None
    thinks: bool = False
    inside: bool = False
    continued: Message | None = None
    messages: Sequence[Message] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    calls: ToolCallSyntax | None = None
    answer_grammar: GrammarState | None = None
    call_grammar: GrammarState | None = None
    details: dict[str, str] = field(default_factory=dict)
    client: str = ""
    score_prompt: bool = False
    adapter: int | None = None
