"""The tool loop: the model's replies, and the results of the tools that they call, in turn."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from qwen3_mlx.api.options import Options
from qwen3_mlx.api.stream import Reply
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.text.messages import Message, normalise
from qwen3_mlx.text.tool_calls import run_tool, tool_functions


def run_tools(
    chat: Callable[..., Reply],
    messages: str | Sequence[Message],
    max_steps: int,
    options: Options,
) -> Reply:
    """Generate replies with `chat` until one calls no tool; see `LLM.run`."""
    functions = tool_functions(options.get("tools"))
    history, added = normalise(messages), list[dict[str, Any]]()
    for _ in range(max_steps):
        reply = chat([*history, *added], **options)
        if options.pop("continue_last", False):
            history = history[:-1]  # the reply's message includes the continued one
        if options.get("tool_choice") != "none":
            options["tool_choice"] = "auto"  # the demanded call has been made
        added += reply.messages
        if reply.finish_reason != "tool_calls":
            return replace(reply, messages=added)
        added += [run_tool(call, functions) for call in reply.tool_calls]
    raise Qwen3Error(f"the model still calls tools after {max_steps} replies (max_steps)")
