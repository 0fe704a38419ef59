"""Several adapters in one model: each request of a batch has its own."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from qwen3_mlx import LLM, CheckpointError, load
from qwen3_mlx.engine.sampling_params import SamplingParams
from qwen3_mlx.model import adapted
from tests.adapters import (
    HIDDEN,
    RANK,
    SHAPES,
    all_linear,
    draw,
    mlx_tensors,
    pair,
    peft_tensors,
    write_mlx,
    write_peft,
)
from tests.support import MOE, assert_close, random_ids, read_weights, write_tiny

GREEDY = SamplingParams(temperature=0.0)
LENGTHS = (3, 40, 90)  # of prompts


def with_magnitudes(seed: int) -> dict[str, Any]:
    tensors = peft_tensors(all_linear(seed=seed))
    for path in all_linear():
        outputs = SHAPES[path.split(".", 3)[3]][0]
        tensors[f"{path}.lora_magnitude_vector"] = 1 + draw(outputs, seed=seed)
    return tensors


def dense(folder: Path) -> dict[str, Path]:
    """Write adapters that differ in kind, in rank, and in what they change."""
    some = {path: ab for path, ab in all_linear(seed=70).items() if "q_proj" in path}
    wide = {f"model.layers.1.{name}": pair(*shape, rank=8) for name, shape in SHAPES.items()}
    return {
        "all": write_peft(folder / "all", peft_tensors(all_linear())),
        "some": write_mlx(folder / "some", mlx_tensors(some)),
        "wide": write_peft(folder / "wide", peft_tensors(wide), r=8),
        "dora": write_peft(folder / "dora", with_magnitudes(5), use_dora=True),
    }


def of_experts(folder: Path) -> dict[str, Path]:
    """Write adapters of the experts and routers."""
    written = {}
    for seed, name in enumerate(("x", "y")):
        tensors: dict[str, Any] = {}
        for layer in (0, 1):
            block = f"model.layers.{layer}.mlp"
            tensors |= mlx_tensors({f"{block}.gate": pair(8, HIDDEN, seed=seed)})
            for place, projection in enumerate(("gate_proj", "up_proj", "down_proj")):
                path, own = f"{block}.switch_mlp.{projection}", 9 * seed + place
                tensors[f"{path}.lora_a"] = draw(8, RANK, 64, seed=own)
                tensors[f"{path}.lora_b"] = draw(8, 64, RANK, seed=own + 1)
        written[name] = write_mlx(folder / name, tensors)
    return written


@pytest.fixture(scope="module", params=["dense", "quantized", "experts"])
def several(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, Path], dict[str, Any], LLM]]:
    """A checkpoint, its adapters, and both loaded."""
    folder = tmp_path_factory.mktemp("several")
    experts = request.param == "experts"
    base = write_tiny(folder / "base", MOE if experts else None)
    adapters = (of_experts if experts else dense)(folder)
    options: dict[str, Any] = {"dtype": "float32"}
    if request.param == "quantized":
        options |= {"bits": 4, "dequantize": False}
    with load(base, adapter=adapters, **options) as llm:
        yield base, adapters, options, llm


def test_each_computes_what_it_does_alone(several: Any) -> None:
    base, adapters, options, llm = several
    ids = random_ids(9)
    assert llm.adapters == tuple(adapters)
    for name in (None, *adapters):
        with load(base, adapter=adapters.get(name), **options) as alone:
            expected = alone.logits(ids)
        own = llm.with_adapter(name)
        assert_close(own.logits(ids), expected, 2e-5)
        assert_close(own.compute(lambda model: model(mx.array([ids]))[0]), expected, 2e-5)


def reply(llm: LLM, name: str | None, ids: list[int]) -> list[bytes]:
    """Return the tokens of a greedy reply with an adapter."""
    own = llm.with_adapter(name)
    prepared = own.prepare_text(ids, max_tokens=8, sampling=GREEDY, logprobs=0)
    return [
        token.token for event in own._stream(prepared) for token in getattr(event, "tokens", ())
    ]


@pytest.mark.heavy
def test_requests_of_one_batch_get_what_each_gets_alone(
    several: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapters, _, llm = several
    jobs = [
        (name, random_ids(length, seed=length)) for length in LENGTHS for name in (None, *adapters)
    ]
    expected = []
    for job in jobs:
        llm.forget()
        expected.append(reply(llm, *job))
    assert len(set(map(tuple, expected))) > len(LENGTHS)
    llm.forget()
    mixed: list[int] = []
    rows_of = adapted._rows_of

    def note(adapters: Any, counts: Any) -> Any:
        mixed.append(len(counts))
        return rows_of(adapters, counts)

    monkeypatch.setattr(adapted, "_rows_of", note)
    with ThreadPoolExecutor(len(jobs)) as pool:
        # Submitted twice: the second time, prefixes are there for each.
        for _ in range(2):
            assert list(pool.map(lambda job: reply(llm, *job), jobs)) == expected
    assert mixed


def test_prefixes_are_of_one_adapter(several: Any) -> None:
    _, adapters, _, llm = several
    first, second, *_ = adapters
    ids = random_ids(50, seed=99)
    llm.forget()
    cached = [
        llm.with_adapter(name).score(ids, start=45).cached_tokens
        for name in (None, first, second, first, None)
    ]
    assert cached == [0, 0, 0, 44, 44]


def test_a_draft_changes_no_reply(tmp_path: Path) -> None:
    base, adapters = write_tiny(tmp_path / "base"), dense(tmp_path)
    ids = random_ids(12) * 3
    with load(base, adapter=adapters, dtype="float32") as llm:
        expected = [reply(llm, name, ids) for name in (None, *adapters)]
    with load(base, adapter=adapters, dtype="float32", draft="ngram") as llm:
        assert [reply(llm, name, ids) for name in (None, *adapters)] == expected
    with load(base, adapter=adapters["all"], dtype="float32", draft=base) as llm:
        assert reply(llm, None, ids) == expected[1]


def test_a_conversation_reads_its_next_turn_with_its_adapter(tmp_path: Path) -> None:
    base, adapters = write_tiny(tmp_path / "base"), dense(tmp_path)
    with load(base, adapter=adapters) as llm:
        talk = llm.with_adapter("all").conversation()
        talk.chat("What is 12 + 34? Think about it for a while.", max_tokens=4)
        again = talk.chat("And 56 more?", max_tokens=4)
        assert again.usage.cached_tokens > 16


def test_names_that_are_not_there_are_refused(several: Any) -> None:
    _, adapters, _, llm = several
    with pytest.raises(ValueError, match=f"no adapter 'z'; there is {next(iter(adapters))}"):
        llm.with_adapter("z")


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens", "model.norm"])
def test_what_changes_more_than_layers_cannot_be_chosen(
    name: str, tiny_folder: Path, tmp_path: Path
) -> None:
    rows = read_weights(tiny_folder)["model.embed_tokens.weight"].shape[0]
    shape = (HIDDEN,) if name == "model.norm" else (rows, HIDDEN)
    adapter = write_peft(tmp_path / "whole", {f"{name}.weight": draw(*shape)})
    with pytest.raises(CheckpointError, match=f"changes {name}.weight, so that requests cannot"):
        load(tiny_folder, adapter={"whole": adapter})
