"""The caches: any way to cut the work gives what one pass gives."""

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.cache.ragged import ragged_layers
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.sampling_params import SamplingParams
from tests.support import MOE, assert_close, fill, make_model, random_ids

MODELS = {"dense": make_model(), "moe": make_model(MOE)}
IDS = mx.array([random_ids(60)])
WHOLE = {name: model(IDS) for name, model in MODELS.items()}
mx.eval(WHOLE)


@pytest.mark.parametrize("kind", MODELS)
@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 59), max_size=6, unique=True), capacity=st.integers(0, 80))
def test_any_chunking_gives_the_whole(kind: str, cuts: list[int], capacity: int) -> None:
    model, cache = MODELS[kind], MODELS[kind].make_cache(capacity)
    places = [0, *sorted(cuts), 60]
    parts = [model(IDS[:, a:b], cache) for a, b in zip(places, places[1:], strict=False)]
    assert_close(mx.concatenate(parts, axis=1), WHOLE[kind])
    assert cache[0].offset == 60


@pytest.mark.parametrize("kind", MODELS)
@settings(max_examples=25, deadline=None)
@given(
    mix=st.lists(
        st.tuples(st.integers(0, 20), st.integers(1, 12), st.integers(0, 12)),
        min_size=1,
        max_size=5,
    )
)
def test_mixed_sequences_equal_each_alone(kind: str, mix: list[tuple[int, int, int]]) -> None:
    model = MODELS[kind]
    mix = [(seen, new, min(wanted, new)) for seen, new, wanted in mix]
    if not any(wanted for *_, wanted in mix):
        mix[-1] = (*mix[-1][:2], 1)
    sequences = [fill(model, IDS[:, :seen]) for seen, *_ in mix]
    lengths, wanted = [new for _, new, _ in mix], [want for *_, want in mix]
    tokens = mx.concatenate([IDS[:, seen : seen + new] for seen, new, _ in mix], axis=1)
    layers, rows = ragged_layers(sequences, lengths, wanted)
    expected = [WHOLE[kind][:, seen + new - want : seen + new] for seen, new, want in mix if want]
    assert_close(model(tokens, layers, rows), mx.concatenate(expected, axis=1))
    assert [cache[0].offset for cache in sequences] == [seen + new for seen, new, _ in mix]


def test_single_tokens_of_several_sequences() -> None:
    model = MODELS["dense"]
    starts = [3, 17, 40]
    sequences = [fill(model, IDS[:, :start]) for start in starts]
    for step in range(3):
        tokens = mx.array([[IDS[0, start + step].item() for start in starts]])
        layers, rows = ragged_layers(sequences, [1, 1, 1])
        expected = mx.stack([WHOLE["dense"][0, start + step] for start in starts])[None]
        assert_close(model(tokens, layers, rows), expected)


def test_wanted_positions_only() -> None:
    model = MODELS["dense"]
    assert_close(model(IDS, model.make_cache(), wanted=[59]), WHOLE["dense"][:, 59:])
    assert_close(model(IDS, model.make_cache(), wanted=[57, 58, 59]), WHOLE["dense"][:, 57:])


def test_what_is_beyond_is_forgotten() -> None:
    model = MODELS["dense"]
    cache = fill(model, IDS[:, :20])
    model(mx.array([[5, 6, 7]]), cache)
    for layer in cache:
        layer.truncate(20)
        layer.truncate(21)  # it has no more than 20
    assert_close(model(IDS[:, 20:], cache), WHOLE["dense"][:, 20:])


def test_growth_is_by_a_quarter_and_at_least_256() -> None:
    cache = KVCache()
    same = lambda x, offset: x  # noqa: E731
    sizes = []
    for tokens in (10, 300, 3000, 800):
        cache.store(*[mx.zeros((1, 2, tokens, 8))] * 2, rope=same)
        sizes.append(cache.nbytes // (2 * 2 * 8 * 4))
    assert sizes == [10 + 256, 310 + 256, 3310 + 827, 4110 - 4110 + 4137]


def test_known_length_is_allocated_at_once() -> None:
    cache = KVCache(capacity=500)
    assert cache.nbytes == 0
    assert not cache.state
    cache.store(*[mx.zeros((1, 2, 40, 8))] * 2, rope=lambda x, offset: x)
    assert cache.nbytes == 2 * 500 * 2 * 8 * 4
    assert [array.shape for array in cache.state] == [(1, 2, 40, 8)] * 2


@pytest.mark.heavy
def test_a_pipelined_step_never_copies_the_cache() -> None:
    model = MODELS["dense"]
    engine = Engine(model, vocabulary=1024)
    tokens = engine.stream(
        random_ids(900) * 2, max_tokens=200, sampling=SamplingParams(temperature=0.0)
    )
    for _ in range(4):
        next(tokens)
    held = 2056 * 2 * 2 * 64 * 4 * 3  # as allocated at once: the prompt and 256 more
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(100):
        next(tokens)
    assert mx.get_peak_memory() - before < held / 12  # a copy of one buffer would be a sixth
    tokens.close()  # type: ignore[attr-defined]
