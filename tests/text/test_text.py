"""Strings to ids and back: templates, tokenizer, thinking, and the parser of replies."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_mlx.errors import CheckpointError, Qwen3Error
from qwen3_mlx.text.events import Reasoning, Text, ToolCall, ToolCallDelta
from qwen3_mlx.text.messages import normalise
from qwen3_mlx.text.parser import ReplyParser
from qwen3_mlx.text.sections import SectionTracker
from qwen3_mlx.text.template import ChatTemplate
from qwen3_mlx.text.thinking import Thinking
from qwen3_mlx.text.tokenizer import Tokenizer
from tests.support import DEMO
from tests.text.harness import TEMPLATE, THINKING, TOKENIZER, new_parser

CASES = json.loads((Path(__file__).parents[1] / "golden" / "chat_cases.json").read_text())
SCRIPTS = (
    "plain English, 1234 + 5678 = 6912.\n\n\tTabs  and   spaces ",
    "你好，世界。机器学习",
    "こんにちは世界 カタカナ",
    "안녕하세요 세계",
    "Привет, мир! Ёлка",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇫🇷 e\u0301 Å ﬁ",
)


def render(template: ChatTemplate, case: dict[str, Any]) -> str:
    return template.render(
        normalise(case["messages"]),
        thinking=case.get("enable_thinking"),
        tools=case["tools"],
        add_generation_prompt=case["add_generation_prompt"],
    )


@pytest.mark.parametrize("case", [case for case in CASES if case["template"] == "hybrid"])
def test_the_demos_template_renders_the_published_format(case: dict[str, Any]) -> None:
    assert render(TEMPLATE, case) == case["text"]


@pytest.fixture(scope="session")
def published_model_config() -> Path:
    """The folder with the published tokenizer and templates."""
    return Path(os.environ["QWEN3_FILES"])


@pytest.mark.published
def test_published_templates_and_ids(published_model_config: Path) -> None:
    tokenizer = Tokenizer(published_model_config / "tokenizer.json")
    for case in CASES:
        kind = "" if case["template"] == "hybrid" else f".{case['template']}"
        template = ChatTemplate((published_model_config / f"chat_template{kind}.jinja").read_text())
        text = render(template, case)
        assert text == case["text"]
        assert tokenizer.encode(text) == case["ids"]


def random_message(rng: random.Random) -> dict[str, Any]:
    texts = ["", "Hi", "  a\n\n", "<think>\nx\n</think>\n\ny", "</think>z", "a<think>b", "你好"]
    texts += ["<tool_response>r</tool_response>", "<tool_response>\nx", "x</think>y</think>z"]
    message: dict[str, Any] = {
        "role": rng.choice(["system", "user", "user", "assistant", "assistant", "tool"]),
        "content": rng.choice(texts),
    }
    if rng.random() < 0.1:
        message["content"] = [{"type": "text", "text": rng.choice(texts)}]
    if message["role"] == "assistant":
        if rng.random() < 0.4:
            message["reasoning_content"] = rng.choice(["", "r", "\nr\n"])
        if rng.random() < 0.3:
            calls = [
                {"name": "f", "arguments": rng.choice([{"b": "<x>'é", "a": 1}, '{"a": 1}', {}])}
                for _ in range(rng.randint(1, 3))
            ]
            bare = rng.random() < 0.2
            message["tool_calls"] = calls if bare else [{"function": call} for call in calls]
    return message


@pytest.mark.published
def test_the_demos_template_renders_any_conversation_as_the_published_one(
    published_model_config: Path,
) -> None:
    other = ChatTemplate((published_model_config / "chat_template.jinja").read_text())
    tool = {"name": "f", "description": "d<&>", "parameters": {"z": 1, "a": 2}}
    for seed in range(3000):
        rng = random.Random(seed)
        messages = normalise([random_message(rng) for _ in range(rng.randint(1, 7))])
        options: dict[str, Any] = {
            "thinking": rng.choice([None, True, False]),
            "tools": rng.choice([None, [{"type": "function", "function": tool}]]),
            "add_generation_prompt": rng.random() < 0.7,
        }
        rendered = []
        for template in (TEMPLATE, other):
            try:
                rendered.append(template.render(messages, **options))
            except Qwen3Error:
                rendered.append("refused")
        assert rendered[0] == rendered[1]


@pytest.mark.published
def test_capabilities_of_the_published_templates(published_model_config: Path) -> None:
    tokenizer = Tokenizer(published_model_config / "tokenizer.json")

    def of(kind: str) -> Thinking:
        template = ChatTemplate((published_model_config / f"chat_template{kind}.jinja").read_text())
        return Thinking.of(template, tokenizer)

    assert of("") == Thinking(True, True, False, 151667, 151668)
    assert of(".thinking-2507") == Thinking(True, False, True, 151667, 151668)
    assert of(".instruct-2507") == Thinking(False, True, False, None, None)
    assert len(tokenizer) == 151669


@pytest.mark.published
@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 151668), max_size=40))
def test_streaming_the_published_vocabulary(published_model_config: Path, ids: list[int]) -> None:
    tokenizer = _published_tokenizer(published_model_config)
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


_LOADED: dict[Path, Tokenizer] = {}


def _published_tokenizer(folder: Path) -> Tokenizer:
    if folder not in _LOADED:
        _LOADED[folder] = Tokenizer(folder / "tokenizer.json")
    return _LOADED[folder]


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    sections = SectionTracker(tokenizer, None)
    pieces = [sections.read(place, token).text for place, token in enumerate(ids)]
    return "".join(pieces) + sections.flushed()


@given(ids=st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40))
def test_streaming_gives_what_whole_decoding_gives(ids: list[int]) -> None:
    assert streamed(TOKENIZER, ids) == TOKENIZER.decode(ids)


@pytest.mark.parametrize("text", SCRIPTS)
def test_no_half_character_is_ever_shown(text: str) -> None:
    ids = TOKENIZER.encode(text)
    sections = SectionTracker(TOKENIZER, None)
    pieces = [sections.read(place, token).text for place, token in enumerate(ids)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == TOKENIZER.decode(ids)
    assert sections.flushed() == ""


@given(ids=st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=30), detour=st.data())
def test_removed_tokens_leave_no_trace(ids: list[int], detour: st.DataObject) -> None:
    tags = [token for token in (THINKING.open_id, THINKING.close_id) if token is not None]
    tokens = st.lists(st.integers(0, len(TOKENIZER) - 1) | st.sampled_from(tags), max_size=4)
    one, other = SectionTracker(TOKENIZER, THINKING), SectionTracker(TOKENIZER, THINKING)
    for token in ids:
        for wrong in (removed := detour.draw(tokens)):
            one.advance(wrong)
        one.rewind(len(removed))
        one.advance(token)
        other.advance(token)
        assert one.last == other.last


def test_a_leading_space_is_kept() -> None:
    assert streamed(TOKENIZER, TOKENIZER.encode(" the")) == " the"


def test_special_tokens_keep_their_text() -> None:
    text = "<|im_start|>user\n<think>x</think><|im_end|>"
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.id_of("<think>") in ids
    assert TOKENIZER.id_of("<nothing>") is None


def test_a_saved_truncation_is_not_obeyed(tmp_path: Path) -> None:
    content = json.loads((DEMO / "tokenizer.json").read_text())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    assert Tokenizer(path).encode("one two three four five") == TOKENIZER.encode(
        "one two three four five"
    )


def test_a_broken_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        Tokenizer(path)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        Tokenizer(path)
    other = json.loads((DEMO / "tokenizer.json").read_text()) | {"decoder": None}
    path.write_text(json.dumps(other))
    with pytest.raises(CheckpointError, match="not a byte-level tokenizer"):
        Tokenizer(path)


# --- messages and templates ---------------------------------------------------------------------


def test_content_is_flattened_before_the_template() -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "1 + 1?"}]
    messages = normalise([{"role": "user", "content": parts}, {"role": "assistant"}])
    assert [message["content"] for message in messages] == ["What is 1 + 1?", ""]
    assert normalise("Hi") == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("messages", "error", "complaint"),
    [
        ([], ValueError, "messages is empty"),
        (7, TypeError, "must be a string or a list"),
        (["Hi"], TypeError, r"messages\[0\] must be a dict"),
        ([{"role": "robot", "content": "x"}], ValueError, "has role 'robot'"),
        ([{"content": "x"}], ValueError, "has role None"),
        ([{"role": "user"}], ValueError, r"messages\[0\] has no content, which a message of user"),
        ([{"role": "user", "content": 3}], TypeError, "content must be text"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            ValueError,
            "a part of type 'image_url' has no text",
        ),
    ],
)
def test_what_is_no_conversation_is_refused(
    messages: Any, error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        normalise(messages)


def test_tojson_neither_sorts_nor_escapes() -> None:
    template = ChatTemplate("{{ messages[0].content | tojson }}")
    value = {"b": "<é&'>", "a": [1, None]}
    assert template.render([{"content": value}]) == """{"b": "<é&'>", "a": [1, null]}"""


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{{ raise_exception('no system turns') }}", "no system turns"),
        ("{{ messages[0].content.nothing.more }}", "refuses these messages"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages"),
        ("{{ 1 / 0 }}", "refuses these messages"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "refuses these messages"),
    ],
)
def test_a_template_that_fails_is_one_sentence(source: str, complaint: str) -> None:
    with pytest.raises(Qwen3Error, match=complaint):
        ChatTemplate(source).render([{"role": "user", "content": "x"}])


def test_where_a_template_is_found(tmp_path: Path) -> None:
    assert ChatTemplate.from_folder(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"chat_template": "in the config"}')
    found = ChatTemplate.from_folder(tmp_path)
    assert found and found.source == "in the config"
    config.write_text('{"chat_template": [{"name": "default", "template": "by name"}]}')
    found = ChatTemplate.from_folder(tmp_path)
    assert found and found.source == "by name"
    (tmp_path / "chat_template.jinja").write_text("{% broken")
    with pytest.raises(CheckpointError, match="chat template is broken in line 1"):
        ChatTemplate.from_folder(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    config.write_text("[")
    with pytest.raises(CheckpointError, match="cannot be read"):
        ChatTemplate.from_folder(tmp_path)


# --- thinking -----------------------------------------------------------------------------------


def test_thinking_is_read_from_the_template() -> None:
    assert THINKING.hybrid and not THINKING.opens_in_prompt
    always = ChatTemplate("{{ messages[0].content }}<think>\n")
    assert Thinking.of(always, TOKENIZER) == Thinking(
        True, False, True, THINKING.open_id, THINKING.close_id
    )
    silent = ChatTemplate("{{ messages[0].content.split('</think>')[-1] }}")
    assert Thinking.of(silent, TOKENIZER).can_think
    never = ChatTemplate("{{ messages[0].content }}")
    assert not Thinking.of(never, TOKENIZER).can_think
    assert not Thinking.of(None, TOKENIZER).can_think


def test_what_a_checkpoint_cannot_do_is_refused() -> None:
    always, never = Thinking(True, False, True, 1, 2), Thinking(False, True, False, None, None)
    assert always.resolve(None) and always.resolve(True)
    assert not never.resolve(None) and not never.resolve(False)
    with pytest.raises(Qwen3Error, match="always thinks"):
        always.resolve(False)
    with pytest.raises(Qwen3Error, match="cannot think"):
        never.resolve(True)


# --- the parser ---------------------------------------------------------------------------------


def parse(
    text: str, *, stop: tuple[str, ...] = (), inside: bool = False, raw: bool = False
) -> tuple[str, str, ReplyParser]:
    """Parse the ids of `text`; give reasoning, answer and the parser."""
    said: list[Reasoning | Text | ToolCall | ToolCallDelta] = []
    thinking = None if raw else THINKING
    parser = new_parser(said.append, thinking=thinking, inside=inside, stop=stop)
    for token in TOKENIZER.encode(text):
        parser.advance([token])
        if parser.finished:
            break
    parser.close()
    assert all(isinstance(event, ToolCall) or event.text for event in said), "one without text"
    reasoning = "".join(event.text for event in said if isinstance(event, Reasoning))
    answer = "".join(event.text for event in said if isinstance(event, Text))
    return reasoning, answer, parser


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("<think>\nhm\n</think>\n\nYes.", "hm", "Yes."),
        ("<think>\n\n</think>\n\nYes.", "", "Yes."),
        ("<think>\na\n\nb\n\n</think>Yes.\n", "a\n\nb", "Yes.\n"),
        ("Yes.", "", "Yes."),
        (" Yes", "", " Yes"),
        ("\n\nYes", "", "\n\nYes"),
        ("<think>\ncut", "cut", ""),
        ("<think>\ncut\n\n", "cut\n\n", ""),
        ("<think>", "", ""),
        ("<think>a</think>b<think>c</think>d", "a", "b<think>c</think>d"),
        ("<think>a</think>\n\n<think>c</think>d", "a", "<think>c</think>d"),
        ("Use the <think> tag.", "", "Use the <think> tag."),
        ("\n<think>\nhm</think>Yes.", "hm", "\nYes."),
        ("<think><think>\nUse <think> here</think>Yes.", "Use <think> here", "Yes."),
        ("a </think> b", "", "a </think> b"),
        ("<think>你好👍</think>\n\n世界🌍", "你好👍", "世界🌍"),
    ],
)
def test_thinking_and_answer_are_told_apart(text: str, reasoning: str, answer: str) -> None:
    assert parse(text)[:2] == (reasoning, answer)


def test_a_prompt_that_has_opened_the_thinking() -> None:
    assert parse("hm\n</think>\n\nYes.", inside=True)[:2] == ("hm", "Yes.")
    assert parse("\nhm", inside=True)[:2] == ("hm", "")


def test_raw_text_is_text() -> None:
    text = "\n<think>\nx</think>\n\ny"
    assert parse(text, raw=True)[:2] == ("", text)


def test_reasoning_tokens_are_those_between_the_tags() -> None:
    inside = len(TOKENIZER.encode("\none two three\n"))
    assert parse("<think>\none two three\n</think>\n\nfour")[2].reasoning_tokens == inside
    assert parse("four")[2].reasoning_tokens == 0


@pytest.mark.parametrize(
    ("text", "stop", "answer", "found"),
    [
        ("one two three", ("two",), "one ", "two"),
        ("one two three", ("three", "two"), "one ", "two"),
        ("a\n\nb", ("\n\n",), "a", "\n\n"),
        ("one twin", ("two",), "one twin", None),
        ("one tw", ("two",), "one tw", None),
        ("aab", ("ab",), "a", "ab"),
        ("<think>\nstop</think>\n\nthe stop here", ("stop",), "the ", "stop"),
        ("end.", (".",), "end", "."),
    ],
)
def test_stop_strings(text: str, stop: tuple[str, ...], answer: str, found: str | None) -> None:
    _, said, parser = parse(text, stop=stop)
    assert said == answer
    assert parser.stopped_by == found


@given(
    text=st.text(alphabet="ab\n👍", max_size=30),
    stop=st.lists(st.text(alphabet="ab\n👍", min_size=1, max_size=4), max_size=3),
)
def test_the_first_complete_stop_string_cuts_the_text(text: str, stop: list[str]) -> None:
    places = [(text.find(one) + len(one), text.find(one)) for one in stop if one in text]
    expected = text[: min(places)[1]] if places else text
    assert parse(text, stop=tuple(stop), raw=True)[1] == expected
