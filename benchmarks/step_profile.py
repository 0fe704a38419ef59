"""Where the time of a decoded token goes: python -m benchmarks.step_profile [FOLDER] [CONTEXT]

Each kind of operation is computed by itself, for all layers at once, on the inputs that it has in a
step. Beside the milliseconds stands what the machine's bandwidth would take to read its weights.
The sum differs from the whole step by what operations cost between each other. FOLDER is a
checkpoint of a dense network, by default a random one of 0.6B's shape, 4-bit.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import qwen3_mlx
from qwen3_mlx import backend  # first: the BLAS

# isort: split

import mlx.core as mx
import mlx.nn as nn

from benchmarks.checkpoint import random_checkpoint
from qwen3_mlx.model.block import MLP
from qwen3_mlx.model.moe import swiglu
from qwen3_mlx.model.qwen3 import Qwen3

_REPEATS = 9
_Operation = tuple[str, int, Callable[[], list[mx.array]]]


def main() -> None:
    """Profile a checkpoint, and print a table."""
    context = int(sys.argv[2]) if len(sys.argv) > 2 else 128
    with tempfile.TemporaryDirectory() as scratch:
        folder = sys.argv[1] if len(sys.argv) > 1 else random_checkpoint(Path(scratch), "0.6B")
        with qwen3_mlx.load(folder) as llm:
            llm.compute(partial(_profile, context=context))


def _profile(model: Qwen3, context: int) -> None:
    speed = backend.memory_bandwidth()
    print(f"{backend.describe()['device']}, {speed / 1e9:.1f} GB/s, {context} tokens of context")
    print(f"{'':34}{'ms':>8}{'GB':>8}{'bound ms':>10}{'of bound':>10}")
    total = 0.0
    found = []
    for label, nbytes, operation in _operations(model, context):
        seconds = _time(operation)
        total += seconds
        found.append((label, seconds, nbytes))
    caches = model.make_cache()
    mx.eval(model(mx.zeros((1, context), dtype=mx.int32), caches, wanted=[context - 1]))
    token = mx.zeros((1, 1), dtype=mx.int32)
    whole = _time(lambda: [model(token, caches)])
    found += [
        ("sum of these", total, sum(nbytes for *_, nbytes in found)),
        ("a whole step", whole, sum(nbytes for *_, nbytes in found)),
    ]
    for label, seconds, nbytes in found:
        bound = nbytes / speed * 1e3
        share = f"{bound / seconds / 10:9.0f} %" if nbytes else ""
        print(f"{label:34}{seconds * 1e3:8.2f}{nbytes / 1e9:8.3f}{bound:10.2f}{share}", flush=True)


def _time(operation: Callable[[], list[mx.array]]) -> float:
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        mx.eval(operation())
        times.append(time.perf_counter() - started)
    return median(times[1:])


def _operations(model: Qwen3, context: int) -> Iterator[_Operation]:
    """Yield kinds of operations: label, bytes of weights, and a function that builds them all."""
    config, layers = model.config, model.layers
    hidden, dtype = config.hidden_size, model.model.norm.weight.dtype
    heads, key_heads, size = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    widths = (1, 1, hidden), (1, 1, heads * size), (1, 1, config.intermediate_size)
    shapes = (*widths, (1, heads, 1, size), (1, key_heads, 1, size))
    x, wide, inner, q, k = (mx.random.normal(shape).astype(dtype) for shape in shapes)
    rope = model.model._rope.for_pass()
    caches = model.make_cache(context + 64)
    for cache in caches:
        cache.append(*[mx.zeros((1, key_heads, context, size), dtype=dtype)] * 2)
    mx.eval(x, wide, inner, q, k, [cache.state for cache in caches])
    attentions = [layer.self_attn for layer in layers]
    mlps = [layer.mlp for layer in layers if isinstance(layer.mlp, MLP)]

    def attend() -> list[mx.array]:
        out = [c.attend_rotated(q, k, k, scale=config.attention_scale) for c in caches]
        for cache in caches:
            cache.truncate(context)
        return out

    for label, owners, names, given in (
        ("q, k, v projections", attentions, ("q_proj", "k_proj", "v_proj"), x),
        ("output projection", attentions, ("o_proj",), wide),
        ("gate, up projections", mlps, ("gate_proj", "up_proj"), x),
        ("down projection", mlps, ("down_proj",), inner),
    ):
        parts = [owner[name] for owner in owners for name in names]
        joints = [owner.fused.joint for owner in owners if owner.fused]
        modules = joints if len(names) > 1 and joints else parts
        yield label, _nbytes(modules), partial(_apply, modules, given)
    head = model.model.embed_tokens if config.tie_word_embeddings else model.lm_head
    yield "head", _nbytes([head]), lambda: [model.head(x)]
    norms = [
        (layer.input_layernorm, layer.post_attention_layernorm, layer.self_attn) for layer in layers
    ]
    yield (
        "norms",
        0,
        lambda: [y for a, b, c in norms for y in (a(x), b(x), c.q_norm(q), c.k_norm(k))],
    )
    yield "rotations", 0, lambda: [y for _ in layers for y in (rope(q, context), rope(k, context))]
    kept = sum(array.nbytes for cache in caches for array in cache.state)
    yield "cache writes and attention", kept, attend
    yield "SwiGLU, residuals", 0, lambda: [y for _ in mlps for y in (swiglu(inner, inner), x + x)]


def _apply(modules: Sequence[nn.Module], x: mx.array) -> list[mx.array]:
    return [module(x) for module in modules]


def _nbytes(modules: Sequence[nn.Module]) -> int:
    arrays = (array for module in modules for array in module.values())
    return sum(array.nbytes for array in arrays if isinstance(array, mx.array))


if __name__ == "__main__":
    main()
