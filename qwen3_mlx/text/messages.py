"""Validates and normalises chat messages before a template renders them.

The published templates drop content that is not a string (some older ones fail on it). So lists of
parts are joined here, and a part without text is refused rather than lost.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant", "tool")
THINK, END_THINK = "<think>", "</think>"
_THINKING = ("reasoning_content", "thinking", "reasoning")


def normalise(messages: str | Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages with every content a string; a single string is a user's message.

    The thinking becomes `reasoning_content` under whichever name it comes; empty arguments of tool
    calls become `{}`.

    Raises:
        TypeError: an entry is not a message.
        ValueError: there is no message, a role is unknown, a part is not text, or text is not
            valid Unicode.
    """
    if isinstance(messages, str):
        check_unicode(messages, "the text")
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence):
        raise TypeError(f"messages must be a string or a list, not {type(messages).__name__}")
    if not messages:
        raise ValueError("messages is empty; give at least one")
    normal = [_normalised(message, index) for index, message in enumerate(messages)]
    for index, message in enumerate(normal):
        name = "the text" if len(normal) == 1 else f"the text of messages[{index}]"
        check_unicode(message["content"], name)
    return normal


def check_unicode(text: str, name: str) -> None:
    """Check that the text called `name` is valid Unicode.

    Raises:
        ValueError: it is not; with the place in this text, since one in the prompt would not help.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is not valid Unicode at character {error.start}; is it UTF-8?"
        ) from error


def without_empty_end(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages without empty assistant messages at the end, which some clients send."""
    kept = list(messages)
    while len(kept) > 1 and kept[-1]["role"] == "assistant" and not _has_content(kept[-1]):
        kept.pop()
    return kept


def _has_content(message: Message) -> bool:
    return any(message.get(name) for name in ("content", "reasoning_content", "tool_calls"))


def think_block(message: Message) -> tuple[str, str, str, str] | None:
    """Return opening, thinking, closing and answer of an assistant's content, or None.

    None if the thinking is separate already, or the content does not begin with a think block.
    """
    content = message.get("content")
    if message.get("role") != "assistant" or isinstance(message.get("reasoning_content"), str):
        return None
    if not isinstance(content, str) or not content.lstrip().startswith(THINK):
        return None
    before, opening, rest = content.partition(THINK)
    thinking, closing, answer = rest.partition(END_THINK)
    return (before + opening, thinking, closing, answer) if closing else None


def _normalised(message: object, index: int) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise TypeError(f"{where} must be a dict with role and content, not {message!r}")
    if message.get("role") not in ROLES:
        raise ValueError(
            f"{where} has role {message.get('role')!r}; it must be one of {', '.join(ROLES)}"
        )
    if message["role"] in ("user", "system") and "content" not in message:
        raise ValueError(f"{where} has no content, which a message of {message['role']} needs")
    made = {name: value for name, value in message.items() if value is not None}
    made["content"] = _flattened(message.get("content"), where)
    thinking = next((made[name] for name in _THINKING if name in made), None)
    if thinking is not None:
        if not isinstance(thinking, str):
            raise TypeError(f"{where}: reasoning_content must be text, not {thinking!r}")
        made["reasoning_content"] = thinking
    if message.get("tool_calls"):
        made["tool_calls"] = _tool_calls(message["tool_calls"], where)
    return made


def _flattened(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise TypeError(f"{where}: content must be text, not {type(content).__name__}")
    return "".join(_part(part, where) for part in content)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise ValueError(f"{where}: a part of type {kind!r} has no text; Qwen3 reads text only")


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(calls, str) or not isinstance(calls, Sequence):
        raise TypeError(f"{where}: tool_calls must be a list, not {calls!r}")
    made = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where}: a tool call needs a function with a name, unlike {call!r}")
        arguments = function.get("arguments")
        if arguments is None or (isinstance(arguments, str) and _is_empty(arguments)):
            function = {**function, "arguments": {}}
        made.append({**call, "function": function} if "function" in call else dict(function))
    return made


def _is_empty(arguments: str) -> bool:
    return arguments.strip() in ("", "null")


def parsed_arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call in the history as an object, for templates that need one.

    A value that is not an object, for example because it was cut off, becomes the only argument.
    """
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, strict=False)
        except (ValueError, RecursionError):
            pass
    return dict(arguments) if isinstance(arguments, Mapping) else {"arguments": arguments}
