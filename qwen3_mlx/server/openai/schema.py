"""The requests of OpenAI's API, as far as they are honoured here."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from qwen3_mlx.server.thinking import UNLIMITED, Said, ThinkingRequest, agreed_effort
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


def _check_most(tokens: int) -> int:
    if tokens == 0 or tokens < UNLIMITED:
        raise ValueError(f"must be at least 1, or -1 for no limit, not {tokens}")
    return tokens


Most = Annotated[int, AfterValidator(_check_most), Field(description="-1 is no limit.")]
Budget = Annotated[int, Field(ge=UNLIMITED, description="Tokens of thinking; -1 is no limit.")]
_BUDGETS = (
    "thinking_budget",
    "thinking_token_budget",
    "thinking_budget_tokens",
    "reasoning_budget_tokens",
    "reasoning_max_tokens",
)
_MOST_CHOICES = 32
_MOST_BIASES = 10_000


def _check_biases(sent: Any) -> Any:
    """Raise a ValueError where so much may be wrong that to say so would take long."""
    if isinstance(sent, dict) and len(sent) > _MOST_BIASES:
        raise ValueError(f"at most {_MOST_BIASES:,} tokens can have a bias, not {len(sent):,}")
    return sent


Biases = Annotated[dict[str, float], BeforeValidator(_check_biases)]

# What asks for something that cannot be had, and the values of it that ask for nothing.
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
NOT_FOR_TEXT = {name: idle for name, idle in NOT_FOR_CHAT.items() if name != "echo"} | {
    "suffix": ("",)
}
# What wishes for a reply of some length or speed, has no effect here, and is warned of; and the
# values of it that wish for nothing.
HINTS: dict[str, tuple[Any, ...]] = {
    "prediction": (),
    "service_tier": ("auto", "default"),
    "verbosity": ("medium",),
}
# What asks for nothing in the reply: it is about caching, which is done in any case, or for the
# provider's own books.
HARMLESS = frozenset(
    ("cache_prompt", "prompt_cache_key", "prompt_cache_retention", "keep_alive")
    + ("metadata", "safety_identifier", "user", "api_key")
)


class Part(WireModel):
    """A part of a message; only text can be read, and what an assistant thought or refused with."""

    type: str = "text"
    text: str | None = None
    thinking: "str | Parts[Part] | None" = None
    refusal: str | None = None


class Function(WireModel):
    """A call as an assistant made it; `arguments` are JSON text, or what it stands for."""

    name: str
    arguments: Any = "{}"


class Call(WireModel):
    """A call in the history."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function
    index: int | None = None


class Message(WireModel):
    """A message of the conversation; the thinking of earlier turns goes by either name."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Parts[Part] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: Parts[Call] | None = None
    tool_call_id: str | None = None
    prefix: bool | None = None  # DeepSeek's and Qwen's words for a last message to be continued
    partial: bool | None = None


class FunctionIn(OrderedModel):
    """What a model is told of a function."""

    name: Annotated[str, Field(min_length=1)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolIn(OrderedModel):
    """A function that the model may call."""

    type: Literal["function"] = "function"
    function: FunctionIn

    def library_tool(self) -> dict[str, Any]:
        """Give it as the library has it."""
        parts = {"type": self.type, "function": self.function.sent}
        return {name: parts.pop(name) for name in self.sent if name in parts} | parts


class NamedFunction(WireModel):
    """The name of a function."""

    name: str


class NamedTool(WireModel):
    """The function that is to be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(WireModel):
    """A schema that the answer is held to."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(WireModel):
    """The form of the answer; `schema` is where other local servers have it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class StructuredOutputs(WireModel):
    """vLLM's words for a form: one of these."""

    json_: dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: FailFast[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class StreamOptions(WireModel):
    """What a stream tells beside the reply."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class TemplateKwargs(WireModel):
    """vLLM's place for switches of the chat template."""

    enable_thinking: bool | None = None


class ReasoningIn(WireModel):
    """OpenRouter's way to speak of thinking."""

    effort: Effort | None = None
    max_tokens: Budget | None = None
    enabled: bool | None = None
    exclude: bool | None = None


class ThinkingIn(WireModel):
    """Anthropic's way to speak of it."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Budget | None = None

    @property
    def switch(self) -> bool | None:
        """Whether it says on or off."""
        return {"enabled": True, "disabled": False, "adaptive": None}[self.type]

    @property
    def adaptive(self) -> str | None:
        """The name of the field, where it leaves the thinking to the model."""
        return "thinking.type" if self.type == "adaptive" else None


class SamplingFields(RequestModel):
    """What chat and text completions have in common."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_CHOICES)] | None = None
    seed: int | None = None
    stop: str | Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Biases | None = None

    @property
    def replies(self) -> int:
        """How many replies are asked for."""
        return self.n or 1


class ChatRequest(SamplingFields):
    """`POST /v1/chat/completions`."""

    messages: Annotated[Messages[Message], Field(min_length=1)]
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    max_tokens: Most | None = None
    max_completion_tokens: Most | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Tools[ToolIn] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    json_schema: dict[str, Any] | None = None  # llama.cpp's word for a form
    format: Literal["json", ""] | dict[str, Any] | None = None  # Ollama's
    think: bool | Effort | None = None  # and its word for thinking
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

    def wish(self) -> ThinkingRequest:
        """Give what is said of thinking.

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
        said: list[Said] = [(name, getattr(self, name)) for name in _BUDGETS]
        said += [
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
            said,
            effort,
            effort_name,
            thinking.adaptive if thinking else None,
        )


class TextRequest(SamplingFields):
    """`POST /v1/completions`."""

    prompt: str | FailFast[str] | FailFast[int] | FailFast[FailFast[int]]
    max_tokens: Annotated[int, Field(ge=-1, description="-1 is no limit.")] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None

    @property
    def replies(self) -> int:
        """How many replies are asked for: `n` to each prompt."""
        several = isinstance(self.prompt, list) and not isinstance((*self.prompt, 0)[0], int)
        return (self.n or 1) * (len(self.prompt) if several else 1)
