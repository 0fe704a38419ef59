"""Request models of OpenAI's API, with the fields that are supported."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from qwen3_mlx.server.thinking import UNLIMITED, NamedValue, ThinkingRequest, agreed_effort
from qwen3_mlx.server.wire import (
    FailFast,
    Messages,
    OrderedModel,
    Parts,
    RequestModel,
    Stops,
    Tools,
    WireModel,
)

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Count = Annotated[int, Field(ge=1)]


def _check_token_limit(tokens: int) -> int:
    if tokens == 0 or tokens < UNLIMITED:
        raise ValueError(f"must be at least 1, or -1 for no limit, not {tokens}")
    return tokens


TokenLimit = Annotated[
    int, AfterValidator(_check_token_limit), Field(description="-1 means no limit.")
]
Budget = Annotated[int, Field(ge=UNLIMITED, description="Thinking tokens; -1 means no limit.")]
_BUDGET_FIELDS = (
    "thinking_budget",
    "thinking_token_budget",
    "thinking_budget_tokens",
    "reasoning_budget_tokens",
    "reasoning_max_tokens",
)
_MAX_CHOICES = 32
_MAX_BIASES = 10_000


def _check_biases(sent: Any) -> Any:
    """Reject a mapping so large that validating it and listing its errors would take long."""
    if isinstance(sent, dict) and len(sent) > _MAX_BIASES:
        raise ValueError(f"at most {_MAX_BIASES:,} tokens can have a bias, not {len(sent):,}")
    return sent


TextOrIds = str | FailFast[str] | FailFast[int] | FailFast[FailFast[int]]
"""One text or several, each as it is or as token ids."""


def texts_of(given: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    """Return the texts of a `TextOrIds` as a list."""
    if isinstance(given, str):
        return [given]
    if given and isinstance(given[0], int):
        return [[token for token in given if isinstance(token, int)]]
    return [item for item in given if not isinstance(item, int)]


Biases = Annotated[dict[str, float], BeforeValidator(_check_biases)]

# Unsupported fields, each with the values that have no effect and are accepted.
NOT_FOR_CHAT: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (),
    "function_call": ("none",),
    "functions": (),
    "ignore_eos": (),
    "include_stop_str_in_output": (),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "prompt_logprobs": (),
    "skip_special_tokens": (True,),
    "store": (),
    "use_beam_search": (),
    "web_search_options": (),
}
NOT_FOR_TEXT = {name: neutral for name, neutral in NOT_FOR_CHAT.items() if name != "echo"} | {
    "suffix": ("",)
}
# Hints about the length or the speed of a reply. They have no effect here, and are warned of unless
# they have one of these values.
HINTS: dict[str, tuple[Any, ...]] = {
    "prediction": (),
    "service_tier": ("auto", "default"),
    "verbosity": ("medium",),
}
# Fields that do not concern the reply: caching, which is always on, and the provider's accounting.
HARMLESS = frozenset(
    ("cache_prompt", "prompt_cache_key", "prompt_cache_retention", "keep_alive")
    + ("metadata", "safety_identifier", "user", "api_key")
)


class Part(WireModel):
    """A part of a message: text, or an assistant's thinking or refusal."""

    type: str = "text"
    text: str | None = None
    thinking: "str | Parts[Part] | None" = None
    refusal: str | None = None


class Function(WireModel):
    """Name and arguments of a tool call; `arguments` are JSON text, or its value."""

    name: str
    arguments: Any = "{}"


class Call(WireModel):
    """A tool call of an earlier turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function
    index: int | None = None


class Message(WireModel):
    """A message of the conversation; an assistant's thinking may have either of two names."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Parts[Part] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: Parts[Call] | None = None
    tool_call_id: str | None = None
    prefix: bool | None = None  # DeepSeek's and Qwen's fields to continue the last message
    partial: bool | None = None


class FunctionIn(OrderedModel):
    """The function that the model sees."""

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolIn(OrderedModel):
    """A tool that the model may call."""

    type: Literal["function"] = "function"
    function: FunctionIn

    def library_tool(self) -> dict[str, Any]:
        """Return the tool for the library, with its keys in the order in which they were sent."""
        parts = {"type": self.type, "function": self.function.sent}
        return {name: parts.pop(name) for name in self.sent if name in parts} | parts


class NamedFunction(WireModel):
    """Name of a function."""

    name: str


class NamedTool(WireModel):
    """The function that the model must call."""

    type: Literal["function"]
    function: NamedFunction


class AllowedList(WireModel):
    """The functions that the model may call."""

    mode: Literal["auto", "required"]
    tools: Tools[NamedTool]


class AllowedTools(WireModel):
    """The choice of some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedList


def only_allowed(tools: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the tools, as the library has them, that an `allowed_tools` choice names.

    Raises:
        ValueError: it names one that is not among them.
    """
    if missing := {*names} - {tool["function"]["name"] for tool in tools}:
        raise ValueError(f"tool_choice allows {min(missing)!r:.100}, which is none of the tools")
    return [tool for tool in tools if tool["function"]["name"] in names]


class JsonSchema(WireModel):
    """JSON schema that the answer must fit."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(WireModel):
    """Format of the answer; `schema` is the field of other local servers."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class StructuredOutputs(WireModel):
    """vLLM's constraints of the answer; set one."""

    json_: dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: FailFast[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class StreamOptions(WireModel):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class TemplateKwargs(WireModel):
    """vLLM's variables of the chat template."""

    enable_thinking: bool | None = None


class ReasoningIn(WireModel):
    """OpenRouter's thinking options."""

    effort: Effort | None = None
    max_tokens: Budget | None = None
    enabled: bool | None = None
    exclude: bool | None = None


class ThinkingIn(WireModel):
    """Anthropic's thinking options."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Budget | None = None

    @property
    def switch(self) -> bool | None:
        """True for on, False for off; None if `adaptive`."""
        return {"enabled": True, "disabled": False, "adaptive": None}[self.type]

    @property
    def adaptive(self) -> str | None:
        """Name of the field if it leaves thinking to the model."""
        return "thinking.type" if self.type == "adaptive" else None


class SamplingFields(RequestModel):
    """Fields of all requests for a reply."""

    seed: int | None = None
    stop: str | Stops | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Biases | None = None

    @property
    def streamed(self) -> bool:
        """True if the request wants the reply as a stream of events."""
        return bool(self.stream)


class LoadingFields(RequestModel):
    """Fields of all requests that load a model."""

    ttl: Annotated[float, Field(ge=0, description="LM Studio's field.")] | None = None

    @property
    def model_seconds(self) -> float | None:
        """Seconds that the model stays loaded after the request; None if it does not say."""
        return self.ttl


class CompletionFields(SamplingFields, LoadingFields):
    """Fields of chat and text completions."""

    n: Annotated[int, Field(ge=1, le=_MAX_CHOICES)] | None = None
    stream_options: StreamOptions | None = None

    @property
    def replies(self) -> int:
        """Number of replies that the request wants."""
        return self.n or 1


class ThinkingFields(WireModel):
    """The thinking options of a request, in the spellings of all clients."""

    think: bool | Effort | None = None  # Ollama's field
    chat_template_kwargs: TemplateKwargs | None = None
    enable_thinking: bool | None = None
    thinking: ThinkingIn | None = None
    thinking_budget: Budget | None = None
    thinking_token_budget: Budget | None = None
    thinking_budget_tokens: Budget | None = None
    thinking_budget_message: str | None = None
    reasoning_budget_tokens: Budget | None = None
    reasoning_max_tokens: Budget | None = None
    reasoning: ReasoningIn | None = None
    reasoning_effort: Effort | None = None
    include_reasoning: bool | None = None

    @property
    def hides_reasoning(self) -> bool:
        """True if the thinking must be left out of the response."""
        return self.include_reasoning is False or bool(self.reasoning and self.reasoning.exclude)

    def thinking_request(self) -> ThinkingRequest:
        """Return the thinking fields of the request.

        Raises:
            ValueError: two fields name different efforts.
        """
        reasoning, thinking = self.reasoning or ReasoningIn(), self.thinking
        template = self.chat_template_kwargs or TemplateKwargs()
        switch, think_effort = self.think, None
        if isinstance(switch, str):
            switch, think_effort = None, switch
        effort_name, effort = agreed_effort(
            [
                ("reasoning_effort", self.reasoning_effort),
                ("reasoning.effort", reasoning.effort),
                ("think", think_effort),
            ]
        )
        budgets: list[NamedValue] = [(name, getattr(self, name)) for name in _BUDGET_FIELDS]
        budgets += [
            ("thinking.budget_tokens", thinking.budget_tokens if thinking else None),
            ("reasoning.max_tokens", reasoning.max_tokens),
        ]
        return ThinkingRequest(
            (
                [("enable_thinking", self.enable_thinking)],
                [("chat_template_kwargs.enable_thinking", template.enable_thinking)],
                [
                    ("thinking.type", thinking.switch if thinking else None),
                    ("reasoning.enabled", reasoning.enabled),
                    ("think", switch),
                ],
            ),
            budgets,
            effort,
            effort_name,
            thinking.adaptive if thinking else None,
        )


class ChatRequest(CompletionFields, ThinkingFields):
    """`POST /v1/chat/completions`."""

    messages: Annotated[Messages[Message], Field(min_length=1)]
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    max_tokens: TokenLimit | None = None
    max_completion_tokens: TokenLimit | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Tools[ToolIn] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    json_schema: dict[str, Any] | None = None  # llama.cpp's field
    format: Literal["json", ""] | dict[str, Any] | None = None  # Ollama's field


class TextRequest(CompletionFields):
    """`POST /v1/completions`."""

    prompt: TextOrIds
    max_tokens: Annotated[int, Field(ge=-1, description="-1 means no limit.")] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None

    @property
    def replies(self) -> int:
        """Number of replies that the request wants: `n` to each prompt."""
        several = isinstance(self.prompt, list) and not isinstance((*self.prompt, 0)[0], int)
        return (self.n or 1) * (len(self.prompt) if several else 1)


class EmbeddingRequest(LoadingFields):
    """`POST /v1/embeddings`; the last four fields are this server's own."""

    input: TextOrIds
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    instruction: str | None = None
    prompt_name: str | None = None
    pooling: Literal["last"] | None = None
    truncate: bool | None = None
