"""Compiled decoding: the tokens of plain layers, whatever is changed in the network meanwhile."""

import gc
from collections.abc import Iterator
from itertools import islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map

from qwen3_mlx.model import compiled
from qwen3_mlx.model.adapted import Delta, Selection, adapted
from qwen3_mlx.model.qwen3 import Qwen3
from tests.engine.harness import MOST, PROMPTS, Client, alone, engine_of, model_of, run
from tests.support import TINY, assert_close, make_model

IDS = mx.array([[7, 300, 12]])


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen3_mlx.model.qwen3.max_rows", lambda: 4)


def fused(model: Qwen3) -> Qwen3:
    for layer in model.layers:
        layer.fuse()
    return model


def decoded(model: Qwen3, ids: mx.array = IDS) -> mx.array:
    """Decode one token behind two others, and return its hidden states after half and all."""
    caches = model.make_cache()
    model(ids[:, :2], caches)
    states: Any = model.decode(ids[:, 2:], caches)
    return mx.concatenate([*states], axis=-1)


def plain(model: Qwen3, ids: mx.array = IDS) -> mx.array:
    caches = model.make_cache()
    model(ids[:, :2], caches)
    states: Any = model.halves(ids[:, 2:], caches)
    return mx.concatenate([*states], axis=-1)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["dense", "moe", "8"])
def test_requests_get_the_tokens_of_plain_layers(kind: str) -> None:
    for first, number in [(0, 1), (1, 2), (0, 6)]:  # six are more than are compiled
        clients = [Client(prompt, MOST) for prompt in islice(PROMPTS, first, first + number)]
        run(engine_of(model_of(kind)), *clients)
        assert [client.tokens for client in clients] == alone(kind)[first : first + number]


@pytest.mark.heavy
@pytest.mark.parametrize("bits", [None, 4])
def test_joint_matrices_are_used(bits: int | None) -> None:
    model = make_model({**TINY, "attention_bias": True})
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    expected = decoded(model)
    assert_close(decoded(fused(model)), expected)
    assert_close(plain(model), expected)


def test_what_changes_after_compiling_is_not_ignored() -> None:
    model = fused(make_model())
    seen = [decoded(model)]
    model.update(tree_map(lambda x: x * 1.1, model.parameters()))
    seen.append(decoded(model))
    assert_close(seen[-1], plain(model))
    nn.quantize(model, group_size=64, bits=8)
    seen.append(decoded(model))
    assert_close(seen[-1], plain(model))

    class Doubled(nn.Module):
        def __init__(self, linear: nn.Module) -> None:
            super().__init__()
            self.linear, self.factor = linear, mx.array(2.0)

        def __call__(self, x: mx.array) -> mx.array:
            doubled: mx.array = self.factor * self.linear(x)
            return doubled

    attention: Any = model.layers[1].self_attn
    attention.v_proj = Doubled(attention.v_proj)
    seen.append(decoded(model))
    assert_close(seen[-1], plain(model))
    for former, latter in zip(seen, seen[1:], strict=False):
        assert mx.abs(former - latter).max() > 1e-3


def test_layers_and_the_norm_may_be_replaced() -> None:
    model, other = fused(make_model()), fused(make_model(seed=9))
    other.update(tree_map(lambda x: x * 1.1, other.parameters()))
    decoded(model)
    model.layers[1] = other.layers[1]
    assert_close(decoded(model), plain(model))
    model.model.norm = other.model.norm
    assert_close(decoded(model), plain(model))
    model.layers.reverse()
    assert_close(decoded(model), plain(model))
    model.layers.pop()
    assert_close(decoded(model), plain(model))


def test_a_network_with_adapters_is_recognised_by_its_last_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It runs as it is, and to find that out before each pass must take next to no time."""
    model, is_plain, seen = make_model(), compiled._is_plain, list[nn.Module]()
    attention: Any = model.layers[-1].self_attn
    outputs, inputs = attention.q_proj.weight.shape
    delta = Delta(mx.ones((2, inputs)), mx.ones((outputs, 2)))
    attention.q_proj = adapted(attention.q_proj, [delta], Selection(0), mx.float32)

    def ask(module: nn.Module) -> bool:
        seen.append(module)
        return is_plain(module)

    monkeypatch.setattr(compiled, "_is_plain", ask)
    assert_close(decoded(model), plain(model))
    assert 0 < len(seen) <= len(model.layers[-1].modules())


@pytest.mark.usefixtures("_kept_functions")
def test_layouts_share_functions_which_keep_no_weights() -> None:
    config = {**TINY, "num_hidden_layers": 4, "intermediate_size": 192}
    mx.clear_cache()
    before = mx.get_active_memory()
    models = [fused(make_model(config, seed=seed)) for seed in (1, 2)]
    for model in models:
        assert_close(decoded(model), plain(model))
    assert len(compiled._functions) == 3  # before, between and after the attentions
    del model, models
    gc.collect()
    assert mx.get_active_memory() < before + 10_000


@pytest.fixture
def _kept_functions() -> Iterator[None]:
    kept = dict(compiled._functions)
    compiled._functions.clear()
    yield
    compiled._functions.update(kept)


@pytest.mark.usefixtures("_kept_functions")
def test_threads_that_compile_the_same_share_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function of the other would be freed with its network: see `rope._rotations`."""
    model, compile_piece, others = make_model(), compiled._compile, list[Any]()

    def overtaken(*ends: Any, single: bool) -> Any:
        if not others:  # another thread, which is here as well, and ends first
            others.append(None)
            others[0] = compiled._piece(*ends, single=single)
        return compile_piece(*ends, single=single)

    monkeypatch.setattr(compiled, "_compile", overtaken)
    own = compiled._piece(None, model.layers[0], single=True)
    assert own.function is others[0].function
