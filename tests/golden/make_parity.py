"""Write the golden logits of tiny random Qwen3 twins, computed by transformers.

By hand: `python tests/golden/make_parity.py [--check]`, with torch 2.13.0 and transformers 5.23.0
(CPU). Each case becomes `parity/<case>.npz`: `config` (config.json as transformers writes it),
`ids` [L], `logits` [L, V], `greedy` [24]. The weights are not stored: `twins.weight` gives them.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that the script can be run from anywhere
from tests.golden import twins

FOLDER = Path(__file__).parent / "parity"
LENGTH = 40  # beyond the 32 positions that the YaRN cases were "trained" on
GREEDY = 24
FEATURE_FLOOR = 1e-2  # a feature that moves the logits by less proves nothing
MARGIN_FLOOR = 5e-3  # a choice (greedy token, expert) closer than this may flip by rounding
CHECK_CEILING = 1e-4  # another CPU, other kernels

Settings = dict[str, Any]
Arrays = dict[str, npt.NDArray[Any]]

ROPE: Settings = {"rope_type": "default", "rope_theta": 1e4}
YARN: Settings = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
EXPLICIT = YARN | {"attention_factor": 1.4, "beta_fast": 4.0, "beta_slow": 0.25, "truncate": False}
MSCALE = YARN | {"mscale": 2.0, "mscale_all_dim": 0.5}
ONE_MSCALE = YARN | {"mscale_all_dim": 0.5}

DENSE: Settings = {
    "model_type": "qwen3",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "rope_parameters": ROPE,
}
MOE = DENSE | {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}


def rope(base: Settings, **changes: Any) -> Settings:
    """Give the settings that replace the rotary embedding by `base` with `changes`."""
    return {"rope_parameters": base | changes}


@dataclass(frozen=True, slots=True)
class Case:
    """The settings of a twin, and the changes to them that must each move its logits."""

    settings: Settings
    changes: Mapping[str, Settings]
    seed: int  # of the ids; one where no choice is too close to call


CASES = {
    "dense_tied": Case(
        DENSE | {"tie_word_embeddings": True} | rope(ROPE, rope_theta=1e6),
        {"untied": {"tie_word_embeddings": False}, "rope_theta 1e4": rope(ROPE)},
        seed=6,
    ),
    "dense_untied": Case(
        DENSE
        | {"vocab_size": 151, "hidden_size": 128, "num_attention_heads": 8, "head_dim": 16}
        # Large, so that an implementation that ignores the config's own value is seen.
        | {"num_hidden_layers": 2, "intermediate_size": 256, "rms_norm_eps": 0.1},
        {"tied": {"tie_word_embeddings": True}, "rms_norm_eps 1e-6": {"rms_norm_eps": 1e-6}},
        seed=1,
    ),
    "heads_64_8": Case(
        DENSE | {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 8},
        {"rope_theta 1e6": rope(ROPE, rope_theta=1e6)},
        seed=1,
    ),
    "yarn_dense": Case(
        DENSE | {"num_key_value_heads": 1, "head_dim": 64, "num_hidden_layers": 2} | rope(YARN),
        {
            "no yarn": rope(ROPE),
            "factor 2": rope(YARN, factor=2.0),
            "original 64": rope(YARN, original_max_position_embeddings=64),
            "attention_factor 1": rope(YARN, attention_factor=1.0),
        },
        seed=2,
    ),
    "yarn_dense_explicit": Case(
        DENSE | rope(EXPLICIT),
        {
            "no yarn": rope(ROPE),
            "attention_factor null": rope(EXPLICIT, attention_factor=None),
            "truncate true": rope(EXPLICIT, truncate=True),
            "beta_fast 32": rope(EXPLICIT, beta_fast=32.0),
            "beta_slow 1": rope(EXPLICIT, beta_slow=1.0),
        },
        seed=5,
    ),
    "yarn_dense_mscale": Case(
        DENSE | rope(MSCALE),
        {
            "no yarn": rope(ROPE),
            "neither": rope(YARN),
            "mscale 1": rope(MSCALE, mscale=1.0),
            "mscale_all_dim 1": rope(MSCALE, mscale_all_dim=1.0),
        },
        seed=5,
    ),
    # transformers heeds the two only together: alone, mscale_all_dim is as good as absent.
    "yarn_dense_one_mscale": Case(
        DENSE | rope(ONE_MSCALE),
        {"no yarn": rope(ROPE), "both": rope(ONE_MSCALE, mscale=0.5)},
        seed=3,
    ),
    "moe": Case(
        MOE,
        {
            "norm_topk_prob false": {"norm_topk_prob": False},
            "2 experts per token": {"num_experts_per_tok": 2},
            "sparse_step 2": {"decoder_sparse_step": 2},
        },
        seed=7,
    ),
    # The window is 8 times the original one: the factor counts, not their ratio.
    "moe_yarn": Case(
        MOE
        | {"num_experts": 6, "num_experts_per_tok": 2, "max_position_embeddings": 256}
        | rope(YARN, rope_theta=1e6),
        {
            "no yarn": rope(ROPE, rope_theta=1e6),
            "factor 8": rope(YARN, rope_theta=1e6, factor=8.0),
            "norm_topk_prob false": {"norm_topk_prob": False},
        },
        seed=2,
    ),
    "moe_dense_layers": Case(
        MOE
        | {"num_hidden_layers": 4, "mlp_only_layers": [1], "decoder_sparse_step": 2}
        | {"norm_topk_prob": False, "head_dim": 16, "intermediate_size": 128},
        {
            "mlp_only_layers []": {"mlp_only_layers": []},
            "mlp_only_layers [3]": {"mlp_only_layers": [3]},
            "sparse_step 1": {"decoder_sparse_step": 1},
            "norm_topk_prob true": {"norm_topk_prob": True},
        },
        seed=2,
    ),
    "attention_bias": Case(
        DENSE | {"attention_bias": True, "num_key_value_heads": 4},
        {"no bias": {"attention_bias": False}},
        seed=3,
    ),
}


@dataclass(frozen=True, slots=True)
class Twin:
    """A loaded reference model, and its config.json as `save_pretrained` writes it."""

    model: Any
    config: str

    def logits(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Give the logits [L, V] of a plain forward pass over `ids` [L]."""
        with torch.inference_mode():
            out = self.model(input_ids=torch.from_numpy(ids).long()[None], use_cache=False)
        return np.asarray(out.logits[0].float().numpy())

    def router_margin(self, ids: npt.NDArray[np.int32]) -> float:
        """Give the least distance, in router logits, between a chosen expert and one passed by."""
        top = self.model.config.num_experts_per_tok
        with torch.inference_mode():
            out = self.model(
                input_ids=torch.from_numpy(ids).long()[None],
                use_cache=False,
                output_router_logits=True,
            )
        ranked = [scores.sort(descending=True).values for scores in out.router_logits]
        return min(float((scores[:, top - 1] - scores[:, top]).min()) for scores in ranked)


def load(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Twin:
    """Write the published tensors of `config` and have transformers read them.

    What transformers saves in turn must be the same tensors, so `twins` names them rightly.
    """
    with tempfile.TemporaryDirectory() as name:
        published, saved = Path(name, "published"), Path(name, "saved")
        twins.write_checkpoint(config, published)
        model, report = AutoModelForCausalLM.from_pretrained(
            published,
            dtype=dtype,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
        assert not any(report.values()), report
        model.eval().save_pretrained(saved)
        mine = load_file(published / "model.safetensors")
        theirs = load_file(saved / "model.safetensors")
        assert mine.keys() == theirs.keys(), mine.keys() ^ theirs.keys()
        assert all(np.array_equal(mine[key], theirs[key]) for key in mine)
        return Twin(model, (saved / "config.json").read_text(encoding="utf-8"))


def full_config(settings: Settings) -> Settings:
    """Give `settings` with all that transformers adds, as a config.json holds it."""
    return dict(json.loads(AutoConfig.for_model(**settings).to_json_string(use_diff=False)))


def build(name: str, case: Case) -> Arrays:
    """Compute the arrays of a case, and print what shows that they are fit to compare with."""
    twin = load(full_config(case.settings))
    vocab = case.settings["vocab_size"]
    ids = np.random.RandomState(case.seed).randint(vocab, size=LENGTH).astype(np.int32)
    logits = twin.logits(ids)

    text, margins = ids, []
    for _ in range(GREEDY):
        last = twin.logits(text)[-1]
        second, first = np.sort(last)[-2:]
        margins.append(float(first - second))
        text = np.append(text, np.int32(last.argmax()))
    if case.settings["model_type"] == "qwen3_moe":
        margins.append(twin.router_margin(text))
    assert min(margins) > MARGIN_FLOOR, f"{name}: a choice by {min(margins)}; take another seed"

    config = json.loads(twin.config)
    for rope_key in ("type", "rope_type"):
        old = load(twins.old_spelling(config, rope_key))
        assert np.array_equal(old.logits(ids), logits), f"{name}: the old spelling differs"
    double = load(config, torch.float64)
    print(
        f"{name:22} {logits.std():9.2f} {np.abs(logits).max():9.2f}"
        f" {len(set(text[LENGTH:].tolist())):9} {min(margins):11.4f}"
        f" {np.abs(double.logits(ids) - logits).max():9.1e}"
    )
    greedy = text[LENGTH:]
    return {"config": np.array(twin.config), "ids": ids, "logits": logits, "greedy": greedy}


def show_changes(name: str, case: Case, arrays: Arrays) -> None:
    """Print how far each change of the settings moves the logits of a case."""
    for label, change in case.changes.items():
        changed = load(full_config(case.settings | change)).logits(arrays["ids"])
        moved = float(np.abs(changed - arrays["logits"]).max())
        print(f"{name:22} {label:24} {moved:9.4f}")
        assert moved > FEATURE_FLOOR, f"{name}: {label} hardly moves the logits"


def compare(name: str, arrays: Arrays) -> bool:
    """Print how far the stored file of a case is from `arrays`; say whether it stands."""
    with np.load(FOLDER / f"{name}.npz") as file:
        stored = dict(file)
    moved = float(np.abs(stored["logits"] - arrays["logits"]).max())
    others = [key for key in ("config", "ids", "greedy") if (stored[key] != arrays[key]).any()]
    print(f"{name:22} max abs difference {moved:.1e}; differing: {', '.join(others) or 'none'}")
    return moved <= CHECK_CEILING and not others


def main() -> int:
    """Write every case, or check every stored one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the stored files")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    print(f"{'case':22} {'std':>9} {'max':>9} {'greedy':>9} {'margin':>11} {'float64':>9}")
    built = {name: build(name, case) for name, case in CASES.items()}
    print()
    if check:
        stands = [compare(name, arrays) for name, arrays in built.items()]
        return 0 if all(stands) else 1
    FOLDER.mkdir(exist_ok=True)
    for name, arrays in built.items():
        show_changes(name, CASES[name], arrays)
        np.savez_compressed(FOLDER / f"{name}.npz", allow_pickle=False, **arrays)
    return 0


if __name__ == "__main__":
    sys.exit(main())
