"""Host cost of a decoded token: kernels dispatched per layer, and time to build the graph.

Only operations that become kernels on a GPU are counted: norms, matrix products, rope, slice
updates, attention and elementwise operations. Views (reshape, transpose, split, slices) are free.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models.qwen3
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache

import qwen3_mlx.model.block  # first: the BLAS
from qwen3_mlx.cache.batched import BatchedCaches
from qwen3_mlx.engine.forward import BatchSlice, forward
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.model.sizes import published_config

_KERNELS: list[tuple[Any, str]] = [
    *((mx.fast, name) for name in ("rms_norm", "rope", "scaled_dot_product_attention")),
    *((mx, name) for name in ("quantized_matmul", "addmm", "concatenate")),
    *((mx.array, f"__{name}__") for name in ("add", "mul", "sub", "matmul", "setitem")),
    (qwen3_mlx.model.block, "swiglu"),
    (mlx_lm.models.qwen3, "swiglu"),
]
_PROMPT = mx.array([[1, 2, 3]])
_FEW, _MORE = 2, 6  # layers of two models; the difference of their counts is that of 4 layers
Step = Callable[[], mx.array]


def dispatches_per_layer() -> dict[str, float]:
    """Return the kernels of one layer per decoded token on a GPU, ours and mlx-lm's."""
    with patch("qwen3_mlx.backend.on_gpu", lambda: True):
        return {
            side: (_count(make(_MORE)) - _count(make(_FEW))) / (_MORE - _FEW)
            for side, make in (("ours", our_step), ("peer", peer_step))
        }


def _least_times(steps: Mapping[str, Step], repeats: int) -> dict[str, float]:
    times: dict[str, list[float]] = {side: [] for side in steps}
    for _ in range(repeats):  # in turn, so that other load affects both
        for side, step in steps.items():
            started = time.perf_counter()
            logits = step()
            times[side].append(time.perf_counter() - started)
            mx.eval(logits)
    return {side: min(values) for side, values in times.items()}


@patch("qwen3_mlx.model.qwen3.max_rows", lambda: 32)
def build_times(layers: int = 28, repeats: int = 100) -> dict[int, dict[str, float]]:
    """Return the seconds to build a decoding step by compiled functions, by number of sequences.

    The network is as deep as 0.6B. Ours has a cache per sequence, or joint ones; mlx-lm's has a
    padded batch with one joint cache. The minimum of many runs: anything above it comes from other
    load on the machine.
    """
    ours, peer = our_model(layers), peer_model(layers)
    found = {}
    for size in (1, 2, 3, 4, 8):
        parts = [BatchSlice(ours.make_cache(4096), 1, True) for _ in range(size)]
        for part in parts:
            mx.eval(ours(_PROMPT, part.layers))
        padded: Any = make_prompt_cache(peer)
        if size > 1:
            padded = [BatchKVCache([0] * size) for _ in range(layers)]
        mx.eval(peer(mx.repeat(_PROMPT, size, axis=0), cache=padded))
        ids = mx.full((size,), 4, dtype=mx.int32)
        column = ids[:, None]
        mx.eval(ids, column)
        together = BatchedCaches()

        def step(
            parts: list[BatchSlice] = parts, ids: mx.array = ids, together: BatchedCaches = together
        ) -> mx.array:
            joined = together.layers([part.layers for part in parts], room=10**9)
            logits = forward(ours, ids, parts, joined).outputs
            assert logits is not None
            return logits

        steps: dict[str, Step] = {
            "ours": step,
            "peer": partial(peer, column, cache=padded),
        }
        found[size] = _least_times(steps, repeats)
    return found


def our_model(layers: int) -> Qwen3:
    """Create our network, narrow and quantized."""
    model = Qwen3(ModelConfig.from_dict(_small_config(layers)))
    nn.quantize(model, group_size=64, bits=4)
    for layer in model.layers:
        layer.fuse()
    return model


def peer_model(layers: int) -> mlx_lm.models.qwen3.Model:
    """Create mlx-lm's network of the same shape."""
    config = _small_config(layers)
    model = mlx_lm.models.qwen3.Model(mlx_lm.models.qwen3.ModelArgs.from_dict(config))
    nn.quantize(model, group_size=64, bits=4)
    return model


def our_step(layers: int) -> Step:
    """Return a function that builds the graph of our next decode step."""
    model = our_model(layers)
    cache = model.make_cache(4096)
    return _warmed(lambda ids: model(ids, cache))


def peer_step(layers: int) -> Step:
    """Return a function that builds the graph of mlx-lm's next decode step."""
    model = peer_model(layers)
    cache = make_prompt_cache(model)
    return _warmed(lambda ids: model(ids, cache=cache))


def _warmed(call: Callable[[mx.array], mx.array]) -> Step:
    mx.eval(call(_PROMPT))
    token = mx.array([[4]])
    mx.eval(call(token))
    return lambda: call(token)


def _small_config(layers: int) -> dict[str, Any]:
    """Return a config with 0.6B's heads on a narrow network: same host work, less computation."""
    narrow = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 256}
    return {**published_config("0.6B"), **narrow, "num_hidden_layers": layers}


def _count(step: Step) -> int:
    with _counting() as seen:
        step()
    return len(seen)


@contextmanager
def _counting() -> Iterator[list[str]]:
    seen: list[str] = []
    originals = [getattr(place, name) for place, name in _KERNELS]
    for (place, name), original in zip(_KERNELS, originals, strict=True):
        setattr(place, name, _noting(name, original, seen))
    try:
        yield seen
    finally:
        for (place, name), original in zip(_KERNELS, originals, strict=True):
            setattr(place, name, original)


def _noting(name: str, original: Callable[..., Any], seen: list[str]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        return original(*args, **kwargs)

    return call
