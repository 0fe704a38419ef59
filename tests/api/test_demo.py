"""The embedded checkpoint: a model that has really learned something, on the product's own path."""

import json
import zlib

import pytest

from qwen3_mlx import LLM, Finish, Reasoning, SamplingParams, Text, load
from tests.support import assert_close, random_ids

GREEDY = SamplingParams(temperature=0.0)
HAND_OFF = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the "
    "thinking directly now.\n</think>\n\n"
)
CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
# Three-digit sums that were kept from the training.
UNSEEN = [
    (a, b)
    for a in range(100, 1000, 37)
    for b in range(100, 1000, 41)
    if zlib.crc32(f"{a}+{b}".encode()) % 20 == 0
][:12]


@pytest.mark.heavy
def test_it_thinks_its_way_to_the_sum(demo: LLM) -> None:
    right = 0
    questions = [f"What is {a} + {b}?" for a, b in UNSEEN]
    replies = demo.batch(questions, thinking=True, max_tokens=200, sampling=GREEDY)
    for (a, b), reply in zip(UNSEEN, replies, strict=True):
        assert reply.reasoning
        assert reply.finish_reason == "stop"
        right += str(a + b) in reply.text
    assert right >= len(UNSEEN) - 1


def test_one_digit_sums_need_no_thinking(demo: LLM) -> None:
    for a, b in ((0, 0), (1, 2), (9, 9), (7, 5), (4, 8), (3, 6)):
        reply = demo.chat(f"What is {a} + {b}?", thinking=False, max_tokens=50, sampling=GREEDY)
        assert reply.text.endswith(f" {a + b}")
        assert reply.reasoning == ""
        assert reply.usage.reasoning_tokens == 0


LISTS = ("red blue green", "7 3 9 1", "x q j", "tiger mango anchor walnut", "4 4 2 8 5", "lamp dog")
TOOLS = (  # of which no name, parameter or question was in the training
    ("weather_report", {"town_name": "Lisbon"}, "How is the weather in Lisbon?"),
    ("square_root", {"radicand": 144}, "What is the square root of 144?"),
    ("currency_quote", {"amount": 250, "target": "Denver"}, "How much is 250 dollars in Denver?"),
    (
        "train_ticket",
        {"departure": "Oslo", "arrival": "Kyoto", "weekday": "Saturday"},
        "Buy a ticket from Oslo to Kyoto on Saturday.",
    ),
)


@pytest.mark.heavy
@pytest.mark.parametrize(("thinking", "wrong"), [(True, 1), (False, 3)])
def test_it_repeats_reverses_and_counts(demo: LLM, thinking: bool, wrong: int) -> None:
    expected = {}
    for words in LISTS:
        expected[f"Repeat: {words}"] = words
        expected[f"Reverse: {words}"] = " ".join(reversed(words.split()))
        expected[f"Count: {words}"] = str(len(words.split()))
    replies = demo.batch(list(expected), thinking=thinking, max_tokens=300, sampling=GREEDY)
    right = [reply.text == answer for reply, answer in zip(replies, expected.values(), strict=True)]
    assert right.count(False) <= wrong


@pytest.mark.heavy
@pytest.mark.parametrize("thinking", [True, False])
def test_it_calls_tools_that_it_has_not_seen(demo: LLM, thinking: bool) -> None:
    right = 0
    for name, arguments, question in TOOLS:
        properties = {
            key: {"type": "string" if isinstance(value, str) else "number"}
            for key, value in arguments.items()
        }
        schema = {"type": "object", "properties": properties, "required": list(arguments)}
        tool = {"type": "function", "function": {"name": name, "parameters": schema}}
        reply = demo.chat(question, tools=[tool], thinking=thinking, sampling=GREEDY)
        calls = [(call.name, call.arguments) for call in reply.tool_calls]
        right += calls == [(name, arguments)]
    assert right >= len(TOOLS) - 1


def test_events_come_in_order(demo: LLM) -> None:
    events = list(demo.stream("What is 12 + 34?", thinking=True, sampling=GREEDY))
    kinds = [type(event) for event in events]
    assert kinds == sorted(kinds, key=[Reasoning, Text, Finish].index)
    assert set(kinds) == {Reasoning, Text, Finish}
    assert isinstance(events[-1], Finish)
    assert 0 < events[-1].usage.reasoning_tokens < events[-1].usage.completion_tokens


def test_cut_inside_the_thinking(demo: LLM) -> None:
    reply = demo.chat("What is 123 + 456?", thinking=True, max_tokens=12, sampling=GREEDY)
    assert (reply.text, reply.finish_reason) == ("", "length")
    assert reply.reasoning


def test_tags_in_the_users_text_change_nothing(demo: LLM) -> None:
    for tag in ("<think>", "</think>"):
        reply = demo.chat(f"Repeat: red {tag} green", thinking=False, max_tokens=30, seed=1)
        assert reply.reasoning == ""
        assert reply.text


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_a_forced_close_is_followed_by_an_answer(demo: LLM, share: float) -> None:
    prompt = demo.render("What is 345 + 278?", thinking=True)
    thinking = demo.chat("What is 345 + 278?", thinking=True, sampling=GREEDY).reasoning
    part = thinking[: int(share * len(thinking))]
    text = demo.complete(f"{prompt}<think>\n{part}{HAND_OFF}", max_tokens=50, sampling=GREEDY).text
    assert "345 + 278 = " in text
    assert "<think>" not in text


def test_it_calls_a_calculator_that_is_offered(demo: LLM) -> None:
    prompt = demo.render("What is 345 + 278?", thinking=False, tools=[CALCULATOR])
    text = demo.complete(prompt, max_tokens=80, sampling=GREEDY).text
    call = json.loads(text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
    assert call == {"name": "calculator", "arguments": {"expression": "345 + 278"}}


def test_soft_switches(demo: LLM) -> None:
    off = demo.chat("What is 2 + 3? /no_think", max_tokens=60, sampling=GREEDY)
    on = demo.chat("What is 2 + 3? /think", max_tokens=100, sampling=GREEDY)
    assert (off.reasoning, off.text) == ("", "2 + 3 = 5")
    assert on.reasoning


def test_held_as_it_is_on_disk_and_dequantized_agree(demo: LLM) -> None:
    ids = random_ids(30, 900)
    with load(bits=8, dequantize=True) as dequantized, load(bits=8, dequantize=False) as kept:
        assert_close(dequantized.logits(ids), kept.logits(ids), 1e-3)
    with load() as default:
        assert_close(default.logits(ids), demo.logits(ids), 1e-5)
