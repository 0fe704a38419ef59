"""Checks of networks: a random layer at each published geometry, and the demo's logits."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn

from qwen3_mlx import backend
from qwen3_mlx.api.load import load
from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.model.block import Block
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.quantization import Format
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.model.rope import Rope
from qwen3_mlx.model.sizes import DEMO, SIZES, published_config
from qwen3_mlx.verify.check import Check, Numbers

_FORMAT = Format(4, 64)
TEXT = "What is 123 + 456? Repeat: apple pear plum. Count from 3 to 9. 反转列表：一 二 三。"


def fill(module: nn.Module, numbers: Numbers) -> None:
    """Quantize a module to 4 bits and fill it with random weights; the old are never computed."""
    nn.quantize(
        module,
        class_predicate=lambda path, one: (
            hasattr(one, "to_quantized") and _FORMAT.for_module(path).as_config()
        ),
    )
    for one in module.modules():
        if hasattr(one, "bits"):
            *outer, packed = one["weight"].shape
            fmt = Format(one.bits, one.group_size)
            parts = numbers.packed(fmt, *outer, packed * 32 // fmt.bits)
            one.weight, one.scales, one.biases = parts
        elif isinstance(one, nn.RMSNorm):
            one.weight = 1 + numbers.normal(*one.weight.shape) / 8


def _layer(numbers: Numbers, size: str) -> list[mx.array]:
    """Compute a layer over two tokens, and over one more, whose projections are fused."""
    content = published_config(size)
    if "num_experts" in content:  # all of few: which are chosen depends on rounding
        content |= {"num_experts": 8}
    config = ModelConfig.from_dict(content)
    block, rope, cache = Block(config, 0), Rope(config), KVCache()
    fill(block, numbers)
    block.fuse()
    found = []
    for length in (2, 1):
        x = numbers.normal(1, length, config.hidden_size)
        found.append(block(x, None, cache, rope.for_pass()))
        mx.eval(found)
    return found


def cut_network(size: str, *, layers: int, vocabulary: int = 4096) -> Qwen3:
    """Return a random network of a published geometry, but of so few layers and tokens.

    On a GPU its weights have 4 bits, on a CPU they are floats, as `load` would hold them.
    """
    content = published_config(size) | {"num_hidden_layers": layers, "vocab_size": vocabulary}
    model = Qwen3(ModelConfig.from_dict(content))
    model.set_dtype(backend.compute_dtype())
    if backend.on_gpu():
        dtype = backend.compute_dtype()
        fill(model, Numbers(size, dtype, dtype))
    mx.eval(model.parameters())
    for layer in model.layers:
        layer.fuse()
    return model


def _demo(numbers: Numbers, *, dequantize: bool) -> list[mx.array]:
    with load(DEMO, dtype=backend.dtype_name(numbers.dtype), dequantize=dequantize) as llm:
        return [llm.logits(llm.tokenizer.encode(TEXT))]


CHECKS = [
    *(Check(f"a layer of {size}", partial(_layer, size=size), 2.0) for size in SIZES),
    Check("logits of the demo, as stored", partial(_demo, dequantize=False), 2.0),
    Check("logits of the demo, dequantized", partial(_demo, dequantize=True), 2.0),
]
