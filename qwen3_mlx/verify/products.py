"""Checks of matrix products: plain, quantized in every mode, of experts, and their gradients."""

import math
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from qwen3_mlx.cache.attention import NoCache
from qwen3_mlx.model.block import Block
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.linear import times_weight
from qwen3_mlx.model.moe import swiglu
from qwen3_mlx.model.quantization import AFFINE_BITS, AFFINE_GROUP_SIZES, Format
from qwen3_mlx.model.rope import Rope
from qwen3_mlx.model.sizes import published_config
from qwen3_mlx.verify.check import Check, Numbers

_FORMATS = [
    *(Format(bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUP_SIZES),
    Format(4, 32, "mxfp4"),
    Format(8, 32, "mxfp8"),
    Format(4, 16, "nvfp4"),
]
_ROWS = (1, 2, 5, 40)  # each has a kernel of its own on some chip


def _product(numbers: Numbers) -> list[mx.array]:
    """Multiply one row, which a CPU computes as a column, and several; add an adapter's product."""
    weight, low = numbers.normal(3072, 1024), numbers.normal(16, 3072)
    products = [times_weight(numbers.normal(1, rows, 1024), weight) for rows in _ROWS]
    return [*products, mx.addmm(numbers.normal(1, 5, 3072), numbers.normal(1, 5, 16), low)]


def _quantized(numbers: Numbers, fmt: Format, outputs: int, inputs: int) -> list[mx.array]:
    """Multiply by a packed matrix, and unpack some of its rows."""
    words, scales, *biases = numbers.packed(fmt, outputs, inputs)
    bias = biases[0] if biases else None
    products = [
        mx.quantized_matmul(
            numbers.normal(1, rows, inputs), words, scales, bias, transpose=True, **fmt.as_config()
        )
        for rows in _ROWS
    ]
    unpacked = mx.dequantize(
        words[:8],
        scales[:8],
        None if bias is None else bias[:8],
        dtype=numbers.dtype,
        **fmt.as_config(),
    )
    return [*products, unpacked]


def _quantize(numbers: Numbers) -> list[mx.array]:
    """Return the mean error of each format; of one number either of two codes may be right."""
    x, errors = numbers.normal(64, 512), []
    for fmt in _FORMATS:
        unpacked = fmt.dequantize_float32(*mx.quantize(x, **fmt.as_config()))
        errors.append(mx.square(unpacked - x).mean().sqrt())
    return [mx.stack(errors)]


def _experts(numbers: Numbers, fmt: Format | None, tokens: int) -> list[mx.array]:
    """Multiply by the experts of each token; many tokens are sorted by expert."""
    x = numbers.normal(tokens, 1, 1, 512)
    chosen = numbers.integers(128, tokens, 8)
    order = mx.argsort(chosen.flatten())
    by_expert = x.reshape(tokens, 1, -1)[order // 8], chosen.flatten()[order]
    if fmt is None:
        weight = numbers.normal(128, 64, 512).swapaxes(-1, -2)
        return [
            mx.gather_mm(x, weight, rhs_indices=chosen),
            mx.gather_mm(by_expert[0], weight, rhs_indices=by_expert[1], sorted_indices=True),
        ]
    words, scales, *biases = numbers.packed(fmt, 128, 64, 512)

    def gather(x: mx.array, indices: mx.array, *, ordered: bool) -> mx.array:
        return mx.gather_qmm(
            x,
            words,
            scales,
            biases[0] if biases else None,
            rhs_indices=indices,
            transpose=True,
            sorted_indices=ordered,
            **fmt.as_config(),
        )

    return [gather(x, chosen, ordered=False), gather(*by_expert, ordered=True)]


def _hadamard(numbers: Numbers) -> list[mx.array]:
    return [mx.hadamard_transform(numbers.normal(1, 8, 3, size)) for size in (64, 128)]


def _swiglu(numbers: Numbers) -> list[mx.array]:
    return [swiglu(numbers.normal(1, rows, 3072), numbers.normal(1, rows, 3072)) for rows in (1, 7)]


def _gradients(numbers: Numbers, *, experts: bool) -> list[mx.array]:
    """Return the gradients of a small layer with respect to its input and its weights."""
    config = ModelConfig.from_dict(
        published_config("30B-A3B" if experts else "0.6B")
        | {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
        | ({"num_experts": 4, "num_experts_per_tok": 4} if experts else {})
    )
    block, rope = Block(config, 0), Rope(config)
    for module in block.modules():
        for name, old in module.items():
            if isinstance(old, mx.array):
                module[name] = numbers.normal(*old.shape) / math.sqrt(old.shape[-1])
    x = numbers.normal(1, 16, 128)

    def loss(x: mx.array) -> mx.array:
        return mx.square(block(x, None, NoCache(), rope.for_pass())).mean()

    of_weights = nn.value_and_grad(block, lambda: loss(x))()[1]
    return [mx.grad(loss)(x), of_weights["self_attn"]["k_proj"]["weight"]]


CHECKS = [
    Check("product", _product),
    *(
        Check(
            f"product, {fmt.mode} {fmt.bits} bits, groups of {fmt.group_size}",
            partial(_quantized, fmt=fmt, outputs=512, inputs=1024),
        )
        for fmt in _FORMATS
    ),
    Check(
        "product, 4 bits, of long rows",
        partial(_quantized, fmt=Format(4, 64), outputs=1024, inputs=12288),
    ),
    Check("quantizing", _quantize, 5.0),
    Check("product of experts", partial(_experts, fmt=None, tokens=20)),
    *(
        Check(
            f"product of experts, {fmt.mode} {fmt.bits} bits",
            partial(_experts, fmt=fmt, tokens=20),
        )
        for fmt in _FORMATS
        if fmt.group_size == 64 or not fmt.has_biases
    ),
    Check("Hadamard transform", _hadamard),
    Check("SwiGLU", _swiglu),
    Check("gradients of a layer", partial(_gradients, experts=False), 3.0),
    Check("gradients of a layer with experts", partial(_gradients, experts=True), 3.0),
]
