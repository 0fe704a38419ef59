"""The geometry of the network: reads and checks a checkpoint's config.json.

Two spellings are read: the published one (transformers 4), and the one that transformers 5 writes.
A key that is missing or null has the default of transformers' Qwen3Config and Qwen3MoeConfig
(5.24). Only the sizes that define the network have no default.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen3_mlx.errors import CheckpointError

MODEL_TYPES = ("qwen3", "qwen3_moe")
LOGITS, SCORE, STATES = "logits", "score", "states"
"""What a network computes: logits of the next token, one score of a text, or hidden states."""
_MAX_LAYERS = 10_000  # more are a mistake, and building them would take long before it fails
_MAX_SIZE = 1 << 31  # no size of a network comes near it; MLX counts in 32 bits
_DEFAULT_THETA = 10_000.0
_DEFAULT_WINDOW = 32_768
_DEFAULT_MAX_WINDOW_LAYERS = 28  # the layers below attend to all tokens, with a sliding window
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
        """Return whether layer `index`, counted from 0, routes to experts."""
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
    output: str = LOGITS

    @property
    def has_lm_head(self) -> bool:
        """True if there is a head that is not the embedding."""
        return self.output == LOGITS and not self.tie_word_embeddings

    @property
    def attention_scale(self) -> float:
        """Factor on q·k. YaRN scales both q and k, so its factor enters squared."""
        stretch = self.yarn.attention_factor if self.yarn else 1.0
        return stretch**2 / math.sqrt(self.head_dim)

    @property
    def context_window(self) -> int:
        """Maximum number of tokens of prompt and reply together.

        A config.json with YaRN added by hand often keeps the old `max_position_embeddings`, so the
        stretched window counts if it is larger.
        """
        if self.yarn is None:
            return self.max_position_embeddings
        with_yarn = int(self.yarn.factor * self.yarn.original_max_position_embeddings)
        return max(self.max_position_embeddings, with_yarn)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Create the config from the contents of a config.json.

        Raises:
            CheckpointError: the network is not Qwen3, a key is missing, or a value is not
                supported; the message names the key.
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
        # transformers' defaults: a fixed size for dense networks, and a quotient for MoE.
        default_dim = 128 if model_type == "qwen3" else hidden // heads
        head_dim = read.count("head_dim", default=default_dim)
        if head_dim % 2:
            raise CheckpointError(f"config.json: head_dim ({head_dim}) is odd")
        theta, yarn = _read_rope(config)
        return cls(
            model_type=model_type,
            vocab_size=read.count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.count("intermediate_size"),
            num_hidden_layers=read.count("num_hidden_layers", maximum=_MAX_LAYERS),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=read.number("rms_norm_eps", default=1e-6),
            max_position_embeddings=read.count("max_position_embeddings", default=_DEFAULT_WINDOW),
            tie_word_embeddings=read.flag("tie_word_embeddings"),
            attention_bias=read.flag("attention_bias"),
            rope_theta=theta,
            yarn=yarn,
            experts=_read_experts(read) if model_type == "qwen3_moe" else None,
            output=_read_output(config),
        )


class _Reader:
    """Typed access to a config; every error names the key."""

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

    def count(self, *names: str, maximum: int = _MAX_SIZE, default: int | None = None) -> int:
        value = self.get(*names, default=default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= maximum:
            raise CheckpointError(
                f"{self.where}: {names[0]} is {_shown(value)}, not a positive integer within reason"
            )
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default=default)
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not 0 < value < _MAX_SIZE
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


def headless(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json as transformers writes it for the network without a head."""
    moe = "Moe" if config.get("model_type") == "qwen3_moe" else ""
    return {**config, "architectures": [f"Qwen3{moe}Model"]}


def _read_output(config: Mapping[str, Any]) -> str:
    """Return what the network computes, by the name that transformers has for its class."""
    architecture = str((_Reader(config).items("architectures") or [""])[0])
    if architecture.endswith("Model"):
        return STATES
    if not architecture.endswith("ForSequenceClassification"):
        return LOGITS
    labels = config.get("num_labels") or len(config.get("id2label") or "ab")  # the default is two
    if labels != 1:
        raise CheckpointError(
            f"config.json: {architecture} with {labels} labels; only rerankers, which have one, "
            "are supported"
        )
    return SCORE


def _missing_kv_heads(config: Mapping[str, Any], heads: int) -> int:
    """Return transformers' default of num_key_value_heads; null means the number of heads."""
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
    elif _has_sliding_window(config):
        raise CheckpointError(
            "config.json: use_sliding_window is true; attention over a sliding window is not "
            "supported"
        )


def _has_sliding_window(config: Mapping[str, Any]) -> bool:
    """Return whether any layer attends to a sliding window, if `layer_types` is missing.

    In a dense network the layers below `max_window_layers` attend to all tokens; in a mixture of
    experts every layer uses the window.
    """
    if not config.get("use_sliding_window") or config.get("sliding_window", 4096) is None:
        return False
    read = _Reader(config)
    below = read.count("max_window_layers", default=_DEFAULT_MAX_WINDOW_LAYERS)
    return config.get("model_type") == "qwen3_moe" or below < read.count("num_hidden_layers")


def unknown_rope_keys(config: Mapping[str, Any]) -> list[str]:
    """Return the keys of config.json's rope sections that have no effect in this package.

    Raises:
        CheckpointError: a section is not an object.
    """
    section, _ = _rope_section(config)
    known = _YARN_KEYS if section.get("rope_type") == "yarn" else _ROPE_KEYS
    return sorted(section.keys() - known)


def _rope_section(config: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return `rope_parameters` and `rope_scaling` merged, and the name of the one that wins.

    If both exist, `rope_scaling` was added by hand to a config that transformers 5 wrote, so it
    wins. Keys that it leaves out, above all rope_theta, come from `rope_parameters`. transformers
    5.24 replaces the whole section instead, and falls back to a theta of 10,000.
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
    """Return theta and the YaRN settings, from `rope_parameters`, `rope_theta`, `rope_scaling`."""
    section, where = _rope_section(config)
    theta = _Reader(section).number(
        "rope_theta", default=_Reader(config).number("rope_theta", default=_DEFAULT_THETA)
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
    """Read the YaRN settings as transformers 5 does, with the same optional keys."""
    stated = read.config.get("original_max_position_embeddings") is not None
    original = "original_max_position_embeddings" if stated else "max_position_embeddings"
    factor = read.number("factor")
    window = (read if stated else _Reader(config)).count(original, default=_DEFAULT_WINDOW)
    return Yarn(
        factor=factor,
        original_max_position_embeddings=window,
        attention_factor=_attention_factor(read, factor),
        beta_fast=read.number("beta_fast", default=32.0),
        beta_slow=read.number("beta_slow", default=1.0),
        truncate=read.flag("truncate", default=True),
    )


def _attention_factor(read: _Reader, factor: float) -> float:
    """Return the factor on q and on k: as stated, or 0.1·ln(factor) + 1 (YaRN, section 3.4).

    `attn_factor` multiplies the formula's result, as in vLLM. DeepSeek-R1-0528-Qwen3-8B states the
    inverse there, so that nothing is scaled; transformers does not know the key and warns.
    """
    if read.config.get("attention_factor") is not None:
        if read.config.get("attn_factor") is not None:
            raise CheckpointError(
                f"{read.where} has both attention_factor and attn_factor; leave one of them out"
            )
        return read.number("attention_factor")
    if read.config.get("mscale") and read.config.get("mscale_all_dim"):
        scale, all_dim = (_mscale(factor, read.number(key)) for key in ("mscale", "mscale_all_dim"))
        base = scale / all_dim
    else:
        base = _mscale(factor, 1.0)
    return base * read.number("attn_factor", default=1.0)


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
