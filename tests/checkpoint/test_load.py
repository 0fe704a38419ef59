"""From files to a model: every format that MLX writes, and a sentence for every broken folder."""

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from qwen3_mlx import CheckpointError, backend, load
from qwen3_mlx.checkpoint.hub import Source
from qwen3_mlx.checkpoint.load import LoadOptions, load_model
from qwen3_mlx.checkpoint.stored import StoredFormats
from qwen3_mlx.checkpoint.weights import Weights
from qwen3_mlx.engine.overflow_check import overflows
from qwen3_mlx.files import read_json
from qwen3_mlx.model.quantization import Format
from qwen3_mlx.model.qwen3 import Qwen3
from tests.support import (
    DEMO,
    MOE,
    TINY,
    assert_close,
    make_model,
    moe_folder,
    random_ids,
    read_weights,
    write_tiny,
)

IDS = random_ids(20)
FORMATS = [
    *({"bits": bits, "group_size": 64} for bits in (2, 3, 4, 5, 6, 8)),
    {"bits": 4, "group_size": 32},
    {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    {"bits": 8, "group_size": 32, "mode": "mxfp8"},
    {"bits": 4, "group_size": 16, "mode": "nvfp4"},
]


def logits(folder: Path, **options: Any) -> mx.array:
    with load(folder, **options) as llm:
        return llm.logits(IDS)


def quantize_folder(source: Path, target: Path, predicate: Any, section: dict[str, Any]) -> Path:
    """Write an MLX-quantized copy of a checkpoint, with MLX's own functions."""
    shutil.copytree(source, target)
    config = read_json(source / "config.json")
    model = load_model(config, Weights(source), LoadOptions(mx.float32), lambda *_: None)
    plain = Qwen3(model.config)
    plain.update(model.parameters())
    nn.quantize(plain, class_predicate=predicate)
    weights = plain.tensors()
    mx.save_safetensors(str(target / "model.safetensors"), weights, metadata={"format": "mlx"})
    (target / "config.json").write_text(json.dumps({**config, **section}))
    return target


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: "-".join(map(str, form.values())))
def test_quantized_checkpoints_load(
    form: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    folder = quantize_folder(
        tiny_folder,
        tmp_path / "quantized",
        lambda path, module: form if hasattr(module, "to_quantized") else False,
        {"quantization": form},
    )
    kept, plain = logits(folder, dequantize=False), logits(folder, dequantize=True)
    assert_close(kept, plain, 1e-4)
    assert 0 < float(mx.abs(kept - logits(tiny_folder)).max()) < 60 / 2 ** min(form["bits"], 6)


def test_overrides_by_module_and_the_old_spelling(tiny_folder: Path, tmp_path: Path) -> None:
    special = {"bits": 8, "group_size": 32}
    general = {"bits": 4, "group_size": 64}

    def form(path: str, module: nn.Module) -> Any:
        if not hasattr(module, "to_quantized") or path.endswith("v_proj"):
            return False
        return special if path.endswith("down_proj") else general

    downs = {f"model.layers.{n}.mlp.down_proj": special for n in range(3)}
    for key in ("quantization", "quantization_config"):
        folder = quantize_folder(
            tiny_folder, tmp_path / key, form, {key: {**general, **downs, "mode": "affine"}}
        )
        with load(folder, dequantize=False) as llm:
            layer = llm.model.layers[0]
            assert (layer.mlp.down_proj.bits, layer.mlp.down_proj.group_size) == (8, 32)
            assert layer.mlp.up_proj.bits == 4
            assert isinstance(layer.self_attn.v_proj, nn.Linear)
            assert_close(llm.logits(IDS), logits(folder, dequantize=True), 1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_quantizing_while_loading_is_quantizing_before(
    bits: int, tiny_folder: Path, tmp_path: Path
) -> None:
    form = {"bits": bits, "group_size": 64}
    folder = quantize_folder(
        tiny_folder,
        tmp_path / "quantized",
        lambda path, module: form if hasattr(module, "to_quantized") else False,
        {"quantization": form},
    )
    found = logits(tiny_folder, bits=bits, dequantize=False)
    assert_close(found, logits(folder, dequantize=False))
    assert_close(found, logits(tiny_folder, bits=bits, dequantize=True), 1e-4)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_published_experts_are_stacked(shards: int, tmp_path: Path) -> None:
    folder = moe_folder(tmp_path / "moe", shards=shards)
    stacked = write_tiny(tmp_path / "stacked", MOE)
    assert_close(logits(folder), logits(stacked))
    (folder / "model.safetensors.index.json").unlink()  # the numbers of the files will do
    assert_close(logits(folder), logits(stacked))


def test_the_router_keeps_eight_bits(tmp_path: Path) -> None:
    with load(moe_folder(tmp_path / "moe"), bits=2, dequantize=False) as llm:
        layer = llm.model.layers[0].mlp
        assert layer.gate.bits == 8
        assert layer.switch_mlp.up_proj.bits == 2
        assert llm.model.lm_head.bits == 2


def test_rows_that_do_not_fit_the_group_are_told(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(tiny_folder, bits=4, group_size=128).close()
    assert "model.embed_tokens" in caplog.text and "mlp.down_proj" not in caplog.text
    caplog.clear()
    load(tiny_folder, bits=4).close()
    assert not caplog.text


def test_the_dtype_asked_for(tiny_folder: Path) -> None:
    with load(tiny_folder, dtype="float16") as llm:
        assert llm.model.model.norm.weight.dtype == mx.float16
    with pytest.raises(ValueError, match="dtype must be one of bfloat16, float16, float32"):
        load(tiny_folder, dtype="float64")


@pytest.mark.heavy
def test_the_dtype_auto_is_float16_only_where_it_is_faster_and_safe(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dtype_of(folder: Path, **options: Any) -> mx.Dtype:
        with load(folder, dtype="auto", **options) as llm:
            assert llm.complete("Hello", max_tokens=2).usage.completion_tokens
            dtype: mx.Dtype = llm.model.model.norm.weight.dtype
            return dtype

    assert dtype_of(tiny_folder) == backend.compute_dtype()
    monkeypatch.setattr(backend, "emulates_bfloat16", lambda: True)
    disk = tmp_path / "prompts"
    assert dtype_of(tiny_folder, prompt_cache=disk) == mx.float16
    # Of one layer's output a number in bfloat16's range is beyond that of float16.
    weights = read_weights(tiny_folder)
    down = weights["model.layers.0.mlp.down_proj.weight"]
    weights["model.layers.0.mlp.down_proj.weight"] = 2e5 * down
    large = shutil.copytree(tiny_folder, tmp_path / "large")
    mx.save_safetensors(str(large / "model.safetensors"), weights)
    assert dtype_of(large) == mx.bfloat16
    assert dtype_of(tiny_folder, draft=large) == mx.bfloat16
    with load(large, dtype="float16") as llm, pytest.raises(CheckpointError, match="float16"):
        llm.complete("Hello", max_tokens=2)


@pytest.mark.parametrize("config", [TINY, MOE], ids=["dense", "moe"])
def test_float16_is_left_before_the_feed_forward_overflows_within(config: dict[str, Any]) -> None:
    model, ids = make_model(config), random_ids(50)
    if config is TINY:  # MLX's CPU build has experts in float32 alone
        model.set_dtype(mx.float16)
    block = model.layers[1].mlp
    projections = block.get("switch_mlp", block)
    doublings = 0
    while not overflows(model, ids):  # the outputs of the layers stay as they are
        projections.up_proj.weight *= 2
        projections.down_proj.weight /= 2
        doublings += 1
    assert doublings > 10
    assert mx.isfinite(model(mx.array([ids]))).all()  # it might have been taken


@pytest.mark.parametrize(
    ("architecture", "emulates"),
    [("applegpu_g13s", True), ("applegpu_g14g", True), ("applegpu_g15d", False), ("sm_90", False)],
)
def test_the_chips_that_emulate_bfloat16(
    architecture: str, emulates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": architecture})
    monkeypatch.setattr(backend, "on_gpu", lambda: True)
    monkeypatch.setattr(mx.metal, "is_available", lambda: architecture.startswith("applegpu"))
    assert backend.emulates_bfloat16() == emulates


def test_a_redundant_head_of_tied_models_is_dropped(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "redundant")
    weights = read_weights(folder)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    assert_close(logits(folder), logits(tiny_folder))


def test_agrees_with_mlx_lm(tmp_path: Path, tiny_folder: Path) -> None:
    mlx_lm = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is the reference here")
    original, _ = mlx_lm.load_model(tiny_folder)
    assert_close(logits(tiny_folder), original(mx.array([IDS]))[0], 1e-4)
    converted = tmp_path / "mlx-lm"
    config = read_json(tiny_folder / "config.json")
    model, config = mlx_lm.quantize_model(original, config, 64, 4)
    mlx_lm.save_model(converted, model)
    mlx_lm.save_config(config, converted / "config.json")
    shutil.copy(DEMO / "tokenizer.json", converted)
    expected = model(mx.array([IDS]))[0]
    assert_close(logits(converted, dequantize=False), expected, 1e-4)
    assert_close(logits(converted), expected, 1e-4)


# --- memory -------------------------------------------------------------------------------------

WIDE = {**TINY, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}


def peak_while_loading(folder: Path, options: LoadOptions) -> tuple[int, int]:
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load_model(read_json(folder / "config.json"), Weights(folder), options, lambda *_: None)
    held = sum(value.nbytes for value in model.tensors().values())
    return mx.get_peak_memory() - before, held


def test_loading_holds_little_beside_the_result(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "wide", WIDE)
    form = {"bits": 4, "group_size": 64}
    folder = quantize_folder(
        source,
        tmp_path / "quantized",
        lambda path, module: form if hasattr(module, "to_quantized") else False,
        {"quantization": form},
    )
    size = (folder / "model.safetensors").stat().st_size
    options = LoadOptions(mx.float32, dequantize=False)
    peak, _ = peak_while_loading(folder, options)
    assert peak <= 1.15 * size
    largest = 512 * 2048 * 4
    options = LoadOptions(mx.float32, quantize=Format(4, 64), dequantize=False)
    peak, held = peak_while_loading(source, options)
    assert peak <= held + 1.1 * largest


# --- what is refused ----------------------------------------------------------------------------


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))

    return edit


def edit_weights(change: Callable[[dict[str, mx.array]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = read_weights(folder)
        change(weights)
        mx.eval(weights)
        mx.save_safetensors(str(folder / "model.safetensors"), weights)

    return edit


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def break_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:8] + b"}" + raw[9:])


def cut_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 10_000) + b"{}")


def edit_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change what the weight file says of itself, and leave its data as it is."""

    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return edit


def edit_entry(**changes: Any) -> Callable[[Path], None]:
    return edit_header(lambda header: header["model.norm.weight"].update(changes))


def twice_in_two_files(folder: Path) -> None:
    weights = read_weights(folder)
    (folder / "model.safetensors").unlink()
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    mx.save_safetensors(str(folder / first), weights)
    mx.save_safetensors(str(folder / second), {"model.norm.weight": mx.zeros(64)})


def as_integers(weights: dict[str, mx.array]) -> None:
    weights["model.norm.weight"] = mx.zeros(64, dtype=mx.int16)


def npz(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model.npz"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def point_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lose_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def only(name: str, **content: Any) -> Callable[[Path], None]:
    """Leave nothing but one file, with this JSON in it."""

    def edit(folder: Path) -> None:
        empty(folder)
        (folder / name).write_text(json.dumps(content))

    return edit


def add_a_shard(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")


def two_sets(folder: Path) -> None:
    add_a_shard(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00003.safetensors")


def whole_beside_index(folder: Path) -> None:
    """Leave weights in one file, and others in a shard that an index names."""
    shard = "model-00001-of-00001.safetensors"
    shutil.copy(folder / "model.safetensors", folder / shard)
    index = {"weight_map": dict.fromkeys(read_weights(folder), shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def prefix(weights: dict[str, mx.array], words: str) -> None:
    """Give all names a prefix."""
    named = {words + name: weights[name] for name in weights}
    weights.clear()
    weights.update(named)


def three_wrongs(weights: dict[str, mx.array]) -> None:
    del weights["model.norm.weight"], weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.extra.weight"] = mx.zeros(3)
    weights["model.layers.0.mlp.gate_proj.weight"] = mx.zeros((2, 2))


BROKEN = {
    "empty": (empty, r"has no config\.json"),
    "no weights": (remove("model.safetensors"), r"has no model\.safetensors"),
    "no tokenizer": (remove("tokenizer.json"), r"has no tokenizer\.json"),
    "truncated": (truncate, "bytes where its header promises .* download it again"),
    "broken header": (break_header, "has a broken header"),
    "cut header": (cut_header, "is truncated or no safetensors file"),
    "missing shard": (lose_a_shard, r"lacks model-00002-of-00002\.safetensors"),
    "index outside": (point_elsewhere, "names files outside its folder"),
    "pickle": (pickled, r"has pytorch_model\.bin, but only safetensors"),
    "config no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        r"config\.json cannot be read as JSON",
    ),
    "config a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "does not hold a JSON object",
    ),
    "tensors": (
        edit_weights(three_wrongs),
        r"missing: model.layers.1.mlp.up_proj.weight, model.norm.weight; unexpected: "
        r"model.extra.weight; misshapen: model.layers.0.mlp.gate_proj.weight is \[2, 2\] where "
        r"\[128, 64\] is needed",
    ),
    "overlap": (
        edit_entry(data_offsets=[640, 896]),
        "has a broken header: .* does not begin where",
    ),
    "offsets below 0": (edit_entry(data_offsets=[-256, 0]), "has a broken header"),
    "offsets as text": (edit_entry(data_offsets=["0", "256"]), "has a broken header"),
    "bytes of another shape": (edit_entry(shape=[65]), "has a broken header"),
    "a terabyte": (edit_entry(shape=[1 << 20, 1 << 20]), "has a broken header"),
    "no such dtype": (edit_entry(dtype="F7"), "has a broken header"),
    "metadata no text": (edit_header(lambda h: h.update(__metadata__={"a": 1})), "broken header"),
    "twice": (twice_in_two_files, "has model.norm.weight twice, in model-00001-of-00002"),
    "integers": (edit_weights(as_integers), "does not belong there: model.norm.weight is I16"),
    "layers without end": (edit_json("config.json", num_hidden_layers=99), "missing: model.lay"),
    "end id as text": (
        edit_json("config.json", eos_token_id="<|im_end|>"),
        "eos_token_id is '<|im",
    ),
    "npz": (npz, "names model.npz, and only safetensors"),
    "another model": (edit_json("config.json", model_type="llama"), "model_type is 'llama'"),
    "gptq of 3 bits": (
        edit_json("config.json", quantization_config={"quant_method": "gptq", "bits": 3}),
        "quantized as GPTQ with bits 3, and only 4 and 8 can be read; take the original weights",
    ),
    "torchao": (
        edit_json("config.json", quantization_config={"quant_method": "torchao"}),
        "quantized as 'torchao', which is not read .* take the original weights",
    ),
    "compressed-tensors of old": (
        edit_json("config.json", compression_config={"format": "marlin-24"}),
        "quantized as compressed-tensors in the format 'marlin-24', and only pack-quantized",
    ),
    "gguf": (only("model-Q4_K_M.gguf"), "model-Q4_K_M.gguf is no GGUF file"),
    "gguf beside a config": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model.gguf"),
        "model.gguf is no GGUF file",
    ),
    "two ggufs": (
        lambda folder: (
            (folder / "model.safetensors").rename(folder / "model-Q8_0.gguf")
            and shutil.copy(folder / "config.json", folder / "model-Q4_0.gguf")
        ),
        "broken has model-Q4_0.gguf, model-Q8_0.gguf; name one of them, such as .*broken:Q4_0",
    ),
    "adapter of peft": (
        only("adapter_config.json", base_model_name_or_path="Qwen/Qwen3-8B"),
        "broken is an adapter for Qwen/Qwen3-8B, not a whole model; load that and .*--adapter",
    ),
    "adapter of mlx-lm": (
        only("adapter_config.json", model="mlx-community/Qwen3-8B-4bit", fine_tune_type="lora"),
        "broken is an adapter for mlx-community/Qwen3-8B-4bit, not a whole model.*--adapter",
    ),
    "adapter beside a config": (
        lambda folder: (
            (folder / "model.safetensors").rename(folder / "adapter_config.json")
            and (folder / "adapter_config.json").write_text("{}")
        ),
        "broken is an adapter for another model",
    ),
    "whole and shards": (add_a_shard, "has model.safetensors and model-00001-of-00002.safetensors"),
    "two sets of shards": (two_sets, "model-00001-of-00002.safetensors and model-00001-of-00003"),
    "whole and indexed": (whole_beside_index, "has model.safetensors and model-00001-of-00001.sa"),
    "compiled": (
        edit_weights(lambda weights: prefix(weights, "_orig_mod.")),
        r"missing: model\.layers\.1\.\*; among .* is _orig_mod\.model\.layers\.1\.input_layernorm",
    ),
    "no tensors": (edit_weights(lambda weights: weights.clear()), "that are there is none"),
    "no such format": (
        edit_json("config.json", quantization={"bits": 7, "group_size": 64}),
        "bits must be one of 2, 3, 4, 5, 6, 8, not 7",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_one_sentence(kind: str, tiny_folder: Path, tmp_path: Path) -> None:
    damage, complaint = BROKEN[kind]
    folder = shutil.copytree(tiny_folder, tmp_path / "broken")
    if kind == "no such format":
        form = {"bits": 4, "group_size": 64}
        shutil.rmtree(folder)
        quantize_folder(
            tiny_folder,
            folder,
            lambda path, module: form if hasattr(module, "to_quantized") else False,
            {"quantization": form},
        )
    damage(folder)
    with pytest.raises(CheckpointError, match=complaint) as raised:
        load(folder)
    assert "\n" not in str(raised.value)


def test_a_size_is_the_hubs_4_bit_checkpoint(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for the command's -m; a folder that is called like a size is a path."""
    asked = list[str]()

    def fetch(self: Source, files: Sequence[str]) -> Path:
        asked.append(self.name)
        return self.folder or tiny_folder

    monkeypatch.setattr(Source, "fetch", fetch)
    (tmp_path / "8B").symlink_to(tiny_folder)
    monkeypatch.chdir(tmp_path)
    for source in ("8B", "8b", "30b-a3b", "./8B", Path("8B"), str(tmp_path / "8B")):
        with load(source) as llm:
            assert llm.chat("Hello", max_tokens=2).usage.completion_tokens
    names = list(dict.fromkeys(asked))
    hub = ["Qwen/Qwen3-8B-MLX-4bit", "Qwen/Qwen3-30B-A3B-MLX-4bit"]
    assert names == [*hub, "./8B", "8B", str(tmp_path / "8B")]
    asked.clear()
    with load(tiny_folder, draft="0.6b"):
        assert "Qwen/Qwen3-0.6B-MLX-4bit" in asked
    with pytest.raises(CheckpointError, match="'7B' is no folder .* one of the sizes 0.6B, 1.7B"):
        load("7B")


def test_names_that_are_no_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no folder here, nor a hub name"):
        load("./nothing")
    with pytest.raises(CheckpointError, match="is no folder here, nor a hub name"):
        load("nothing")
    with pytest.raises(CheckpointError, match="is no folder here, nor a hub name"):
        load("")
    with pytest.raises(CheckpointError, match="is a file"):
        load(tiny_folder / "config.json")
    file = tmp_path / "Qwen3-8B-Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="_M.gguf is truncated, or has a broken header"):
        load(file)
    with pytest.raises(CheckpointError, match="has Qwen3-8B-Q4_K_M.gguf; name one of them"):
        load(f"{tmp_path}:Q5_0")
    with pytest.raises(ValueError, match="revision belongs to hub names"):
        load(tiny_folder, revision="main")


def test_arguments_out_of_range(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bits must be one of 2, 3, 4, 5, 6, 8, not 7"):
        load(tiny_folder, bits=7)
    with pytest.raises(ValueError, match="bits must be one of 2, 3, 4, 5, 6, 8, not 0"):
        load(tiny_folder, bits=0)
    with pytest.raises(ValueError, match="group_size must be one of 32, 64, 128, not 50"):
        load(tiny_folder, bits=4, group_size=50)
    folder = quantize_folder(
        tiny_folder,
        tmp_path / "quantized",
        lambda path, module: hasattr(module, "to_quantized"),
        {"quantization": {"bits": 4, "group_size": 64}},
    )
    with pytest.raises(CheckpointError, match="quantized already"):
        load(folder, bits=8)


def test_interrupted_loading_lets_go(tiny_folder: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(tiny_folder, progress=stop)


def test_progress_is_told(tiny_folder: Path) -> None:
    told: list[tuple[int, int]] = []
    load(tiny_folder, progress=lambda done, total: told.append((done, total))).close()
    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1] == len(told) - 1


def test_formats_left_out_are_mlx_defaults() -> None:
    stored = StoredFormats({"group_size": None, "bits": 4, "x": {"mode": "mxfp4"}})
    assert stored.format_of("y") == Format(4, 64)
    assert stored.format_of("x") == Format(4, 32, "mxfp4")
    with pytest.raises(CheckpointError, match="quantization of z"):
        StoredFormats({"bits": 4, "mode": "new"}).format_of("z")


def test_dequantizing_is_for_small_models_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "total_memory", lambda: 1000)
    monkeypatch.setattr(backend, "on_gpu", lambda: False)
    assert backend.worth_dequantizing(500)
    assert not backend.worth_dequantizing(501)
    monkeypatch.setattr(backend, "on_gpu", lambda: True)
    assert not backend.worth_dequantizing(1)
