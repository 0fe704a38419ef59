"""Results of MCP tools as text, which is all that Qwen3 reads."""

import json
from typing import TYPE_CHECKING, assert_never

if TYPE_CHECKING:
    from mcp_types import CallToolResult, ContentBlock


def result_text(result: "CallToolResult", max_characters: int) -> str:
    """Return a result as text, with what is not text named; a long one is cut, and says so."""
    parts = [_text_of(block) for block in result.content]
    # Beside text it is the same data again.
    if result.structured_content is not None and not any(
        block.type == "text" for block in result.content
    ):
        parts.insert(0, json.dumps(result.structured_content, ensure_ascii=False))
    text = "\n".join(parts) or "(no content)"
    if len(text) > max_characters:
        length = f"{max_characters:,} of {len(text):,} characters"
        text = f"{text[:max_characters]}\n[cut off: the first {length}]"
    return f"Error: {text}" if result.is_error else text


def _text_of(block: "ContentBlock") -> str:
    if block.type == "text":
        return block.text
    if block.type == "image" or block.type == "audio":
        return f"[{block.type}, {block.mime_type}, {_size(block.data)}: only text can be read]"
    if block.type == "resource_link":
        about = ", ".join(filter(None, (block.name, block.mime_type, block.description)))
        return f"[link to {block.uri}: {about}]"
    if block.type == "resource":
        resource = block.resource
        kind = f"{resource.uri}, {resource.mime_type or 'unknown type'}"
        if hasattr(resource, "text"):
            return f"[{kind}]\n{resource.text}"
        return f"[{kind}, {_size(resource.blob)}: only text can be read]"
    assert_never(block)


def _size(base64: str) -> str:
    return f"{len(base64.rstrip('=')) * 3 // 4:,} bytes"
