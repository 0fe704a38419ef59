"""Sensitivity: how much quantizing each group of modules changes the model's output.

It is measured on text, one layer at a time. The measure is the divergence of the model's output,
KL(original ‖ quantized) a token, to second order in the change δ of the weights: ½ δᵀFδ with the
Fisher information F of the output. With labels y drawn from the model itself, F is the mean of ggᵀ
for the gradients g of log p(y), so half the mean of (g·δ)² over sequences and draws is an unbiased
estimate (Amari, "Natural Gradient Works Efficiently in Learning", 1998). The change of a weight
enters through the change of its module's output: no gradient of a weight is computed, and at most
one layer is in memory.

N sequences, L tokens each, R draws of labels, D hidden, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qwen3_mlx.arguments import Progress
from qwen3_mlx.cache.attention import NoCache
from qwen3_mlx.checkpoint.formats.matrix import Matrix
from qwen3_mlx.checkpoint.gptq import moments
from qwen3_mlx.checkpoint.layerwise import (
    batches,
    blocks_of,
    head_path,
    last_norm,
    layer_inputs,
    load_block,
    rows_of,
)
from qwen3_mlx.checkpoint.load import parent_of, quantizable
from qwen3_mlx.checkpoint.recipes import group_of
from qwen3_mlx.model.block import Block
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.linear import Linear
from qwen3_mlx.model.moe import SwitchLinear
from qwen3_mlx.model.quantization import Format
from qwen3_mlx.model.rope import Rope

SensitivityScores = dict[str, dict[Format, float]]
"""For each group of modules, the divergence in nats a token that each format causes."""
Moments = dict[str, mx.array]
"""The second moments of each module's inputs, see `gptq.moments`."""

DRAWINGS = 4


def measure(
    config: ModelConfig,
    matrices: Mapping[str, Matrix],
    ids: mx.array,
    formats: Sequence[Format],
    progress: Progress,
) -> tuple[SensitivityScores, Moments]:
    """Compute the divergence of each group of modules in each format, and all modules' moments.

    The text is ids [N, L]. `progress(done, total)` counts layers, each of them twice: once
    forwards, once backwards.
    """
    rope = Rope(config)
    layers = config.num_hidden_layers
    inputs: list[mx.array] = []
    for done, x in enumerate(layer_inputs(config, matrices, ids)):
        if done < layers:
            progress(done, 2 * layers)
        inputs.append(x)
    scores: SensitivityScores = {}
    seen: Moments = {}
    head, norm = head_path(config), last_norm(config, matrices)
    seen[head] = moments(norm(inputs[-1]))
    gradients, scores[head] = _head(matrices[f"{head}.weight"], norm, inputs.pop(), formats)
    for index in reversed(range(layers)):
        progress(2 * layers - 1 - index, 2 * layers)
        block = load_block(config, matrices, index)
        gradients, found, of_inputs = _layer(block, rope, inputs.pop(), gradients, formats)
        scores |= {f"model.layers.{index}.{group}": found[group] for group in found}
        seen |= {f"model.layers.{index}.{name}": of_inputs[name] for name in of_inputs}
    of_input = _embedding(matrices["model.embed_tokens.weight"], ids, gradients, formats)
    of_head = scores.get("model.embed_tokens", {})
    scores["model.embed_tokens"] = {
        fmt: score + of_head.get(fmt, 0.0) for fmt, score in of_input.items()
    }
    progress(2 * layers, 2 * layers)
    return scores, seen


def _quantization_error(weight: mx.array, fmt: Format) -> mx.array:
    """Compute the change of a weight by quantization: quantized less original."""
    return fmt.dequantize_float32(*mx.quantize(weight, **fmt.as_config())) - weight


def _scalar(array: mx.array) -> float:
    value = array.item()
    assert isinstance(value, float)
    return value


def _fitting(weight: mx.array, formats: Sequence[Format]) -> list[Format]:
    return [fmt for fmt in formats if fmt.fits(weight.shape)]


# --- the head and the embedding -----------------------------------------------------------------


def _head(
    matrix: Matrix, norm: nn.RMSNorm, x: mx.array, formats: Sequence[Format]
) -> tuple[mx.array, dict[Format, float]]:
    """Compute the gradients [R, N, L, D] of log p(y) for drawn labels y, and the head's scores.

    The vocabulary is read twice: for the normalisation and the draws (the greatest sum of logit and
    Gumbel noise is a draw), and for the gradients. The head's own change of the logits is known
    exactly, so half its variance is the divergence, without draws.
    """
    h = norm(x).reshape(-1, x.shape[-1])  # [N·L, D]
    greatest = mx.full((DRAWINGS, h.shape[0]), -mx.inf)
    labels = mx.zeros((DRAWINGS, h.shape[0]), dtype=mx.int32)
    total = mx.full((h.shape[0],), -mx.inf)  # log of the sum of exponentials
    for start, rows in blocks_of(matrix):
        logits = h @ rows.T
        total = mx.logaddexp(total, mx.logsumexp(logits, axis=1))
        for drawing in range(DRAWINGS):
            noisy = logits + mx.random.gumbel(logits.shape)
            best, place = noisy.max(axis=1), noisy.argmax(axis=1).astype(mx.int32) + start
            labels[drawing] = mx.where(best > greatest[drawing], place, labels[drawing])
            greatest[drawing] = mx.maximum(best, greatest[drawing])
            mx.eval(labels, greatest, total)
    mean = mx.zeros_like(h)
    moments = {fmt: [mx.zeros_like(total)] * 2 for fmt in _fitting(h, formats)}
    for _, rows in blocks_of(matrix):
        p = mx.exp(h @ rows.T - total[:, None])
        mean = mean + p @ rows
        for fmt, (first, second) in moments.items():
            change = h @ _quantization_error(rows, fmt).T
            moments[fmt] = [first + (p * change).sum(1), second + (p * change * change).sum(1)]
            mx.eval(moments[fmt])
        mx.eval(mean)
    scores = {
        fmt: 0.5 * _scalar((second - first * first).mean())
        for fmt, (first, second) in moments.items()
    }
    of_normed = rows_of(matrix, labels) - mean  # [R, N·L, D]
    parts = []
    for drawing in range(DRAWINGS):
        _, gradients = mx.vjp(norm, [x], [of_normed[drawing].reshape(x.shape)])
        mx.eval(gradients)
        parts.append(gradients[0])
    return mx.stack(parts), scores


def _embedding(
    matrix: Matrix, ids: mx.array, gradients: mx.array, formats: Sequence[Format]
) -> dict[Format, float]:
    rows = rows_of(matrix, ids)  # each row is quantized by itself
    return {
        fmt: _divergence((gradients * _quantization_error(rows, fmt)).sum((2, 3)), ids.shape[1])
        for fmt in _fitting(rows, formats)
    }


def _divergence(products: mx.array, length: int) -> float:
    """Compute the divergence a token from products g·δ [R, N] of whole sequences."""
    return 0.5 * _scalar((products * products).mean()) / length


# --- a layer ------------------------------------------------------------------------------------


class _Tap:
    """Replaces a module in a layer: records its call, and adds to its output."""

    def __init__(self, inner: nn.Module) -> None:
        self.weight: mx.array = inner["weight"]
        self.added: mx.array | None = None
        self.call: Callable[[nn.Module], mx.array] = lambda module: module(mx.zeros(()))
        self.x = self.out = mx.zeros(())
        self._inner = inner

    def __call__(self, x: mx.array, *args: Any, **options: Any) -> mx.array:
        """Run the module; record the call, or add `added` to the output if it is set."""
        out: mx.array = self._inner(x, *args, **options)
        if self.added is not None:
            return out + self.added
        self.call = lambda module: module(x, *args, **options)
        self.x, self.out = x, out
        return out

    def with_weight(self, weight: mx.array) -> nn.Module:
        """Return a module of the same kind with another weight and no bias."""
        experts = isinstance(self._inner, SwitchLinear)
        module: nn.Module = SwitchLinear(1, 1, 1) if experts else Linear(1, 1, bias=False)
        module.weight = weight
        return module


def _layer(
    block: Block, rope: Rope, x: mx.array, gradients: mx.array, formats: Sequence[Format]
) -> tuple[mx.array, dict[str, dict[Format, float]], Moments]:
    """Compute the gradients [R, N, L, D] at a layer's input, its groups' scores, and its moments.

    `gradients` [R, N, L, D] are those at its output. One sequence is differentiated at a time.
    """
    taps = _install_taps(block)
    seen: Moments = {}
    products: dict[str, dict[Format, list[mx.array]]] = defaultdict(lambda: defaultdict(list))
    carried = []
    for batch in batches(x.shape[0], x.shape[1]):
        calls, pulls = [], []
        for n in range(batch.start, min(batch.stop, x.shape[0])):
            its_gradients = gradients[:, n : n + 1]
            of_input, *of_modules = _backward(block, rope, taps, x[n : n + 1], its_gradients)
            carried.append(of_input)
            pulls.append(of_modules)
            calls.append([tap.call for tap in taps.values()])
            for name, tap in taps.items():
                seen[name] = moments(tap.x) + seen.get(name, 0)
            mx.eval(seen)
        for place, (name, tap) in enumerate(taps.items()):
            for fmt in _fitting(tap.weight, formats):
                changed = tap.with_weight(_quantization_error(tap.weight, fmt))
                of_batch = mx.stack(
                    [
                        (pull[place] * call[place](changed)).flatten(1).sum(1)  # [R]
                        for call, pull in zip(calls, pulls, strict=True)
                    ]
                )
                mx.eval(of_batch)
                products[name][fmt].append(of_batch)
    return mx.concatenate(carried, axis=1), _by_group(products, x.shape[1]), seen


def _backward(
    block: Block, rope: Rope, taps: Mapping[str, _Tap], sequence: mx.array, gradients: mx.array
) -> list[mx.array]:
    """Compute the gradients at the input [R, 1, L, D] and at each tapped output of one sequence."""

    def forward(x: mx.array, *added: mx.array) -> mx.array:
        for tap, value in zip(taps.values(), added, strict=True):
            tap.added = value
        return block(x, None, NoCache(), rope.for_pass())

    for tap in taps.values():
        tap.added = None
    mx.eval(block(sequence, None, NoCache(), rope.for_pass()))
    zeros = [mx.zeros_like(tap.out) for tap in taps.values()]
    of_drawings = [
        mx.vjp(forward, [sequence, *zeros], [gradients[drawing]])[1] for drawing in range(DRAWINGS)
    ]
    pulled = list(map(mx.stack, map(list, zip(*of_drawings, strict=True))))
    mx.eval(pulled)
    return pulled


def _by_group(
    products: Mapping[str, Mapping[Format, list[mx.array]]], length: int
) -> dict[str, dict[Format, float]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in products:
        groups[group_of(name)].append(name)
    scores: dict[str, dict[Format, float]] = {}
    for group, names in groups.items():
        shared = [fmt for fmt in products[names[0]] if all(fmt in products[n] for n in names)]
        scores[group] = {
            fmt: _divergence(
                mx.stack([mx.concatenate(products[name][fmt]) for name in names]).sum(0), length
            )
            for fmt in shared
        }
    return scores


def _install_taps(block: Block) -> dict[str, _Tap]:
    """Replace the modules to measure by taps; return the taps by module path.

    The router is left out: it keeps its bits in every recipe.
    """
    taps = {}
    for path, module in quantizable(block):
        if not path.endswith("mlp.gate"):
            owner, name = parent_of(block, path)
            owner[name] = taps[path] = _Tap(module)
    return taps
