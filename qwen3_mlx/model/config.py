"""What a checkpoint's config.json says of the network: read and checked.

Both spellings are read: the published one (transformers 4) and the one transformers 5 writes. A key
that is missing or null has the default of transformers' Qwen3Config and Qwen3MoeConfig (5.24); only
the sizes that make the network have none.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen3_mlx.errors import CheckpointError

MODEL_TYPES = ("qwen3", "qwen3_moe")
_MOST_LAYERS = 10_000  # more are a mistake, and would take long to find out
_LARGEST = 1 << 31  # no size of a network comes near; MLX counts in 32 bits
_THETA = 10_000.0
_WINDOW = 32_768
_FULL_BELOW = 28  # layers, where a sliding window begins above `max_window_layers`
# The keys of rope_scaling and rope_parameters that are read, by rope_type.
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_YARN_KEYS = _ROPE_KEYS | {
    *("factor", "original_max_position_embeddings", "attention_factor", "attn_factor"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}


@dataclass(frozen=True, slots=True)
class Yarn:
    """Rotary embeddings stretched beyond the trained window (YaRN, arXiv 2309.00071)."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class Experts:
    """The sizes of a mixture-of-experts feed-forward block, and which layers have one."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...]

    def in_layer(self, index: int) -> bool:
        """Say whether layer `index`, counted from 0, routes to experts."""
        every = self.decoder_sparse_step
        return index not in self.mlp_only_layers and (index + 1) % every == 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The geometry of a Qwen3 network, under the published names."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    rope_theta: float
    yarn: Yarn | None = None
    experts: Experts | None = None

    @property
    def attention_scale(self) -> float:
        """The factor on q·k. YaRN scales q and k alike, so its factor enters squared."""
        stretch = self.yarn.attention_factor if self.yarn else 1.0
        return stretch**2 / math.sqrt(self.head_dim)

    @property
    def context_window(self) -> int:
        """The most tokens of prompt and reply together.

        Who adds YaRN to a config.json often leaves `max_position_embeddings` as it was.
        """
        if self.yarn is None:
            return self.max_position_embeddings
        with_yarn = int(self.yarn.factor * self.yarn.original_max_position_embeddings)
        return max(self.max_position_embeddings, with_yarn)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read the contents of a config.json.

        Raises:
            CheckpointError: it is not a Qwen3 network, lacks a key, or asks for what this
                package does not do; the message names the key.
        """
        read = _Reader(config)
        model_type = config.get("model_type")
        if model_type not in MODEL_TYPES:
            raise CheckpointError(
                f"config.json: model_type is {model_type!r}; this package runs "
                f"{' and '.join(MODEL_TYPES)}"
            )
        _refuse_unsupported(config)
        heads = read.count("num_attention_heads")
        kv_heads = read.count("num_key_value_heads", default=_missing_kv_heads(config, heads))
        if heads % kv_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads ({heads}) is not a multiple of "
                f"num_key_value_heads ({kv_heads})"
            )
        hidden = read.count("hidden_size")
        # Where it is missing, transformers has a number for dense networks, and a share for others.
        share = 128 if model_type == "qwen3" else hidden // heads
        head_dim = read.count("head_dim", default=share)
        if head_dim % 2:
            raise CheckpointError(f"config.json: head_dim ({head_dim}) is odd")
        theta, yarn = _read_rope(config)
        return cls(
            model_type=model_type,
            vocab_size=read.count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.count("intermediate_size"),
            num_hidden_layers=read.count("num_hidden_layers", most=_MOST_LAYERS),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=read.number("rms_norm_eps", default=1e-6),
            max_position_embeddings=read.count("max_position_embeddings", default=_WINDOW),
            tie_word_embeddings=read.flag("tie_word_embeddings"),
            attention_bias=read.flag("attention_bias"),
            rope_theta=theta,
            yarn=yarn,
            experts=_read_experts(read) if model_type == "qwen3_moe" else None,
        )


class _Reader:
    """Typed access to a config that names the key in every complaint."""

    def __init__(self, config: Mapping[str, Any], where: str = "config.json") -> None:
        self.config = config
        self.where = where

    def get(self, *names: str, default: Any = None) -> Any:
        for name in names:
            if self.config.get(name) is not None:
                return self.config[name]
        if default is None:
            raise CheckpointError(f"{self.where}: {' or '.join(names)} is missing")
        return default

    def count(self, *names: str, most: int = _LARGEST, default: int | None = None) -> int:
        value = self.get(*names, default=default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
            raise CheckpointError(
                f"{self.where}: {names[0]} is {_shown(value)}, not a positive integer within reason"
            )
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default=default)
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not 0 < value < _LARGEST
        ):
            raise CheckpointError(
                f"{self.where}: {name} is {_shown(value)}, not a positive number within reason"
            )
        return float(value)

    def flag(self, name: str, *, default: bool = False) -> bool:
        value = self.get(name, default=default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {name} is {_shown(value)}, not true or false")
        return value

    def items(self, name: str) -> list[Any]:
        value = self.get(name, default=[])
        if not isinstance(value, list):
            raise CheckpointError(f"{self.where}: {name} is {_shown(value)}, not a list")
        return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _missing_kv_heads(config: Mapping[str, Any], heads: int) -> int:
    """Return transformers' number where none is stated; null means as many as there are heads."""
    if config.get("model_type") == "qwen3_moe":
        return 4
    return heads if "num_key_value_heads" in config else 32


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    if (act := config.get("hidden_act")) not in (None, "silu"):
        raise CheckpointError(f"config.json: hidden_act is {act!r}; Qwen3 uses silu")
    if config.get("layer_types") is not None:
        kinds = _Reader(config).items("layer_types")
        if other := sorted({_shown(kind) for kind in kinds if kind != "full_attention"}):
            raise CheckpointError(
                f"config.json: layer_types has {', '.join(other)}; only 'full_attention' is "
                "supported"
            )
    elif _slides(config):
        raise CheckpointError(
            "config.json: use_sliding_window is true; attention over a sliding window is not "
            "supported"
        )


def _slides(config: Mapping[str, Any]) -> bool:
    """Return whether a layer attends to a window only, where `layer_types` does not.

    In a dense network the layers below `max_window_layers` do not; in a mixture of experts all do.
    """
    if not config.get("use_sliding_window") or config.get("sliding_window", 4096) is None:
        return False
    read = _Reader(config)
    below = read.count("max_window_layers", default=_FULL_BELOW)
    return config.get("model_type") == "qwen3_moe" or below < read.count("num_hidden_layers")


def unknown_rope_keys(config: Mapping[str, Any]) -> list[str]:
    """Name the keys of config.json's rope sections that change nothing here.

    Raises:
        CheckpointError: a section is not an object.
    """
    section, _ = _rope_section(config)
    known = _YARN_KEYS if section.get("rope_type") == "yarn" else _ROPE_KEYS
    return sorted(section.keys() - known)


def _rope_section(config: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return what `rope_parameters` and `rope_scaling` state together, and which of them rules.

    Where both are there, `rope_scaling` has been added by hand to a config that transformers 5
    wrote, so it wins. What it leaves out, above all rope_theta, is still that of `rope_parameters`;
    transformers 5.24 replaces the whole section there, and falls back to a theta of 10,000.
    """
    where = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    section: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        part = config.get(name) or {}
        if not isinstance(part, Mapping):
            raise CheckpointError(f"config.json: {name} is {_shown(part)}, not an object")
        if nested := [key for key, value in part.items() if isinstance(value, Mapping)]:
            raise CheckpointError(
                f"config.json: {name}.{nested[0]} is an object; only one rope for all layers is "
                "supported"
            )
        kind = part.get("rope_type") or part.get("type") or "default"
        section |= {**part, "rope_type": kind} if part else {}
    return section, where


def _read_rope(config: Mapping[str, Any]) -> tuple[float, Yarn | None]:
    """Return theta and the scaling, from `rope_parameters` or `rope_theta` and `rope_scaling`."""
    section, where = _rope_section(config)
    theta = _Reader(section).number(
        "rope_theta", default=_Reader(config).number("rope_theta", default=_THETA)
    )
    if {**config, **section}.get("partial_rotary_factor") not in (None, 1):
        raise CheckpointError("config.json: partial_rotary_factor is not supported")
    kind = section.get("rope_type", "default")
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise CheckpointError(
            f"config.json: {where} asks for rope_type {_shown(kind)}; default and yarn are "
            "supported"
        )
    if theta == 1:
        raise CheckpointError("config.json: rope_theta is 1, where every angle is the same")
    return theta, _read_yarn(_Reader(section, f"config.json: {where}"), config)


def _read_yarn(read: _Reader, config: Mapping[str, Any]) -> Yarn:
    """Read YaRN as transformers 5 does; what is optional there is optional here."""
    stated = read.config.get("original_max_position_embeddings") is not None
    original = "original_max_position_embeddings" if stated else "max_position_embeddings"
    factor = read.number("factor")
    window = (read if stated else _Reader(config)).count(original, default=_WINDOW)
    return Yarn(
        factor=factor,
        original_max_position_embeddings=window,
        attention_factor=_attention_factor(read, factor),
        beta_fast=read.number("beta_fast", default=32.0),
        beta_slow=read.number("beta_slow", default=1.0),
        truncate=read.flag("truncate", default=True),
    )


def _attention_factor(read: _Reader, factor: float) -> float:
    """Return the factor on q and on k: stated, or 0.1·ln(factor) + 1 (YaRN paper, section 3.4).

    `attn_factor` multiplies that, as in vLLM. DeepSeek-R1-0528-Qwen3-8B states its inverse there,
    so that nothing is scaled; transformers does not know the key and warns.
    """
    if read.config.get("attention_factor") is not None:
        if read.config.get("attn_factor") is not None:
            raise CheckpointError(
                f"{read.where} has both attention_factor and attn_factor; leave one of them out"
            )
        return read.number("attention_factor")
    if read.config.get("mscale") and read.config.get("mscale_all_dim"):
        whole, part = (_mscale(factor, read.number(key)) for key in ("mscale", "mscale_all_dim"))
        plain = whole / part
    else:
        plain = _mscale(factor, 1.0)
    return plain * read.number("attn_factor", default=1.0)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _read_experts(read: _Reader) -> Experts:
    layers, count = read.items("mlp_only_layers"), read.count("num_hidden_layers")
    if wrong := [layer for layer in layers if not isinstance(layer, int) or layer >= count]:
        raise CheckpointError(
            f"config.json: mlp_only_layers has {_shown(wrong[0])}; the layers are 0 to {count - 1}"
        )
    experts = Experts(
        num_experts=read.count("num_experts", "num_local_experts", default=128),
        num_experts_per_tok=read.count("num_experts_per_tok", default=8),
        moe_intermediate_size=read.count("moe_intermediate_size", default=768),
        norm_topk_prob=read.flag("norm_topk_prob"),
        decoder_sparse_step=read.count("decoder_sparse_step", default=1),
        mlp_only_layers=tuple(layers),
    )
    if experts.num_experts_per_tok > experts.num_experts:
        raise CheckpointError(
            f"config.json: num_experts_per_tok ({experts.num_experts_per_tok}) is more than "
            f"num_experts ({experts.num_experts})"
        )
    return experts
