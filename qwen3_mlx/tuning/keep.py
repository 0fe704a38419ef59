"""What is to be kept: conversations whose replies shall stay those of the untrained model."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen3_mlx.api.llm import LLM
from qwen3_mlx.api.stream import collect
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.text.messages import normalise
from qwen3_mlx.tuning.lessons import Line, read_lines, read_rows

_MAX_REPLY = 256  # tokens


def read_keep(file: Path) -> list[Line]:
    """Read a file: lessons if it has JSON Lines, which may lack the answer; else a question a line.

    Raises:
        Qwen3Error: the file cannot be read, or a line is wrong.
    """
    rows = read_rows(file)
    if file.suffix == ".jsonl" or rows[0].startswith("{"):
        return read_lines(file, rows, may_lack_answer=True)
    lines = [
        Line(file, number, normalise(row)) for number, row in enumerate(rows, 1) if row.strip()
    ]
    if not lines:
        raise Qwen3Error(f"{file} has no lines; give a question a line, or lessons as .jsonl")
    return lines


def answered(llm: LLM, lines: Sequence[Line]) -> list[Line]:
    """Return lines with the likeliest reply where the last turn is not the assistant's.

    A hybrid checkpoint replies with and without thinking.
    """
    kept, started = list[Line](), list[tuple[Line, Any]]()
    for line in lines:
        if line.text or line.messages[-1]["role"] == "assistant":
            kept.append(line)
            continue
        for thinking in _modes(llm):
            with line.named():
                stream = llm.stream(
                    line.messages,
                    thinking=thinking,
                    tools=list(line.tools) or None,
                    temperature=0.0,
                    max_tokens=_MAX_REPLY,
                )
            started.append((line, stream))
    try:
        for line, stream in started:
            reply = collect(stream).messages[-1]
            if reply["content"] or reply.get("reasoning_content") or reply.get("tool_calls"):
                kept.append(replace(line, messages=[*line.messages, *normalise([reply])]))
    finally:
        for _, stream in started:
            stream.close()
    return kept


def _modes(llm: LLM) -> Iterator[bool]:
    if llm.thinking.can_answer_directly:
        yield False
    if llm.thinking.can_think:
        yield True
