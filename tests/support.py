"""Small models and exact comparisons for the tests."""

import json
import shutil
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.cache.quantized import PLAIN, CacheFormat
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.sampling_params import SamplingParams
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.qwen3 import Qwen3

DEMO = Path(str(files("qwen3_mlx") / "demo"))
TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-2, mx.bfloat16: 1e-1}
TINY: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 1088,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
}
MOE: dict[str, Any] = {
    **TINY,
    "model_type": "qwen3_moe",
    "tie_word_embeddings": False,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


class TinyQwen3(Qwen3):
    """A network that makes caches of its own format, unless it is asked for another."""

    cache_format: CacheFormat = PLAIN

    def make_cache(
        self, capacity: int = 0, *, cache_format: CacheFormat | None = None
    ) -> list[KVCache]:
        return super().make_cache(capacity, cache_format=cache_format or self.cache_format)


def cache_format_of(model: Qwen3) -> CacheFormat:
    """Return the format of the caches that a test's model makes."""
    return model.cache_format if isinstance(model, TinyQwen3) else PLAIN


def make_model(config: dict[str, Any] | None = None, seed: int = 0) -> TinyQwen3:
    """Make a random model, evaluated, with lively norms so that every parameter matters."""
    mx.random.seed(seed)
    model = TinyQwen3(ModelConfig.from_dict(config or TINY))
    lively = [
        (name, value + 0.3 * mx.random.normal(value.shape) if value.ndim == 1 else value)
        for name, value in model.tensors().items()
    ]
    model.load_weights(lively)
    mx.eval(model.parameters())
    return model


def greedy_tokens(model: Qwen3, ids: Sequence[int], count: int) -> list[int]:
    """Give the tokens that an engine of its own chooses after `ids`."""
    vocabulary = model.config.vocab_size
    engine = Engine(model, vocabulary=vocabulary, cache_format=cache_format_of(model))
    return list(engine.stream(ids, max_tokens=count, sampling=SamplingParams(temperature=0.0)))


def prefill(model: Qwen3, cache: Sequence[KVCache], ids: Sequence[int], chunk: int) -> mx.array:
    """Read a prompt in chunks and give the logits [V] of its last token, evaluated."""
    for start in range(0, len(ids), chunk):
        part = list(ids[start : start + chunk])
        logits = model(mx.array([part]), cache, wanted=[len(part) - 1])
        mx.eval(logits)
    return logits[0, -1]


def fill(model: Qwen3, ids: mx.array) -> list[KVCache]:
    """Give caches that have seen ids [1, L], L perhaps 0."""
    cache = model.make_cache()
    if ids.size:
        model(ids, cache)
    return cache


def write_tiny(
    folder: Path, config: dict[str, Any] | None = None, seed: int = 1, padding: int = 0
) -> Path:
    """Write a random checkpoint with the demo's tokenizer and template into `folder`.

    Its embedding has `padding` rows more than there are tokens. Of `seed` 1, unlike 0, replies to
    short prompts go on: hardly one ends by itself within 40 tokens.
    """
    config = dict(config or TINY)
    config["vocab_size"] = json.loads((DEMO / "config.json").read_text())["vocab_size"] + padding
    weights = make_model(config, seed).tensors()
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, folder / name)
    shutil.copy(DEMO / "generation_config.json", folder / "generation_config.json")
    return folder


Stored = tuple[str, NDArray[Any]]
"""A tensor as a file has it: the format's name of its dtype, and its numbers (BF16 as U16)."""


def write_safetensors(file: Path, tensors: Mapping[str, Stored]) -> None:
    """Write a file of any dtypes, by the format's definition."""
    header: dict[str, Any] = {}
    place = 0
    for name, (dtype, values) in tensors.items():
        offsets = [place, place + values.nbytes]
        header[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": offsets}
        place += values.nbytes
    text = json.dumps(header).encode()
    data = b"".join(np.ascontiguousarray(values).tobytes() for _, values in tensors.values())
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def as_bfloat16(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Cut float32 to bfloat16, as the upper half of its bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (bits >> 16).astype(np.uint16)


def float_of(stored: Stored) -> NDArray[np.float32]:
    """Give the numbers of a stored tensor of plain floats."""
    dtype, values = stored
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def assert_close(found: mx.array, expected: Any, tolerance: float | None = None) -> None:
    """Compare arrays within the tolerance of their dtype, and show the worst place."""
    tolerance = TOLERANCE[found.dtype] if tolerance is None else tolerance
    a = np.array(found.astype(mx.float32))
    b = np.array(expected.astype(mx.float32) if isinstance(expected, mx.array) else expected)
    assert a.shape == b.shape, f"shapes differ: {a.shape} and {b.shape}"
    differences = np.abs(a - b)
    assert np.isfinite(differences).all(), "not all values are finite"
    worst = np.unravel_index(differences.argmax(), differences.shape)
    assert differences[worst] <= tolerance, (
        f"differ by {differences[worst]:.3g} (allowed {tolerance:g}) at {tuple(map(int, worst))}: "
        f"{a[worst]:.6g} and {b[worst]:.6g}"
    )


def random_ids(count: int, vocabulary: int = 1024, seed: int = 0) -> list[int]:
    """Draw token ids."""
    return [int(n) for n in np.random.RandomState(seed).randint(0, vocabulary, count)]


def read_weights(folder: Path) -> dict[str, mx.array]:
    """Read a checkpoint's only weight file."""
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    return weights


def moe_folder(folder: Path, config: dict[str, Any] | None = None, *, shards: int = 1) -> Path:
    """Write a MoE checkpoint as published: each expert by itself, perhaps over two shards."""
    write_tiny(folder, config or MOE)
    weights = read_weights(folder)
    published_model_config: dict[str, mx.array] = {}
    for name, value in weights.items():
        if ".switch_mlp." in name:
            for expert, part in enumerate(value):
                published_model_config[name.replace("switch_mlp", f"experts.{expert}")] = part
        else:
            published_model_config[name] = value
    (folder / "model.safetensors").unlink()
    names = sorted(published_model_config)
    index: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part_of = {name: published_model_config[name] for name in names[shard::shards]}
        mx.save_safetensors(str(folder / file), part_of)
        index |= dict.fromkeys(part_of, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder
