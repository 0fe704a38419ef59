"""The requests and responses of Anthropic's Messages API, as far as they are honoured here."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from qwen3_mlx.server.openai.schema import ThinkingIn
from qwen3_mlx.server.thinking import ThinkingRequest
from qwen3_mlx.server.wire import (
    Messages,
    OrderedModel,
    Parts,
    RequestModel,
    Stops,
    Tools,
    WireModel,
)

NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "container": (),
    "mcp_servers": (),
    "service_tier": ("auto", "standard_only"),
}
HARMLESS = frozenset(("metadata", "betas", "cache_control", "inference_geo"))
# What a model is told of a tool; the rest is for the provider.
_LIBRARY_NAMES = {"name": "name", "description": "description", "input_schema": "parameters"}
_EFFORT = "output_config.effort"
_BILLING = "x-anthropic-billing-header:"  # changes from request to request, and means nothing here


class Block(WireModel):
    """A part of a message: text, thinking, a call of a tool, or what came of one."""

    type: str
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None  # of redacted_thinking
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: "str | Parts[Block] | None" = None
    is_error: bool | None = None
    cache_control: dict[str, Any] | None = None
    citations: Parts[Any] | None = None


class Message(WireModel):
    """A message of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | Parts[Block]


class ToolIn(OrderedModel):
    """A tool that the model may call."""

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None
    cache_control: dict[str, Any] | None = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None


class ToolChoice(WireModel):
    """Which of them it must call, if any."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(WireModel):
    """The form of the answer."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(WireModel):
    """How much to think, and the form of the answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class PromptBody(RequestModel):
    """What a prompt is made of."""

    model: str | None = None
    messages: Annotated[Messages[Message], Field(min_length=1)]
    system: str | Parts[Block] | None = None
    tools: Tools[ToolIn] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingIn | None = None
    output_config: OutputConfig | None = None

    def wish(self) -> ThinkingRequest:
        """Give what is said of thinking; an effort wins over a budget, as it does elsewhere."""
        thinking, config = self.thinking, self.output_config
        switch = thinking.switch if thinking else None
        budget = ("thinking.budget_tokens", thinking.budget_tokens if thinking else None)
        effort = config.effort if config and switch is not False else None
        overruled = effort and budget[1] is not None
        return ThinkingRequest(
            ([("thinking.type", switch)],),
            [] if overruled else [budget],
            config.effort if config else None,
            _EFFORT,
            thinking.adaptive if thinking else None,
            [(budget, f"{_EFFORT}={effort}")] if overruled else (),
        )

    def library_messages(self) -> list[dict[str, Any]]:
        """Give the messages as the library has them.

        Raises:
            ValueError: a part cannot be read.
        """
        made = [{"role": "system", "content": text}] if (text := self._system()) else []
        for place, message in enumerate(self.messages):
            if isinstance(message.content, str):
                made.append({"role": message.role, "content": message.content})
            elif message.role == "assistant":
                made.append(_reply(message.content, f"messages[{place}]"))
            else:
                made += _turn(message.role, message.content, f"messages[{place}]")
        return made

    def _system(self) -> str:
        if self.system is None or isinstance(self.system, str):
            return self.system or ""
        texts = [_text(block, "system") for block in self.system]
        return "\n\n".join(text for text in texts if not text.startswith(_BILLING))

    def library_tools(self) -> list[dict[str, Any]]:
        """Give the tools as the library has them.

        Raises:
            ValueError: one is the provider's own.
        """
        made = []
        for tool in self.tools or ():
            if tool.type not in (None, "custom") or tool.input_schema is None:
                kind = f" of type {tool.type!r:.100}" if tool.type else ""
                raise ValueError(
                    f"the tool {tool.name!r:.100}{kind} is not supported: it needs an "
                    "input_schema, and to be run by the client"
                )
            function = {
                _LIBRARY_NAMES[name]: value
                for name, value in tool.sent.items()
                if name in _LIBRARY_NAMES
            }
            made.append({"type": "function", "function": function})
        return made


class MessagesRequest(PromptBody):
    """`POST /v1/messages`."""

    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool | None = None
    stop_sequences: Stops | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None


class UsageOut(WireModel):
    """Tokens counted; those of the prompt that were cached are not among `input_tokens`."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int


class MessageOut(WireModel):
    """A whole reply."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal[
        "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
    ]
    stop_sequence: str | None
    usage: UsageOut


class CountOut(WireModel):
    """How many tokens a prompt has."""

    input_tokens: int


class ErrorDetails(WireModel):
    """What is wrong."""

    type: str
    message: str


class ErrorOut(WireModel):
    """Any response that is not the one asked for."""

    type: Literal["error"]
    error: ErrorDetails


def _text(block: Block, where: str) -> str:
    if block.type == "text" and block.text is not None:
        return block.text
    raise ValueError(f"{where}: a part of type {block.type!r} has no text; Qwen3 reads text only")


def _reply(blocks: list[Block], where: str) -> dict[str, Any]:
    """Put an assistant's message together; signatures come back as they went, unread."""
    texts, thinking, calls = [], [], []
    for block in blocks:
        if block.type == "thinking":
            thinking.append(block.thinking or "")
        elif block.type == "tool_use" and block.name is not None:
            function = {"name": block.name, "arguments": block.input or {}}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif block.type != "redacted_thinking":  # which nobody can read but who wrote it
            texts.append(_text(block, where))
    made: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thinking:
        made["reasoning_content"] = "\n".join(thinking)
    if calls:
        made["tool_calls"] = calls
    return made


def _turn(role: str, blocks: list[Block], where: str) -> Iterator[dict[str, Any]]:
    """Take a user's message apart: what came of calls, and what is said beside it."""
    said = []
    for block in blocks:
        if block.type != "tool_result":
            said.append(_text(block, where))
            continue
        content = block.content or ""
        parts = [content] if isinstance(content, str) else [_text(part, where) for part in content]
        words = "".join(parts)
        if block.is_error and not words.startswith("Error"):
            words = f"Error: {words}"
        yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": words}
    if said or not blocks:
        yield {"role": role, "content": "\n\n".join(said)}
