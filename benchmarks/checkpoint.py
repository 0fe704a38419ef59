"""Random checkpoints of real size: 4-bit as mlx-lm writes them, or bfloat16 in shards.

Their output is meaningless. They have the demo's tokenizer, so that they load like any checkpoint.
"""

import json
import shutil
from collections import defaultdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qwen3_mlx.checkpoint.weights import INDEX
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.model.sizes import published_config

_SPREAD = 0.03  # of the weights, about that of published checkpoints


def random_checkpoint(folder: Path, size: str, bits: int | None = 4) -> Path:
    """Write a random checkpoint into `folder` unless it exists; bits None means bfloat16."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = published_config(size)
    mx.random.seed(0)
    if bits:
        model = Qwen3(ModelConfig.from_dict(config))
        model.set_dtype(mx.bfloat16)
        nn.quantize(model, group_size=64, bits=bits)
        config["quantization"] = config["quantization_config"] = {"group_size": 64, "bits": bits}
        _save(folder / "model.safetensors", model.tensors())
    else:
        _write_layers(folder, config)
    shutil.copy(str(files("qwen3_mlx") / "demo" / "tokenizer.json"), folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def _write_layers(folder: Path, config: dict[str, Any]) -> None:
    """Write one file per layer, embedding, norm and head, so that no model is held in memory."""
    groups: dict[str, dict[str, list[int]]] = defaultdict(dict)
    for name, array in Qwen3(ModelConfig.from_dict(config)).tensors().items():
        before, layers, after = name.partition(".layers.")
        group = f"{before}{layers}{after.partition('.')[0]}" if layers else name
        groups[group][name] = list(array.shape)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(groups.values(), 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        _save(folder / file, {name: _random(shape) for name, shape in shapes.items()})
        weight_map |= dict.fromkeys(shapes, file)
        mx.clear_cache()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2))


def _random(shape: list[int]) -> mx.array:
    if len(shape) == 1:  # of a norm
        return mx.random.uniform(0.5, 1.5, shape, dtype=mx.bfloat16)
    return mx.random.uniform(-_SPREAD, _SPREAD, shape, dtype=mx.bfloat16)


def _save(file: Path, tensors: dict[str, mx.array]) -> None:
    mx.save_safetensors(str(file), tensors, metadata={"format": "mlx"})
