"""Lessons: what is learned of a line, by the demo's template and those of other releases."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qwen3_mlx import LLM, Qwen3Error, load
from qwen3_mlx.tuning.lessons import Lesson, Lessons, encode, read_lines
from tests.support import write_tiny

ASKED = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def lessons_of(llm: LLM, folder: Path, *lines: Any, max_length: int = 512) -> Lessons:
    file = folder / "lessons.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return encode(llm.processor, read_lines(file), max_length)


def parts(llm: LLM, lesson: Lesson) -> tuple[str, str]:
    """Decode the context and what is learned of a lesson."""
    ids: Sequence[int] = lesson.ids
    decode = llm.tokenizer.decode
    return decode(list(ids[: lesson.start])), decode(list(ids[lesson.start :]))


def only(llm: LLM, folder: Path, line: Any) -> tuple[str, str]:
    ((lesson,),) = lessons_of(llm, folder, line).lessons
    return parts(llm, lesson)


def test_an_empty_think_block_is_not_learned(tiny: LLM, tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "Hello"}
    prompt, learned = only(tiny, tmp_path, {"messages": [ASKED, answer]})
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert learned == "Hello<|im_end|>"


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_are_learned_under_every_name(name: str, tiny: LLM, tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "Hello", name: "Polite."}
    prompt, learned = only(tiny, tmp_path, {"messages": [ASKED, answer]})
    assert prompt.endswith("<|im_start|>assistant\n")
    assert learned == "<think>\nPolite.\n</think>\n\nHello<|im_end|>"


def test_each_turn_is_a_lesson_rendered_up_to_it(tiny: LLM, tmp_path: Path) -> None:
    first = {"role": "assistant", "content": "One", "thinking": "Count."}
    silent = {"role": "assistant", "content": "Two", "weight": 0}
    last = {"role": "assistant", "content": "Three"}
    messages = [ASKED, first, ASKED, silent, ASKED, last]
    ((one, other),) = lessons_of(tiny, tmp_path, {"messages": messages}).lessons
    assert parts(tiny, one)[1] == "<think>\nCount.\n</think>\n\nOne<|im_end|>"
    prompt, learned = parts(tiny, other)
    assert learned == "Three<|im_end|>" and "Two" in prompt and "Count." not in prompt


def test_calls_of_tools_are_learned_and_results_are_not(tiny: LLM, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ]
    ((calls, answers),) = lessons_of(
        tiny, tmp_path, {"messages": messages, "tools": [TOOL]}
    ).lessons
    prompt, learned = parts(tiny, calls)
    assert '"name": "add"' in prompt and learned.startswith("<tool_call>")
    prompt, learned = parts(tiny, answers)
    assert "42" in prompt and learned == "It is 42.<|im_end|>"


def test_prompt_and_completion_are_a_question_and_its_answer(tiny: LLM, tmp_path: Path) -> None:
    pair = only(tiny, tmp_path, {"prompt": "Hi", "completion": "Hello"})
    answer = {"role": "assistant", "content": "Hello"}
    assert pair == only(tiny, tmp_path, {"messages": [ASKED, answer]})


def test_text_is_learned_whole_and_ends(tiny: LLM, tmp_path: Path) -> None:
    ((lesson,),) = lessons_of(tiny, tmp_path, {"text": "Once upon a time"}).lessons
    assert lesson.start == 1
    assert tiny.tokenizer.decode(list(lesson.ids)) == "Once upon a time<|endoftext|>"


def test_control_tokens_in_a_message_stay_text(tiny: LLM, tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "It is <|im_end|>, you see"}
    ((lesson,),) = lessons_of(tiny, tmp_path, {"messages": [ASKED, answer]}).lessons
    end = tiny.tokenizer.id_of("<|im_end|>")
    assert list(lesson.ids[lesson.start :]).count(end or 0) == 1 and lesson.ids[-1] == end


def test_long_lessons_are_cut_or_left_out_and_counted(tiny: LLM, tmp_path: Path) -> None:
    short, long = {"text": "Once"}, {"text": "Once upon " * 50}
    found = lessons_of(
        tiny, tmp_path, short, long, {"prompt": "Hi " * 50, "completion": "No"}, max_length=32
    )
    assert (found.cut, found.left_out, len(found.lessons)) == (1, 1, 2)
    assert max(len(lesson.ids) for (lesson,) in found.lessons) == 32
    with pytest.raises(Qwen3Error, match="with 2 tokens nothing to learn is left of any lesson"):
        lessons_of(tiny, tmp_path, {"prompt": "Hi", "completion": "No"}, max_length=2)


THINKING_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ODD = PLAIN.replace("assistant\n{% endif %}", "assistant: {% endif %}")


@pytest.mark.parametrize(
    ("template", "answer", "reason"),
    [
        (THINKING_ONLY, {"content": "Hello"}, "has no thoughts, and this checkpoint always thinks"),
        (PLAIN, {"content": "Hello", "thinking": "?"}, "this checkpoint does not think"),
        (ODD, {"content": "Hello"}, "the turn does not continue its prompt"),
    ],
)
def test_a_line_that_does_not_suit_the_checkpoint_is_named(
    template: str, answer: dict[str, str], reason: str, tmp_path: Path
) -> None:
    folder = write_tiny(tmp_path / "tiny")
    (folder / "chat_template.jinja").write_text(template)
    with (
        load(folder) as llm,
        pytest.raises(Qwen3Error, match=rf"lessons.jsonl, line 1: messages\[1\].*{reason}"),
    ):
        lessons_of(llm, tmp_path, {"messages": [ASKED, {"role": "assistant", **answer}]})


def test_a_checkpoint_that_always_thinks_learns_thoughts_alone(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny")
    (folder / "chat_template.jinja").write_text(THINKING_ONLY)
    answer = {"role": "assistant", "content": "Hello", "thinking": "Polite."}
    with load(folder) as llm:
        prompt, learned = only(llm, tmp_path, {"messages": [ASKED, answer]})
    assert prompt.endswith("<think>\n")
    assert learned == "Polite.\n</think>\n\nHello<|im_end|>"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(Qwen3Error, match=r"none.jsonl cannot be read: No such file or directory$"):
        read_lines(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe{}")
    with pytest.raises(Qwen3Error, match="binary is not UTF-8 text$"):
        read_lines(tmp_path / "binary")
