"""Held to transformers: logits and greedy tokens of every kind of config, through the loader.

`golden/make_parity.py` wrote the expected values; `golden/twins.py` gives the same weights here.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen3_mlx.checkpoint.load import LoadOptions, load_model
from qwen3_mlx.checkpoint.weights import Weights
from qwen3_mlx.files import read_json
from qwen3_mlx.model.qwen3 import Qwen3
from tests.golden import twins
from tests.support import assert_close, greedy_tokens, prefill

CASES = sorted((Path(__file__).parents[1] / "golden" / "parity").glob("*.npz"))
TOLERANCE = 1e-4


def golden(case: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    with np.load(case) as stored:
        return json.loads(str(stored["config"])), {name: stored[name] for name in stored}


def load_twin(config: dict[str, Any], folder: Path, *, shards: int = 1) -> Qwen3:
    twins.write_checkpoint(config, folder, shards=shards)
    options = LoadOptions(mx.float32)
    return load_model(read_json(folder / "config.json"), Weights(folder), options, lambda *_: None)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_logits_and_greedy_tokens(case: Path, tmp_path: Path) -> None:
    config, expected = golden(case)
    model = load_twin(config, tmp_path)
    ids = [int(token) for token in expected["ids"]]
    assert_close(model(mx.array([ids]))[0], expected["logits"], TOLERANCE)
    assert_close(prefill(model, model.make_cache(), ids, 16), expected["logits"][-1], TOLERANCE)
    assert greedy_tokens(model, ids, 24) == expected["greedy"].tolist()


@pytest.mark.parametrize("rope_key", ["rope_type", "type"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_the_published_spelling(case: Path, rope_key: str, tmp_path: Path) -> None:
    config, expected = golden(case)
    model = load_twin(twins.old_spelling(config, rope_key), tmp_path, shards=3)
    ids = mx.array([expected["ids"].tolist()])
    assert_close(model(ids)[0], expected["logits"], TOLERANCE)


def test_every_kind_of_config_has_a_golden_file() -> None:
    kinds = {case.stem for case in CASES}
    assert kinds >= {
        "dense_tied",
        "dense_untied",
        "heads_64_8",
        "yarn_dense",
        "moe",
        "moe_yarn",
        "moe_dense_layers",
        "attention_bias",
    }
