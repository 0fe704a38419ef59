"""Which bits go where: what a recipe promises, and an assignment held against trying all."""

import random
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_mlx.checkpoint.load import quantizable_shapes
from qwen3_mlx.checkpoint.recipes import Formats, assign, choose_formats, group_of
from qwen3_mlx.model.quantization import Format
from tests.support import MOE, TINY

UNTIED = {**TINY, "tie_word_embeddings": False}
FORMS = [Format(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64)]
OTHERS = [Format(4, 32, "mxfp4"), Format(8, 32, "mxfp8"), Format(4, 16, "nvfp4")]


def bits_of(formats: Formats, end: str) -> set[int]:
    return {form.bits for path, form in formats.items() if path.endswith(end) and form}


@pytest.mark.parametrize("config", [TINY, UNTIED, MOE], ids=["tied", "untied", "moe"])
@pytest.mark.parametrize("recipe", ["uniform", "mixed", "mixed-rich"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_every_recipe_promises(form: Format, recipe: str, config: dict[str, Any]) -> None:
    modules = quantizable_shapes(config)
    formats = choose_formats(modules, recipe, form)
    assert formats.keys() == modules.keys()
    groups: dict[str, set[Format | None]] = {}
    for path, own in formats.items():
        assert own is not None
        assert own.bits >= form.bits
        if path.endswith("mlp.gate"):
            assert own.bits >= 8
        else:
            groups.setdefault(group_of(path), set()).add(own)
    assert all(len(forms) == 1 for forms in groups.values())
    for layer in range(config["num_hidden_layers"]):
        together = f"model.layers.{layer}.self_attn."
        assert formats[together + "q_proj"] == formats[together + "k_proj"]
        assert formats[together + "q_proj"] == formats[together + "v_proj"]
        mlp = f"model.layers.{layer}.mlp." + ("switch_mlp." if config is MOE else "")
        assert formats[mlp + "gate_proj"] == formats[mlp + "up_proj"]


def test_uniform_is_uniform() -> None:
    for form in (*FORMS, *OTHERS):
        for config in (TINY, MOE):
            formats = choose_formats(quantizable_shapes(config), "uniform", form)
            gates = {path for path in formats if path.endswith("mlp.gate")}
            assert {own for path, own in formats.items() if path not in gates} == {form}
            assert all(formats[gate] == Format(8, 64) for gate in gates)


def test_where_the_mixed_recipes_spend() -> None:
    modules = quantizable_shapes({**UNTIED, "num_hidden_layers": 3})
    mixed = choose_formats(modules, "mixed", Format(4, 64))
    rich = choose_formats(modules, "mixed-rich", Format(4, 64))
    for formats in (mixed, rich):
        for end in ("embed_tokens", "lm_head"):
            assert bits_of(formats, end) == {6}
        for layer in (0, 2):
            own = {path: form for path, form in formats.items() if f"layers.{layer}." in path}
            assert set(own.values()) == {Format(6, 64)}
    inner = {path for path in modules if ".layers.1." in path}
    assert {mixed[path] for path in inner} == {Format(4, 64)}
    richer = {path.rpartition(".")[2] for path in inner if rich[path] == Format(6, 64)}
    assert richer == {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}
    assert all(rich[path] in (Format(4, 64), Format(6, 64)) for path in inner)


@pytest.mark.parametrize("form", [Format(4, 128), Format(4, 64), Format(4, 32)])
def test_rows_that_are_no_multiple_of_the_group_stay(form: Format) -> None:
    modules = quantizable_shapes({**MOE, "moe_intermediate_size": 96, "hidden_size": 160})
    for recipe in ("uniform", "mixed", "mixed-rich"):
        formats = choose_formats(modules, recipe, form)
        for path, shape in modules.items():
            size = 64 if path.endswith("mlp.gate") else form.group_size
            assert (formats[path] is None) == (shape[-1] % size != 0)
    assert None in formats.values() or form.group_size == 32


def test_recipes_that_are_none() -> None:
    modules = quantizable_shapes(TINY)
    for recipe in ("rich", "auto", ""):
        with pytest.raises(ValueError, match="recipe must be one of uniform, mixed, mixed-rich"):
            choose_formats(modules, recipe, Format(4, 64))
    for form in OTHERS:
        with pytest.raises(ValueError, match=f"mixes bits, and {form.mode} has only one choice"):
            choose_formats(modules, "mixed", form)


# --- the best assignment under a limit ----------------------------------------------------------

CHOICES = [Format(bits, 64) for bits in (2, 3, 4, 6, 8)]
SensitivityScores = dict[str, dict[Format, float]]
Sizes = dict[str, dict[Format, int]]


def best(scores: SensitivityScores, sizes: Sizes, budget: int) -> float | None:
    """Try all assignments."""
    groups = list(scores)
    sums = [
        sum(scores[group][form] for group, form in zip(groups, forms, strict=True))
        for forms in product(*(scores[group] for group in groups))
        if sum(sizes[group][form] for group, form in zip(groups, forms, strict=True)) <= budget
    ]
    return min(sums, default=None)


def total(of: Any, choice: dict[str, Format]) -> Any:
    return sum(of[group][form] for group, form in choice.items())


@st.composite
def cases(draw: st.DrawFn) -> tuple[SensitivityScores, Sizes, int]:
    """Draw up to five groups whose scores fall with the bits, each at its own rate."""
    scores, sizes = {}, {}
    for number in range(draw(st.integers(1, 5))):
        weights = draw(st.integers(64, 6400))
        hurt = 10 ** draw(st.floats(-6, 0))
        rate = draw(st.floats(1.5, 4.5))
        scores[f"g{number}"] = {form: hurt * rate**-form.bits for form in CHOICES}
        sizes[f"g{number}"] = {form: weights * (form.bits + 1) // 8 for form in CHOICES}
    least = sum(of[CHOICES[0]] for of in sizes.values())
    most = sum(of[CHOICES[-1]] for of in sizes.values())
    return scores, sizes, draw(st.integers(least - 20, most + 20))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_against_trying_all(case: tuple[SensitivityScores, Sizes, int]) -> None:
    scores, sizes, budget = case
    least = best(scores, sizes, budget)
    if least is None:
        with pytest.raises(ValueError, match="below what the smallest formats take"):
            assign(scores, sizes, budget)
        return
    choice = assign(scores, sizes, budget)
    assert choice.keys() == scores.keys()
    assert total(sizes, choice) <= budget
    # What no price can reach is one step of one group, as the theory of the relaxation has it.
    steps = [max(of.values()) - min(of.values()) for of in scores.values()]
    assert least * (1 - 1e-9) <= total(scores, choice) <= least + max(steps) + 1e-12


def test_the_gap_to_the_best_is_mostly_none() -> None:
    gaps = []
    for seed in range(40):
        dice = random.Random(seed)
        scores: SensitivityScores = {}
        sizes: Sizes = {}
        for number in range(5):
            weights, hurt = dice.randint(1000, 9000), 10 ** dice.uniform(-3, 0)
            rate = dice.uniform(2, 4.5)
            scores[f"g{number}"] = {form: hurt * rate**-form.bits for form in CHOICES}
            sizes[f"g{number}"] = {form: weights * (form.bits + 1) // 8 for form in CHOICES}
        ends = [sum(of[form] for of in sizes.values()) for form in (CHOICES[0], CHOICES[-1])]
        budget = dice.randint(*ends)
        least = best(scores, sizes, budget)
        assert least is not None
        gaps.append(total(scores, assign(scores, sizes, budget)) / least - 1)
    gaps.sort()
    assert gaps[20] < 0.01
    assert gaps[36] < 0.25


def test_many_groups_come_close_to_the_best() -> None:
    """With many groups the gap is small: the bound by prices shows it without trying all."""
    for seed in range(2):
        dice = random.Random(seed)
        scores: SensitivityScores = {}
        sizes: Sizes = {}
        for number in range(100):
            weights, hurt = dice.randint(1000, 9000), 10 ** dice.uniform(-4, -1)
            scores[f"g{number}"] = {form: hurt * 4.0**-form.bits for form in CHOICES}
            sizes[f"g{number}"] = {form: weights * (form.bits + 1) // 8 for form in CHOICES}
        at_four = sum(of[Format(4, 64)] for of in sizes.values())
        choice = assign(scores, sizes, at_four)
        assert 0.999 * at_four <= total(sizes, choice) <= at_four
        bound = max(
            sum(
                min(scores[group][form] + price * sizes[group][form] for form in CHOICES)
                for group in scores
            )
            - price * at_four
            for price in (10 ** (exponent / 50) for exponent in range(-600, 0))
        )
        assert total(scores, choice) <= 1.02 * bound
        uniform = sum(of[Format(4, 64)] for of in scores.values())
        assert total(scores, choice) < 0.8 * uniform


def test_a_budget_met_exactly() -> None:
    scores = {"a": {CHOICES[0]: 1.0, CHOICES[4]: 0.1}, "b": {CHOICES[0]: 2.0, CHOICES[4]: 0.1}}
    sizes = {name: {CHOICES[0]: 10, CHOICES[4]: 40} for name in scores}
    assert assign(scores, sizes, 20) == {"a": CHOICES[0], "b": CHOICES[0]}
    assert assign(scores, sizes, 49) == {"a": CHOICES[0], "b": CHOICES[0]}
    assert assign(scores, sizes, 50) == {"a": CHOICES[0], "b": CHOICES[4]}
    assert assign(scores, sizes, 79) == {"a": CHOICES[0], "b": CHOICES[4]}
    assert assign(scores, sizes, 80) == {"a": CHOICES[4], "b": CHOICES[4]}
    with pytest.raises(ValueError, match="below"):
        assign(scores, sizes, 19)


def test_where_more_bits_do_harm_they_are_not_bought() -> None:
    scores = {"a": {CHOICES[0]: 0.1, CHOICES[4]: 0.2}}
    sizes = {"a": {CHOICES[0]: 10, CHOICES[4]: 40}}
    assert assign(scores, sizes, 1000) == {"a": CHOICES[0]}
