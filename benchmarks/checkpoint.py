"""A checkpoint of real size and random weights, 4-bit as mlx-lm writes it: for speed and memory.

Its tokens mean nothing, so it needs no tokenizer.
"""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.qwen3 import Qwen3

# hidden, intermediate, layers, query heads, key/value heads, tied: of the published config.json
_GEOMETRY = {
    "0.6B": (1024, 3072, 28, 16, 8, True),
    "1.7B": (2048, 6144, 28, 16, 8, True),
    "4B": (2560, 9728, 36, 32, 8, True),
    "8B": (4096, 12288, 36, 32, 8, False),
}


def published_config(size: str) -> dict[str, object]:
    """Give the config.json of a published size: 0.6B, 1.7B, 4B or 8B."""
    hidden, intermediate, layers, heads, kv_heads, tied = _GEOMETRY[size]
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "hidden_act": "silu",
        "rope_theta": 1000000,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "eos_token_id": 151645,
    }


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
