"""Speculation: what is proposed, when it pays, and that it changes nothing but the passes."""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import qwen3_mlx
from qwen3_mlx.cache.sequence_caches import SequenceCaches
from qwen3_mlx.engine.sampling_params import NEUTRAL, SamplingParams
from qwen3_mlx.engine.sequence import SequenceState
from qwen3_mlx.engine.speculation.ngram import AcceptanceRates, NgramProposer
from qwen3_mlx.engine.speculation.speculator import Speculator
from qwen3_mlx.engine.speculation.step_cost import StepCostModel, chip_costs
from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.model.sizes import SIZES, published_model_config
from tests.engine.harness import (
    MODELS,
    MOST,
    PROMPTS,
    WAYS,
    Client,
    ErraticConstraint,
    ScriptedConstraint,
    alone,
    engine_of,
    expected_of_erratic,
    expected_of_scripted,
    run,
)
from tests.support import DEMO

# --- lookup -------------------------------------------------------------------------------------


def lookup_of(ids: Sequence[int]) -> NgramProposer:
    lookup = NgramProposer(ids, AcceptanceRates())
    lookup.index_new()
    return lookup


def test_what_followed_the_same_words_is_proposed() -> None:
    lookup = lookup_of([1, 2, 3, 4, 5, 9, 2, 3])
    assert (lookup.length, lookup.next) == (2, 4)
    assert lookup.propose(2) == [4, 5]
    assert lookup.propose(9) == [4, 5, 9, 2, 3, 4, 5, 9, 2]  # and so on, for ever
    assert lookup_of([7, 7, 7]).propose(4) == [7, 7, 7, 7]
    assert lookup_of([1, 2, 3, 2]).propose(3) == [3, 2, 3]  # where nothing longer is alike
    for nothing_alike in ([], [1], [1, 2], [1, 2, 3]):
        lookup = lookup_of(nothing_alike)
        assert (lookup.length, lookup.next, lookup.propose(3)) == (0, None, [])


def test_the_longest_match_counts_and_the_latest_of_equals() -> None:
    assert lookup_of([1, 2, 3, 50, 2, 3, 60, 9, 1, 2, 3]).propose(1) == [50]
    assert lookup_of([1, 2, 50, 1, 2, 60, 9, 1, 2]).propose(1) == [60]


def test_what_is_taken_back_was_never_there() -> None:
    rng = random.Random(0)
    ids: list[int] = []
    lookup = NgramProposer(ids, AcceptanceRates())
    for _ in range(300):
        if ids and rng.random() < 0.3:
            count = rng.randint(1, min(4, len(ids)))
            lookup.rewind(count)
            del ids[-count:]
            assert lookup.next is None
        ids += rng.choices(range(4), k=rng.randint(1, 3))
        lookup.index_new()
        fresh = lookup_of(list(ids))
        assert (lookup.length, lookup.propose(5)) == (fresh.length, fresh.propose(5))


def test_a_long_prompt_is_indexed_by_and_by() -> None:
    ids = [n % 5000 for n in range(10_000)]
    lookup = NgramProposer(ids, AcceptanceRates())
    for _ in range(3):
        assert lookup.next is None
        lookup.index_new()
    assert lookup.propose(2) == [0, 1]


# --- the gate -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "two", "eight"),
    [
        ("applegpu_g13g", 2.0, 6.0),  # M1: rows are not cheap
        ("applegpu_g14s", 2.0, 6.0),
        ("applegpu_g15d", 1.7, 6.1),
        ("applegpu_g16s", 1.11, 2.45),
        ("applegpu_g17g", 1.055, 2.2),
        ("x86_64", 1.1, 1.3),
        ("unknown", 1.1, 1.3),
    ],
)
def test_costs_by_chip(architecture: str, two: float, eight: float) -> None:
    costs = StepCostModel(chip_costs(architecture))
    assert costs.of(1, synchronous=True) == 1
    assert costs.of(2, synchronous=True) == pytest.approx(two)
    assert costs.of(8, synchronous=True) == pytest.approx(eight)
    assert (
        costs.of(64, synchronous=True)
        > costs.of(33, synchronous=True)
        > costs.of(8, synchronous=True)
    )  # beyond the table in proportion


def test_measured_costs_replace_the_table_and_grow_old() -> None:
    costs = StepCostModel({1: 1.0, 4: 2.0})
    costs.observe(1, 5.0, synchronous=True)  # the first of a width also sets it up
    assert not costs.measured
    for _ in range(50):
        costs.observe(1, 0.1, synchronous=True)
    assert costs.of(1, synchronous=True) == pytest.approx(0.1)
    assert costs.of(4, synchronous=True) == pytest.approx(0.2)
    for _ in range(50):
        costs.observe(4, 0.5, synchronous=True)
    costs.observe(4, 60.0, synchronous=True)  # the machine slept
    assert 0.5 < costs.of(4, synchronous=True) < 0.8
    for _ in range(600):
        costs.observe(1, 0.1, synchronous=True)
    assert costs.of(4, synchronous=True) == pytest.approx(0.2)


def running(
    speculator: Speculator, ids: Sequence[int], max_tokens: int = 1000
) -> tuple[SequenceState, NgramProposer]:
    client = Client(ids, max_tokens)
    sequence = SequenceState(client.request, 1088, 100_000, speculator.ngram_rates)
    sequence.reserve(len(ids) + 256)
    lookup = sequence.ngrams
    assert lookup
    while lookup.next is None:
        lookup.index_new()
    return sequence, lookup


COPYING = [*range(40), *range(40)]


def proposed(speculator: Speculator, sequence: SequenceState) -> int:
    return len(speculator.propose([sequence], rows=1).get(sequence, []))


def see(lookup: NgramProposer, *, right: bool) -> None:
    """Record hits, or misses, of lookup for a while."""
    assert lookup.next is not None
    for _ in range(60):
        lookup.observe(lookup.next if right else lookup.next + 1)


def test_the_gate_follows_what_comes_true_and_what_it_costs() -> None:
    speculator = Speculator(
        published_model_config("8B"), costs=StepCostModel(chip_costs("applegpu_g16s"))
    )
    sequence, lookup = running(speculator, COPYING)
    assert speculator.should_wait(sequence, rows=1)
    see(lookup, right=False)
    assert not speculator.should_wait(sequence, rows=1)
    assert proposed(speculator, sequence) == 0
    see(lookup, right=True)  # while nothing was proposed
    assert speculator.should_wait(sequence, rows=1)
    assert proposed(speculator, sequence) >= 3
    for _ in range(50):
        for rows in (1, 2, 3, 4, 6, 8):
            speculator.observe_step(
                rows, 0.01 * rows, synchronous=True
            )  # each row costs as much as a pass
    assert proposed(speculator, sequence) == 0


def test_waiting_must_pay_too() -> None:
    speculator = Speculator(
        published_model_config("8B"), costs=StepCostModel(chip_costs("applegpu_g16s"))
    )
    sequence, lookup = running(speculator, COPYING)
    see(lookup, right=True)
    for synchronous, seconds in ((False, 0.01), (True, 0.05)) * 20:
        speculator.observe_step(1, seconds, synchronous=synchronous)
    assert not speculator.should_wait(sequence, rows=1)
    assert proposed(speculator, sequence) == 0
    masked = SequenceState(
        replace(sequence.request, constraint=ScriptedConstraint()), 1088, 100_000
    )
    masked.reserve(sequence.room)
    masked.ngrams = lookup
    assert proposed(speculator, masked) > 0  # which has to wait in any case


def test_old_chips_verify_long_copies_or_none() -> None:
    speculator = Speculator(
        published_model_config("8B"), costs=StepCostModel(chip_costs("applegpu_g13g"))
    )
    sequence, lookup = running(speculator, COPYING)
    assert proposed(speculator, sequence) == 0
    see(lookup, right=True)
    assert proposed(speculator, sequence) == 31
    longer, its_lookup = running(speculator, [n % 5000 for n in range(5100)])
    assert its_lookup.length == lookup.length
    assert proposed(speculator, longer) == 0  # for many queries and keys there is no good kernel


@pytest.mark.parametrize("size", SIZES)
def test_proposals_keep_to_the_kernels_limits_and_to_what_is_left(size: str) -> None:
    config = published_model_config(size)
    group = config.num_attention_heads // config.num_key_value_heads
    speculator = Speculator(
        config, costs=StepCostModel({1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 6: 1.0, 8: 1.0})
    )
    for left in (1000, 3, 2, 1):
        sequence, _ = running(speculator, COPYING, max_tokens=left)
        count = proposed(speculator, sequence)
        assert count == min(left - 1, max(w for w in (2, 3, 4, 6, 8) if w * group <= 32) - 1)
    sequence.caches = SequenceCaches(room=len(COPYING) + 3)
    assert proposed(speculator, sequence) <= 2


# --- exactness ----------------------------------------------------------------------------------

FAST = [way for way in WAYS if way != "plain"]
SAMPLED = [
    SamplingParams(temperature=0.3, top_k=20, top_p=0.9),
    SamplingParams(temperature=0.2, presence_penalty=0.5, repetition_penalty=1.05),
    SamplingParams(temperature=0.3, frequency_penalty=0.1, logit_bias={5: 3.0}),
    SamplingParams(temperature=0.0, frequency_penalty=0.02),
]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("kind", "way"),
    [
        *(("dense", way) for way in FAST),
        ("moe", "lookup"),
        pytest.param("moe", "draft", marks=pytest.mark.slow),  # which the dense one hardly helps
    ],
)
def test_fewer_passes_give_the_same(kind: str, way: str) -> None:
    for together in (False, True):
        engine = engine_of(MODELS[kind], way)
        clients = [Client(prompt, MOST) for prompt in PROMPTS]
        for group in [clients] if together else [[client] for client in clients]:
            run(engine, *group)
        for client, expected in zip(clients, alone(kind), strict=True):
            assert client.tokens == expected
            outcome = client.outcome
            assert outcome.passes <= MOST - outcome.accepted
            assert outcome.accepted <= outcome.proposed
            if kind == "dense":  # which repeats itself
                assert outcome.passes < MOST / 2


@cache
def drawn(way: str, seed: int) -> tuple[Client, list[Any]]:
    """Return a client and the logprobs that it received."""
    logprobs: list[Any] = []
    client = Client(
        PROMPTS[seed % len(PROMPTS)],
        40,
        sampling=SAMPLED[seed % len(SAMPLED)].over(NEUTRAL),
        seed=seed,
        on_logprobs=logprobs.append,
        top_logprobs=2,
    )
    run(engine_of(MODELS["dense"], way), client)
    return client, logprobs


@pytest.mark.parametrize("way", FAST)
def test_what_is_drawn_is_the_same_with_penalties_too(way: str) -> None:
    accepted = 0
    for seed in range(4):
        (plain, expected), (client, logprobs) = drawn("plain", seed), drawn(way, seed)
        assert client.tokens == plain.tokens
        for one, other in zip(logprobs, expected, strict=True):
            assert one.token == other.token
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
        accepted += client.outcome.accepted
    assert accepted > 20


@pytest.mark.parametrize("way", FAST)
@pytest.mark.parametrize("first", [[], [8, 10]])
def test_drafts_have_lookahead_masks_and_end_at_forced_tokens(way: str, first: list[int]) -> None:
    clients = [Client(PROMPTS[i], 30, constraint=ScriptedConstraint(first)) for i in (0, 4)]
    run(engine_of(MODELS["dense"], way), *clients)
    for client, which in zip(clients, (0, 4), strict=True):
        assert client.tokens == expected_of_scripted(MODELS["dense"], PROMPTS[which], first)
        assert client.outcome.completion_tokens == 10


@pytest.mark.heavy
@pytest.mark.parametrize("way", FAST)
@pytest.mark.parametrize("kind", MODELS)
def test_erratic_constraints_are_obeyed(kind: str, way: str) -> None:
    clients = [Client(prompt, MOST, constraint=ErraticConstraint()) for prompt in PROMPTS]
    run(engine_of(MODELS[kind], way), *clients)
    for which, client in enumerate(clients):
        assert client.tokens == expected_of_erratic(kind, which)
        assert client.request.constraint.taken == client.tokens  # type: ignore[union-attr]


@pytest.mark.parametrize("way", FAST)
def test_an_end_within_a_proposal_ends_there_and_what_is_kept_is_right(way: str) -> None:
    model = MODELS["dense"]
    reply = alone("dense")[0]
    end = next(place for place in range(4, MOST) if reply[place] not in reply[:place])
    engine = engine_of(model, way)
    client = Client(PROMPTS[0], MOST, end_ids=frozenset({reply[end]}))
    run(engine, client)
    assert client.tokens == reply[:end]
    assert client.outcome.completion_tokens == end + 1
    later = Client([*PROMPTS[0], *reply[: end + 1], 5, 6], 8)
    run(engine, later)
    assert later.outcome.cached_tokens >= len(PROMPTS[0]) + end
    plain = Client(later.request.ids, 8)
    run(engine_of(model), plain)
    assert later.tokens == plain.tokens


def test_a_draft_model_that_lags_catches_up_and_a_useless_one_rests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qwen3_mlx.engine.speculation.draft_model._CHUNK", 16)
    monkeypatch.setattr(
        "qwen3_mlx.engine.speculation.ngram.NgramProposer._match", lambda self: None
    )
    helped = Client(PROMPTS[5], MOST)
    run(engine_of(MODELS["dense"], "draft"), helped)
    assert helped.tokens == alone("dense")[5]
    assert helped.outcome.accepted > MOST / 2
    useless = Client(PROMPTS[5], 150)
    engine = engine_of(MODELS["moe"], "draft")
    assert engine._core.speculator and engine._core.speculator.draft
    engine._core.speculator.draft.size = engine._core.speculator._num_weights // 2
    run(engine, useless)
    assert useless.outcome.accepted <= useless.outcome.proposed < 80
    assert useless.outcome.passes <= 150


# --- the demo -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drafting() -> Any:
    with qwen3_mlx.load(draft="ngram") as llm:
        yield llm


def test_finish_tells_what_it_came_to(drafting: qwen3_mlx.LLM) -> None:
    plain = qwen3_mlx.load()
    for thinking in (True, False):
        asked: dict[str, Any] = {"thinking": thinking, "seed": 3}
        fast = drafting.chat("Repeat: one two three four five", **asked)
        slow = plain.chat("Repeat: one two three four five", **asked)
        assert (fast.text, fast.reasoning, fast.usage) == (slow.text, slow.reasoning, slow.usage)
        counts = {name: int(fast.details[name]) for name in COUNTS}
        assert counts["accepted_tokens"] <= counts["drafted_tokens"]
        assert counts["forward_passes"] >= fast.usage.completion_tokens - counts["accepted_tokens"]
        assert not COUNTS & slow.details.keys()
    plain.close()


COUNTS = {"forward_passes", "drafted_tokens", "accepted_tokens"}


@pytest.mark.heavy
def test_a_schema_and_a_budget_are_kept(drafting: qwen3_mlx.LLM) -> None:
    plain = qwen3_mlx.load()
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
    forms: list[dict[str, Any]] = [
        {"schema": schema},
        {"thinking_budget": 12},
        {"regex": "(ab){3,9}c"},
    ]
    for seed, asked in enumerate(forms):
        options: dict[str, Any] = {"seed": seed, "max_tokens": 120, **asked}
        fast = drafting.chat("What is 12 + 34?", **options)
        slow = plain.chat("What is 12 + 34?", **options)
        assert (fast.text, fast.reasoning, fast.usage) == (slow.text, slow.reasoning, slow.usage)
    plain.close()


def test_a_draft_model_may_be_quantized_already(tiny_folder: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    qwen3_mlx.convert(tiny_folder, small, bits=4)
    with qwen3_mlx.load(tiny_folder, bits=4, draft=small) as llm:
        assert llm.chat("Hello", max_tokens=3).usage.completion_tokens == 3
    with pytest.raises(CheckpointError, match="quantized already; leave bits out"):
        qwen3_mlx.load(small, bits=4, draft=tiny_folder)


def test_another_familys_model_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"draft: .* has other tokens than .*draft='ngram'"):
        qwen3_mlx.load(tiny_folder, draft=other)
    with pytest.raises(CheckpointError, match="no folder here"):
        qwen3_mlx.load(tiny_folder, draft="nowhere")


def test_a_draft_model_is_loaded_beside_and_its_memory_counted() -> None:
    with qwen3_mlx.load(draft=DEMO) as llm, qwen3_mlx.load() as plain:
        assert llm.chat("What is 5 + 6?", seed=1).text == plain.chat("What is 5 + 6?", seed=1).text
        budgets = [one._open().engine.budget for one in (llm, plain)]
        assert budgets[0].bytes_of(1) == 2 * budgets[1].bytes_of(1)
