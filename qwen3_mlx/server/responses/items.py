"""Converts the input items of a request to the messages of a conversation.

An item is a part of a turn: thinking, text and calls in a row are one message of the assistant's.
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from qwen3_mlx.server.responses.schema import ContentPart, InputItem

Message = dict[str, Any]
_THINKING = "reasoning_content"


def library_messages(items: Sequence[InputItem], before: Sequence[Message] = ()) -> list[Message]:
    """Return the messages of items, in OpenAI's format; every content is a string.

    `before` are those of the previous response.

    Raises:
        ValueError: an item or a part of one is of a type that is not supported, or incomplete, or
            the output of a call that was not made.
    """
    messages: list[Message] = []
    calls = {call["id"] for message in before for call in message.get("tool_calls", ())}
    for index, item in enumerate(items):
        where = f"input[{index}]"
        kind = item.type or ("message" if item.role else None)
        if kind == "message":
            _add_message(messages, item, where)
        elif kind == "reasoning":
            parts = _parts(item.content) or item.summary or ()
            texts = [_text(part, where) for part in parts]
            thoughts = _turn(messages, "content", "tool_calls").setdefault(_THINKING, [])
            thoughts += filter(None, texts)
        elif kind == "function_call":
            if not item.name:
                raise ValueError(f"{where} has no name, which a function_call needs")
            function = {"name": item.name, "arguments": item.arguments or "{}"}
            call = {"id": item.call_id, "type": "function", "function": function}
            calls.add(item.call_id)
            _turn(messages).setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            if item.call_id not in calls:  # in OpenAI's words
                raise ValueError(
                    f"No tool call found for function call output with call_id {item.call_id:.100}."
                    if item.call_id
                    else f"{where} has no call_id"
                )
            result = _joined(item.output, where)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": result})
        else:
            raise ValueError(
                f"{where}: an item of type {kind!r:.100} is not supported; there are message, "
                "reasoning, function_call, function_call_output and item_reference"
            )
    # Joined only now: to add each of many thoughts to a text would take long.
    for message in messages:
        if thoughts := message.pop(_THINKING, None):
            message[_THINKING] = "\n".join(thoughts)
    return messages


def with_references(
    items: Sequence[InputItem], stored: Mapping[str, Mapping[str, Any]]
) -> list[InputItem]:
    """Return the items with the stored ones in the place of references to them, by their ids.

    Raises:
        ValueError: the item of a reference is not stored.
    """
    found = []
    for index, item in enumerate(items):
        if item.type == "item_reference":
            if (kept := stored.get(item.id or "")) is None:
                raise ValueError(f"input[{index}]: no item with id {item.id!r:.100} is stored")
            item = InputItem.model_validate(kept)
        found.append(item)
    return found


def with_system(instructions: str | None, messages: Sequence[Message]) -> list[Message]:
    """Return the messages with one system message, of the instructions and those at the front."""
    leading = list(takewhile(lambda message: message["role"] == "system", messages))
    texts = filter(None, [instructions, *(message["content"] for message in leading)])
    system = "\n\n".join(texts)
    rest = messages[len(leading) :]
    return [{"role": "system", "content": system}, *rest] if system else [*rest]


def _add_message(messages: list[Message], item: InputItem, where: str) -> None:
    if item.role is None or item.content is None:
        raise ValueError(f"{where}: a message needs a role and content")
    text = _joined(item.content, where)
    if item.role == "assistant":
        _turn(messages, "content", "tool_calls")["content"] = text
    else:
        role = "system" if item.role == "developer" else item.role
        messages.append({"role": role, "content": text})


def _turn(messages: list[Message], *earlier: str) -> Message:
    """Return the assistant's message at the end, or a new one if it has a field of `earlier`."""
    last = messages[-1] if messages else {"role": None}
    if last["role"] != "assistant" or any(last.get(name) for name in earlier):
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _joined(content: str | list[ContentPart] | None, where: str) -> str:
    return "".join(_text(part, where) for part in _parts(content))


def _parts(content: str | list[ContentPart] | None) -> list[ContentPart]:
    if isinstance(content, str):
        return [ContentPart(type="input_text", text=content)]
    return content or []


def _text(part: ContentPart, where: str) -> str:
    text = part.refusal if part.type == "refusal" else part.text
    if text is None:
        raise ValueError(
            f"{where}: a part of type {part.type!r:.100} has no text; Qwen3 reads text only"
        )
    return text
