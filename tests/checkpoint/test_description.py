"""What the files beside the weights say, as other programs write them: read, or refused by name."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen3_mlx import CheckpointError, SamplingParams, convert, load
from qwen3_mlx.checkpoint.hub import Source
from qwen3_mlx.cli.evaluate import ReadingOptions, compare
from qwen3_mlx.files import read_json
from tests.checkpoint.harness import INDEX, make_gptq, shards_of
from tests.cli.harness import call
from tests.support import (
    MOE,
    TINY,
    Stored,
    assert_close,
    random_ids,
    read_weights,
    write_safetensors,
    write_tiny,
)

IDS = random_ids(20)


def logits(folder: Path) -> mx.array:
    with load(folder) as llm:
        return llm.logits(IDS)


def change(folder: Path, name: str, edit: Callable[[dict[str, Any]], object]) -> Path:
    content = read_json(folder / name)
    edit(content)
    (folder / name).write_text(json.dumps(content))
    return folder


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


# --- config.json --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_config_that_leaves_out_what_transformers_has_defaults_for(
    kind: str, tmp_path: Path
) -> None:
    sizes = {"head_dim": 128, "tie_word_embeddings": False, "rope_theta": 10000.0}
    base = {**TINY, **sizes}
    if kind == "moe":
        base = {**MOE, **sizes, "num_attention_heads": 8, "num_key_value_heads": 4}
        base["head_dim"] = MOE["hidden_size"] // 8
        base |= {"num_experts_per_tok": 8, "norm_topk_prob": False}
    folder = write_tiny(tmp_path / "stated", base)
    expected = logits(folder)
    left_out = (
        *("head_dim", "hidden_act", "rms_norm_eps", "tie_word_embeddings", "attention_bias"),
        *("rope_theta", "rope_scaling", "sliding_window", "use_sliding_window"),
        *("max_position_embeddings", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"),
        *(("num_experts_per_tok", "num_key_value_heads") if kind == "moe" else ()),
    )
    change(folder, "config.json", lambda config: [config.pop(key, None) for key in left_out])
    assert_close(logits(folder), expected, 0)


def test_keys_of_rope_that_are_not_known_are_named(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "odd")
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}
    odd = {"extrapolation_factor": 1.0, "beta_quick": 3}
    change(folder, "config.json", lambda config: config.update(rope_scaling=scaling | odd))
    expected = [
        f"{folder}: config.json has keys for rope that are not known and change nothing: "
        "beta_quick, extrapolation_factor"
    ]
    logits(folder)
    assert messages(caplog) == expected
    convert(folder, tmp_path / "out")
    assert messages(caplog) == 2 * expected
    assert call(["plan", str(folder)], capsys)[0] == 0
    assert messages(caplog) == 3 * expected


def test_attn_factor_is_honoured(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    found: list[mx.array] = []
    for more in ({"attn_factor": 0.5}, {"attention_factor": 0.5 * 1.1386294361119891}, {}):
        folder = shutil.copytree(tiny_folder, tmp_path / f"yarn{len(found)}")
        content = read_json(folder / "config.json") | {"rope_scaling": scaling | more}
        (folder / "config.json").write_text(json.dumps(content))
        found.append(logits(folder))
    assert_close(found[0], found[1], 1e-6)
    assert float(mx.abs(found[0] - found[2]).max()) > 1e-3
    assert not messages(caplog)


# --- which files --------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 1])
def test_an_index_of_shards_that_are_gone_is_an_older_one(
    left: int, tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "stale")
    shards_of(folder, index=True)
    for shard in (1, 2)[left:]:
        (folder / f"model-{shard:05}-of-00002.safetensors").unlink()
    assert_close(logits(folder), logits(tiny_folder), 0)
    expected = f"{folder}: {INDEX} names files that are not there; model.safetensors is read"
    assert messages(caplog) == [expected]
    convert(folder, tmp_path / "out", dequantize=True, dtype="float32")
    assert messages(caplog) == 2 * [expected]
    assert_close(logits(tmp_path / "out"), logits(tiny_folder), 0)


@pytest.mark.parametrize(
    ("index", "fault"),
    [
        ("{", "cannot be read as JSON"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": "x.bin"}}', "names x.bin, and only safetensors files are read"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "names files outside its folder"),
    ],
)
def test_a_broken_index_beside_whole_weights(
    index: str, fault: str, tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "broken")
    (folder / INDEX).write_text(index)
    assert_close(logits(folder), logits(tiny_folder), 0)
    assert messages(caplog) == [f"{folder}: {INDEX} {fault}; model.safetensors is read"]
    convert(folder, tmp_path / "out", dequantize=True, dtype="float32")
    assert_close(logits(tmp_path / "out"), logits(tiny_folder), 0)


@pytest.mark.parametrize("index", [True, False])
def test_two_sets_of_weights_are_refused(index: bool, tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "two")
    shards_of(folder, index=index)
    complaint = "has model.safetensors and model-00001-of-00002.safetensors, which are not parts of"
    with pytest.raises(CheckpointError, match=complaint):
        load(folder)
    with pytest.raises(CheckpointError, match=complaint):
        convert(folder, tmp_path / "out")


# --- tokens of other files ----------------------------------------------------------------------


def added(token: int, content: str, *, special: bool = True) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {str(token): {"content": content, **flags, "special": special}}


@pytest.mark.parametrize("file", ["tokenizer_config.json", "added_tokens.json"])
def test_tokens_that_only_another_file_has_are_added(file: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "added", padding=64)
    with load(folder) as llm:
        known = len(llm.tokenizer)
        think = llm.tokenizer.id_of("<think>")
    assert think is not None
    if file == "added_tokens.json":
        tokens = {"<|later|>": known + 1, "<|new|>": known, "<think>": think}
        (folder / file).write_text(json.dumps(tokens))
    else:
        decoder = added(known + 1, "<|later|>", special=False) | added(known, "<|new|>")
        decoder |= added(think, "<think>")
        change(folder, file, lambda config: config.update(added_tokens_decoder=decoder))
    with load(folder) as llm:
        ids = llm.tokenizer.encode("a<|new|>b<|later|>")
        assert ids[1::2] == [known, known + 1]
        assert llm.tokenizer.decode(ids) == "a<|new|>b<|later|>"
        assert len(llm.tokenizer) == known + 2
        certain = SamplingParams(temperature=0.0, logit_bias={known: 1000.0})
        assert llm.complete("a", sampling=certain, max_tokens=1).text == "<|new|>"


@pytest.mark.parametrize("kind", ["a gap", "another id", "taken"])
def test_a_token_with_another_id_is_refused_by_name(
    kind: str, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "odd")
    with load(tiny_folder) as llm:
        known = len(llm.tokenizer)
    decoder, complaint = {
        "a gap": (
            added(known + 1, "<|new|>"),
            rf"'<\|new\|>' as token {known + 1}, .* it is {known};",
        ),
        "another id": (
            added(5, "<think>"),
            "has '<think>' as token 5, and by tokenizer.json it is",
        ),
        "taken": (added(5, "<|new|>"), r"has '<\|new\|>' as token 5, and by tokenizer.json it is"),
    }[kind]
    change(
        folder, "tokenizer_config.json", lambda config: config.update(added_tokens_decoder=decoder)
    )
    with pytest.raises(CheckpointError, match=f"tokenizer_config.json.*{complaint}"):
        load(folder)


@pytest.mark.parametrize(
    "decoder", [5, {"5": 5}, {"x": {"content": "a"}}, {"5": {"content": None}}], ids=str
)
def test_added_tokens_that_are_none(decoder: Any, tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "odd")
    change(
        folder, "tokenizer_config.json", lambda config: config.update(added_tokens_decoder=decoder)
    )
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        load(folder)


# --- GPTQ, from a whole checkpoint --------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_gptq_becomes_what_its_words_say(version: int, tmp_path: Path) -> None:
    """Zeros of 0 among them, and groups of inputs in an order of their own (desc_act)."""
    plain = write_tiny(tmp_path / "plain", {**TINY, "hidden_size": 256, "intermediate_size": 256})
    weights = read_weights(plain)
    stored: dict[str, Stored] = {}
    for place, (name, array) in enumerate(sorted(weights.items())):
        if "proj" in name:
            outputs, inputs = array.shape
            tensors, matrix = make_gptq(inputs, outputs, 4, "permuted", place, version)
            stored |= {name.replace("weight", kind): tensor for kind, tensor in tensors.items()}
            weights[name] = mx.array(matrix)
        else:
            stored[name] = ("F32", np.array(array))
    mx.save_safetensors(str(plain / "model.safetensors"), weights)
    packed = shutil.copytree(plain, tmp_path / "packed")
    write_safetensors(packed / "model.safetensors", stored)
    section = {"quant_method": "gptq", "bits": 4, "desc_act": True, "sym": False}
    if version == 2:
        section["checkpoint_format"] = "gptq_v2"
    change(packed, "config.json", lambda config: config.update(quantization_config=section))
    convert(packed, tmp_path / "out", dequantize=True, dtype="float32")
    assert_close(logits(tmp_path / "out"), logits(plain), 0)


# --- what is refused before work ----------------------------------------------------------------


def test_a_report_compares_with_the_revision_that_was_converted(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[str | None] = []

    def fetch(place: Source, files: object) -> Path:
        if place.folder is None:
            asked.append(place._revision)
        return place.folder or tiny_folder

    monkeypatch.setattr(Source, "fetch", fetch)
    monkeypatch.setattr("qwen3_mlx.cli.convert.read_text", lambda _: "What is 1 + 2? " * 20)
    few = partial(compare, reading=ReadingOptions(tokens=100))
    monkeypatch.setattr("qwen3_mlx.cli.convert.compare", few)
    arguments = ["convert", "someone/tiny", str(tmp_path / "out"), "--revision", "v2", "--report"]
    code, _, err = call(arguments, capsys)
    assert code == 0, err
    assert set(asked) == {"v2"}
