"""The quantized caches: every way to cut the work gives the same, and little is lost."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_mlx.cache.quantized import (
    CACHE_FORMATS,
    CacheFormat,
    Packing,
    QuantizedKVCache,
    cache_format,
    new_cache,
)
from qwen3_mlx.cache.ragged import ragged_layers
from qwen3_mlx.model.qwen3 import Qwen3
from tests.support import assert_close, fill, make_model, random_ids

FORMATS = {name: form for name, form in CACHE_FORMATS.items() if form.key_bits}
IDS = mx.array([random_ids(60)])
ROUNDED_ANEW = 0.02  # of logits: another order of sums may round a key or a value the other way


def unmoved(x: mx.array, offset: object) -> mx.array:
    return x


def quantized_model(form: CacheFormat) -> Qwen3:
    model = make_model()
    model.cache_format = form
    return model


MODELS = {name: quantized_model(form) for name, form in FORMATS.items()}
WHOLE = {name: model(IDS, model.make_cache()) for name, model in MODELS.items()}
mx.eval(WHOLE)


def through(x: mx.array, packing: Packing) -> mx.array:
    return packing.unpack(packing.pack(x), x.dtype)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("queries", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("heads", [(4, 4, 64), (8, 2, 128), (4, 2, 32)], ids=str)
def test_attention_is_that_over_the_dequantized(
    name: str, queries: int, heads: tuple[int, int, int]
) -> None:
    form = FORMATS[name]
    mx.random.seed(queries)
    q = mx.random.normal((1, heads[0], queries, heads[2]))
    k, v = (mx.random.normal((1, heads[1], 40, heads[2])) for _ in range(2))
    cache = new_cache(form, heads[2])
    cache.store(k[:, :, : 40 - queries], v[:, :, : 40 - queries], rope=unmoved)
    found = cache.attend(
        q, k[:, :, 40 - queries :], v[:, :, 40 - queries :], scale=0.1, rope=unmoved
    )
    keys, values = form.packings(heads[2])
    if form.rotated:
        q, k = mx.hadamard_transform(q), mx.hadamard_transform(k)
    expected = mx.fast.scaled_dot_product_attention(
        q, through(k, keys), through(v, values), scale=0.1, mask="causal"
    )
    assert_close(found, expected)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 59), max_size=6, unique=True))
def test_any_chunking_gives_the_whole(name: str, cuts: list[int]) -> None:
    model, cache = MODELS[name], MODELS[name].make_cache()
    places = [0, *sorted(cuts), 60]
    parts = [model(IDS[:, a:b], cache) for a, b in zip(places, places[1:], strict=False)]
    assert_close(mx.concatenate(parts, axis=1), WHOLE[name], ROUNDED_ANEW)


@pytest.mark.parametrize("name", FORMATS)
def test_mixed_sequences_equal_each_alone(name: str) -> None:
    model = MODELS[name]
    for starts, lengths in ([(0, 5, 30), (7, 1, 12)], [(3, 17, 40), (1, 1, 1)]):
        sequences = [fill(model, IDS[:, :start]) for start in starts]
        spans = [slice(s, s + n) for s, n in zip(starts, lengths, strict=True)]
        layers, rows = ragged_layers(sequences, lengths)
        found = model(mx.concatenate([IDS[:, span] for span in spans], axis=1), layers, rows)
        expected = mx.concatenate([WHOLE[name][:, span] for span in spans], axis=1)
        assert_close(found, expected, ROUNDED_ANEW)


@pytest.mark.parametrize("name", FORMATS)
def test_copies_and_what_forgets_go_on_from_the_same(name: str) -> None:
    model = MODELS[name]
    cache = fill(model, IDS[:, :20])
    model(mx.array([[5, 6, 7]]), cache)
    copies = [layer.copy(20) for layer in cache]
    for layer in cache:
        layer.truncate(20)
    for one in (cache, copies):
        assert_close(model(IDS[:, 20:], one), WHOLE[name][:, 20:], ROUNDED_ANEW)


def test_a_rotation_shares_the_load_of_large_channels() -> None:
    """Two channels of keys ten times larger than the others, as trained models have them."""
    mx.random.seed(0)
    q, k = mx.random.normal((1, 8, 64, 128)), mx.random.normal((1, 8, 512, 128))
    k[..., 11] *= 10
    k[..., 70] *= 10
    exact = q @ k.swapaxes(-1, -2)

    def error(q: mx.array, k: mx.array) -> float:
        wrong = np.array(q @ through(k, Packing(4, 64)).swapaxes(-1, -2) - exact)
        return float(np.sqrt((wrong**2).mean()))

    rotated = error(mx.hadamard_transform(q), mx.hadamard_transform(k))
    assert rotated <= 0.65 * error(q, k)


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_of_the_formula(name: str) -> None:
    form = FORMATS[name]
    for dtype, itemsize in ((mx.float32, 4), (mx.bfloat16, 2)):
        cache = new_cache(form, 128, 500)
        cache.store(*[mx.zeros((1, 8, 40, 128), dtype=dtype)] * 2, rope=unmoved)
        assert cache.nbytes == 500 * 8 * form.nbytes(128, itemsize)


def test_numbers_are_kept_in_the_models_dtype() -> None:
    cache = new_cache(CACHE_FORMATS["4"], 64)
    new = mx.random.normal((1, 2, 5, 64)).astype(mx.bfloat16)
    for queries in (5, 1):
        q = mx.zeros((1, 4, queries, 64), dtype=mx.bfloat16)
        out = cache.attend(q, new[:, :, :queries], new[:, :, :queries], scale=0.1, rope=unmoved)
        assert out.dtype == mx.bfloat16


def test_kv_bits_name_a_format() -> None:
    assert cache_format(None, 128) == CACHE_FORMATS["bf16"]
    assert cache_format(8, 128) == cache_format("8", 128) == CACHE_FORMATS["8"]
    assert cache_format("K8V4", 64) == CACHE_FORMATS["k8v4"]
    assert isinstance(new_cache(cache_format(4, 32), 32), QuantizedKVCache)
    for wrong in (2, "bf16", "4.0", True, 0, ""):
        with pytest.raises(ValueError, match='kv_bits must be 8, "k8v4" or 4, not'):
            cache_format(wrong, 128)
    with pytest.raises(ValueError, match="heads of a multiple of 32 numbers, not 80"):
        cache_format(8, 80)


def test_eight_bits_lose_next_to_nothing() -> None:
    plain = np.array(make_model()(IDS))
    lost = {name: float(np.abs(np.array(WHOLE[name]) - plain).mean()) for name in FORMATS}
    assert lost["8"] < 0.02 * float(np.abs(plain).mean())
    assert lost["8"] < lost["k8v4"] < lost["4"]
