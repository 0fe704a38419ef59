"""Lessons: the lines of a JSON Lines file, as token ids of which some are learned.

Each turn of the assistant is a lesson of its own, rendered up to it as it would be generated: with
thinking on if the turn has thoughts, else off. So a turn without thoughts teaches a hybrid
checkpoint nothing about thinking: the empty think block belongs to the prompt, which is not
learned.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen3_mlx.api.prompts import render_whole, thinking_of
from qwen3_mlx.api.text_processor import TextProcessor
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.text.messages import normalise, parsed_arguments
from qwen3_mlx.text.tool_calls import as_tool_list, tool_schema

_FORMS = '"messages", "prompt" and "completion", or "text"'
_FIELDS = {"messages": {"tools"}, "prompt": {"completion", "tools"}, "text": set[str]()}


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a file: a conversation with the tools that it offers, or raw text."""

    file: Path
    number: int
    messages: Sequence[dict[str, Any]] = ()
    tools: Sequence[dict[str, Any]] = ()
    text: str = ""

    @contextmanager
    def named(self) -> Iterator[None]:
        """Name the file and the line in the errors of a block.

        Raises:
            Qwen3Error: in place of a TypeError, a ValueError or another Qwen3Error.
        """
        try:
            yield
        except (TypeError, ValueError, Qwen3Error) as error:
            raise Qwen3Error(f"{self.file}, line {self.number}: {error}") from error


@dataclass(frozen=True, slots=True)
class Lesson:
    """Token ids, of which those from `start` on are learned; those before are context."""

    ids: Sequence[int]
    start: int

    @property
    def learned(self) -> int:
        """The number of tokens that are learned."""
        return len(self.ids) - self.start


@dataclass(frozen=True, slots=True)
class Lessons:
    """The lessons of a file.

    Attributes:
        lessons: the lessons, by line: those of one conversation stay together.
        cut: how many were cut at their end.
        left_out: how many were left out, because nothing to learn would remain of them.
    """

    lessons: Sequence[Sequence[Lesson]]
    cut: int
    left_out: int


def read_rows(file: Path) -> list[str]:
    """Return the lines of a text file.

    Raises:
        Qwen3Error: it cannot be read, or is not UTF-8.
    """
    try:
        return [row.removesuffix("\r") for row in file.read_text("utf-8-sig").split("\n")]
    except OSError as error:
        raise Qwen3Error(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise Qwen3Error(f"{file} is not UTF-8 text") from error


def read_lines(
    file: Path, rows: Sequence[str] | None = None, *, may_lack_answer: bool = False
) -> list[Line]:
    """Read a file of lessons; what is not JSON Lines or has no known form is refused.

    `rows` are its lines, if they have been read. With `may_lack_answer` a conversation need not
    have a turn of the assistant's.

    Raises:
        Qwen3Error: the file cannot be read or has no line, or a line is wrong; the message names
            it.
    """
    rows = read_rows(file) if rows is None else rows
    lines = []
    for number, row in enumerate(rows, 1):
        if row.strip():
            line = Line(file, number)
            with line.named():
                lines.append(_read(line, row, may_lack_answer))
    if not lines:
        raise Qwen3Error(f"{file} has no lines; a lesson is a JSON object with {_FORMS}")
    return lines


def _read(line: Line, row: str, may_lack_answer: bool) -> Line:
    if row.lstrip().startswith("["):
        raise ValueError(
            f"it begins a JSON list; a line is an object with {_FORMS} (jq -c '.[]' FILE writes a "
            "list so)"
        )
    try:
        content = json.loads(row)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"it is no JSON object; a lesson has {_FORMS}")
    form = _form_of(content)
    if form == "text":
        return replace(line, text=_text_of(content, "text"))
    if form == "prompt":
        turns = [{"role": "user", "content": _text_of(content, "prompt")}]
        if "completion" in content or not may_lack_answer:
            turns.append({"role": "assistant", "content": _text_of(content, "completion")})
    elif not isinstance(content["messages"], list):
        raise ValueError(f"its messages must be a list, not {content['messages']!r:.40}")
    else:
        turns = normalise(content["messages"])
    for place, turn in enumerate(turns):
        _check_turn(turn, f"messages[{place}]")
    if not may_lack_answer and not any(map(_is_learned, turns)):
        raise ValueError("it has no turn of the assistant's to learn")
    tools = [tool_schema(tool) for tool in as_tool_list(content.get("tools"))]
    return replace(line, messages=turns, tools=tools)


def _form_of(content: dict[str, Any]) -> str:
    forms = [name for name in ("messages", "prompt", "text") if name in content]
    if len(forms) != 1:
        raise ValueError(f"it must have one of {_FORMS}, and it has {list(content)}")
    foreign = {"tools", "completion"} & content.keys() - _FIELDS[forms[0]]
    if foreign:
        raise ValueError(f"{forms[0]} and {min(foreign)} exclude each other")
    return forms[0]


def _text_of(content: dict[str, Any], name: str) -> str:
    text = content.get(name)
    if not isinstance(text, str) or not text:
        raise ValueError(f"its {name} must be a string that is not empty, not {text!r:.40}")
    return text


def _check_turn(turn: dict[str, Any], where: str) -> None:
    if turn.get("weight", 1) not in (0, 1):  # of OpenAI's format
        raise ValueError(f"{where}: weight must be 0 or 1, not {turn['weight']!r}")
    said = turn["content"] or turn.get("reasoning_content") or turn.get("tool_calls")
    if turn["role"] == "assistant" and not said:
        raise ValueError(f"{where}: the assistant says nothing")
    for call in turn.get("tool_calls") or ():
        function = call["function"]
        arguments = function["arguments"]
        if parsed_arguments(function) == {"arguments": arguments}:
            raise ValueError(
                f"{where}: the arguments of {function['name']} are no JSON object: "
                f"{arguments!r:.40}"
            )


def _is_learned(turn: dict[str, Any]) -> bool:
    return turn["role"] == "assistant" and bool(turn.get("weight", 1))


def encode(processor: TextProcessor, lines: Sequence[Line], max_length: int) -> Lessons:
    """Encode lines as lessons of at most `max_length` tokens.

    Raises:
        Qwen3Error: the checkpoint's template cannot render a line, or renders it so that the turn
            does not begin with its prompt; the message names the line.
    """
    lessons, cut, left_out = [], 0, 0
    for line in lines:
        with line.named():
            found = list(_lessons_of(processor, line))
        whole = [lesson for lesson in found if lesson.start < max_length]
        left_out += len(found) - len(whole)
        cut += sum(len(lesson.ids) > max_length for lesson in whole)
        if whole:
            lessons.append([replace(lesson, ids=lesson.ids[:max_length]) for lesson in whole])
    if not lessons:
        raise Qwen3Error(
            f"{lines[0].file}: with {max_length:,} tokens nothing to learn is left of any lesson; "
            "max_length allows more"
        )
    return Lessons(lessons, cut, left_out)


def _lessons_of(processor: TextProcessor, line: Line) -> Iterator[Lesson]:
    tokenizer = processor.tokenizer
    if line.text:
        end = tokenizer.id_of("<|endoftext|>")
        ends = [end] if end in processor.end_ids else sorted(processor.end_ids)[:1]
        # The first token has nothing before it that it could be predicted from.
        yield Lesson([*tokenizer.encode(line.text), *ends], 1)
    for place, turn in enumerate(line.messages):
        if _is_learned(turn):
            yield _turn_lesson(processor, line, place)


def _turn_lesson(processor: TextProcessor, line: Line, place: int) -> Lesson:
    """Return the lesson of one turn of a conversation.

    Raises:
        Qwen3Error, ValueError: see `encode`.
    """
    where, thinks = f"messages[{place}]", bool(thinking_of(line.messages[place]).strip())
    if thinks and not processor.thinking.can_think:
        raise ValueError(f"{where} has thoughts, and this checkpoint does not think")
    if not thinks and not processor.thinking.can_answer_directly:
        raise ValueError(
            f"{where} has no thoughts, and this checkpoint always thinks: give them as "
            "reasoning_content, or tune a hybrid or Instruct checkpoint"
        )
    asked = render_whole(processor, line.messages[:place], thinks, line.tools)
    prompt, turns = processor.tokenizer.encode(asked), line.messages[: place + 1]
    rendered = render_whole(processor, turns, thinks, line.tools, add_generation_prompt=False)
    whole = processor.tokenizer.encode(rendered)
    ends = processor.turn_end_ids or processor.end_ids
    # The template writes a line break after the end, which is never generated.
    while whole and whole[-1] not in ends:
        whole.pop()
    if whole[: len(prompt)] != prompt or len(whole) <= len(prompt):
        raise ValueError(
            f"{where}: as this checkpoint's template renders it, the turn does not continue its "
            "prompt, so what is to be learned of it is unclear (a line break before the answer or "
            "thoughts of white space may be the cause, or no user's message before it)"
        )
    return Lesson(whole, len(prompt))
