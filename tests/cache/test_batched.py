"""Sequences that decode together in one pair of buffers find what each finds in its own."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest

from qwen3_mlx.cache.batched import BatchedCaches
from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.engine import cache_manager
from qwen3_mlx.engine.forward import BatchSlice, forward
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.model.sizes import SIZES, published_model_config
from tests.cache.harness import HEADS, model_with
from tests.engine.harness import MODELS, MOST, PROMPTS, Client, alone, engine_of, run
from tests.support import assert_close, make_model, random_ids

MODEL = make_model()
ROOM = 10**6


def begun(model: Qwen3, lengths: Sequence[int]) -> list[list[KVCache]]:
    """Give caches that have seen prompts of such lengths, and have room for 64 tokens more."""
    found = []
    for seed, length in enumerate(lengths):
        caches = model.make_cache(length + 64)
        mx.eval(model(mx.array([random_ids(length, seed=seed)]), caches))
        found.append(caches)
    return found


def step(
    model: Qwen3, together: BatchedCaches | None, caches: list[list[KVCache]], ids: Sequence[int]
) -> tuple[mx.array, bool]:
    """Run one, and say whether it was answered by joint buffers; caches grow as in the engine."""
    for layer in (layer for layers in caches for layer in layers):
        if layer.offset + 1 >= layer.capacity:
            layer.reserve(layer.offset + 65)
    joined = together.layers(caches, ROOM) if together else None
    parts = [BatchSlice(layers, 1, 1) for layers in caches]
    logits = forward(model, mx.array(list(ids), dtype=mx.int32), parts, joined).outputs
    assert logits is not None
    mx.eval(logits)
    return logits, joined is not None


@pytest.mark.parametrize("lengths", [[9, 9, 9, 9], [3, 40, 17, 1, 26]])
def test_joint_buffers_answer_as_each_sequences_own(lengths: list[int]) -> None:
    own, joint, together = begun(MODEL, lengths), begun(MODEL, lengths), BatchedCaches()
    joined = 0
    for number in range(40):
        ids = random_ids(len(lengths), seed=100 + number)
        expected, _ = step(MODEL, None, own, ids)
        found, by_slots = step(MODEL, together, joint, ids)
        assert_close(found, expected, 1e-4)
        joined += by_slots
        if number % 9 == 8:  # a constraint takes tokens back
            for caches in (own, joint):
                for layer in caches[number % len(lengths)]:
                    layer.truncate(layer.offset - 3)
        if number == 25:
            together.split()
            for one, other in zip(own, joint, strict=True):
                for a, b in zip(one, other, strict=True):
                    assert a.offset == b.offset
                    for x, y in zip(a.state, b.state, strict=True):
                        assert_close(x, y, 1e-4)
    assert joined == 32  # all but the first four after a beginning


def test_who_joins_or_leaves_parts_them_and_full_buffers_are_made_anew() -> None:
    lengths = [5, 9, 7, 8]
    caches, together = begun(MODEL, lengths), BatchedCaches()
    for _ in range(8):
        _, by_slots = step(MODEL, together, caches, [1, 2, 3, 4])
    assert by_slots and not caches[0][0]._buffers
    _, by_slots = step(MODEL, together, caches[:3], [1, 2, 3])
    assert not by_slots
    for sequence, seen in zip(caches, (14, 18, 16, 16), strict=True):
        assert {layer.offset for layer in sequence} == {seen}
        assert {layer.state[0].shape[2] for layer in sequence} == {seen}
    own = begun(MODEL, lengths)
    for _ in range(8):
        step(MODEL, None, own, [1, 2, 3, 4])
    step(MODEL, None, own[:3], [1, 2, 3])
    together = BatchedCaches()
    for number in range(100):  # beyond the 64 columns that they have room for
        found, _ = step(MODEL, together, caches, [5, 6, 7, 8])
        expected, _ = step(MODEL, None, own, [5, 6, 7, 8])
        if number % 20 == 0 or number > 40:
            assert_close(found, expected, 1e-4)


def test_few_sequences_and_little_room_are_left_alone() -> None:
    caches = begun(MODEL, [5, 9, 7, 8])
    together = BatchedCaches()
    for _ in range(9):
        assert together.layers(caches[:1], ROOM) is None
    for _ in range(9):
        assert together.layers(caches, room=4 * 73 - 1) is None
    assert together.layers(caches, room=4 * 73) is not None
    together.split()
    assert [sequence[0].offset for sequence in caches] == [5, 9, 7, 8]


def test_who_is_about_to_grow_is_left_alone() -> None:
    caches, together = begun(MODEL, [5, 9]), BatchedCaches()
    for layer in caches[0] + caches[1]:
        layer.reserve(13)  # one more than 9 tokens and the four steps before they join
    for _ in range(9):
        assert together.layers(caches, ROOM) is None
    caches[0][0].reserve(14)
    assert together.layers(caches, ROOM) is not None


def test_the_engine_puts_them_together(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []
    layers = BatchedCaches.layers

    def noted(self: BatchedCaches, *arguments: Any) -> Any:
        found = layers(self, *arguments)
        given.append(found is not None)
        return found

    monkeypatch.setattr(BatchedCaches, "layers", noted)
    engine = engine_of(MODELS["dense"])
    clients = [Client(prompt, MOST) for prompt in PROMPTS]
    run(engine, *clients)
    for client, expected in zip(clients, alone("dense"), strict=True):
        assert client.tokens == expected
    assert sum(given) > MOST / 2
    later = Client([*PROMPTS[1], *clients[1].tokens, 5], 4)
    run(engine, later)
    assert later.outcome.cached_tokens == len(PROMPTS[1]) + MOST - 1
    given.clear()
    run(engine_of(MODELS["dense"], "lookup"), *[Client(prompt, 9) for prompt in PROMPTS])
    assert not given  # proposals have rows of their own


def test_only_networks_that_wait_for_the_host_have_joint_buffers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_joint = []
    for size in SIZES:
        waits = cache_manager._waits_for_host(published_model_config(size))
        with_joint += [size] * waits
    assert with_joint == ["0.6B", "1.7B"]  # 30B-A3B is as narrow as 1.7B
    monkeypatch.setattr(BatchedCaches, "layers", lambda *_: pytest.fail("joint buffers"))
    engine = engine_of(MODELS["moe"])
    clients = [Client(prompt, 9) for prompt in PROMPTS]
    run(engine, *clients)
    assert [client.tokens for client in clients] == [tokens[:9] for tokens in alone("moe")]


@pytest.mark.parametrize("geometry", HEADS)
def test_a_mask_is_laid_out_once_a_step(
    geometry: str,
    calls: list[dict[str, Any]],
) -> None:
    model = model_with(*HEADS[geometry])
    caches, together = begun(model, [4, 6, 5, 9]), BatchedCaches()
    for _ in range(6):
        calls.clear()
        step(model, together, caches, [1, 2, 3, 4])
    heads, kv_heads = HEADS[geometry]
    assert len(calls) == 2  # one a layer
    for call in calls:
        assert call["q"] == (4, heads, 1, 128) and call["k"][:2] == (4, kv_heads)
        assert call["mask"].shape == (4, heads, 1, call["k"][2])
    assert calls[0]["mask"] is calls[1]["mask"]
