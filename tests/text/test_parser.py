"""Nothing leaks: in random replies, cut anywhere, thinking and answer hold what they should."""

import codecs
import random

import pytest

from qwen3_mlx.text.events import Reasoning, Text, ToolCall, ToolCallDelta
from qwen3_mlx.text.logprobs import TextLogprobs
from qwen3_mlx.text.parser import ReplyParser
from qwen3_mlx.text.sections import SectionTracker
from tests.text.harness import (
    BAD,
    CALL,
    CALLS,
    CLOSE,
    END,
    OPEN,
    THINKING,
    TOKENIZER,
    Reply,
    new_parser,
)

PIECES = [
    *("a", "b c", "\n", "\n\n", " ", "你好", "👩‍👩‍👧", "é", "x" * 9, "<", "think>", "</", "<|"),
    *("carry 0\n", "{", '"', "tool_call>", "0.5", "\t"),
]
TAGS = ["<think>", "</think>", "<think>\n", "\n</think>\n\n", "</think></think>", "<think><think>"]


def random_ids(rng: random.Random, *, tools: bool) -> list[int]:
    """Make up a reply; single bytes of characters may be missing."""
    ids: list[int] = []
    for _ in range(rng.randint(1, 25)):
        pieces = TAGS if rng.random() < 0.25 else PIECES
        if tools and rng.random() < 0.2:
            pieces = [CALL, f"\n{CALL}", BAD, "<tool_call>", "</tool_call>"]
        ids += TOKENIZER.encode(rng.choice(pieces))
        if rng.random() < 0.1 and len(ids) > 1:
            del ids[rng.randrange(len(ids))]
    return ids


def text_of(ids: list[int]) -> str:
    """Decode the ids, without bytes at the end that are no whole character."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return decoder.decode(b"".join(TOKENIZER.token_bytes(token) for token in ids))


def expected(ids: list[int], inside: bool) -> tuple[str, str]:
    """Give thinking and answer by cutting the ids at the tags, of which one pair counts."""
    spans: list[tuple[bool, bool, list[int]]] = [(inside, inside, [])]  # inside, after a tag, ids
    over = False
    for token in ids:
        within, _, span = spans[-1]
        nothing_yet = not text_of(span).strip("\n" if within else None)
        if token == OPEN and not over and nothing_yet:
            spans.append((True, True, []))
        elif token == CLOSE and within:
            spans.append((False, True, []))
            over = True
        else:
            span.append(token)
    reasoning = answer = ""
    for number, (within, after_tag, span) in enumerate(spans):
        data = b"".join(TOKENIZER.token_bytes(token) for token in span)
        text = data.decode(errors="replace")
        text = text.lstrip("\n") if after_tag else text
        if within:
            closed = number < len(spans) - 1
            reasoning += text.rstrip("\n") if closed else text
        else:
            answer += text
    return reasoning, answer


def check_a_reply(rng: random.Random) -> None:
    ids, inside = random_ids(rng, tools=False), rng.random() < 0.3
    ids = ids[: rng.randint(1, len(ids))]
    said: list[Reasoning | Text | ToolCall | ToolCallDelta] = []
    parser = new_parser(said.append, inside=inside)
    place = 0
    while place < len(ids):
        step = rng.choice([1, 1, 1, 2, 5])
        parser.advance(ids[place : place + step])
        place += step
    parser.close()
    reasoning = "".join(event.text for event in said if isinstance(event, Reasoning))
    answer = "".join(event.text for event in said if isinstance(event, Text))
    assert (reasoning, answer) == expected(ids, inside)
    assert all(event.text for event in said if not isinstance(event, ToolCall))


def check_a_reply_with_tools(rng: random.Random) -> None:
    """However it is cut, it says the same; calls in the answer are made, and none is lost."""
    ids = random_ids(rng, tools=True)
    found = []
    for _ in range(2):
        said: list[Reasoning | Text | ToolCall | ToolCallDelta] = []
        parser = new_parser(said.append, calls=CALLS)
        place = 0
        while place < len(ids):
            step = rng.choice([1, 2, 7])
            parser.advance(ids[place : place + step])
            place += step
        parser.close()
        reasoning = "".join(event.text for event in said if isinstance(event, Reasoning))
        answer = "".join(event.text for event in said if isinstance(event, Text))
        calls = sum(isinstance(event, ToolCall) for event in said)
        found.append((reasoning, answer, calls))
    assert found[0] == found[1]
    reasoning, answer, calls = found[0]
    said_at_all = reasoning + answer
    assert said_at_all.count('"arguments"') + calls >= TOKENIZER.decode(ids).count('"arguments"')


def check_a_budget(rng: random.Random) -> None:
    """The same with everything on: tokens taken back and forced."""
    script, budget = random_ids(rng, tools=False), rng.choice([0, 1, 3, 9])

    def choose(ids: object, ruled_out: object) -> int:
        allowed = [token for token in [rng.choice(script), END, 65] if token not in ruled_out]  # type: ignore[operator]
        return allowed[0]

    reply = Reply(choose, budget=budget, most=120, inside=rng.random() < 0.3)
    ids = [token for token in reply.ids if token != END]
    inside = reply.began_inside
    assert (reply.reasoning, reply.text) == expected(ids, inside)


@pytest.mark.parametrize("check", [check_a_reply, check_a_reply_with_tools, check_a_budget])
def test_a_few_hundred_replies(check: object) -> None:
    for seed in range(200):
        check(random.Random(seed))  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_a_reply, check_a_reply_with_tools, check_a_budget])
def test_ten_thousand_replies(check: object) -> None:
    for seed in range(200, 10_200):
        check(random.Random(seed))  # type: ignore[operator]


def test_the_logprobs_of_a_section_spell_its_text() -> None:
    """Those of a character that several tokens make up are all there, next to a tag as well."""
    said: list[Reasoning | Text | ToolCall | ToolCallDelta] = []
    logprobs = TextLogprobs(TOKENIZER)
    parser = ReplyParser(SectionTracker(TOKENIZER, THINKING), said.append, logprobs=logprobs)
    for token in TOKENIZER.encode("<think>\n👩‍👧 hm\n</think>\n\n👍🏽 é"):
        logprobs.record((token, -1.0, []))
        parser.advance([token])
    parser.close()
    for kind, text in ((Reasoning, "👩‍👧 hm"), (Text, "👍🏽 é")):
        events = [event for event in said if isinstance(event, kind)]
        tokens = [token for event in events for token in event.tokens]
        assert "".join(event.text for event in events) == text
        assert b"".join(token.token for token in tokens) == text.encode()
