"""What a group's quantization costs: estimated a layer at a time, and measured outright."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from qwen3_mlx.checkpoint import layerwise
from qwen3_mlx.checkpoint.formats.matrix import Matrix
from qwen3_mlx.checkpoint.gptq import block_size, moments, quantize
from qwen3_mlx.checkpoint.load import quantizable_shapes
from qwen3_mlx.checkpoint.recipes import group_of
from qwen3_mlx.checkpoint.sensitivity import SensitivityScores, measure
from qwen3_mlx.checkpoint.stored_formats import read_matrices
from qwen3_mlx.files import read_json
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.quantization import Format
from qwen3_mlx.model.qwen3 import Qwen3
from tests.support import MOE, TINY, moe_folder, random_ids, read_weights, write_tiny

CONFIGS: dict[str, dict[str, Any]] = {
    "tied": TINY,
    "untied": {**TINY, "tie_word_embeddings": False},
    # With all experts chosen: what another choice changes, no derivative knows.
    "moe": {**MOE, "num_experts_per_tok": 8},
}
FINE, COARSE = Format(6, 32), Format(4, 64)


def draw_ids(sequences: int, length: int) -> mx.array:
    return mx.array(random_ids(sequences * length)).reshape(sequences, length)


def opened(folder: Path) -> tuple[ModelConfig, dict[str, Matrix]]:
    config = read_json(folder / "config.json")
    return ModelConfig.from_dict(config), read_matrices(folder, config)


def sharpen(folder: Path, factor: float) -> None:
    """Raise the logits, so that some tokens are likely and others are not."""
    weights = read_weights(folder)
    weights["model.norm.weight"] = factor * weights["model.norm.weight"]
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def estimated(folder: Path, ids: mx.array, formats: list[Format]) -> SensitivityScores:
    mx.random.seed(1)
    return measure(*opened(folder), ids, formats, lambda done, total: None)[0]


def quantized(weight: mx.array, form: Format) -> mx.array:
    parts = mx.quantize(weight, form.group_size, form.bits)
    return mx.dequantize(*parts, group_size=form.group_size, bits=form.bits)


class Outright:
    """The whole model in memory, and what each group's quantization does to its output."""

    def __init__(self, folder: Path, ids: mx.array) -> None:
        config, matrices = opened(folder)
        self.weights = {
            name: mx.concatenate(list(matrix.blocks(1 << 26))).reshape(matrix.shape)
            for name, matrix in matrices.items()
        }
        self.model = Qwen3(config)
        self.ids = ids
        self.before = self._log_probabilities(self.weights)

    def _log_probabilities(self, weights: dict[str, mx.array]) -> mx.array:
        self.model.load_weights(list(weights.items()))
        logits = self.model(self.ids)
        found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(found)
        return found

    def divergence(self, modules: list[str], form: Format) -> float:
        """Give KL(original ‖ quantized) a token where only these modules are quantized."""
        changed = {
            f"{path}.weight": quantized(self.weights[f"{path}.weight"], form) for path in modules
        }
        after = self._log_probabilities(self.weights | changed)
        kl = (mx.exp(self.before) * (self.before - after)).sum(-1).mean()
        return float(kl.item())  # type: ignore[arg-type]


def groups_of(folder: Path) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for path in quantizable_shapes(read_json(folder / "config.json")):
        if not path.endswith("mlp.gate"):
            groups.setdefault(group_of(path), []).append(path)
    return groups


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("kind", "vocabulary_block"),
    [
        ("tied", 1 << 22),
        ("untied", 1 << 14),
        pytest.param("moe", 1 << 22, marks=pytest.mark.slow),
    ],
)
def test_the_estimate_is_the_divergence(
    kind: str, vocabulary_block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "_VOCABULARY_BLOCK", vocabulary_block)
    folder, ids = write_tiny(tmp_path / "model", CONFIGS[kind]), draw_ids(32, 10)
    sharpen(folder, 6.0)
    scores = estimated(folder, ids, [FINE])
    groups = groups_of(folder)
    assert scores.keys() == groups.keys()
    outright = Outright(folder, ids)
    ratios = {
        group: scores[group][FINE] / outright.divergence(modules, FINE)
        for group, modules in groups.items()
    }
    assert all(0.65 < ratio < 1.35 for ratio in ratios.values()), ratios
    assert 0.85 < sum(ratios.values()) / len(ratios) < 1.15
    if "lm_head" in ratios:  # whose divergence is computed without drawings
        assert ratios["lm_head"] == pytest.approx(1, rel=0.02)


def test_a_tied_embedding_pays_for_the_head_as_well(tmp_path: Path) -> None:
    tied, untied = (write_tiny(tmp_path / str(n)) for n in range(2))
    weights = read_weights(untied)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    mx.eval(weights)
    mx.save_safetensors(str(untied / "model.safetensors"), weights)
    config = {**read_json(tied / "config.json"), "tie_word_embeddings": False}
    (untied / "config.json").write_text(json.dumps(config))
    together, apart = (estimated(folder, draw_ids(4, 8), [FINE]) for folder in (tied, untied))
    head = apart["lm_head"][FINE]
    assert head > 0
    embedding = apart["model.embed_tokens"][FINE]
    assert together["model.embed_tokens"][FINE] == pytest.approx(embedding + head, rel=1e-4)


def test_fewer_bits_cost_more(tmp_path: Path) -> None:
    folder = moe_folder(tmp_path / "model", shards=2)
    formats = [Format(bits, 64) for bits in (2, 3, 4, 6, 8)]
    for of in estimated(folder, draw_ids(8, 16), formats).values():
        assert list(of) == formats
        assert all(more > 1.5 * less > 0 for more, less in pairwise(of.values()))


def test_formats_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", {**TINY, "intermediate_size": 96})
    scores = estimated(folder, draw_ids(2, 8), [Format(4, 64), Format(4, 32)])
    for group, of in scores.items():
        assert set(of) == {Format(4, 32)} | (
            set() if group.endswith("down_proj") else {Format(4, 64)}
        )


def test_progress_counts_each_layer_twice(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model")
    told: list[tuple[int, int]] = []
    measure(*opened(folder), draw_ids(2, 8), [FINE], lambda *state: told.append(state))
    assert told == [(done, 4) for done in range(5)]


@pytest.mark.heavy
def test_one_layer_at_a_time_is_in_memory(tmp_path: Path) -> None:
    """Of a layer more, only its input and the moments are kept while the others are measured."""
    sizes = {"hidden_size": 128, "intermediate_size": 1024}
    ids = draw_ids(2, 8)
    peaks = {}
    for layers in (3, 12):
        config = {**TINY, **sizes, "num_hidden_layers": layers}
        folder = write_tiny(tmp_path / str(layers), config)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        estimated(folder, ids, [COARSE])
        peaks[layers] = mx.get_peak_memory() - before
    layer = 4 * (3 * 128 * 1024 + 2 * 128 * 256 + 2 * 128 * 128)  # bytes
    inputs = {128: 6, 256: 1, 1024: 1}  # widths of the modules' inputs, and how many have them
    moments = sum(4 * count * width * block_size(width) for width, count in inputs.items())
    assert peaks[12] < peaks[3] + 9 * (4 * ids.size * 128 + moments) + layer / 2
    assert peaks[12] < 12 * layer


def test_rounding_waits_for_the_device_once_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, evaluate = [0], mx.eval

    def count(*arrays: mx.array) -> None:
        waits[0] += 1
        evaluate(*arrays)

    mx.random.seed(0)
    rows, inputs = mx.random.normal((8, 384)), moments(mx.random.normal((64, 384)))
    evaluate(rows, inputs)
    monkeypatch.setattr(mx, "eval", count)
    quantize(rows, Format(4, 64), inputs, mx.bfloat16)
    assert 0 < waits[0] <= block_size(384) // 64
