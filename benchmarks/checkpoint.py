"""A checkpoint of real size and random weights, 4-bit as mlx-lm writes it: for speed and memory.

Its tokens mean nothing, so it needs no tokenizer.
"""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.published import published_config
from qwen3_mlx.model.qwen3 import Qwen3


def random_checkpoint(folder: Path, size: str, bits: int | None = 4) -> Path:
    """Write such a checkpoint into `folder`, unless it is there; bits None keeps bfloat16."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = published_config(size)
    mx.random.seed(0)
    model = Qwen3(ModelConfig.from_dict(config))
    model.set_dtype(mx.bfloat16)
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
        config["quantization"] = config["quantization_config"] = {"group_size": 64, "bits": bits}
    weights = model.tensors()
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder
