"""Adapters for the tests: written as PEFT and mlx-lm write them, and merged by hand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from tests.support import read_weights, write_safetensors

Arrays = dict[str, NDArray[np.float32]]
RANK, SCALE = 4, 2.0
HIDDEN, WIDTH, QUERIES, KEYS = 64, 128, 256, 128  # of the tiny checkpoint
SHAPES = {  # [O, D]
    "self_attn.q_proj": (QUERIES, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, QUERIES),
    "mlp.gate_proj": (WIDTH, HIDDEN),
    "mlp.up_proj": (WIDTH, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDTH),
}


def draw(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Draw numbers about as large as a trained adapter's."""
    return np.random.RandomState(seed).normal(0, 0.1, shape).astype(np.float32)


def pair(outputs: int, inputs: int, seed: int = 0, rank: int = RANK) -> tuple[Any, Any]:
    """Draw A [r, D] and B [O, r]."""
    return draw(rank, inputs, seed=seed), draw(outputs, rank, seed=seed + 1)


def all_linear(seed: int = 0, layers: int = 2) -> dict[str, tuple[Any, Any]]:
    """Draw a pair for each linear layer of the tiny checkpoint, by module path."""
    paths = [f"model.layers.{layer}.{name}" for layer in range(layers) for name in SHAPES]
    return {
        path: pair(*SHAPES[path.split(".", 3)[3]], seed=seed + 2 * place)
        for place, path in enumerate(paths)
    }


def write_peft(folder: Path, tensors: Mapping[str, Any], **config: Any) -> Path:
    """Write an adapter of PEFT's; the names are those behind `base_model.model.`."""
    return write_adapter(
        folder,
        "adapter_model.safetensors",
        {f"base_model.model.{name}": value for name, value in tensors.items()},
        {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK * SCALE, "bias": "none", **config},
    )


def write_mlx(folder: Path, tensors: Mapping[str, Any], **config: Any) -> Path:
    """Write an adapter of mlx-lm's."""
    parameters = {"rank": RANK, "scale": SCALE, "dropout": 0.0}
    stated = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, **config}
    return write_adapter(folder, "adapters.safetensors", tensors, stated)


def write_adapter(
    folder: Path, file: str, tensors: Mapping[str, Any], config: Mapping[str, Any]
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / file, {name: ("F32", value) for name, value in tensors.items()})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def peft_tensors(pairs: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """Give pairs the names that PEFT has for them."""
    tensors: dict[str, Any] = {}
    for path, (a, b) in pairs.items():
        tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    return tensors


def mlx_tensors(pairs: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """Give pairs the names and the order that mlx-lm has for them."""
    tensors: dict[str, Any] = {}
    for path, (a, b) in pairs.items():
        tensors |= {f"{path}.lora_a": a.T, f"{path}.lora_b": b.T}
    return tensors


def deltas_of(pairs: Mapping[str, tuple[Any, Any]], scale: float = SCALE) -> Arrays:
    """Multiply pairs; give the changes by tensor name."""
    return {f"{path}.weight": scale * (b @ a) for path, (a, b) in pairs.items()}


def write_merged(
    base: Path, folder: Path, changed: Mapping[str, Any], *, tie: bool | None = None
) -> Path:
    """Write a checkpoint with some of its tensors replaced, perhaps with a head of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    weights = read_weights(base) | {name: mx.array(value) for name, value in changed.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    if tie is not None:
        config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": tie}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def weights_of(base: Path) -> Arrays:
    """Read a checkpoint's tensors as numbers."""
    return {name: np.array(value.astype(mx.float32)) for name, value in read_weights(base).items()}


def merged(base: Path, deltas: Mapping[str, Any]) -> Arrays:
    """Add changes to the tensors of a checkpoint; give the changed ones."""
    weights = weights_of(base)
    return {name: weights[name] + delta for name, delta in deltas.items()}
