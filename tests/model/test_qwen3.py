"""The network: held to transformers, and sensitive to everything its config says."""

import dataclasses
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map

from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.model.config import ModelConfig, unknown_rope_keys
from qwen3_mlx.model.qwen3 import Qwen3
from tests.support import MOE, TINY, assert_close, make_model, random_ids

IDS = mx.array([random_ids(40)])
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
EXPLICIT = {
    **YARN,
    "original_max_position_embeddings": 64,
    "attention_factor": 1.3,
    "beta_fast": 6.0,
    "beta_slow": 1.0,
    "truncate": False,
}
FACTOR = "attention_factor"  # which has no place beside attn_factor


def logits_of(config: dict[str, Any], reference: Qwen3) -> mx.array:
    """Give the logits of a model with this config and, where they fit, the reference's weights."""
    model = Qwen3(ModelConfig.from_dict(config))
    mx.random.seed(1)
    known = reference.tensors()
    weights = [
        (name, known[name] if name in known and known[name].shape == value.shape else value)
        for name, value in model.tensors().items()
    ]
    model.load_weights(weights)
    return model(IDS[:, :40] % config["vocab_size"])


DENSE_CHANGES: dict[str, Any] = {
    "model_type": MOE,
    "vocab_size": 1152,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "rms_norm_eps": 1e-2,
    "tie_word_embeddings": False,
    "attention_bias": True,
    "rope_theta": 500.0,
    "rope_scaling": YARN,
}
MOE_CHANGES: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "norm_topk_prob": False,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [1],
}
YARN_CHANGES: dict[str, Any] = {
    "factor": 2.0,
    "original_max_position_embeddings": 24,
    "attention_factor": 1.1,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "truncate": True,
    "attn_factor": 0.7,
}
# What transformers 5.24 has where config.json says nothing, or null.
DEFAULTS: dict[str, Any] = {
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "rope_theta": 10000.0,
    "use_sliding_window": False,
}
EXPERT_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
# Bounds a conversation, but changes no number.
HARMLESS = {"max_position_embeddings"}


def differ(a: mx.array, b: mx.array) -> bool:
    return a.shape != b.shape or bool(mx.abs(a - b).max() > 1e-4)


@pytest.mark.parametrize("key", DENSE_CHANGES)
def test_every_key_changes_the_logits(key: str) -> None:
    reference = make_model()
    change = DENSE_CHANGES[key]
    changed = change if key == "model_type" else {**TINY, key: change}
    assert differ(logits_of(changed, reference), reference(IDS))


@pytest.mark.parametrize("key", MOE_CHANGES)
def test_every_key_of_the_experts_changes_the_logits(key: str) -> None:
    reference = make_model(MOE)
    assert differ(logits_of({**MOE, key: MOE_CHANGES[key]}, reference), reference(IDS))


@pytest.mark.parametrize("base", [TINY, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("key", YARN_CHANGES)
def test_every_key_of_yarn_changes_the_logits(key: str, base: dict[str, Any]) -> None:
    stated = {
        name: value for name, value in EXPLICIT.items() if key != "attn_factor" or name != FACTOR
    }
    reference = make_model({**base, "rope_scaling": stated})
    changed = {**base, "rope_scaling": {**stated, key: YARN_CHANGES[key]}}
    assert differ(logits_of(changed, reference), reference(IDS))


def test_no_field_of_the_config_is_left_out() -> None:
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    # The output is another head: tests/api/test_embedding.py has networks of each.
    tried = {*DENSE_CHANGES, *HARMLESS, "yarn", "experts", "output"} - {"rope_scaling"}
    assert fields == tried


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"layer_types": ["sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type 'linear'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', not an object"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention is an obj"),
        ({"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 1}, "window"),
        (
            {**MOE, "use_sliding_window": True, "sliding_window": 512, "max_window_layers": 2},
            "wind",
        ),
        (
            {"rope_scaling": {**EXPLICIT, "attention_factor": 1.0, "attn_factor": 1.0}},
            "has both attention_factor and attn_factor",
        ),
        ({"hidden_size": "64"}, "hidden_size is '64', not a positive integer"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"num_attention_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"head_dim": 63}, "head_dim .63. is odd"),
        ({**MOE, "norm_topk_prob": "yes"}, "norm_topk_prob is 'yes', not true or false"),
        ({**MOE, "num_experts_per_tok": 9}, "is more than num_experts"),
        ({**MOE, "mlp_only_layers": 5}, "mlp_only_layers is 5, not a list"),
        ({**MOE, "mlp_only_layers": ["0"]}, "mlp_only_layers has '0'; the layers are 0 to 1"),
        ({"layer_types": 5}, "layer_types is 5, not a list"),
        ({"hidden_size": 10**30}, "hidden_size is 10000.*, not a positive integer"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf, not a positive number"),
        ({"rope_theta": 10**400}, "rope_theta is 1000.*, not a positive number"),
        ({"rope_theta": 1, "rope_scaling": EXPLICIT}, "rope_theta is 1"),
        ({"rope_scaling": {**EXPLICIT, "attention_factor": -3}}, "attention_factor is -3"),
        ({"rope_scaling": {**YARN, "mscale": "x", "mscale_all_dim": 1}}, "mscale is 'x'"),
        (
            {"rope_scaling": {**YARN, "original_max_position_embeddings": float("nan")}},
            "rope_scaling: original_max_position_embeddings is nan",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        ModelConfig.from_dict({**TINY, **change})


@pytest.mark.parametrize("key", [*DEFAULTS, *EXPERT_DEFAULTS])
def test_what_is_missing_has_the_default_of_transformers(key: str) -> None:
    base = {**MOE, "num_attention_heads": 8} if key in EXPERT_DEFAULTS else TINY
    stated = {**base, key: {**DEFAULTS, **EXPERT_DEFAULTS}[key]}
    missing = {name: value for name, value in base.items() if name != key}
    expected = ModelConfig.from_dict(stated)
    assert ModelConfig.from_dict(missing) == ModelConfig.from_dict({**base, key: None}) == expected


def test_a_head_size_that_is_not_stated_is_a_share_where_there_are_experts() -> None:
    config = {**MOE, "num_attention_heads": 2, "head_dim": None}
    assert ModelConfig.from_dict(config).head_dim == MOE["hidden_size"] // 2


def test_key_value_heads_that_are_not_stated() -> None:
    """A dense network has transformers' 32; null means as many as there are heads."""
    wide = {**TINY, "num_attention_heads": 64}
    assert ModelConfig.from_dict({**wide, "num_key_value_heads": None}).num_key_value_heads == 64
    del wide["num_key_value_heads"]
    assert ModelConfig.from_dict(wide).num_key_value_heads == 32


def test_a_window_that_no_layer_has() -> None:
    """As in transformers, where the layers from `max_window_layers` on attend to a window."""
    plain = ModelConfig.from_dict(TINY)
    sliding = {**TINY, "use_sliding_window": True, "max_window_layers": 2}
    for window in ({"sliding_window": 512}, {"sliding_window": None, "max_window_layers": 0}):
        assert ModelConfig.from_dict({**sliding, **window}) == plain
    full = {"layer_types": ["full_attention"] * 2, "sliding_window": 512, "max_window_layers": 0}
    assert ModelConfig.from_dict({**sliding, **full}) == plain
    del sliding["sliding_window"]  # which is 4,096 then
    assert ModelConfig.from_dict(sliding) == plain
    with pytest.raises(CheckpointError, match="use_sliding_window is true"):
        ModelConfig.from_dict({**sliding, "max_window_layers": 1})


def test_the_scaling_of_deepseek_r1_0528_scales_no_attention() -> None:
    """Its `attn_factor` is the inverse of YaRN's own factor, and vLLM multiplies them."""
    scaling = {**YARN, "attn_factor": 0.8782488562869419, "beta_fast": 32, "beta_slow": 1}
    yarn = ModelConfig.from_dict({**TINY, "rope_scaling": scaling}).yarn
    assert yarn and yarn.attention_factor == pytest.approx(1, abs=1e-12)


def test_unknown_rope_keys_are_named() -> None:
    scaling = {**YARN, "extrapolation_factor": 1.0, "finetuned": True}
    assert unknown_rope_keys({**TINY, "rope_scaling": scaling}) == [
        "extrapolation_factor",
        "finetuned",
    ]
    untyped = {key: value for key, value in YARN.items() if key != "rope_type"}
    assert unknown_rope_keys({**TINY, "rope_scaling": untyped}) == sorted(untyped)
    assert unknown_rope_keys({**TINY, "rope_scaling": EXPLICIT}) == unknown_rope_keys(TINY) == []


def test_both_spellings_are_one() -> None:
    new = dict(MOE)
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": new.pop("rope_theta")}
    new["num_local_experts"] = new.pop("num_experts")
    del new["rope_scaling"]
    assert ModelConfig.from_dict(new) == ModelConfig.from_dict(MOE)
    old = {**TINY, "rope_scaling": {**YARN, "type": "yarn"}}
    del old["rope_scaling"]["rope_type"]
    spelled = {**TINY, "rope_parameters": {**YARN, "rope_theta": 10000.0}}
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(spelled)
    by_hand = {**TINY, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    assert ModelConfig.from_dict({**by_hand, "rope_scaling": YARN}) == ModelConfig.from_dict(old)


def test_yarn_widens_the_window() -> None:
    assert ModelConfig.from_dict(TINY).context_window == 2048
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2000}
    assert ModelConfig.from_dict({**TINY, "rope_scaling": yarn}).context_window == 8000


def test_a_geometry_that_no_published_model_has() -> None:
    odd = {"num_hidden_layers": 40, "num_attention_heads": 64, "num_key_value_heads": 8}
    model = make_model({**TINY, **odd, "head_dim": 8})
    assert model(IDS).shape == (1, 40, TINY["vocab_size"])


@pytest.mark.parametrize("bits", [None, 4])
def test_fused_weights_change_nothing(bits: int | None) -> None:
    model = make_model({**TINY, "attention_bias": True})
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    before = model.tensors()
    plain = model(IDS[:, :1])
    for layer in model.layers:
        layer.fuse()
    after = model.tensors()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert mx.array_equal(value, after[name]), name
    assert_close(model(IDS[:, :1], model.make_cache()), plain)


def test_fused_weights_are_not_held_twice() -> None:
    model = make_model({**TINY, "intermediate_size": 4096, "hidden_size": 256})
    mx.clear_cache()
    before = mx.get_active_memory()
    for layer in model.layers:
        layer.fuse()
    assert mx.get_active_memory() <= before * 1.01


def test_an_update_after_fusing_is_not_ignored() -> None:
    model = make_model()
    for layer in model.layers:
        layer.fuse()
    model.update(tree_map(lambda x: x * 1.1, model.parameters()))
    fresh = Qwen3(model.config)
    fresh.update(model.parameters())
    assert_close(model(IDS[:, :1], model.make_cache()), fresh(IDS[:, :1]))


def test_an_adapter_after_fusing_is_not_ignored() -> None:
    model = make_model()
    for layer in model.layers:
        layer.self_attn.fuse()
    plain = model(IDS[:, :1], model.make_cache())
    old = model.layers[0].self_attn.k_proj

    class Doubled(nn.Module):
        def __call__(self, x: mx.array) -> mx.array:
            return 2 * old(x)

    model.layers[0].self_attn["v_proj"] = Doubled()
    assert differ(model(IDS[:, :1], model.make_cache()), plain)


def test_experts_sorted_and_unsorted_agree() -> None:
    model = make_model(MOE)
    whole = model(IDS)  # 40 tokens, 2 experts each: sorted
    cache = model.make_cache()
    parts = [model(IDS[:, i : i + 1], cache) for i in range(40)]
    assert_close(mx.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize("config", [TINY, MOE], ids=["dense", "moe"])
def test_gradients_reach_every_parameter(config: dict[str, Any]) -> None:
    model = make_model(config)
    loss = nn.value_and_grad(model, lambda ids: nn.losses.cross_entropy(model(ids), ids).mean())
    _, gradients = loss(IDS)
    for name, gradient in dict(tree_flatten(gradients)).items():
        assert float(mx.abs(gradient).max()) > 0, name


def test_published_tensor_names() -> None:
    names = make_model(MOE).tensors().keys()
    layer = "model.layers.1."
    assert {name.removeprefix(layer) for name in names if name.startswith(layer)} == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"self_attn.{name}_norm.weight" for name in "qk"),
        "mlp.gate.weight",
        *(f"mlp.switch_mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    }
    rest = {name for name in names if ".layers." not in name}
    assert rest == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
