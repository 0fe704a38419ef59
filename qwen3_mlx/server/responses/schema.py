"""Request and response models of OpenAI's Responses API, with the fields that are supported."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from qwen3_mlx.server.openai.schema import (
    NamedFunction,
    ReasoningIn,
    SamplingFields,
    ThinkingFields,
    TokenLimit,
    only_allowed,
)
from qwen3_mlx.server.wire import Messages, OrderedModel, Parts, Tools, WireModel

# Unsupported fields, each with the values that have no effect and are accepted.
NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {"background": (), "conversation": (), "prompt": ()}
# Fields that concern the provider alone, with the values that are not warned of.
HINTS: dict[str, tuple[Any, ...]] = {
    "client_metadata": (),
    "max_tool_calls": (),  # of tools that the provider runs
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "stream_options": (),
    "user": (),
}
LOGPROBS = "message.output_text.logprobs"
INCLUDED = (LOGPROBS, "reasoning.encrypted_content")
"""What `include` may ask for; the encrypted thinking is null, since it is sent in the clear."""
_SHOWN = ("name", "description", "parameters")  # what the model sees of a function
_MAX_WARNING = 300  # characters: a warning quotes what the client sent
# OpenAI's limits.
_MAX_PAIRS = 16
_Name = Annotated[str, Field(max_length=64)]
_Value = Annotated[str, Field(max_length=512)]


class ContentPart(WireModel):
    """A part of a message, of thinking, or of a tool's output."""

    type: str
    text: str | None = None
    refusal: str | None = None
    annotations: Parts[Any] | None = None
    logprobs: Parts[Any] | None = None


class InputItem(WireModel):
    """A message, thinking, a call, its output, or a reference to an item of a stored response."""

    type: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | Parts[ContentPart] | None = None
    summary: Parts[ContentPart] | None = None
    encrypted_content: str | None = None
    id: str | None = None
    status: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | Parts[ContentPart] | None = None


class Tool(OrderedModel):
    """A tool; the model may call functions, and other types are left out."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def unknown(self, prefix: str = "") -> Iterator[str]:
        """Yield the unknown fields of a function; a warning names the other types as a whole."""
        if self.type == "function":
            yield from super().unknown(prefix)


class FunctionChoice(NamedFunction):
    """The function that the model must call."""

    type: Literal["function"]


class AllowedTool(WireModel):
    """A tool that the model may call; types other than functions are left out."""

    type: str
    name: str | None = None


class AllowedTools(WireModel):
    """The choice of some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Tools[AllowedTool]


class TextFormat(WireModel):
    """Format of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(WireModel):
    """Format and length of the answer."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponsesReasoning(ReasoningIn):
    """OpenAI's thinking options, with OpenRouter's; the thinking itself is sent, not a summary."""

    summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesRequest(SamplingFields, ThinkingFields):
    """`POST /v1/responses`."""

    input: str | Annotated[Messages[InputItem], Field(min_length=1)]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    include: Parts[str] | None = None
    max_output_tokens: TokenLimit | None = None
    metadata: Annotated[dict[_Name, _Value], Field(max_length=_MAX_PAIRS)] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ResponsesReasoning | None = None
    text: TextConfig | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | AllowedTools | None = None
    tools: Tools[Tool] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncation: Literal["auto", "disabled"] | None = None

    @property
    def functions(self) -> list[Tool]:
        """The tools that the model may call."""
        return [tool for tool in self.tools or () if tool.type == "function"]

    def not_honoured(self) -> list[str]:
        """Return warnings of declared fields that are not honoured."""
        left_out = dict.fromkeys(tool.type for tool in self.tools or () if tool.type != "function")
        included = [name for name in self.include or () if name not in INCLUDED]
        verbosity = self.text.verbosity if self.text else None
        warnings = {
            f"tools of type {', '.join(left_out)} were left out: the model can call functions "
            "only": bool(left_out),
            f"include={', '.join(included)} has no effect here": bool(included),
            "truncation was ignored: a prompt that does not fit is refused": (
                self.truncation == "auto"
            ),
            f"text.verbosity={verbosity} has no effect here": verbosity not in (None, "medium"),
        }
        return [warning[:_MAX_WARNING] for warning, applies in warnings.items() if applies]

    def library_tools(self) -> list[dict[str, Any]]:
        """Return the functions for the library, of which `tool_choice` may allow some only.

        Raises:
            ValueError: a function has no name, or there is none of an allowed name.
        """
        tools = []
        for tool in self.functions:
            if not tool.name:
                raise ValueError("one of the tools has no name, which a function needs")
            shown = {name: value for name, value in tool.sent.items() if name in _SHOWN}
            tools.append({"type": "function", "function": shown})
        if isinstance(choice := self.tool_choice, AllowedTools):
            allowed = [tool.name or "" for tool in choice.tools if tool.type == "function"]
            return only_allowed(tools, allowed)
        return tools

    def library_tool_choice(self) -> str:
        """Return the choice of a tool for the library."""
        choice = self.tool_choice or "auto"
        if isinstance(choice, str):
            return choice
        return choice.mode if isinstance(choice, AllowedTools) else choice.name

    def described(self) -> dict[str, Any]:
        """Return the fields that a response repeats, with their defaults."""
        reasoning, choice = self.reasoning or ResponsesReasoning(), self.tool_choice or "auto"
        form = self.text.format if self.text else None
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
            "store": self.store is not False,
            "temperature": self.temperature,
            "text": {"format": _known(form) if form else {"type": "text"}},
            "tool_choice": choice if isinstance(choice, str) else _known(choice),
            "tools": [
                {"parameters": None, "strict": None, **_known(tool)} for tool in self.functions
            ],
            "top_logprobs": self.top_logprobs,
            "top_p": self.top_p,
            "truncation": "disabled",
        }

    def answer_schema(self) -> dict[str, Any] | None:
        """Return the JSON schema of the answer; None if it is plain text.

        Raises:
            ValueError: the schema is missing, or has no place in the format.
        """
        form = self.text.format if self.text else None
        schema = form.schema_ if form else None
        if form is None or form.type != "json_schema":
            if schema is not None:
                raise ValueError("text.format has a schema, which only the type json_schema has")
            return {"type": "object"} if form and form.type == "json_object" else None
        if schema is None:
            raise ValueError("text.format of type json_schema needs a schema")
        return schema


def _known(model: WireModel) -> dict[str, Any]:
    """Return the declared fields of an object that are not null."""
    known = {*type(model).model_fields}
    return model.model_dump(include=known, by_alias=True, exclude_none=True)


class InputDetails(WireModel):
    """Input tokens that were read from the prefix cache; writing to it is not counted."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(WireModel):
    """Output tokens that are thinking."""

    reasoning_tokens: int


class ResponseUsageOut(WireModel):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseOut(WireModel):
    """A response of the model."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    background: bool
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, str | None]
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int | None
    top_p: float | None
    truncation: Literal["disabled"]
    usage: ResponseUsageOut
    finish_details: dict[str, str] | None = None


class DeletedOut(WireModel):
    """The confirmation that a stored response was deleted."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]
