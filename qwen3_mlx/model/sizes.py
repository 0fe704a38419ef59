"""The names of models: the embedded demo, and the published sizes of Qwen3 with their geometry.

The geometry is from the config.json of each Qwen/Qwen3-SIZE on the hub. It is enough to plan memory
for a size without its files, and to create random models of its shape.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class _Geometry:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool = False
    expert_width: int = 0  # of each of 128 experts, 8 for a token; 0 for a dense network
    yarn: bool = True  # the model card has YaRN settings for contexts beyond the window


_GEOMETRIES = {
    "0.6B": _Geometry(1024, 3072, 28, 16, 8, tied=True, yarn=False),
    "1.7B": _Geometry(2048, 6144, 28, 16, 8, tied=True, yarn=False),
    "4B": _Geometry(2560, 9728, 36, 32, 8, tied=True),
    "8B": _Geometry(4096, 12288, 36, 32, 8),
    "14B": _Geometry(5120, 17408, 40, 40, 8),
    "32B": _Geometry(5120, 25600, 64, 64, 8),
    "30B-A3B": _Geometry(2048, 6144, 48, 32, 4, expert_width=768),
    "235B-A22B": _Geometry(4096, 12288, 94, 64, 4, expert_width=1536),
}
SIZES = tuple(_GEOMETRIES)
DEMO = "demo"
_BILLIONS = re.compile(r"(\d+(?:\.\d+)?)b", re.IGNORECASE)
_FARTHEST = 1 / 3  # of the size that a misspelt name states
_WINDOW = 40960  # tokens: 32,768 as trained and for output, 8,192 for the prompt
_TRAINED_WINDOW = 32768  # tokens
_YARN_LENGTHS = (65536, 131072)  # factors 2 and 4 on the trained window (model cards)


def published_config(size: str) -> dict[str, object]:
    """Return the keys of a published size's config.json that describe the network."""
    geometry = _GEOMETRIES[size]
    config: dict[str, object] = {
        "architectures": ["Qwen3MoeForCausalLM" if geometry.expert_width else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if geometry.expert_width else "qwen3",
        "vocab_size": 151936,
        "hidden_size": geometry.hidden,
        "intermediate_size": geometry.intermediate,
        "num_hidden_layers": geometry.layers,
        "num_attention_heads": geometry.heads,
        "num_key_value_heads": geometry.kv_heads,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": _WINDOW,
        "tie_word_embeddings": geometry.tied,
        "attention_bias": False,
        "hidden_act": "silu",
        "rope_theta": 1000000,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "eos_token_id": 151645,
    }
    if geometry.expert_width:
        config |= {
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": geometry.expert_width,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return config


def published_model_config(size: str) -> ModelConfig:
    """Return the config of a published size."""
    return ModelConfig.from_dict(published_config(size))


def mlx_4bit_name(size: str) -> str:
    """Return the hub name of the 4-bit MLX build of a published size."""
    return f"Qwen/Qwen3-{size}-MLX-4bit"


def size_named(name: str) -> str | None:
    """Return the published size that `name` names, in any case; None if there is no such size."""
    return next((size for size in SIZES if size.lower() == name.lower()), None)


def is_demo(name: str | Path) -> bool:
    """Return whether `name` names the embedded demo, in any case."""
    return isinstance(name, str) and name.lower() == DEMO


def demo_folder() -> Path:
    """Return the folder of the embedded demo checkpoint."""
    return Path(str(files("qwen3_mlx") / "demo"))


def hub_name(name: str | Path) -> str:
    """Return the hub name of a bare size, the demo's folder for "demo", and other names unchanged.

    A folder that is called so must be given as a Path, or with a slash: ./8B.
    """
    if is_demo(name):
        return str(demo_folder())
    size = size_named(name) if isinstance(name, str) else None
    return mlx_4bit_name(size) if size else str(name)


def folder_name(folder: Path) -> str:
    """Return a folder's path as text that cannot be mistaken for a size or the demo."""
    name = str(folder)
    return f"./{name}" if size_named(name) or is_demo(name) else name


def closest_size(name: str) -> str | None:
    """Return the size nearest to that in a wrong name such as 7B or qwen3:8b; None if none is."""
    if "/" in name or not (stated := _BILLIONS.search(name)):
        return None
    billions = float(stated[1])

    def distance(size: str) -> float:
        return abs(float(size.partition("B")[0]) - billions)

    nearest = min(SIZES, key=distance)
    return nearest if distance(nearest) <= _FARTHEST * billions else None


def yarn_lengths(config: ModelConfig) -> tuple[int, ...]:
    """Return the context lengths beyond the window for which Qwen publishes YaRN settings.

    The model is recognised by its geometry: the sizes from 4B on, with the window of their first
    release.
    """
    shape = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    shapes = {(g.hidden, g.layers, g.heads) for g in _GEOMETRIES.values() if g.yarn}
    fits = config.yarn is None and config.max_position_embeddings == _WINDOW and shape in shapes
    return _YARN_LENGTHS if fits else ()


def with_yarn(content: Mapping[str, Any], context: int) -> dict[str, Any]:
    """Return the contents of a config.json with YaRN enabled if `context` needs it.

    The factor is that of the model cards: the context over the 32,768 tokens of training.

    Raises:
        Qwen3Error: the context is beyond the window, and beyond the published YaRN lengths.
    """
    config = ModelConfig.from_dict(content)
    window, lengths = config.context_window, yarn_lengths(config)
    if context <= window:
        return dict(content)
    if not lengths or context > lengths[-1]:
        with_yarn = f", and with YaRN {lengths[-1]:,}" if lengths else ""
        raise Qwen3Error(
            f"context={context:,} is beyond this model: its window is {window:,}{with_yarn}"
        )
    yarn = {
        "rope_type": "yarn",
        "factor": context / _TRAINED_WINDOW,
        "original_max_position_embeddings": _TRAINED_WINDOW,
    }
    return {**content, "rope_scaling": yarn}
