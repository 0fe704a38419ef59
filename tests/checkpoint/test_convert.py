"""Conversion: the same bytes as mlx-lm's, in bounded memory, whole or not at all."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from qwen3_mlx import CheckpointError, Qwen3Error, load
from qwen3_mlx import convert as convert_folder
from qwen3_mlx.checkpoint import convert
from qwen3_mlx.checkpoint.convert import Job, Written, run
from qwen3_mlx.checkpoint.load import quantizable_shapes
from qwen3_mlx.checkpoint.recipes import choose_formats
from qwen3_mlx.files import ShardWriter, read_header, read_json
from qwen3_mlx.model.quantization import Format
from tests.support import (
    MOE,
    TINY,
    assert_close,
    moe_folder,
    random_ids,
    read_weights,
    write_tiny,
)

IDS = random_ids(20)
THREE = {"num_hidden_layers": 3}  # a first, an inner and a last one
UNTIED = {**TINY, **THREE, "tie_word_embeddings": False}
Weights = dict[str, mx.array]


def quiet(done: int, total: int) -> None:
    pass


def make_job(source: Path, output: Path, form: Format | None = None, **options: Any) -> Job:
    """Describe a conversion; bfloat16 unless `dtype` says otherwise, uniform unless `recipe`."""
    config = read_json(source / "config.json")
    recipe = options.pop("recipe", "uniform")
    formats = choose_formats(quantizable_shapes(config), recipe, form) if form else {}
    return Job(source, output, config, formats, options.pop("dtype", mx.bfloat16), **options)


def all_weights(folder: Path) -> Weights:
    weights: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        arrays: Any = mx.load(str(file))
        assert not weights.keys() & arrays.keys()
        weights |= arrays
    return weights


def assert_identical(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert mx.array_equal(found[name].view(mx.uint8), array.view(mx.uint8)), name


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def in_dtype(folder: Path, dtype: mx.Dtype) -> Path:
    """Store a checkpoint's floats in another dtype."""
    for file in folder.glob("*.safetensors"):
        arrays: Any = mx.load(str(file))
        arrays = {name: array.astype(dtype) for name, array in arrays.items()}
        mx.eval(arrays)
        mx.save_safetensors(str(file), arrays)
    return folder


def redundant_head(folder: Path) -> Path:
    """Give a tied checkpoint the copy of its embedding that the small published ones have."""
    weights = read_weights(folder)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {
    "tied": lambda folder: redundant_head(write_tiny(folder, {**TINY, **THREE})),
    "untied": lambda folder: write_tiny(folder, UNTIED),
    "moe": lambda folder: moe_folder(folder, {**MOE, **THREE}),
    "moe in two shards": lambda folder: moe_folder(folder, {**MOE, **THREE}, shards=2),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints in bfloat16, as published."""
    place = tmp_path_factory.mktemp("sources")
    return {kind: in_dtype(make(place / kind), mx.bfloat16) for kind, make in MAKERS.items()}


@pytest.fixture(scope="module")
def tied(sources: dict[str, Path]) -> Path:
    return sources["tied"]


@pytest.fixture(scope="module")
def lm() -> Any:
    """The reference."""
    return pytest.importorskip("mlx_lm.utils", reason="mlx-lm is the reference here")


def reference_logits(lm: Any, folder: Path) -> mx.array:
    model, _ = lm.load_model(folder)
    model.set_dtype(mx.float32)
    logits: mx.array = model(mx.array([IDS]))[0]
    return logits


def parameters(model: Any) -> Weights:
    named: Any = tree_flatten(model.parameters())
    return dict(named)


def our_logits(folder: Path) -> mx.array:
    with load(folder, dtype="float32", dequantize=False) as llm:
        return llm.logits(IDS)


# --- the same as mlx-lm -------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", MAKERS)
def test_the_same_as_mlx_lm(
    kind: str, bits: int, sources: dict[str, Path], tmp_path: Path, lm: Any
) -> None:
    model, _ = lm.load_model(sources[kind])
    model, config = lm.quantize_model(model, read_json(sources[kind] / "config.json"), 64, bits)
    lm.save_model(tmp_path / "expected", model)
    output = tmp_path / "found"
    written = run(make_job(sources[kind], output, Format(bits, 64)), quiet)
    weights = read_weights(output)
    assert_identical(weights, read_weights(tmp_path / "expected"))
    found = read_json(output / "config.json")
    for key in ("quantization", "quantization_config"):
        usual = {"group_size": 64, "bits": bits, "mode": "affine"}
        assert {name: found[key][name] for name in usual} == usual
        others = {path: {**usual, **form} for path, form in config[key].items() if "." in path}
        assert found[key].items() <= {**usual, **others}.items()  # mlx-lm names also the usual
        assert all(found[key].get(path, usual) == form for path, form in others.items())
    assert_close(our_logits(output), reference_logits(lm, output), 1e-4)
    original, _ = lm.load_model(sources[kind])
    count = sum(array.size for array in parameters(original).values())
    total = sum(array.nbytes for array in weights.values())
    assert written == Written(len(weights), count, total)
    assert written.bits_per_weight == pytest.approx(8 * total / count)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_other_modes_are_the_same_as_mlx_lm(mode: str, tied: Path, tmp_path: Path, lm: Any) -> None:
    group, bits = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}[mode]
    model, _ = lm.load_model(tied)
    model, _ = lm.quantize_model(model, read_json(tied / "config.json"), group, bits, mode)
    lm.save_model(tmp_path / "expected", model)
    run(make_job(tied, tmp_path / "found", Format(bits, group, mode)), quiet)
    assert_identical(read_weights(tmp_path / "found"), read_weights(tmp_path / "expected"))
    assert_close(our_logits(tmp_path / "found"), reference_logits(lm, tmp_path / "found"), 1e-4)


@pytest.mark.parametrize("kind", ["untied", "moe"])
def test_mixed_formats_are_read_by_both(
    kind: str, sources: dict[str, Path], tmp_path: Path, lm: Any
) -> None:
    output = tmp_path / "mixed"
    job = make_job(sources[kind], output, Format(3, 32), recipe="mixed-rich")
    assert len({form for form in job.formats.values() if form}) == (3 if kind == "moe" else 2)
    run(job, quiet)
    section = read_json(output / "config.json")["quantization"]
    usual = {key: section[key] for key in ("group_size", "bits", "mode")}
    modules = {name.rpartition(".")[0] for name in read_weights(output) if "scales" in name}
    for path in modules:
        form = job.formats[path]
        assert form is not None
        assert section.get(path, usual) == form.as_config()
    assert {path for path in section if "." in path or path == "lm_head"} <= modules
    assert_close(our_logits(output), reference_logits(lm, output), 1e-4)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize("kind", ["tied", "moe in two shards"])
def test_plain_dtypes(
    kind: str, dtype: mx.Dtype, sources: dict[str, Path], tmp_path: Path, lm: Any
) -> None:
    output = tmp_path / "plain"
    run(make_job(sources[kind], output, dtype=dtype), quiet)
    model, _ = lm.load_model(sources[kind])
    expected = {name: array.astype(dtype) for name, array in parameters(model).items()}
    assert_identical(read_weights(output), expected)
    config = read_json(output / "config.json")
    assert config["torch_dtype"] == str(dtype).removeprefix("mlx.core.")
    assert "quantization" not in config
    assert "quantization_config" not in config
    assert_close(our_logits(output), reference_logits(lm, output), 1e-4)


@pytest.mark.parametrize("kind", ["tied", "moe"])
def test_back_to_plain_numbers(
    kind: str, sources: dict[str, Path], tmp_path: Path, lm: Any
) -> None:
    quantized, plain = tmp_path / "quantized", tmp_path / "plain"
    run(make_job(sources[kind], quantized, Format(5, 32), dtype=mx.float32), quiet)
    run(make_job(quantized, plain, dtype=mx.float32), quiet)
    assert "quantization" not in read_json(plain / "config.json")
    assert_close(our_logits(plain), our_logits(quantized), 1e-4)
    assert_close(reference_logits(lm, plain), reference_logits(lm, quantized), 1e-4)
    again = tmp_path / "again"
    run(make_job(quantized, again, Format(4, 64)), quiet)  # from one format to another
    assert_close(our_logits(again), reference_logits(lm, again), 1e-4)


@pytest.mark.parametrize("kind", ["tied", "moe"])
@pytest.mark.parametrize("yarn", [False, True])
def test_the_newer_spelling_becomes_readable_by_mlx_lm(
    kind: str, yarn: bool, sources: dict[str, Path], tmp_path: Path, lm: Any
) -> None:
    newer, older = (shutil.copytree(sources[kind], tmp_path / name) for name in ("new", "old"))
    config = read_json(newer / "config.json")
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    config["rope_scaling"] = scaling if yarn else None
    (older / "config.json").write_text(json.dumps(config))
    del config["torch_dtype"], config["rope_scaling"]
    config["dtype"] = "bfloat16"
    rope = scaling if yarn else {"rope_type": "default"}
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), **rope}
    if "num_experts" in config:
        config["num_local_experts"] = config.pop("num_experts")
    (newer / "config.json").write_text(json.dumps(config))
    run(make_job(newer, tmp_path / "found", Format(4, 64)), quiet)
    run(make_job(older, tmp_path / "expected", Format(4, 64)), quiet)
    assert_identical(read_weights(tmp_path / "found"), read_weights(tmp_path / "expected"))
    reference = reference_logits(lm, tmp_path / "found")
    assert_close(reference, reference_logits(lm, tmp_path / "expected"), 0)
    assert_close(our_logits(tmp_path / "found"), our_logits(tmp_path / "expected"), 0)
    if not (yarn and kind == "moe"):  # mlx-lm does not apply YaRN to these
        assert_close(our_logits(tmp_path / "found"), reference, 1e-4)


@pytest.mark.parametrize("kind", ["tied", "moe"])
@pytest.mark.parametrize("value", ["missing", None])
def test_defaults_are_stated_for_mlx_lm(
    kind: str, value: str | None, sources: dict[str, Path], tmp_path: Path, lm: Any
) -> None:
    source = shutil.copytree(sources[kind], tmp_path / "source")
    config = read_json(source / "config.json")
    own = ("rms_norm_eps", "rope_theta", "max_position_embeddings", "attention_bias")
    experts = ("decoder_sparse_step", "mlp_only_layers", "norm_topk_prob", "num_experts_per_tok")
    for key in (*own, *experts, *(["tie_word_embeddings"] if kind == "moe" else [])):
        config.pop(key, None)
        if value is None:
            config[key] = None
    if kind == "moe":  # whose head_dim is by default the hidden size over the heads
        config |= {"head_dim": None, "num_attention_heads": 1, "num_key_value_heads": 1}
        source = write_tiny(tmp_path / "experts", config)
    (source / "config.json").write_text(json.dumps(config))
    convert_folder(source, tmp_path / "out", dtype="float32")
    assert_close(our_logits(tmp_path / "out"), reference_logits(lm, tmp_path / "out"), 1e-4)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"rope_type": None, "type": "yarn", "factor": 4.0, "beta_fast": None}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5000.0}},
    ],
)
def test_yarn_is_stated_as_mlx_lm_reads_it(
    rope: dict[str, Any], tied: Path, tmp_path: Path, lm: Any
) -> None:
    source = shutil.copytree(tied, tmp_path / "source")
    config = {**read_json(source / "config.json"), **rope}  # with a rope_theta of its own, too
    (source / "config.json").write_text(json.dumps(config))
    convert_folder(source, tmp_path / "out", dtype="float32", dequantize=True)
    found = our_logits(tmp_path / "out")
    assert_close(found, our_logits(source), 1e-4)
    assert_close(found, reference_logits(lm, tmp_path / "out"), 1e-4)


# --- files --------------------------------------------------------------------------------------


def test_what_goes_with_the_weights(tied: Path, tmp_path: Path) -> None:
    source, output = shutil.copytree(tied, tmp_path / "source"), tmp_path / "output"
    carried = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE")
    (source / "LICENSE").write_text("free")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    for name in carried:
        (source / name).chmod(0o444)
    run(make_job(source, output, Format(4, 64), card=lambda job, written: "# Card"), quiet)
    for name in (*carried, "generation_config.json"):
        assert (output / name).read_bytes() == (source / name).read_bytes()
    assert (output / "README.md").read_text() == "# Card"
    made = {"README.md", "config.json", "model.safetensors", "generation_config.json"}
    assert {file.name for file in output.iterdir()} == made | set(carried)
    original, config = (read_json(folder / "config.json") for folder in (source, output))
    assert {key: config[key] for key in original} == original


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards, and several blocks a tensor, of the tiny checkpoints."""
    monkeypatch.setattr(convert, "_SHARD_BYTES", 60_000)
    monkeypatch.setattr(convert, "_BLOCK", 1 << 13)


@pytest.mark.parametrize("kind", ["tied", "moe in two shards"])
def test_several_shards(
    kind: str, small: None, sources: dict[str, Path], tmp_path: Path, lm: Any
) -> None:
    output = tmp_path / "output"
    written = run(make_job(sources[kind], output, Format(4, 64)), quiet)
    files = sorted(output.glob("*.safetensors"))
    assert len(files) >= 3
    names = [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    assert [file.name for file in files] == names
    index = read_json(output / "model.safetensors.index.json")
    assert index["weight_map"] == {name: file.name for file in files for name in read_header(file)}
    assert index["metadata"] == {"total_size": written.bytes, "total_parameters": written.weights}
    for file in files:
        entries = read_header(file).values()
        assert sum(entry.nbytes for entry in entries) <= 60_000 or len(entries) == 3
    whole = tmp_path / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "_SHARD_BYTES", 1 << 30)
        patch.setattr(convert, "_BLOCK", 1 << 23)
        run(make_job(sources[kind], whole, Format(4, 64)), quiet)
    assert_identical(all_weights(output), read_weights(whole))
    assert_close(our_logits(output), reference_logits(lm, output), 1e-4)


@pytest.mark.parametrize("block", [1, 1 << 14, 1 << 30])
def test_the_size_of_blocks_changes_nothing(
    block: int, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(sources["moe"], tmp_path / "expected", Format(4, 32), recipe="mixed")
    run(job, quiet)
    monkeypatch.setattr(convert, "_BLOCK", block)
    run(replace(job, output=tmp_path / "found"), quiet)
    assert contents(tmp_path / "found") == contents(tmp_path / "expected")


def test_progress_counts_bytes(small: None, tied: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    job = make_job(tied, tmp_path / "output", Format(4, 64))
    written = run(job, lambda *state: told.append(state))
    assert told[0] == (0, written.bytes)
    assert told[-1] == (written.bytes, written.bytes)
    assert told == sorted(told)
    assert len(told) > 20


# --- interrupted --------------------------------------------------------------------------------


class Stop:
    """Interrupts a conversion when it tells of its progress for the nth time."""

    def __init__(self, nth: int) -> None:
        self._left = nth

    def __call__(self, done: int, total: int) -> None:
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt


def nothing_finished(output: Path) -> bool:
    """Say that there is no result, and that what is there holds only whole shards and the state."""
    partial = convert.partial_folder(output)
    left = {file.name for file in partial.iterdir()} if partial.exists() else set()
    whole = all(name.endswith(".safetensors") or name == "conversion.json" for name in left)
    for name in left - {"conversion.json"}:
        read_header(partial / name)
    return not output.exists() and whole and (len(left) != 1)


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Tell the shards' files apart from others of the same name."""
    files = folder.glob("*.safetensors")
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


@pytest.mark.parametrize("seed", range(3))
def test_interrupted_and_resumed_is_uninterrupted(
    seed: int, small: None, sources: dict[str, Path], tmp_path: Path
) -> None:
    dice = random.Random(seed)
    source = sources["tied" if seed else "moe in two shards"]
    job = make_job(source, tmp_path / "output", Format(4, 64), card=lambda job, written: "# Card")
    calls: list[int] = []
    run(replace(job, output=tmp_path / "expected"), lambda done, total: calls.append(done))
    finished: dict[str, tuple[int, int]] = {}
    interruptions = 0
    while interruptions < 10:
        stop = Stop(dice.randint(1, max(3, len(calls) // 8)))
        try:
            run(job, stop)
            break
        except KeyboardInterrupt:
            interruptions += 1
        assert nothing_finished(job.output)
        now = stamps(convert.partial_folder(job.output))
        assert finished.items() <= now.items()
        finished = now
    assert interruptions > 5
    if not job.output.exists():
        told: list[int] = []
        run(job, lambda done, total: told.append(done))
        sizes = {
            file.name: sum(entry.nbytes for entry in read_header(file).values())
            for file in job.output.glob("*.safetensors")
        }
        assert told[0] == sum(sizes[name] for name in finished)
    assert finished.items() <= stamps(job.output).items()
    assert contents(job.output) == contents(tmp_path / "expected")
    assert not convert.partial_folder(job.output).exists()


def change_dtype(job: Job) -> Job:
    return replace(job, dtype=mx.float16)


def change_bits(job: Job) -> Job:
    return make_job(job.source, job.output, Format(8, 64))


def change_source(job: Job) -> Job:
    in_dtype(job.source, mx.float16)
    return job


@pytest.mark.parametrize("change", [change_dtype, change_bits, change_source])
def test_another_job_starts_anew(
    change: Callable[[Job], Job], small: None, tied: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(tied, tmp_path / "source")
    job = make_job(source, tmp_path / "output", Format(4, 64))
    with pytest.raises(KeyboardInterrupt):
        run(job, Stop(40))
    assert stamps(convert.partial_folder(job.output))
    job = change(job)
    told: list[int] = []
    run(job, lambda done, total: told.append(done))
    assert told[0] == 0
    run(replace(job, output=tmp_path / "expected"), quiet)
    assert contents(job.output) == contents(tmp_path / "expected")


def test_interrupted_before_the_first_shard_leaves_nothing(tied: Path, tmp_path: Path) -> None:
    for nth in (1, 2, 5):
        with pytest.raises(KeyboardInterrupt):
            run(make_job(tied, tmp_path / "output", Format(4, 64)), Stop(nth))
        assert list(tmp_path.iterdir()) == []


def test_interrupted_among_the_last_files(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tied, tmp_path / "output", Format(4, 64))

    def interrupted(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "copyfile", interrupted)
        run(job, quiet)
    before = stamps(convert.partial_folder(job.output))
    assert before
    assert not job.output.exists()
    run(job, quiet)
    assert stamps(job.output) == before
    assert "conversion.json" not in contents(job.output)


# --- what fails ---------------------------------------------------------------------------------


def spoil(folder: Path, name: str, values: list[float]) -> Path:
    weights = read_weights(folder)
    spoilt = np.array(weights[name].astype(mx.float32))
    spoilt.flat[: len(values)] = values
    weights[name] = mx.array(spoilt).astype(weights[name].dtype)
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


NONFINITE = [float("nan"), float("inf"), -float("inf"), 1.0, -float("nan")]


@pytest.mark.parametrize("form", [None, Format(4, 64)])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize("values", [NONFINITE, NONFINITE[:1], NONFINITE[1:2], NONFINITE[2:3]])
def test_numbers_that_are_none(
    values: list[float], dtype: mx.Dtype, form: Format | None, tied: Path, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    source = spoil(shutil.copytree(tied, tmp_path / "source"), name, values)
    job = make_job(source, tmp_path / "output", form, dtype=dtype)
    count = sum(not np.isfinite(value) for value in values)
    told = rf"^model\.layers\.1\.mlp\.up_proj\.weight has NaN or infinity in {count} places"
    with pytest.raises(CheckpointError, match=told) as raised:
        run(job, quiet)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == [source]


def test_numbers_that_are_none_are_counted_over_blocks(
    small: None, tied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    source = shutil.copytree(tied, tmp_path / "source")
    rows = read_weights(source)[name].size
    spoil(source, name, [float("nan")] * rows)
    spoil(source, "model.layers.2.input_layernorm.weight", [float("inf")])
    job = make_job(source, tmp_path / "output", Format(8, 64))
    with pytest.raises(CheckpointError, match=f"up_proj.weight has .* in {rows:,} places"):
        run(job, quiet)
    assert list(tmp_path.iterdir()) == [source]
    assert not caplog.records
    run(replace(job, allow_nonfinite=True), quiet)
    assert "up_proj.weight has NaN or infinity in 8,192 places" in caplog.text
    assert "input_layernorm.weight has NaN or infinity in 1 places" in caplog.text
    norm = all_weights(job.output)["model.layers.2.input_layernorm.weight"]
    assert mx.isinf(norm).sum().item() == 1


@pytest.mark.heavy
def test_the_recipe_auto_does_not_measure_what_is_not_finite(tied: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tied, tmp_path / "source")
    spoil(source, "model.layers.1.mlp.up_proj.weight", [float("nan")])
    options: dict[str, Any] = {"recipe": "auto", "target_bpw": 4.6, "allow_nonfinite": True}
    text = "What is 12 + 34? " * 200
    with pytest.raises(CheckpointError, match="auto cannot measure weights with NaN or infinity"):
        convert_folder(source, tmp_path / "output", calibration=text, **options)


def test_numbers_beyond_float16_are_told(tied: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tied, tmp_path / "source")
    spoil(source, "model.norm.weight", [1e6, 2.0, -1e30])
    run(make_job(source, tmp_path / "fine"), quiet)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight .* in 2 places as float16"):
        run(make_job(source, tmp_path / "output", dtype=mx.float16), quiet)


def fill_after(monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """Let the disk be full after so many writes."""
    append, left = ShardWriter.append, [writes]

    def limited(self: ShardWriter, name: str, rows: mx.array) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        append(self, name, rows)

    monkeypatch.setattr(ShardWriter, "append", limited)


def test_a_full_disk_keeps_what_is_finished(small: None, tied: Path, tmp_path: Path) -> None:
    job = make_job(tied, tmp_path / "output", Format(4, 64))
    with pytest.MonkeyPatch.context() as patch:
        fill_after(patch, 60)
        with pytest.raises(Qwen3Error, match="failed: No space left on device"):
            run(job, quiet)
    assert nothing_finished(job.output)
    kept = stamps(convert.partial_folder(job.output))
    assert kept
    run(job, quiet)
    assert kept.items() <= stamps(job.output).items()
    run(replace(job, output=tmp_path / "expected"), quiet)
    assert contents(job.output) == contents(tmp_path / "expected")


def test_a_full_disk_before_anything_is_finished(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_after(monkeypatch, 60)
    with pytest.raises(Qwen3Error, match="failed: No space left on device"):
        run(make_job(tied, tmp_path / "output", Format(4, 64)), quiet)
    assert list(tmp_path.iterdir()) == []


class Usage(NamedTuple):
    """What `shutil.disk_usage` tells."""

    total: int
    used: int
    free: int


def test_too_little_room_is_told_before_work(
    tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10, 0, 10))
    told: list[int] = []
    with pytest.raises(Qwen3Error, match=r"takes 0\.00 GB more and the disk of .* has 0\.00 GB"):
        run(make_job(tied, tmp_path / "output"), lambda done, total: told.append(done))
    assert not told
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_shrinks_while_it_is_read(tied: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tied, tmp_path / "source")
    file = source / "model.safetensors"

    def shrink(done: int, total: int) -> None:
        file.write_bytes(file.read_bytes()[:50_000])

    with pytest.raises(CheckpointError, match="become shorter"):
        run(make_job(source, tmp_path / "output", Format(4, 64)), shrink)
    assert list(tmp_path.iterdir()) == [source]


def test_weights_and_config_that_do_not_match(tied: Path, tmp_path: Path) -> None:
    job = make_job(tied, tmp_path / "output", Format(4, 64))
    with pytest.raises(CheckpointError, match="do not match; missing: model.layers.3"):
        run(replace(job, config={**job.config, "num_hidden_layers": 4}), quiet)
    with pytest.raises(CheckpointError, match="misshapen: .*down_proj.weight is"):
        run(replace(job, config={**job.config, "intermediate_size": 64}), quiet)
    with pytest.raises(CheckpointError, match="missing: .*bias"):
        run(replace(job, config={**job.config, "attention_bias": True}), quiet)
    assert list(tmp_path.iterdir()) == []


# --- places -------------------------------------------------------------------------------------


def test_places_that_are_not_written_to(tied: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tied, tmp_path / "source")
    before = contents(source)
    job = make_job(source, source / "inside", Format(4, 64), force=True)
    for output in (source, source / "inside", source / "a" / "b", tmp_path / "x" / ".." / "source"):
        with pytest.raises(Qwen3Error, match="lies in the source"):
            run(replace(job, output=output), quiet)
    with pytest.raises(Qwen3Error, match="is not a checkpoint folder"):
        run(replace(job, output=tmp_path), quiet)
    with pytest.raises(Qwen3Error, match="cannot be the output folder"):
        run(replace(job, output=Path("/")), quiet)
    link = tmp_path / "link"
    link.symlink_to(source)
    with pytest.raises(Qwen3Error, match="lies in the source"):
        run(replace(job, output=link), quiet)
    file = tmp_path / "file"
    file.write_text("precious")
    for force in (False, True):
        with pytest.raises(Qwen3Error, match="exists|is not a checkpoint"):
            run(replace(job, output=file, force=force), quiet)
    assert contents(source) == before
    assert {place.name for place in tmp_path.iterdir()} == {"source", "link", "file"}
    assert file.read_text() == "precious"


@pytest.mark.parametrize("suffix", ["partial", "replaced"])
def test_a_source_where_the_work_would_be_is_safe(suffix: str, tied: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tied, tmp_path / f"model.{suffix}")
    before = contents(source)
    with pytest.raises(Qwen3Error, match="as a working folder"):
        run(make_job(source, tmp_path / "model", Format(4, 64), force=True), quiet)
    assert contents(source) == before


def test_a_strangers_folder_where_the_work_would_be_is_safe(tied: Path, tmp_path: Path) -> None:
    job = make_job(tied, tmp_path / "model", Format(4, 64), force=True)
    strange = tmp_path / "model.partial"
    strange.mkdir()
    (strange / "thesis.txt").write_text("precious")
    with pytest.raises(Qwen3Error, match="something else is there; move it away"):
        run(job, quiet)
    assert contents(strange) == {"thesis.txt": b"precious"}
    shutil.rmtree(strange)
    strange.write_text("precious")
    with pytest.raises(Qwen3Error, match="something else is there; move it away"):
        run(job, quiet)
    strange.unlink()
    strange.mkdir()
    run(job, quiet)


def test_only_a_checkpoint_is_replaced_and_only_by_force(tied: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    job = make_job(tied, output, Format(4, 64))
    run(job, quiet)  # an empty folder is no obstacle
    first = contents(output)
    with pytest.raises(Qwen3Error, match=r"exists; --force \(force=True\) replaces it"):
        run(replace(job, dtype=mx.float16), quiet)
    assert contents(output) == first
    (output / "notes.txt").write_text("of the old one")
    run(replace(job, dtype=mx.float16, force=True), quiet)
    assert "notes.txt" not in contents(output)
    assert read_json(output / "config.json")["torch_dtype"] == "float16"
    assert list(tmp_path.iterdir()) == [output]
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", "index.js"):
        (other / name).write_text("{}")
        with pytest.raises(Qwen3Error, match="is not a checkpoint folder, so it is not replaced"):
            run(replace(job, output=other, force=True), quiet)
    assert contents(other) == {"config.json": b"{}", "index.js": b"{}"}


def test_the_old_one_is_kept_where_the_new_one_fails(tied: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    job = make_job(tied, output, Format(4, 64), force=True)
    run(job, quiet)
    before = contents(output)
    source = spoil(shutil.copytree(tied, tmp_path / "source"), "model.norm.weight", NONFINITE)
    with pytest.raises(CheckpointError):
        run(replace(job, source=source), quiet)
    with pytest.raises(KeyboardInterrupt):
        run(replace(job, dtype=mx.float16), Stop(5))
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(13, "Permission denied")
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(Qwen3Error, match="failed: Permission denied"):
            run(replace(job, dtype=mx.float16), quiet)
    assert contents(output) == before
    run(replace(job, dtype=mx.float16), quiet)  # goes on
    assert contents(output) != before
    assert {place.name for place in tmp_path.iterdir()} == {"output", "source"}


def test_a_run_cut_short_while_it_replaced_is_no_obstacle(tied: Path, tmp_path: Path) -> None:
    job = make_job(tied, tmp_path / "output", Format(4, 64), force=True)
    run(job, quiet)
    shutil.copytree(job.output, tmp_path / "output.replaced")
    run(job, quiet)
    assert list(tmp_path.iterdir()) == [job.output]


def test_here(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tied, tmp_path / "expected", Format(4, 64))
    run(job, quiet)
    for place in (Path(), Path("..") / "b"):
        work = tmp_path / ("a" if place == Path() else "b")
        work.mkdir()
        monkeypatch.chdir(work)
        run(replace(job, output=place), quiet)
        assert contents(work) == contents(job.output)


def test_missing_parents_are_made(tied: Path, tmp_path: Path) -> None:
    job = make_job(tied, tmp_path / "a" / "b", Format(4, 64))
    run(job, quiet)
    assert (job.output / "config.json").is_file()
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(Qwen3Error, match=r"b\.partial cannot be written: Not a directory"):
        run(replace(job, output=blocked / "b"), quiet)
