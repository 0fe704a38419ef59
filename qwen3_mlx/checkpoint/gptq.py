"""GPTQ rounding, for recipes that measure: quantizes weights with regard to their inputs.

Checkpoints in GPTQ's format are read by `formats/gptq_words.py`.

MLX's own quantization spreads each group's codes evenly between its least and greatest weight. Here
scale and offset are fitted, and each rounding error is compensated in the weights after it, as far
as their inputs correlate (GPTQ, arXiv 2210.17323, within blocks of inputs, so that memory is
bounded). The result is stored and computed with like any other of its format.

R rows, I inputs, B inputs of a block, C = I / B blocks, g weights of a group.
"""

import mlx.core as mx
import numpy as np

from qwen3_mlx.checkpoint.formats.affine import pack
from qwen3_mlx.model.quantization import Format

_MAX_BLOCK = 192  # inputs; a layer's moments take 4 · I · B bytes
_DAMPING = 0.01  # share of the mean second moment, added to each: calibration did not see all
_SHRINKINGS = (1.0, 0.85)  # parts of a group's range, where the fit of scale and offset starts
_FIT_ROUNDS = 3


def block_size(inputs: int) -> int:
    """Return the inputs of a block: the most that divide `inputs` and hold whole groups, or all."""
    sizes = [size for size in range(64, _MAX_BLOCK + 1, 64) if inputs % size == 0]
    return max(sizes, default=inputs)


def moments(x: mx.array) -> mx.array:
    """Compute the second moments [C, B, B] of inputs x [..., I], summed over the other axes."""
    blocks = x.reshape(-1, x.shape[-1] // block_size(x.shape[-1]), block_size(x.shape[-1]))
    by_block = blocks.transpose(1, 2, 0)
    return by_block @ by_block.swapaxes(1, 2)


def fits(fmt: Format, inputs: int) -> bool:
    """Return whether weights with `inputs` inputs can be quantized to `fmt` this way."""
    return fmt.has_biases and block_size(inputs) % fmt.group_size == 0


def quantize(
    rows: mx.array, fmt: Format, inputs: mx.array, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array]:
    """Compute the packed weights, scales and biases of rows [R, I], in the layout of `mx.quantize`.

    `inputs` are the `moments` of the inputs that the rows are multiplied by.
    """
    blocks, size, _ = inputs.shape
    group, top = fmt.group_size, (1 << fmt.bits) - 1
    factors = _factors(inputs)  # [C, B, B]
    importance = mx.diagonal(inputs, axis1=1, axis2=2)
    importance = importance / mx.maximum(importance.mean(), 1e-30) + 1e-6
    rest = rows.astype(mx.float32).reshape(-1, blocks, size)  # the weights, errors compensated
    codes, scales, biases = [], [], []
    for start in range(0, size, group):
        inside = slice(start, start + group)
        part = rest[..., inside]
        scale, bias = fit(part, importance[:, inside], fmt, dtype)
        errors = []
        for place in range(group):
            factor = factors[:, start + place]  # [C, B]
            value = part[..., place]
            code = mx.clip(mx.round((value - bias) / scale), 0, top)
            error = (value - (code * scale + bias)) / factor[:, start + place]
            part = part - error[..., None] * factor[:, inside]
            codes.append(code)
            errors.append(error)
            mx.async_eval(part, code, error)
        # Waiting bounds what is held. For each column it would take a GPU longer than rounding.
        mx.eval(part)
        if start + group < size:
            spread = mx.stack(errors, axis=1).transpose(2, 0, 1)  # [C, R, g]
            rest = rest - (spread @ factors[:, inside]).transpose(1, 0, 2)
        scales.append(scale)
        biases.append(bias)
    whole = mx.stack(codes, axis=2).reshape(rows.shape)
    return (
        pack(whole.astype(mx.uint32), fmt.bits),
        mx.stack(scales, axis=2).reshape(rows.shape[0], -1).astype(dtype),
        mx.stack(biases, axis=2).reshape(rows.shape[0], -1).astype(dtype),
    )


def _factors(inputs: mx.array) -> mx.array:
    """Compute the upper Cholesky factor of each block's inverse damped moments."""
    exact, size = np.array(inputs, dtype=np.float64), inputs.shape[1]
    mean = exact.trace(axis1=1, axis2=2)[:, None, None] / size
    damped = exact + (_DAMPING * mean + 1e-12) * np.eye(size)
    factors = np.linalg.cholesky(np.linalg.inv(damped))
    return mx.array(factors.swapaxes(1, 2).astype(np.float32))


def fit(
    part: mx.array, importance: mx.array, fmt: Format, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """Compute scale and offset [R, C] of groups [R, C, g], rounded to `dtype`, in float32.

    From each of some initial ranges, two steps alternate: rounding to codes, and fitting a line to
    the codes by weighted least squares. The best pair of all rounds is returned.
    """
    top = (1 << fmt.bits) - 1
    low, high = part.min(axis=-1), part.max(axis=-1)
    total = importance.sum(axis=-1)
    best = mx.full(low.shape, mx.inf)
    best_scale, best_bias = mx.ones_like(low), low
    for shrinking in _SHRINKINGS:
        half = (high - low) / 2 * shrinking
        scale, bias = 2 * half / top, (high + low) / 2 - half
        for _ in range(_FIT_ROUNDS):
            scale = scale.astype(dtype).astype(mx.float32)
            bias = bias.astype(dtype).astype(mx.float32)
            scale = mx.where(scale == 0, 1, scale)
            code = mx.clip(mx.round((part - bias[..., None]) / scale[..., None]), 0, top)
            error = part - (code * scale[..., None] + bias[..., None])
            loss = (importance * error * error).sum(axis=-1)
            better = loss < best
            best = mx.where(better, loss, best)
            best_scale = mx.where(better, scale, best_scale)
            best_bias = mx.where(better, bias, best_bias)
            mean_code = (importance * code).sum(axis=-1) / total
            mean_part = (importance * part).sum(axis=-1) / total
            offset = code - mean_code[..., None]
            spread = (importance * offset * offset).sum(axis=-1)
            slope = (importance * offset * part).sum(axis=-1) / mx.maximum(spread, 1e-30)
            scale = mx.where(spread > 0, slope, scale)
            bias = mean_part - scale * mean_code
            mx.async_eval(best, best_scale, best_bias, scale, bias)
    return best_scale, best_bias
