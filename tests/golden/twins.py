"""Tiny checkpoints anyone can rebuild: each weight is a function of its published name and shape.

So the golden files of `make_parity.py` need no stored weights, and the tests need no torch.
"""

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

Shapes = dict[str, tuple[int, ...]]

GAIN = 1.5  # over 1/sqrt(fan in): every block moves the residual stream about as much as it is


def weight(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Give the weight published as `name`, always the same on every machine.

    numpy promises never to change the stream of the legacy `RandomState`.
    """
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("norm.weight"):
        normal = 1 + 0.2 * normal
    elif name.endswith(".bias"):
        normal = 0.3 * normal
    elif name == "model.embed_tokens.weight":
        normal = 0.3 * normal  # small beside the blocks, or a tied twin repeats its last token
    else:
        normal = normal * (GAIN / math.sqrt(shape[-1]))  # [out, in]
    return normal.astype(np.float32)


def published_tensors(config: Mapping[str, Any]) -> Shapes:
    """Give the names and shapes a published checkpoint of `config` holds.

    `config` is the contents of a config.json, in transformers' old spelling or its new one.
    """
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    tensors: Shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        tensors[f"{layer}.input_layernorm.weight"] = (hidden,)
        tensors |= _attention(config, f"{layer}.self_attn")
        tensors[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        if _is_sparse(config, index):
            tensors |= _experts(config, f"{layer}.mlp")
        else:
            tensors |= _feed_forward(f"{layer}.mlp", hidden, config["intermediate_size"])
    tensors["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = (vocab, hidden)
    return tensors


def write_checkpoint(
    config: Mapping[str, Any],
    folder: Path,
    dtype: npt.DTypeLike = np.float32,
    shards: int = 1,
) -> None:
    """Write config.json and the weights of `config` into `folder`, in `shards` safetensors files.

    Raises:
        ValueError: there are fewer tensors than shards.
    """
    names = list(tensors := published_tensors(config))
    if not 1 <= shards <= len(names):
        raise ValueError(f"shards is {shards}; this checkpoint has {len(names)} tensors")
    folder.mkdir(parents=True, exist_ok=True)
    dtype_key = "torch_dtype" if "torch_dtype" in config else "dtype"
    _write_json(folder / "config.json", {**config, dtype_key: np.dtype(dtype).name})

    total, weight_map = 0, dict[str, str]()
    for number, part in enumerate(np.array_split(names, shards), 1):
        file = (
            f"model-{number:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        )
        arrays = {str(name): weight(name, tensors[name]).astype(dtype) for name in part}
        save_file(arrays, folder / file, metadata={"format": "pt"})
        total += sum(array.nbytes for array in arrays.values())
        weight_map |= dict.fromkeys(arrays, file)
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def old_spelling(config: Mapping[str, Any], rope_key: str = "rope_type") -> dict[str, Any]:
    """Give a config of transformers 5 as 4.51 spelt it, the way Qwen's own checkpoints do.

    `rope_key` names the kind of scaling inside `rope_scaling`: `type` in the oldest files.
    """
    old = dict(config)
    rope = dict(old.pop("rope_parameters"))
    kind = rope.pop("rope_type")
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = None if kind == "default" else {rope_key: kind, **rope}
    old.pop("layer_types", None)  # of the dense model only
    old.setdefault("max_window_layers", old["num_hidden_layers"])
    for new_name, old_name in (("dtype", "torch_dtype"), ("num_local_experts", "num_experts")):
        if new_name in old:
            old[old_name] = old.pop(new_name)
    if old.get("pad_token_id") is None:
        old.pop("pad_token_id", None)
    return dict(sorted(old.items())) | {"transformers_version": "4.51.0"}


def _attention(config: Mapping[str, Any], prefix: str) -> Shapes:
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    queries = config["num_attention_heads"] * head_dim
    keys = config["num_key_value_heads"] * head_dim
    tensors: Shapes = {
        f"{prefix}.q_proj.weight": (queries, hidden),
        f"{prefix}.k_proj.weight": (keys, hidden),
        f"{prefix}.v_proj.weight": (keys, hidden),
        f"{prefix}.o_proj.weight": (hidden, queries),
    }
    if config.get("attention_bias", False):
        tensors |= {name.replace(".weight", ".bias"): shape[:1] for name, shape in tensors.items()}
    return tensors | {f"{prefix}.{norm}.weight": (head_dim,) for norm in ("q_norm", "k_norm")}


def _is_sparse(config: Mapping[str, Any], index: int) -> bool:
    if config["model_type"] != "qwen3_moe" or index in config["mlp_only_layers"]:
        return False
    return (index + 1) % int(config["decoder_sparse_step"]) == 0


def _experts(config: Mapping[str, Any], prefix: str) -> Shapes:
    hidden = config["hidden_size"]
    count = config["num_experts"] if "num_experts" in config else config["num_local_experts"]
    tensors: Shapes = {f"{prefix}.gate.weight": (count, hidden)}
    for expert in range(count):
        inner = config["moe_intermediate_size"]
        tensors |= _feed_forward(f"{prefix}.experts.{expert}", hidden, inner)
    return tensors


def _feed_forward(prefix: str, hidden: int, inner: int) -> Shapes:
    return {
        f"{prefix}.gate_proj.weight": (inner, hidden),
        f"{prefix}.up_proj.weight": (inner, hidden),
        f"{prefix}.down_proj.weight": (hidden, inner),
    }


def _write_json(file: Path, contents: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
