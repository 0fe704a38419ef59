"""Response models of OpenAI's API."""

from typing import Any, Literal

from qwen3_mlx.server.openai.schema import Call
from qwen3_mlx.server.wire import WireModel


class PromptDetails(WireModel):
    """Prompt tokens that were read from the prefix cache."""

    cached_tokens: int


class CompletionDetails(WireModel):
    """Completion tokens that are thinking."""

    reasoning_tokens: int


class UsageOut(WireModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class MessageOut(WireModel):
    """A complete message of the assistant."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Call] | None = None


class ChoiceOut(WireModel):
    """One of the `n` replies."""

    index: int
    message: MessageOut
    finish_reason: Literal["stop", "length", "tool_calls"]
    logprobs: dict[str, Any] | None = None
    finish_details: dict[str, str] | None = None


class ChatOut(WireModel):
    """The response to a `ChatRequest` without `stream`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChoiceOut]
    usage: UsageOut
    timings: dict[str, float]


class TextChoiceOut(WireModel):
    """One of the `n` continuations."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: dict[str, Any] | None = None


class TextOut(WireModel):
    """The response to a `TextRequest` without `stream`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoiceOut]
    usage: UsageOut
    timings: dict[str, float]


class EmbeddingOut(WireModel):
    """The vector of a text; in base64 it is of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class TextsUsageOut(WireModel):
    """Token counts of texts that are only read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsOut(WireModel):
    """The response to an `EmbeddingRequest`."""

    object: Literal["list"]
    data: list[EmbeddingOut]
    model: str
    usage: TextsUsageOut


class ModelOut(WireModel):
    """A served model, with the fields of OpenAI's, Anthropic's and LM Studio's API."""

    id: str
    object: Literal["model"]
    type: Literal["model"]
    display_name: str
    created: int
    created_at: str
    owned_by: str
    kind: Literal["chat", "embedding", "reranker"]
    state: Literal["loaded", "loading", "not-loaded"]
    context_length: int
    max_input_tokens: int
    vocab_size: int
    thinking: Literal["hybrid", "always", "never"] | None  # null before a chat model is loaded


class ModelsOut(WireModel):
    """The list of the served models."""

    object: Literal["list"]
    data: list[ModelOut]
    first_id: str
    last_id: str
    has_more: bool
