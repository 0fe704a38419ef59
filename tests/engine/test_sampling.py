"""The chain from logits to a token."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_mlx import LLM, load
from qwen3_mlx.engine.sampling import (
    Sampler,
    apply_min_p,
    apply_top_p,
    choose,
    penalise,
    top_k_logits,
)
from qwen3_mlx.engine.sampling_params import (
    DIRECT,
    NEUTRAL,
    SamplingParams,
    sampling_defaults,
    stated_sampling,
)
from tests.support import assert_close

PUBLISHED = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
LOGITS = mx.array(np.random.RandomState(0).randn(5000).astype(np.float32) * 3)


def item(scalar: mx.array) -> int:
    value = scalar.item()
    assert isinstance(value, int)
    return value


def draw_one(sampler: Sampler, logits: mx.array) -> int:
    return item(choose(logits[None], [sampler]))


def draw(count: int, logits: mx.array, **params: Any) -> Counter[int]:
    """Count what independent samplers choose."""
    chosen: Counter[int] = Counter()
    for start in range(0, count, 50):  # at once
        samplers = [
            Sampler(
                SamplingParams(**params).over(NEUTRAL),
                seed=seed,
                vocabulary=logits.size,
                prompt=[0],
            )
            for seed in range(start, min(start + 50, count))
        ]
        rows = mx.broadcast_to(logits, (len(samplers), logits.size))
        chosen.update(np.array(choose(rows, samplers)).tolist())
    return chosen


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        {"top_p": 0.9},
        {"min_p": 0.01},
        {"presence_penalty": 1.0, "logit_bias": {7: 2.0}},
    ],
)
def test_half_precision_is_widened_where_it_is_computed_with(params: dict[str, Any]) -> None:
    half = LOGITS.astype(mx.bfloat16)
    assert draw(30, half, **params) == draw(30, half.astype(mx.float32), **params)


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(61, 9000),
    padding=st.integers(0, 300),
    k=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_the_likeliest_are_those_of_a_whole_sort(
    size: int, padding: int, k: int, seed: int
) -> None:
    values = np.random.RandomState(seed).permutation(size + padding).astype(np.float32)
    best, ids = top_k_logits(mx.array(values)[None], k, size)
    expected = np.argsort(-values[:size])[:k]
    assert np.array(ids)[0].tolist() == expected.tolist()
    assert np.array(best)[0].tolist() == values[expected].tolist()


def test_no_sort_is_wider_than_one_block_of_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Qwen3's logits, with its top-k of 20: Metal sorts up to 2,048 numbers in one kernel."""
    widths: list[int] = []
    for name in ("argpartition", "argsort", "sort"):
        whole = getattr(mx, name)

        def record(x: mx.array, *rest: Any, whole: Any = whole, **options: Any) -> mx.array:
            widths.append(x.shape[-1])
            found: mx.array = whole(x, *rest, **options)
            return found

        monkeypatch.setattr(mx, name, record)
    values = np.random.RandomState(0).permutation(151_936).astype(np.float32)
    best, _ = top_k_logits(mx.array(values)[None], 20, 151_669)
    assert np.array(best)[0].tolist() == np.sort(values[:151_669])[:-21:-1].tolist()
    assert widths and max(widths) <= 2048


def reference(logits: np.ndarray, temperature: float, k: int, top_p: float, min_p: float) -> Any:
    """Give the probabilities after all filters, in the field's order, by plain numpy."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled)
    if k:
        order = order[:k]
    p = np.exp(scaled[order] - scaled[order[0]])
    p /= p.sum()
    keep = (np.cumsum(p) - p) < top_p
    order, p = order[keep], p[keep] / p[keep].sum()
    keep = p >= min_p * p[0]
    order, p = order[keep], p[keep] / p[keep].sum()
    return dict(zip(order.tolist(), p.tolist(), strict=True))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (0.6, 20, 0.95, 0.0),
        (0.7, 20, 0.8, 0.0),
        (1.0, 0, 0.5, 0.0),
        (1.5, 5, 1.0, 0.2),
        (1, 0, 1, 0.3),
    ],
)
def test_what_is_drawn_follows_the_filtered_distribution(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    expected = reference(np.array(LOGITS), temperature, top_k, top_p, min_p)
    count = 1500
    chosen = draw(count, LOGITS, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert chosen.keys() <= expected.keys()
    for token, p in expected.items():
        spread = (p * (1 - p) / count) ** 0.5
        assert abs(chosen[token] / count - p) < 5 * spread + 1e-3, token


def test_padding_is_never_chosen() -> None:
    logits = mx.concatenate([mx.zeros(100), mx.full((20,), 50.0)])
    greedy, free = SamplingParams(temperature=0.0), SamplingParams(temperature=1.0)
    for params in (greedy, free, SamplingParams(temperature=1.0, top_k=5)):
        sampler = Sampler(params.over(NEUTRAL), seed=0, vocabulary=100, prompt=[0])
        assert all(draw_one(sampler, logits) < 100 for _ in range(30))


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draw(3, LOGITS, temperature=0.0) == {item(mx.argmax(LOGITS)): 3}


def test_next_to_no_temperature_is_none() -> None:
    for temperature in (1e-5, 1e-40, 1e-310):
        assert draw(3, LOGITS, temperature=temperature) == {item(mx.argmax(LOGITS)): 3}


def test_a_seed_repeats_and_another_differs() -> None:
    def run(seed: int) -> list[int]:
        params = SamplingParams(temperature=2.0).over(NEUTRAL)
        sampler = Sampler(params, seed=seed, vocabulary=5000, prompt=[0])
        return [draw_one(sampler, LOGITS) for _ in range(20)]

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert len(set(run(1))) > 10
    run(-5), run(2**80)  # any whole number will do


def test_penalties() -> None:
    logits = mx.array([2.0, -2.0, 1.0, 0.5])
    counts, in_prompt = mx.array([2.0, 1.0, 0.0, 0.0]), mx.array([False, False, True, False])
    params = SamplingParams(
        repetition_penalty=2.0, presence_penalty=0.1, frequency_penalty=0.01
    ).over(NEUTRAL)
    expected = [2 / 2 - 0.1 - 0.02, -2 * 2 - 0.1 - 0.01, 1 / 2, 0.5]
    assert_close(penalise(logits, counts, in_prompt, params), np.array(expected))


def test_penalties_follow_the_reply() -> None:
    params = SamplingParams(temperature=0.0, presence_penalty=2.0).over(NEUTRAL)
    sampler = Sampler(params, seed=0, vocabulary=4, prompt=[3])
    logits = mx.array([3.0, 2.5, 2.0, 0.0])
    assert [draw_one(sampler, logits) for _ in range(4)] == [0, 1, 2, 0]


def test_logit_bias() -> None:
    assert draw(2, mx.zeros(50), temperature=0.0, logit_bias={7: 1.0, 8: 2.0}) == {8: 2}
    with pytest.raises(ValueError, match="logit_bias names 50; token ids are 0 to 49"):
        draw(1, mx.zeros(50), logit_bias={50: 1.0})


def test_filters_keep_at_least_the_likeliest() -> None:
    logits = mx.array([5.0, 1.0, 0.0])
    assert item((apply_top_p(logits, 1e-6) > -mx.inf).sum()) == 1
    assert item((apply_min_p(logits, 1.0) > -mx.inf).sum()) == 1


@pytest.mark.parametrize(
    ("params", "error"),
    [
        ({"temperature": -0.1}, "temperature must be from 0 to 100, not -0.1"),
        ({"top_p": 1.5}, "top_p must be from 0 to 1, not 1.5"),
        ({"top_p": 0}, "top_p must be more than 0"),
        ({"top_k": -1}, "top_k must be from 0"),
        ({"min_p": 2}, "min_p must be from 0 to 1"),
        ({"presence_penalty": 3}, "presence_penalty must be from -2 to 2"),
        ({"repetition_penalty": 0}, "repetition_penalty must be from 0.01 to 100"),
        ({"temperature": float("inf")}, "temperature must be from 0 to 100, not inf"),
        ({"temperature": float("nan")}, "temperature must be from 0 to 100, not nan"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias of 5 must be finite, not nan"),
    ],
)
def test_values_out_of_range_are_refused(params: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        SamplingParams(**params)


@pytest.mark.parametrize("params", [{"top_k": 1.5}, {"temperature": "hot"}, {"top_p": True}])
def test_values_of_another_type_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="must be a number"):
        SamplingParams(**params)


def test_defaults_follow_the_mode_on_a_hybrid_checkpoint() -> None:
    stated, _ = stated_sampling({**PUBLISHED, "repetition_penalty": 1.1, "min_p": 0.1, "x": 1})
    thinking = sampling_defaults(stated, thinking=True, hybrid=True)
    direct = sampling_defaults(stated, thinking=False, hybrid=True)
    assert (thinking.temperature, thinking.top_p, thinking.top_k) == (0.6, 0.95, 20)
    assert (direct.temperature, direct.top_p, direct.top_k) == (0.7, 0.8, 20)
    assert direct.repetition_penalty == thinking.repetition_penalty == 1.1
    assert direct.min_p == thinking.min_p == 0.1


def test_defaults_of_a_one_mode_checkpoint_are_its_own() -> None:
    own = sampling_defaults({"temperature": 0.3}, thinking=False, hybrid=False)
    assert (own.temperature, own.top_p, own.top_k, own.min_p) == (0.3, 0.8, 20, 0.0)
    published_model_config = sampling_defaults(PUBLISHED, thinking=False, hybrid=False)
    assert (
        published_model_config.temperature,
        published_model_config.top_p,
        published_model_config.top_k,
    ) == (0.6, 0.95, 20)
    assert SamplingParams(temperature=1.2).over(own).temperature == 1.2


# What a hybrid checkpoint's generation_config.json states, and how it draws without thinking.
STATED: dict[str, tuple[dict[str, Any], SamplingParams, list[str]]] = {
    "published for thinking": (PUBLISHED, DIRECT, []),
    "published for the other": ({"temperature": 0.7, "top_p": 0.8, "top_k": 20}, DIRECT, []),
    "nothing": ({}, DIRECT, []),
    "a fine-tune's": (
        {"temperature": 1.5, "top_p": 0.99, "top_k": 500},
        SamplingParams(temperature=1.5, top_p=0.99, top_k=500),
        [],
    ),
    "one beside what is no number": (
        {"temperature": 0.6, "top_p": 0.95, "top_k": 20.5},
        DIRECT,
        ["top_k must be a number, not 20.5; the default is taken"],
    ),
    "some of the published": ({"temperature": 0.6}, DIRECT, []),
    "one of them": ({"temperature": 1.5}, replace(DIRECT, temperature=1.5), []),
    "greedy": ({**PUBLISHED, "do_sample": False}, SamplingParams(temperature=0.0), []),
    "all": (
        {"temperature": 1.5, "top_p": 1.0, "top_k": -1},
        SamplingParams(temperature=1.5, top_p=1.0, top_k=0),
        ["top_k is -1, which is taken as 0"],
    ),
    "a float": (
        {"temperature": 0.6, "top_p": 0.95, "top_k": 20.0},
        DIRECT,
        ["top_k is 20.0, which is taken as 20"],
    ),
    "out of range": (
        {"temperature": "hot", "top_p": 0, "top_k": 2.5, "min_p": 7},
        DIRECT,
        [
            "temperature must be a number, not 'hot'; the default is taken",
            "top_p must be more than 0; temperature 0 takes the likeliest token; the default is",
            "top_k must be a number, not 2.5; the default is taken",
            "min_p must be from 0 to 1, not 7; the default is taken",
        ],
    ),
}


@pytest.mark.heavy
@pytest.mark.parametrize("kind", STATED)
def test_what_a_checkpoint_states_is_how_it_draws(
    kind: str, tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stated, meant, warnings = STATED[kind]
    folder = shutil.copytree(tiny_folder, tmp_path / "stated")
    (folder / "generation_config.json").write_text(json.dumps(stated))

    def draw(llm: LLM, sampling: SamplingParams | None) -> str:
        return llm.chat("Hi", thinking=False, seed=3, max_tokens=20, sampling=sampling).text

    with load(folder) as llm:
        found = draw(llm, None)
        assert found == draw(llm, meant)
        assert (found == draw(llm, DIRECT)) == (meant == DIRECT)
    said = [record.getMessage() for record in caplog.records]
    for warning, expected in zip(said, warnings, strict=True):
        assert warning.startswith(f"generation_config.json: {expected}")


def test_forced_tokens_are_counted_and_take_their_places() -> None:
    params = SamplingParams(temperature=2.0, frequency_penalty=1.0).over(NEUTRAL)
    chosen, mixed = (Sampler(params, seed=3, vocabulary=5000, prompt=[0]) for _ in range(2))
    reply = [draw_one(chosen, LOGITS) for _ in range(6)]
    assert [draw_one(mixed, LOGITS) for _ in range(2)] == reply[:2]
    mixed.force(mx.array([7, 7, 7]))
    mixed.rewind(mx.array([7, 7, 7]))
    mixed.force(mx.array(reply[2:5]))
    assert draw_one(mixed, LOGITS) == reply[5]
