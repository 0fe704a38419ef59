"""Thinking under control: budgets, hand-offs and loops, token by token."""

import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_mlx.text.repetition import RepetitionDetector
from qwen3_mlx.text.sections import SectionTracker
from qwen3_mlx.text.thinking import Thinking
from qwen3_mlx.text.thinking_budget import (
    HAND_OFF,
    ThinkingBudget,
    ThinkingLimits,
    budget_within,
    hand_off_ids,
)
from qwen3_mlx.text.tokenizer import Tokenizer
from tests.text.harness import CLOSE, END, OPEN, THINKING, TOKENIZER, Chooser, Reply

PLAIN_CLOSE = TOKENIZER.encode("\n</think>\n\n")
HAND_OFF_IDS = hand_off_ids(TOKENIZER, THINKING, None)
"""Chooses a token after those so far, none of those ruled out."""


def saying(text: str, then: str = "") -> Chooser:
    """Say a text as tokens, then the other again and again."""
    script, rest = TOKENIZER.encode(text), TOKENIZER.encode(then) or [END]

    def choose(ids: Sequence[int], ruled_out: Sequence[int]) -> int:
        place = len(ids)
        token = script[place] if place < len(script) else rest[(place - len(script)) % len(rest)]
        return TOKENIZER.encode("x")[0] if token in ruled_out else token

    return choose


def chosen_thinking(reply: Reply, hand_off: Sequence[int] = HAND_OFF_IDS) -> int:
    """Count the tokens of thinking that were not forced; a reply thinks once."""
    inside, over, count, place = False, False, 0, 0
    while place < len(reply.ids):
        token = reply.ids[place]
        forced = [
            ids for ids in (list(hand_off), PLAIN_CLOSE) if reply.ids[place:][: len(ids)] == ids
        ]
        place += len(forced[0]) if forced else 1
        if token == CLOSE or forced:
            inside, over = False, True
        elif token == OPEN and not inside and not over:
            inside = True
        else:
            count += inside
    return count


@pytest.mark.parametrize("budget", [0, 1, 2, 7, 64])
@pytest.mark.parametrize("words", ["So we add. ", "我们来想一想。", "👩‍👩‍👧 "])
def test_a_budget_holds_and_an_answer_follows(budget: int, words: str) -> None:
    reply = Reply(saying("<think>\n", words), budget=budget)
    assert chosen_thinking(reply) <= budget
    assert reply.steering.closed_by == "budget"
    assert "�" not in reply.reasoning
    assert HAND_OFF.split("\n")[2] in reply.reasoning
    assert reply.text
    within = chosen_thinking(reply) + len(HAND_OFF_IDS) - 2  # the tag, and the breaks after it
    assert reply.parser.reasoning_tokens == within


def test_thinking_that_keeps_within_its_budget_is_left_alone() -> None:
    said = "<think>\nShort.\n</think>\n\nYes."
    reply = Reply(saying(said), budget=64)
    assert (reply.reasoning, reply.text) == ("Short.", "Yes.")
    assert reply.ids == [*TOKENIZER.encode(said), END]
    assert reply.steering.closed_by is None


def test_a_reply_that_ends_while_thinking_is_handed_off() -> None:
    reply = Reply(saying("<think>\nHm."), budget=64)
    assert reply.reasoning.startswith("Hm.") and reply.steering.closed_by == "end"
    assert reply.text == "x"  # the end was ruled out until something visible was there
    assert Reply(saying("<think>\nHm."), budget=None).text == ""


def test_a_reply_thinks_once() -> None:
    reply = Reply(saying("<think>\n", "a b c d e <think> f g h i j "), budget=3, most=380)
    assert chosen_thinking(reply) <= 3
    assert reply.text.count("<think> f") > 5 and reply.reasoning.count("Considering") == 1
    again = Reply(saying("<think>\na</think>b<think>\nc d e f g", "h "), budget=6)
    assert chosen_thinking(again) <= 6 and again.text.startswith("b<think>\nc d e")


def test_a_prompt_may_have_opened_the_thinking() -> None:
    reply = Reply(saying("", "hm "), budget=2, inside=True)
    assert reply.reasoning.startswith("hm") and chosen_thinking(reply) == 0
    none = Reply(saying("", "hm "), budget=0, inside=True)
    assert none.ids[: len(HAND_OFF_IDS)] == HAND_OFF_IDS


def test_thinking_is_finished_on_request() -> None:
    reply = Reply(saying("<think>\n", "we go on "), budget=None, finish_at=20)
    assert reply.steering.closed_by == "request"
    assert reply.ids[20 : 20 + len(HAND_OFF_IDS)] == HAND_OFF_IDS or (
        reply.ids[21 : 21 + len(HAND_OFF_IDS)] == HAND_OFF_IDS
    )


def test_a_message_of_ones_own() -> None:
    plain = Reply(saying("<think>\n", "we go on "), budget=2, message="")
    assert plain.text and "Considering" not in plain.reasoning
    own = Reply(saying("<think>\n", "we go on "), budget=2, message="\n\nEnough.")
    assert own.reasoning.endswith("Enough.")
    assert hand_off_ids(TOKENIZER, THINKING, "Enough.</think>")[-1] == CLOSE
    for wrong in ("</think></think>", "<think>"):
        with pytest.raises(ValueError, match="thinking_budget_message must"):
            hand_off_ids(TOKENIZER, THINKING, wrong)


def test_a_budget_leaves_room_for_an_answer() -> None:
    hand_off = list(range(24))
    assert budget_within(1024, 100_000, hand_off) == 1024
    assert budget_within(1024, 125, hand_off) == 75  # 100 but for the hand-off, 25 for the answer
    assert budget_within(1024, 26, hand_off) == 0
    with pytest.raises(
        ValueError,
        match=r"max_tokens=25 leaves no room .* takes 25 tokens, and the answer at least 1",
    ):
        budget_within(0, 25, hand_off)


@pytest.mark.published
def test_the_hand_off_is_that_of_qwens_documentation() -> None:
    tokenizer = Tokenizer(Path(os.environ["QWEN3_FILES"]) / "tokenizer.json")
    thinking = Thinking(True, True, False, 151667, 151668)
    ids = hand_off_ids(tokenizer, thinking, None)
    assert ids[:3] == [271, 82796, 279] and ids[-3:] == [624, 151668, 271] and len(ids) == 24
    assert hand_off_ids(tokenizer, thinking, "") == [198, 151668, 271]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 12),
    st.randoms(use_true_random=False),
    st.booleans(),
    st.integers(1, 60),
)
def test_tokens_can_be_taken_back(budget: int, rng: random.Random, guard: bool, count: int) -> None:
    """Forgetting tokens is as if they had never come; what was forced stays."""
    common = [OPEN, CLOSE, END, *TOKENIZER.encode("a b 你好 👍")]
    limits = ThinkingLimits(None, budget, guard)

    def fresh() -> ThinkingBudget:
        ends = frozenset([END])
        sections = SectionTracker(TOKENIZER, THINKING, end_ids=ends)
        return ThinkingBudget(TOKENIZER, THINKING, sections, limits, end_ids=ends)

    one, other = fresh(), fresh()
    for _ in range(count):
        token = rng.choice(common)
        detour = [rng.choice(common) for _ in range(rng.randint(0, 5))]
        taken = 0
        for wrong in detour:
            one.advance([wrong])
            if one.rollback:
                taken -= one.rollback - 1
                break
            taken += 1
        one.rewind(max(0, taken))
        if taken < 0:
            return  # the detour has taken back what came before it, too
        for steering in (one, other):
            steering.advance([token])
        assert (one.rollback, one.needs_mask, one.finished) == (
            other.rollback,
            other.needs_mask,
            other.finished,
        )
        forced = one.forced_tokens()
        assert forced == other.forced_tokens()
        for steering in (one, other):
            steering.advance(forced)


# --- loops --------------------------------------------------------------------------------------


def test_endless_repetition_is_noticed_and_lists_are_not() -> None:
    loops = RepetitionDetector()
    circle = list(range(100, 130))
    found = [loops.add(token) for token in [*range(50), *circle * 20]]
    assert not any(found[: 50 + 256]) and any(found)
    loops = RepetitionDetector()
    rows = [token for row in range(100) for token in (1, 2, 3, 1000 + row, 4, 5)]
    assert not any(loops.add(token) for token in rows)
    loops = RepetitionDetector()
    text = [(7919 * n) % 1000 for n in range(600)]
    assert not any(loops.add(token) for token in text * 4)  # copied thrice is no circle yet


def test_loops_forget() -> None:
    one, other = RepetitionDetector(), RepetitionDetector()
    rng = random.Random(0)
    for _ in range(2000):
        token = rng.choice([1, 2, 3])
        detour = [rng.choice([1, 2, 3]) for _ in range(rng.randint(0, 4))]
        for wrong in detour:
            one.add(wrong)
        one.rewind(len(detour))
        assert one.add(token) == other.add(token)
    assert one._last == other._last


def test_a_loop_ends_the_thinking_or_the_answer() -> None:
    reply = Reply(saying("<think>\n", "and so on "), budget=None, guard=True, most=2000)
    assert reply.steering.closed_by == "loop"
    assert reply.text and reply.steering.finished
    assert len(reply.ids) < 1000
    free = Reply(saying("<think>\n", "and so on "), budget=None, most=2000)
    assert len(free.ids) == 2000
