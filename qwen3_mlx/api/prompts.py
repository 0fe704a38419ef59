"""Prompts: renders conversations with the checkpoint's chat template.

A prompt ends where the reply begins: after the messages, or inside the last one, which the reply
then continues.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3_mlx.api.text_processor import TextProcessor
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.text.messages import (
    END_THINK,
    THINK,
    Message,
    normalise,
    think_block,
    without_empty_end,
)
from qwen3_mlx.text.prompt import ControlTokenEscaper
from qwen3_mlx.text.tokenizer import Prompt
from qwen3_mlx.text.tool_calls import Tool, as_tool_list, tool_schema


def render(
    processor: TextProcessor,
    messages: str | Sequence[Message],
    thinking: bool | None = None,
    tools: Sequence[Tool] | None = None,
    add_generation_prompt: bool = True,
    continue_last: bool = False,
) -> Prompt:
    """Render a conversation; see `LLM.render`."""
    processor.thinking.resolve(thinking)
    described = [tool_schema(tool) for tool in as_tool_list(tools)]
    history = normalise(messages)
    if continue_last:
        return render_begun(processor, begun(history), thinking, described)
    if add_generation_prompt:
        history = without_empty_end(history)
    return render_whole(processor, history, thinking, described, add_generation_prompt)


def render_whole(
    processor: TextProcessor,
    history: Sequence[Message],
    thinking: bool | None,
    tools: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
) -> Prompt:
    """Render normalised messages and tool descriptions.

    Raises:
        Qwen3Error: there is no template, or it refuses the messages.
    """
    hiding = ControlTokenEscaper(processor.control)
    rendered = _rendered(processor, hiding, history, thinking, tools, add_generation_prompt)
    return hiding.prompt(rendered)


def render_begun(
    processor: TextProcessor,
    history: Sequence[Message],
    thinking: bool | None,
    tools: Sequence[Mapping[str, Any]],
) -> Prompt:
    """Render normalised messages up to the end of the last one's text; see `begun`.

    Raises:
        Qwen3Error: there is no template, it refuses the messages, or it leaves the last one out.
    """
    *before, last = history
    field = "content" if last["content"] else "reasoning_content"
    # A random mark at the end of the text shows where the template has put that end.
    end = f"q{secrets.token_hex(8)}e"
    history = [*before, {**last, field: last[field] + end}]
    hiding = ControlTokenEscaper(processor.control)
    rendered, found, _ = _rendered(processor, hiding, history, thinking, tools, False).rpartition(
        end
    )
    if not found:
        raise Qwen3Error(
            "the last message cannot be continued: this checkpoint's chat template leaves it out"
        )
    return hiding.prompt(rendered)


def _rendered(
    processor: TextProcessor,
    hiding: ControlTokenEscaper,
    history: Sequence[Message],
    thinking: bool | None,
    tools: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
) -> str:
    if processor.template is None:
        raise Qwen3Error(processor.no_template)
    try:
        return processor.template.render(
            history,
            escape=hiding.hide_in_message,
            thinking=thinking if processor.thinking.hybrid else None,
            tools=hiding.hide(tools) if tools else None,
            add_generation_prompt=add_generation_prompt,
        )
    except Qwen3Error as error:
        raise Qwen3Error(hiding.show(str(error))) from error


def begun(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages for a reply that continues the last one, its thinking split off.

    Raises:
        ValueError: the last message is not the assistant's, is empty, or calls tools.
    """
    last = dict(history[-1])
    if last["role"] != "assistant":
        raise ValueError(
            f"continue_last continues a last message of the assistant's, and it is the "
            f"{last['role']}'s"
        )
    if last.get("tool_calls"):
        raise ValueError(no_turn_message(last))
    opened = last["content"].lstrip()
    if opened.startswith(THINK) and END_THINK not in opened and not thinking_of(last):
        last |= {"content": "", "reasoning_content": opened.removeprefix(THINK).lstrip("\n")}
    elif not last["content"] and not thinking_of(last):
        raise ValueError("continue_last: the last message says nothing that could be continued")
    return [*history[:-1], last]


def has_content(message: Message) -> bool:
    """Return whether an assistant's message has an answer or thinking."""
    return bool(message["content"] or thinking_of(message))


def no_turn_message(last: Message) -> str:
    """Return the error message for a conversation whose last message is the assistant's."""
    if last.get("tool_calls"):
        return "the last message calls tools: add their answers, as messages with the role tool"
    if not has_content(last):
        return "the last message is the assistant's and says nothing: add a message to reply to"
    return (
        "the last message is the assistant's: add a message to reply to, or have it continued "
        "(continue_last=True)"
    )


def thinking_of(message: Message) -> str:
    """Return the thinking of an assistant's message: from its field or from its content."""
    block = think_block(message)
    return block[1].strip() if block else message.get("reasoning_content") or ""
