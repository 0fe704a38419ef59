"""Request and response models of Anthropic's Messages API, with the fields that are supported."""

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
# Fields of a tool that the model sees; the others are for the provider.
_LIBRARY_NAMES = {"name": "name", "description": "description", "input_schema": "parameters"}
_EFFORT = "output_config.effort"
# Differs in each request, which would defeat the prefix cache, and has no meaning here.
_BILLING = "x-anthropic-billing-header:"


class Block(WireModel):
    """A content block: text, thinking, a tool call, or the result of one."""

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
    """The tool that the model must call, if any."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(WireModel):
    """Format of the answer."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(WireModel):
    """Effort of thinking, and format of the answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class PromptBody(RequestModel):
    """Fields that determine a prompt."""

    messages: Annotated[Messages[Message], Field(min_length=1)]
    system: str | Parts[Block] | None = None
    tools: Tools[ToolIn] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingIn | None = None
    output_config: OutputConfig | None = None

    def thinking_request(self) -> ThinkingRequest:
        """Return the thinking fields; an effort takes precedence over a budget in this protocol."""
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
        """Return the messages for the library.

        Raises:
            ValueError: a content block is not text, thinking, a tool call or a result.
        """
        messages = [{"role": "system", "content": text}] if (text := self._system()) else []
        for index, message in enumerate(self.messages):
            if isinstance(message.content, str):
                messages.append({"role": message.role, "content": message.content})
            elif message.role == "assistant":
                messages.append(_assistant_message(message.content, f"messages[{index}]"))
            else:
                messages += _user_messages(message.role, message.content, f"messages[{index}]")
        return messages

    def _system(self) -> str:
        if self.system is None or isinstance(self.system, str):
            return self.system or ""
        texts = [_text(block, "system") for block in self.system]
        return "\n\n".join(text for text in texts if not text.startswith(_BILLING))

    def library_tools(self) -> list[dict[str, Any]]:
        """Return the tools for the library.

        Raises:
            ValueError: a tool is one that the provider runs.
        """
        tools = []
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
            tools.append({"type": "function", "function": function})
        return tools


class MessagesRequest(PromptBody):
    """`POST /v1/messages`."""

    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool | None = None
    stop_sequences: Stops | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None

    @property
    def streamed(self) -> bool:
        """True if the request wants the reply as a stream of events."""
        return bool(self.stream)


class AnthropicUsageOut(WireModel):
    """Token counts; `input_tokens` excludes the cached tokens of the prompt."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int


class AnthropicMessageOut(WireModel):
    """A complete message of the assistant."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal[
        "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
    ]
    stop_sequence: str | None
    usage: AnthropicUsageOut


class CountOut(WireModel):
    """Number of tokens of a prompt."""

    input_tokens: int


def _text(block: Block, where: str) -> str:
    if block.type == "text" and block.text is not None:
        return block.text
    raise ValueError(f"{where}: a part of type {block.type!r} has no text; Qwen3 reads text only")


def _assistant_message(blocks: list[Block], where: str) -> dict[str, Any]:
    """Convert the blocks of an assistant's message; signatures are not verified."""
    texts, thinking, calls = [], [], []
    for block in blocks:
        if block.type == "thinking":
            thinking.append(block.thinking or "")
        elif block.type == "tool_use" and block.name is not None:
            function = {"name": block.name, "arguments": block.input or {}}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif block.type != "redacted_thinking":  # encrypted by the provider
            texts.append(_text(block, where))
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thinking:
        message["reasoning_content"] = "\n".join(thinking)
    if calls:
        message["tool_calls"] = calls
    return message


def _user_messages(role: str, blocks: list[Block], where: str) -> Iterator[dict[str, Any]]:
    """Yield the tool results of a user's message, then one message with its text."""
    texts = []
    for block in blocks:
        if block.type != "tool_result":
            texts.append(_text(block, where))
            continue
        content = block.content or ""
        parts = [content] if isinstance(content, str) else [_text(part, where) for part in content]
        result = "".join(parts)
        if block.is_error and not result.startswith("Error"):
            result = f"Error: {result}"
        yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": result}
    if texts or not blocks:
        yield {"role": role, "content": "\n\n".join(texts)}
