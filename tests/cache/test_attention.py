"""Every attention call is one that MLX's fused Metal kernels serve."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from qwen3_mlx import backend
from qwen3_mlx.cache.attention import attend_per_sequence, causal_attention
from qwen3_mlx.cache.quantized import CACHE_FORMATS
from qwen3_mlx.cache.ragged import ragged_layers
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.sampling_params import SamplingParams
from qwen3_mlx.engine.speculation.speculator import Speculator
from qwen3_mlx.engine.speculation.step_cost import StepCostModel
from tests.cache.harness import HEADS, model_with
from tests.support import TINY, assert_close, random_ids


def assert_fused(call: dict[str, Any]) -> None:
    """Hold a call to the limits of MLX 0.32's two fused attention kernels."""
    (_, heads, queries, size), (_, kv_heads, keys, _) = call["q"], call["k"]
    assert size == 128
    assert queries <= keys
    if queries <= 8:
        assert queries * (heads // kv_heads) <= 32, call
    assert call["mask"] == (None if queries == 1 else "causal")


@pytest.mark.heavy
@pytest.mark.parametrize("geometry", HEADS)
def test_every_call_fits_a_fused_kernel(geometry: str, calls: list[dict[str, Any]]) -> None:
    model = model_with(*HEADS[geometry])
    ids = mx.array([random_ids(80)])
    for length in (*range(1, 20), 31, 32, 33, 64):
        cache = model.make_cache()
        mx.eval(model(ids[:, :5], cache), model(ids[:, :length], cache, wanted=[length - 1]))
        assert cache[0].offset == 5 + length
    sequences = [model.make_cache() for _ in range(3)]
    for lengths in ([7, 1, 12], [1, 1, 1], [1, 3, 1]):
        layers, rows = ragged_layers(sequences, lengths, [1] * 3)
        before = len(calls)
        mx.eval(model(ids[:, : sum(lengths)], layers, rows))
        assert len(calls) - before >= 6  # one for each sequence and layer
    assert len(calls) > 100
    for call in calls:
        assert_fused(call)


@pytest.mark.parametrize("queries", range(1, 12))
@pytest.mark.parametrize("heads", HEADS.values(), ids=str)
def test_split_calls_give_what_one_call_gives(queries: int, heads: tuple[int, int]) -> None:
    mx.random.seed(queries)
    q = mx.random.normal((1, heads[0], queries, 128))
    k, v = (mx.random.normal((1, heads[1], 30, 128)) for _ in range(2))
    plain: Callable[..., mx.array] = mx.fast.scaled_dot_product_attention
    assert_close(causal_attention(q, k, v, scale=0.1), plain(q, k, v, scale=0.1, mask="causal"))


@pytest.mark.parametrize("heads", HEADS.values(), ids=str)
def test_queries_of_several_find_what_each_finds(
    heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    mx.random.seed(0)
    q = mx.random.normal((3, heads[0], 1, 128))
    seen = [
        (mx.random.normal((1, heads[1], n, 128)), mx.random.normal((1, heads[1], n, 128)))
        for n in (1, 30, 7)
    ]
    each = [causal_attention(q[i : i + 1], k, v, scale=0.1) for i, (k, v) in enumerate(seen)]
    for gpu in (False, True):
        monkeypatch.setattr(backend, "on_gpu", lambda gpu=gpu: gpu)
        assert_close(attend_per_sequence(q, seen, scale=0.1), mx.concatenate(each))


@pytest.mark.heavy
@pytest.mark.parametrize("form", ["8", "k8v4", "4"])
@pytest.mark.parametrize("geometry", HEADS)
def test_a_quantized_cache_keeps_to_its_kernels(
    geometry: str, form: str, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few queries go over the packed numbers, in rows that MLX splits; many are fused."""
    rows: list[tuple[int, bool]] = []
    original = mx.quantized_matmul

    def record(x: mx.array, w: mx.array, s: mx.array, b: mx.array, *how: Any) -> mx.array:
        rows.append((x.shape[-2], how[0]))
        return original(x, w, s, b, *how)

    monkeypatch.setattr(mx, "quantized_matmul", record)
    model = model_with(*HEADS[geometry])
    model.cache_format = CACHE_FORMATS[form]
    ids = mx.array([random_ids(40)])
    for length in (1, 2, 3, 4, 5, 8, 9, 19):
        cache = model.make_cache()
        model(ids[:, :9], cache)
        before, fused = len(rows), len(calls)
        mx.eval(model(ids[:, :length], cache))
        packed = rows[before:]
        assert len(packed) == (4 if length <= 3 else 0)  # of 2 layers: keys, then values
        assert bool(calls[fused:]) == (length > 3)
        # From 4 rows on, the kernel for values takes all tokens one after another (MLX 0.32).
        assert all(count == length for count, transpose in packed if not transpose)
    for call in calls:
        assert_fused(call)


@pytest.mark.heavy
@pytest.mark.parametrize("form", ["bf16", "8"])
@pytest.mark.parametrize("geometry", HEADS)
def test_speculation_and_kept_prefixes_need_no_other_call(
    geometry: str, form: str, calls: list[dict[str, Any]]
) -> None:
    """What is verified at once fits one call of the kernel for few queries."""
    model = model_with(*HEADS[geometry])
    model.cache_format = CACHE_FORMATS[form]
    speculator = Speculator(model.config, costs=StepCostModel(dict.fromkeys(range(1, 9), 1.0)))
    engine = Engine(
        model,
        vocabulary=TINY["vocab_size"],
        cache_format=CACHE_FORMATS[form],
        speculator=speculator,
        available=10**9,
    )
    ids = random_ids(12) * 4
    greedy = SamplingParams(temperature=0.0)
    said = list(engine.stream(ids, max_tokens=40, sampling=greedy))
    list(engine.stream([*ids, *said, *random_ids(30, seed=1)], max_tokens=3, sampling=greedy))
    list(engine.stream([*ids[:30], 5, 6], max_tokens=3, sampling=greedy))  # a copied prefix
    heads, kv_heads = HEADS[geometry]
    most = min(8, 32 * kv_heads // heads)
    widths = {call["q"][2] for call in calls}
    assert widths & set(range(2, most + 1)) or (form == "8" and most <= 3)  # verified
    for call in calls:
        assert_fused(call)
