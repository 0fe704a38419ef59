"""The fields that `test_fields` changes, and those that may be without effect."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen3_mlx.server.anthropic import schema as anthropic_wire
from qwen3_mlx.server.ollama import schema as ollama_wire
from qwen3_mlx.server.openai import schema as openai_wire
from qwen3_mlx.server.rerank import schema as rerank_wire
from qwen3_mlx.server.responses import schema as responses_wire
from qwen3_mlx.server.wire import WireModel


@dataclass(frozen=True)
class Case:
    """A change of a field: to `value`, or to what its type allows.

    `beside` is what else the request has, and `at` where the object with the field stands in it;
    both are those of its kind, if they are not named. Some changes must be `refused`.
    """

    value: Any = None
    beside: Mapping[str, Any] | None = None
    at: str | None = None
    refused: bool = False


@dataclass(frozen=True)
class RequestFields:
    """The fields of one kind of request, which `base` makes complete.

    For each kind of object in it, `locations` has where one stands, and what else the request then
    has. `cases` are changes of fields that need more than another value of their type. Fields in
    `silent` may be without effect, for the reason that is given.
    """

    path: str
    model: type[WireModel]
    base: Mapping[str, Any]
    locations: Mapping[str, tuple[str, Mapping[str, Any]]]
    cases: Mapping[str, Case]
    silent: Mapping[str, str] = field(default_factory=dict)
    server: str = "demo"  # or the fixture of another one


SCHEMA = {"type": "object", "properties": {"x": {"type": "string"}}}
OTHER = {"type": "object", "properties": {"y": {"type": "string"}}}
USER = {"role": "user", "content": "What is 12 + 34?"}
TURNS = {"messages": [USER, {"role": "assistant", "content": "46"}, USER]}
BEGUN = {"messages": [USER, {"role": "assistant", "content": "It is"}]}
ORDER = "calls and their results belong together by their order, as templates show them"
ALWAYS_STRICT = "answers and calls are always held to their schemas, as far as those can be"
FOR_PROVIDERS = "it asks the provider for something that is no part of the reply"


def _assistant(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return messages with parts of the assistant's before the last question."""
    return {"messages": [USER, {"role": "assistant", "content": list(parts)}]}


# --- OpenAI ---------------------------------------------------------------------------------------

_TOOL = {
    "type": "function",
    "function": {"name": "calculator", "description": "Calculate.", "parameters": SCHEMA},
}
_TOOLS = {"tools": [_TOOL, {"type": "function", "function": {"name": "other"}}]}
_CALL = {"id": "call_1", "type": "function", "function": {"name": "calculator", "arguments": "{}"}}
_CHAIN = {
    "messages": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [_CALL]},
        {"role": "tool", "content": "46", "tool_call_id": "call_1"},
    ]
}
_PARTS = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]}
_NAMED = {**_TOOLS, "tool_choice": {"type": "function", "function": {"name": "calculator"}}}
_ALLOWED = {
    **_TOOLS,
    "tool_choice": {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": [_NAMED["tool_choice"]]},
    },
}
_THOUGHT = _assistant({"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Oh"})
_REFUSED = _assistant({"type": "refusal", "refusal": "No"})
_JSON_SCHEMA = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}

CHAT = RequestFields(
    "/v1/chat/completions",
    openai_wire.ChatRequest,
    {"messages": [USER], "max_tokens": 99},
    locations={
        "ChatRequest": ("", {}),
        "Message": ("messages.0", {}),
        "Part": ("messages.0.content.0", _PARTS),
        "Call": ("messages.1.tool_calls.0", _CHAIN),
        "Function": ("messages.1.tool_calls.0.function", _CHAIN),
        "ToolIn": ("tools.0", _TOOLS),
        "FunctionIn": ("tools.0.function", _TOOLS),
        "NamedTool": ("tool_choice", _NAMED),
        "NamedFunction": ("tool_choice.function", _NAMED),
        "AllowedTools": ("tool_choice", _ALLOWED),
        "AllowedList": ("tool_choice.allowed_tools", _ALLOWED),
        "JsonSchema": ("response_format.json_schema", {"response_format": _JSON_SCHEMA}),
        "ResponseFormat": ("response_format", {"response_format": {"type": "json_object"}}),
        "StructuredOutputs": ("structured_outputs", {"structured_outputs": {}}),
        "StreamOptions": ("stream_options", {"stream": True, "stream_options": {}}),
        "TemplateKwargs": ("chat_template_kwargs", {"chat_template_kwargs": {}}),
        "ReasoningIn": ("reasoning", {"reasoning": {}}),
        "ThinkingIn": ("thinking", {"thinking": {"type": "enabled"}}),
    },
    cases={
        "AllowedList.mode": Case("required"),
        "AllowedList.tools": Case([]),
        "AllowedTools.allowed_tools": Case({"mode": "auto", "tools": []}),
        "Call.function": Case({"name": "other"}),
        "ChatRequest.add_generation_prompt": Case(True, BEGUN, refused=True),
        "ChatRequest.chat_template_kwargs": Case({"enable_thinking": False}),
        "ChatRequest.continue_final_message": Case(False, BEGUN, refused=True),
        "ChatRequest.enable_thinking": Case(False),
        "ChatRequest.include_reasoning": Case(False),
        "ChatRequest.logit_bias": Case({"7": 1.0}),
        "ChatRequest.max_completion_tokens": Case(7, {"max_tokens": None}),
        "ChatRequest.messages": Case(BEGUN["messages"]),
        "ChatRequest.parallel_tool_calls": Case(False, _TOOLS),
        "ChatRequest.reasoning": Case({"max_tokens": 7}),
        "ChatRequest.response_format": Case({"type": "json_object"}),
        "ChatRequest.stream_options": Case({"include_usage": True}, {"stream": True}),
        "ChatRequest.structured_outputs": Case({"regex": "a"}),
        "ChatRequest.think": Case(False),
        "ChatRequest.thinking": Case({"type": "disabled"}),
        "ChatRequest.tool_choice": Case("none", _TOOLS),
        "ChatRequest.tools": Case([_TOOL]),
        "ChatRequest.top_logprobs": Case(7, {"logprobs": True}),
        "FunctionIn.parameters": Case(OTHER),
        "Function.arguments": Case('{"x": "1"}'),
        "JsonSchema.schema_": Case(OTHER),
        "Message.content": Case("Hello"),
        "Message.partial": Case(True, TURNS, "messages.1", refused=True),
        "Message.prefix": Case(True, TURNS, "messages.1", refused=True),
        "Message.reasoning": Case("Hm.", _CHAIN, "messages.1"),
        "Message.reasoning_content": Case("Hm.", _CHAIN, "messages.1"),
        "Message.refusal": Case("No.", TURNS, "messages.1"),
        "Message.tool_call_id": Case("call_2", _CHAIN, "messages.2"),
        "Message.tool_calls": Case([_CALL], TURNS, "messages.1"),
        "NamedFunction.name": Case("other"),
        "NamedTool.function": Case({"name": "other"}),
        "Part.refusal": Case("Never", _REFUSED, "messages.1.content.0"),
        "Part.thinking": Case("Hm, hm.", _THOUGHT, "messages.1.content.0"),
        "Part.type": Case("input_text"),
        "ResponseFormat.json_schema": Case({"schema": SCHEMA}),
        "ResponseFormat.schema_": Case(SCHEMA),
        "StructuredOutputs.grammar": Case('start: "a"'),
        "StructuredOutputs.json_": Case(SCHEMA),
        "TemplateKwargs.enable_thinking": Case(False),
        "ReasoningIn.enabled": Case(False),
        "ReasoningIn.exclude": Case(True),
        "ToolIn.function": Case({"name": "third"}),
    },
    silent={
        "Call.id": ORDER,
        "Call.index": ORDER,
        "JsonSchema.description": "the schema has descriptions of its own, and none is shown",
        "JsonSchema.name": "one form needs no name",
        "JsonSchema.strict": ALWAYS_STRICT,
        "Message.tool_call_id": ORDER,
        "Part.type": "what has a text is text, whatever it is called",
        "StreamOptions.include_obfuscation": "nothing is padded, which it may ask for",
    },
)

COMPLETION = RequestFields(
    "/v1/completions",
    openai_wire.TextRequest,
    {"prompt": "Once", "max_tokens": 99},
    locations={
        "TextRequest": ("", {}),
        "StreamOptions": ("stream_options", {"stream": True, "stream_options": {}}),
    },
    cases={
        "TextRequest.logit_bias": Case({"7": 1.0}),
        "TextRequest.stream_options": Case({"include_usage": True}, {"stream": True}),
    },
    silent={"StreamOptions.include_obfuscation": CHAT.silent["StreamOptions.include_obfuscation"]},
)

_ITEM = {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}]}
_FUNCTION = {"type": "function", "name": "calculator", "parameters": SCHEMA}
_FUNCTIONS = {"tools": [_FUNCTION, {"type": "function", "name": "other"}]}
_ALLOWED_FUNCTIONS = {
    **_FUNCTIONS,
    "tool_choice": {
        "type": "allowed_tools",
        "mode": "auto",
        "tools": [{"type": "function", "name": "calculator"}],
    },
}
_ITEMS: dict[str, Any] = {
    "input": [
        USER,
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {"type": "function_call", "call_id": "call_1", "name": "calculator", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "46"},
    ]
}
_TEXT_SCHEMA = {"type": "json_schema", "name": "a", "schema": SCHEMA}

RESPONSES = RequestFields(
    "/v1/responses",
    responses_wire.ResponsesRequest,
    {"input": [USER], "max_output_tokens": 99},
    locations={
        "ResponsesRequest": ("", {}),
        "InputItem": ("input.0", {}),
        "ContentPart": ("input.0.content.0", _ITEM),
        "Tool": ("tools.0", _FUNCTIONS),
        "FunctionChoice": (
            "tool_choice",
            {**_FUNCTIONS, "tool_choice": {"type": "function", "name": "calculator"}},
        ),
        "AllowedTools": ("tool_choice", _ALLOWED_FUNCTIONS),
        "AllowedTool": ("tool_choice.tools.0", _ALLOWED_FUNCTIONS),
        "TextConfig": ("text", {"text": {}}),
        "TextFormat": ("text.format", {"text": {"format": _TEXT_SCHEMA}}),
        "ResponsesReasoning": ("reasoning", {"reasoning": {}}),
        "TemplateKwargs": CHAT.locations["TemplateKwargs"],
        "ThinkingIn": CHAT.locations["ThinkingIn"],
    },
    cases={
        "AllowedTool.name": Case("other"),
        "AllowedTool.type": Case("mcp"),
        "AllowedTools.mode": Case("required"),
        "AllowedTools.tools": Case([]),
        "ContentPart.annotations": Case([{}]),
        "ContentPart.logprobs": Case([{}]),
        "ContentPart.refusal": Case(
            "Never",
            {"input": [{"role": "user", "content": [{"type": "refusal", "refusal": "No"}]}]},
        ),
        "FunctionChoice.name": Case("other"),
        "InputItem.arguments": Case('{"x": "1"}', _ITEMS, "input.2"),
        "InputItem.call_id": Case("call_2", _ITEMS, "input.3", refused=True),
        "InputItem.content": Case("Hello"),
        "InputItem.encrypted_content": Case("x", _ITEMS, "input.1"),
        "InputItem.name": Case("other", _ITEMS, "input.2"),
        "InputItem.output": Case("47", _ITEMS, "input.3"),
        "InputItem.role": Case("developer"),
        "InputItem.summary": Case([{"type": "summary_text", "text": "Oh."}], _ITEMS, "input.1"),
        "InputItem.type": Case("web_search_call", refused=True),
        "ResponsesRequest.chat_template_kwargs": Case({"enable_thinking": False}),
        "ResponsesRequest.enable_thinking": Case(False),
        "ResponsesRequest.include": Case([responses_wire.LOGPROBS]),
        "ResponsesRequest.include_reasoning": Case(False),
        "ResponsesRequest.input": Case("Hello"),
        "ResponsesRequest.logit_bias": Case({"7": 1.0}),
        "ResponsesRequest.metadata": Case({"a": "b"}),
        "ResponsesRequest.parallel_tool_calls": Case(False),
        "ResponsesRequest.previous_response_id": Case("resp_1", refused=True),
        "ResponsesRequest.reasoning": Case({"max_tokens": 7}),
        "ResponsesRequest.store": Case(False),
        "ResponsesRequest.text": Case({"format": {"type": "json_object"}}),
        "ResponsesRequest.think": Case(False),
        "ResponsesRequest.thinking": Case({"type": "disabled"}),
        "ResponsesRequest.tool_choice": Case("none", _FUNCTIONS),
        "ResponsesRequest.tools": Case([_FUNCTION]),
        "ResponsesReasoning.enabled": Case(False),
        "ResponsesReasoning.exclude": Case(True),
        "TemplateKwargs.enable_thinking": Case(False),
        "TextConfig.format": Case(_TEXT_SCHEMA),
        "TextFormat.schema_": Case(OTHER),
        "TextFormat.type": Case("json_object", {"text": {"format": {"type": "text"}}}),
        "Tool.parameters": Case(OTHER),
        "Tool.type": Case("web_search"),
    },
    silent={
        "ContentPart.annotations": "citations are no text",
        "ContentPart.logprobs": "they are measured anew where they are wanted",
        "ContentPart.type": "what has a text is text, whatever it is called",
        "InputItem.encrypted_content": "thinking that is encrypted can be read by nobody else",
        "InputItem.id": "an item is sent whole, whatever it is called",
        "InputItem.status": "a part of an item is shown as far as it goes",
    },
)

# --- Anthropic ------------------------------------------------------------------------------------

_CLAUDE_TOOL = {"name": "calculator", "description": "Calculate.", "input_schema": SCHEMA}
_CLAUDE_TOOLS = {"tools": [_CLAUDE_TOOL, {"name": "other", "input_schema": OTHER}]}
_USE = {"type": "tool_use", "id": "toolu_1", "name": "calculator", "input": {"x": "1"}}
_RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "46"}
_CLAUDE_CHAIN = {
    "messages": [
        USER,
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm."}, _USE]},
        {"role": "user", "content": [_RESULT]},
    ]
}
_THINKS, _USES, _RESULTS = (
    f"messages.{place}" for place in ("1.content.0", "1.content.1", "2.content.0")
)
_FORMAT = {"type": "json_schema", "schema": SCHEMA}
_CLAUDE_PLACES: dict[str, tuple[str, dict[str, Any]]] = {
    "Message": ("messages.0", {}),
    "Block": ("messages.0.content.0", _PARTS),
    "ToolIn": ("tools.0", _CLAUDE_TOOLS),
    "ToolChoice": ("tool_choice", {**_CLAUDE_TOOLS, "tool_choice": {"type": "auto"}}),
    "ThinkingIn": ("thinking", {"thinking": {"type": "enabled"}}),
    "OutputConfig": ("output_config", {"output_config": {}}),
    "OutputFormat": ("output_config.format", {"output_config": {"format": _FORMAT}}),
}
_CLAUDE_CASES = {
    "Block.citations": Case([{}]),
    "Block.content": Case("47", _CLAUDE_CHAIN, _RESULTS),
    "Block.data": Case("x", _assistant({"type": "redacted_thinking"}), _THINKS),
    "Block.id": Case("toolu_2", _CLAUDE_CHAIN, _USES),
    "Block.input": Case({"x": "2"}, _CLAUDE_CHAIN, _USES),
    "Block.is_error": Case(True, _CLAUDE_CHAIN, _RESULTS),
    "Block.name": Case("other", _CLAUDE_CHAIN, _USES),
    "Block.signature": Case("x", _CLAUDE_CHAIN, _THINKS),
    "Block.thinking": Case("Hm, hm.", _CLAUDE_CHAIN, _THINKS),
    "Block.tool_use_id": Case("toolu_2", _CLAUDE_CHAIN, _RESULTS),
    "Block.type": Case("image", refused=True),
    "Message.content": Case("Hello"),
    "OutputConfig.format": Case(_FORMAT),
    "OutputFormat.schema_": Case(OTHER),
    "ThinkingIn.budget_tokens": Case(7),
    "ToolChoice.name": Case(
        "other", {**_CLAUDE_TOOLS, "tool_choice": {"type": "tool", "name": "calculator"}}
    ),
    "ToolChoice.type": Case("none"),
    "ToolIn.input_schema": Case(OTHER),
    "ToolIn.type": Case("web_search_20250305", refused=True),
}
_CLAUDE_OF_REQUEST = {
    "messages": Case(BEGUN["messages"]),
    "output_config": Case({"effort": "low"}),
    "thinking": Case({"type": "disabled"}),
    "tool_choice": Case({"type": "none"}, _CLAUDE_TOOLS),
    "tools": Case([_CLAUDE_TOOL]),
}
_CLAUDE_SILENT = {
    "Block.cache_control": "the beginnings of prompts are kept in any case",
    "Block.citations": FOR_PROVIDERS,
    "Block.data": "thinking that is encrypted can be read by nobody else",
    "Block.id": ORDER,
    "Block.signature": "what was thought is believed without proof",
    "Block.tool_use_id": ORDER,
    "ToolIn.cache_control": "the beginnings of prompts are kept in any case",
    "ToolIn.eager_input_streaming": "arguments always stream as they are written",
    "ToolIn.strict": ALWAYS_STRICT,
}
_NOT_COUNTED = "it is no part of the prompt that is counted"

MESSAGES = RequestFields(
    "/v1/messages",
    anthropic_wire.MessagesRequest,
    {"messages": [USER], "max_tokens": 99},
    locations={"MessagesRequest": ("", {}), **_CLAUDE_PLACES},
    cases={
        **_CLAUDE_CASES,
        **{f"MessagesRequest.{name}": case for name, case in _CLAUDE_OF_REQUEST.items()},
    },
    silent=_CLAUDE_SILENT,
)
COUNTED = RequestFields(
    "/v1/messages/count_tokens",
    anthropic_wire.PromptBody,
    {"messages": [USER]},
    locations={"PromptBody": ("", {}), **_CLAUDE_PLACES},
    cases={
        **_CLAUDE_CASES,
        **{f"PromptBody.{name}": case for name, case in _CLAUDE_OF_REQUEST.items()},
    },
    silent={
        **_CLAUDE_SILENT,
        "PromptBody.output_config": _NOT_COUNTED,
        "OutputConfig.effort": _NOT_COUNTED,
        "OutputConfig.format": _NOT_COUNTED,
        "OutputFormat.schema_": _NOT_COUNTED,
        "ThinkingIn.budget_tokens": _NOT_COUNTED,
        "ToolChoice.disable_parallel_tool_use": _NOT_COUNTED,
        "ToolChoice.name": _NOT_COUNTED,
    },
)

# --- Ollama ---------------------------------------------------------------------------------------

_LLAMA_CHAIN = {
    "messages": [
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "calculator", "arguments": {"x": "1"}}}],
        },
        {"role": "tool", "content": "46", "tool_name": "calculator"},
    ]
}
_CALLED = "messages.1.tool_calls.0"
_OF_NO_EFFECT = "it is about the machine, which is used as well as it can be"
_OPTIONS: dict[str, Any] = {"num_predict": 7, "seed": 7, "top_k": 7, "num_ctx": 7, "stop": ["x"]}
_OPTIONS |= {"repeat_last_n": 7, "num_gpu": 7, "repeat_penalty": 1.5}
_OPTIONS |= dict.fromkeys(("temperature", "top_p", "min_p"), 0.5)
_OPTIONS |= dict.fromkeys(("presence_penalty", "frequency_penalty"), 0.5)

_NAMES = "the names that are known are those of the one model, and others are 404"


def _llama_cases(kind: str) -> dict[str, Case]:
    """Return the changes of the fields that both of Ollama's requests have."""
    cases = {
        "model": Case("demo:latest"),
        "options": Case({"seed": 7}),
        "stream": Case(True),
        "think": Case(False),
        "top_logprobs": Case(7, {"logprobs": True}),
    }
    options = {name: Case({name: value}, at="options") for name, value in _OPTIONS.items()}
    return {
        **{f"{kind}.{name}": case for name, case in cases.items()},
        **{f"options.{name}": case for name, case in options.items()},
    }


OLLAMA = RequestFields(
    "/api/chat",
    ollama_wire.OllamaChatRequest,
    {"messages": [USER], "stream": False},
    locations={
        "OllamaChatRequest": ("", {}),
        "OllamaMessage": ("messages.0", {}),
        "ToolCallIn": (_CALLED, _LLAMA_CHAIN),
        "FunctionCall": (f"{_CALLED}.function", _LLAMA_CHAIN),
        "ToolIn": ("tools.0", _TOOLS),
        "FunctionIn": ("tools.0.function", _TOOLS),
    },
    cases={
        "ToolCallIn.function": Case({"name": "other"}),
        "FunctionCall.arguments": Case({"x": "2"}),
        "OllamaMessage.content": Case("Hello"),
        "OllamaMessage.images": Case(["x"], refused=True),
        "OllamaMessage.thinking": Case("Hm.", _LLAMA_CHAIN, "messages.1"),
        "OllamaMessage.tool_call_id": Case("x", _LLAMA_CHAIN, "messages.2"),
        "OllamaMessage.tool_calls": Case(
            [{"function": {"name": "calculator"}}], TURNS, "messages.1"
        ),
        "OllamaMessage.tool_name": Case("other", _LLAMA_CHAIN, "messages.2"),
        "OllamaChatRequest.messages": Case(BEGUN["messages"]),
        "OllamaChatRequest.tools": Case([_TOOL]),
        "FunctionIn.parameters": Case(OTHER),
        "ToolIn.function": Case({"name": "third"}),
        **_llama_cases("OllamaChatRequest"),
    },
    silent={
        "ToolCallIn.id": ORDER,
        "ToolCallIn.type": "all calls are of functions",
        "FunctionCall.index": ORDER,
        "OllamaMessage.tool_call_id": ORDER,
        "OllamaMessage.tool_name": ORDER,
        "OllamaChatRequest.model": _NAMES,
        "options.num_gpu": _OF_NO_EFFECT,
    },
)

GENERATE = RequestFields(
    "/api/generate",
    ollama_wire.OllamaGenerateRequest,
    {"prompt": "What is 12 + 34?", "stream": False},
    locations={"OllamaGenerateRequest": ("", {})},
    cases=_llama_cases("OllamaGenerateRequest"),
    silent={"OllamaGenerateRequest.model": _NAMES, "options.num_gpu": _OF_NO_EFFECT},
)

# --- vectors and scores ---------------------------------------------------------------------------

EMBEDDINGS = RequestFields(
    "/v1/embeddings",
    openai_wire.EmbeddingRequest,
    {"input": "Hello"},
    locations={"EmbeddingRequest": ("", {})},
    cases={
        "EmbeddingRequest.encoding_format": Case("base64"),
        "EmbeddingRequest.input": Case(["Hello", "you"]),
        "EmbeddingRequest.prompt_name": Case("query"),
        "EmbeddingRequest.truncate": Case(
            False, {"input": "a " * 300, "truncate": True}, refused=True
        ),
    },
    silent={"EmbeddingRequest.pooling": "the twin's own pooling is of the last token"},
    server="embedder",
)

EMBED = RequestFields(
    "/api/embed",
    ollama_wire.OllamaEmbedRequest,
    {"input": "a " * 300},
    locations={"OllamaEmbedRequest": ("", {})},
    cases={
        "OllamaEmbedRequest.input": Case(["Hello", "you"]),
        "OllamaEmbedRequest.model": Case("demo:latest"),
        "OllamaEmbedRequest.options": Case({"seed": 7}),
        "OllamaEmbedRequest.truncate": Case(False, refused=True),
        "options.num_ctx": Case({"num_ctx": 7}, at="options"),
        "options.num_gpu": Case({"num_gpu": 7}, at="options"),
    },
    silent={"OllamaEmbedRequest.model": _NAMES, "options.num_gpu": _OF_NO_EFFECT},
    server="embedder",
)

OLD_EMBEDDINGS = RequestFields(
    "/api/embeddings",
    ollama_wire.OllamaEmbeddingsRequest,
    {"prompt": "Hello"},
    locations={"OllamaEmbeddingsRequest": ("", {})},
    cases={
        "OllamaEmbeddingsRequest.model": Case("demo:latest"),
        "OllamaEmbeddingsRequest.options": Case({"seed": 7}),
    },
    silent={"OllamaEmbeddingsRequest.model": _NAMES},
    server="embedder",
)

_SHORT, _LONG = {"documents": ["Hello", "you"]}, {"documents": ["Hello", "a " * 300]}
_TEI = {"documents": None, "texts": ["Hello", "you"]}

RERANK = RequestFields(
    "/v1/rerank",
    rerank_wire.RerankRequest,
    {"query": "What?", **_SHORT},
    locations={
        "RerankRequest": ("", {}),
        "DocumentIn": ("documents.0", {"documents": [{"text": "Hello"}, "you"]}),
    },
    cases={
        "RerankRequest.documents": Case(["Hello", "we"]),
        "RerankRequest.texts": Case(["Hello", "we"], _TEI),
        "RerankRequest.top_n": Case(1),
        "RerankRequest.return_text": Case(True, _TEI),
        "RerankRequest.truncate": Case(False, _LONG, refused=True),
    },
    silent={"RerankRequest.scoring": "the twin scores by yes and no"},
    server="reranker",
)

REQUESTS = (
    *(CHAT, COMPLETION, RESPONSES, MESSAGES, COUNTED, OLLAMA, GENERATE),
    *(EMBEDDINGS, EMBED, OLD_EMBEDDINGS, RERANK),
)
