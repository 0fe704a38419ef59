"""Chat completions: converts OpenAI's requests for the library, and its replies for clients."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from qwen3_mlx.api.options import Options
from qwen3_mlx.api.stream import ReplyBuilder
from qwen3_mlx.server.openai.completion import Completion, sampling_options, thinking_options
from qwen3_mlx.server.openai.response_format import constraint_option
from qwen3_mlx.server.openai.schema import (
    HARMLESS,
    HINTS,
    NOT_FOR_CHAT,
    AllowedTools,
    ChatRequest,
    Message,
    NamedTool,
    Part,
    only_allowed,
)
from qwen3_mlx.server.service import ModelService
from qwen3_mlx.server.thinking import UNLIMITED
from qwen3_mlx.server.wire import check_unknown, ends_with_assistant_text, logprob_entries
from qwen3_mlx.text.events import Event, Finish, Reasoning, Text, TokenLogprob, ToolCallDelta

_REASONING_FIELDS = {
    "both": ("reasoning_content", "reasoning"),
    "reasoning_content": ("reasoning_content",),
    "reasoning": ("reasoning",),
    "none": (),
}


class ChatCompletion(Completion[ChatRequest]):
    """A chat completion."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, service: ModelService, body: ChatRequest) -> None:
        super().__init__(service, body)
        # Ids of the calls begun in each choice.
        self._call_ids: list[list[str]] = [[] for _ in range(self.choices)]
        fields = _REASONING_FIELDS[service.settings.reasoning_field]
        self._fields = () if body.hides_reasoning else fields
        self.warnings += check_unknown(body, NOT_FOR_CHAT, HARMLESS, HINTS)
        self.warnings += _message_warnings(body.messages)
        messages = [_library_message(message) for message in body.messages]
        options: Options = {
            **_chat_options(body),
            **thinking_options(service, body, self.warnings),
            "continue_last": _continues(body, messages),
            "prefetch_next_turn": self.choices == 1,
        }
        self.prepares = [partial(service.llm.prepare, messages, **options)]

    def opening_chunk(self, index: int) -> Mapping[str, Any]:
        """Return the delta with the role."""
        return _chunk(index, {"role": "assistant", "content": ""})

    def chunks_for(self, index: int, event: Event) -> Sequence[Mapping[str, Any]]:
        """Return the deltas that an event adds to the message."""
        if isinstance(event, Text):
            return [_chunk(index, {"content": event.text}, self._logprobs(event.tokens))]
        if isinstance(event, Reasoning):
            delta = dict.fromkeys(self._fields, event.text)
            return [_chunk(index, delta)] if delta else []
        if isinstance(event, ToolCallDelta):
            return [
                _chunk(index, {"tool_calls": [part]}) for part in self._call_deltas(index, event)
            ]
        return [_chunk(index, {}, finish=event)] if isinstance(event, Finish) else []

    def choice(self, index: int, reply: ReplyBuilder, finish: Finish) -> Mapping[str, Any]:
        """Return the complete message; `content` is null if there are tool calls and no text."""
        message = reply.message()
        thinking = message.pop("reasoning_content", None)
        if thinking:
            message |= dict.fromkeys(self._fields, thinking)
        if reply.tool_calls and not reply.text:
            message["content"] = None
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(reply.logprobs),
            "finish_reason": finish.reason,
            **_details(finish),
        }

    def _call_deltas(self, index: int, delta: ToolCallDelta) -> Iterator[dict[str, Any]]:
        """Yield the deltas of a tool call; the first of each call names the tool."""
        begun = self._call_ids[index]
        if delta.id not in begun:
            begun.append(delta.id)
            yield {
                "index": len(begun) - 1,
                "id": delta.id,
                "type": "function",
                "function": {"name": delta.name, "arguments": ""},
            }
        yield {"index": len(begun) - 1, "function": {"arguments": delta.text}}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return {"content": logprob_entries(tokens), "refusal": None}


def _library_message(message: Message) -> dict[str, Any]:
    """Convert a message for the library; an assistant's thinking becomes a field of its own."""
    content, thoughts = message.content, [message.reasoning_content or message.reasoning]
    if message.refusal:
        parts = content if isinstance(content, list) else [Part(text=content or "")]
        content = [*parts, Part(type="refusal", refusal=message.refusal)]
    converted: dict[str, Any] = {"role": message.role, "content": content}
    if message.role == "developer":
        converted["role"] = "system"
    if isinstance(content, list):
        assistant = message.role == "assistant"
        thoughts += [_thinking(part) for part in content if assistant and part.type == "thinking"]
        parts = [part for part in content if not (assistant and part.type == "thinking")]
        converted["content"] = [_part(part, assistant) for part in parts]
    if thinking := "\n".join(filter(None, thoughts)):
        converted["reasoning_content"] = thinking
    if message.tool_calls:
        calls = [call.model_dump(exclude_none=True) for call in message.tool_calls]
        converted["tool_calls"] = calls
    if message.tool_call_id:
        converted["tool_call_id"] = message.tool_call_id
    return converted


def _part(part: Part, assistant: bool) -> dict[str, Any]:
    text = part.refusal if assistant and part.type == "refusal" else part.text
    return {"type": part.type} | ({} if text is None else {"text": text})


def _thinking(part: Part) -> str:
    thinking = part.thinking
    if isinstance(thinking, list):
        return "".join(piece.text or "" for piece in thinking)
    return thinking or part.text or ""


def _message_warnings(messages: Sequence[Message]) -> list[str]:
    """Return warnings of message fields that a prompt has no place for."""
    if any(message.name and message.role != "tool" for message in messages):
        return ["names of speakers (messages[].name) are not shown to the model"]
    return []


def _continues(body: ChatRequest, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the reply continues the last message: as requested, or if it is an answer.

    Raises:
        ValueError: fields contradict each other, or the request is impossible.
    """
    requested = [body.continue_final_message]
    if body.add_generation_prompt is not None:
        requested.append(not body.add_generation_prompt)
    begun = [
        index for index, message in enumerate(body.messages) if message.prefix or message.partial
    ]
    if begun:  # a value of false is the default, and requests nothing
        if begun[0] < len(messages) - 1:
            raise ValueError(f"messages[{begun[0]}]: only the last message can be continued")
        requested.append(True)
    stated = set(requested) - {None}
    if len(stated) > 1:
        raise ValueError(
            "continue_final_message and add_generation_prompt contradict each other; send one"
        )
    continues = ends_with_assistant_text(messages)
    if continues and False in stated:
        raise ValueError("the last message is the assistant's: it can be continued, not replied to")
    if True in stated and messages[-1]["role"] != "assistant":
        raise ValueError("continue_final_message needs a last message of the assistant's")
    return continues


def _chat_options(body: ChatRequest) -> Options:
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if limits == {UNLIMITED}:
        limits.clear()
    if len(limits) > 1:
        raise ValueError(
            f"max_tokens={body.max_tokens} and max_completion_tokens="
            f"{body.max_completion_tokens} contradict each other; send one of them"
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise ValueError("top_logprobs needs logprobs=true")
    tools = [tool.library_tool() for tool in body.tools or ()]
    choice = body.tool_choice or "auto"
    if isinstance(choice, AllowedTools):
        allowed = choice.allowed_tools
        tools = only_allowed(tools, [tool.function.name for tool in allowed.tools])
        choice = allowed.mode
    return {
        **sampling_options(body),
        **constraint_option(body),
        "max_tokens": limits.pop() if limits else None,
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        "tools": tools or None,
        "tool_choice": choice.function.name if isinstance(choice, NamedTool) else choice,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "partial_calls": bool(body.stream),
    }


def _chunk(
    index: int,
    delta: Mapping[str, Any],
    logprobs: Mapping[str, Any] | None = None,
    finish: Finish | None = None,
) -> dict[str, Any]:
    return {
        "index": index,
        "delta": delta,
        "logprobs": logprobs,
        "finish_reason": finish.reason if finish else None,
        **(_details(finish) if finish else {}),
    }


def _details(finish: Finish) -> dict[str, Any]:
    return {"finish_details": finish.details} if finish.details else {}
