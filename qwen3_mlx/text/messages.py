"""Conversations as plain data: checked and flattened before a template sees them.

The published templates drop content that is not a string (some older ones fail on it), so lists of
parts are joined here, and what has no text is refused rather than lost.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant", "tool")


def normalise(messages: str | Sequence[Message]) -> list[dict[str, Any]]:
    """Give the messages with every content a string; a lone string is a user's message.

    Raises:
        TypeError: something is not a message.
        ValueError: there is no message, a role is unknown, or a part is not text.
    """
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence):
        raise TypeError(f"messages must be a string or a list, not {type(messages).__name__}")
    if not messages:
        raise ValueError("messages is empty; give at least one")
    return [_normal(message, index) for index, message in enumerate(messages)]


def _normal(message: object, index: int) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise TypeError(f"{where} must be a dict with role and content, not {message!r}")
    if message.get("role") not in ROLES:
        raise ValueError(
            f"{where} has role {message.get('role')!r}; it must be one of {', '.join(ROLES)}"
        )
    return {**message, "content": _flat(message.get("content"), where)}


def _flat(content: Any, where: str) -> str:
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
