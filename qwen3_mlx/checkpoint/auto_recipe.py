"""The recipe `auto`: the format of each module by measured sensitivity, within a size in bytes."""

import math
from collections.abc import Mapping
from itertools import chain
from typing import Any

import mlx.core as mx

from qwen3_mlx.arguments import Progress
from qwen3_mlx.checkpoint.formats.matrix import Matrix
from qwen3_mlx.checkpoint.load import quantizable_shapes
from qwen3_mlx.checkpoint.recipes import Formats, assign, choose_formats, group_of
from qwen3_mlx.checkpoint.sensitivity import Moments, measure
from qwen3_mlx.checkpoint.weights import refuse_missing_layers
from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.quantization import Format
from qwen3_mlx.model.qwen3 import Qwen3

_CANDIDATES = (*(Format(bits, 64) for bits in (2, 3, 4, 5, 6, 8)), Format(4, 32), Format(5, 32))


def choose_measured_formats(
    matrices: Mapping[str, Matrix],
    config: Mapping[str, Any],
    ids: mx.array,
    *,
    target_bpw: float,
    dtype: mx.Dtype,
    progress: Progress,
) -> tuple[Formats, Moments]:
    """Return each module's format, and the moments of its inputs for GPTQ.

    The formats are chosen by their effect on the model's output on `ids` [N, L], so that all
    tensors, the unquantized ones in `dtype`, take at most `target_bpw` bits a weight.

    Raises:
        CheckpointError: the source is broken, or not finite.
        ValueError: not even the smallest formats reach `target_bpw`.
    """
    network, modules = ModelConfig.from_dict(config), quantizable_shapes(config)
    refuse_missing_layers(network, matrices)
    mx.random.seed(0)
    scores, moments = measure(network, matrices, ids, _CANDIDATES, progress)
    if not all(map(math.isfinite, chain.from_iterable(map(dict.values, scores.values())))):
        raise CheckpointError(
            "the recipe auto cannot measure weights with NaN or infinity: look for a sound copy, "
            'or take another recipe, such as recipe="mixed"'
        )
    scores = {group: by_format for group, by_format in scores.items() if by_format}
    members: dict[str, list[str]] = {}
    for path in modules:
        members.setdefault(group_of(path), []).append(path)
    # Routers are not measured. They decide which experts run, so they keep 8 bits.
    formats = choose_formats(modules, "uniform", Format(8, 64))
    shapes = {name: tuple(array.shape) for name, array in Qwen3(network).tensors().items()}
    # Bytes for the measured modules: the target less what all other tensors take.
    budget = int(target_bpw * sum(map(math.prod, shapes.values())) / 8)
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if group_of(module) not in scores or module not in modules:
            fmt = formats.get(module)
            budget -= fmt.nbytes(shape, dtype.size) if fmt else math.prod(shape) * dtype.size
    sizes = {
        group: {
            fmt: sum(fmt.nbytes(modules[path], dtype.size) for path in members[group])
            for fmt in by_format
        }
        for group, by_format in scores.items()
    }
    choice = assign(scores, sizes, budget)
    formats |= {path: fmt for group, fmt in choice.items() for path in members[group]}
    return formats, moments
