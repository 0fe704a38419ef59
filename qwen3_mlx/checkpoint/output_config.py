"""The config.json of a converted checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.checkpoint.recipes import Formats
from qwen3_mlx.model.config import ModelConfig

_QUANTIZATION_KEYS = ("quantization", "quantization_config", "compression_config")


def output_config(stated: Mapping[str, Any], formats: Formats, dtype: mx.Dtype) -> dict[str, Any]:
    """Return the `stated` config with the quantization as MLX programs read it.

    Keys in the spelling of newer libraries are added in the older spelling as well, for programs
    that know only that. Defaults that were left out are written, for programs that have none or
    others.
    """
    network = ModelConfig.from_dict(stated)
    config = {key: value for key, value in stated.items() if key != "dtype"}
    values = {**asdict(network), **(asdict(network.experts) if network.experts else {})}
    for key in values.keys() - {"yarn", "experts", "output"}:
        if config.get(key) is None:
            config[key] = values[key]
    config["rope_theta"] = network.rope_theta
    config["rope_scaling"] = _rope_scaling(config, network)
    config["torch_dtype"] = backend.dtype_name(dtype)
    return with_formats(config, formats)


def with_formats(config: Mapping[str, Any], formats: Formats) -> dict[str, Any]:
    """Return a config with the quantization as MLX programs read it, in place of another."""
    kept = {key: value for key, value in config.items() if key not in _QUANTIZATION_KEYS}
    section = _quantization(formats)
    return {
        **kept,
        **(dict.fromkeys(("quantization", "quantization_config"), section) if section else {}),
    }


def _rope_scaling(config: Mapping[str, Any], network: ModelConfig) -> dict[str, Any] | None:
    """Return the scaling that is in effect, from whichever section and spelling it comes."""
    if network.yarn is None:
        return None
    stated = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    window = network.yarn.original_max_position_embeddings
    return {
        **{key: value for key, value in stated.items() if value is not None and key != "type"},
        "rope_type": "yarn",
        "original_max_position_embeddings": window,
    }


def _quantization(formats: Formats) -> dict[str, Any]:
    """Return the quantization section: the most frequent format, and the others by module."""
    used = [fmt for fmt in formats.values() if fmt]
    if not used:
        return {}
    usual = max(dict.fromkeys(used), key=used.count)
    others = {path: fmt.as_config() for path, fmt in formats.items() if fmt and fmt != usual}
    return {**usual.as_config(), **others}
