"""The memory plan: equal to what MLX holds, and to the published files; and what it refuses."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from qwen3_mlx import CheckpointError, Qwen3Error, backend, load
from qwen3_mlx.api import capacity
from qwen3_mlx.api.capacity import plan_load
from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.cache.quantized import CACHE_FORMATS, CacheFormat
from qwen3_mlx.checkpoint.hub import Source
from qwen3_mlx.checkpoint.load import LoadOptions, load_model
from qwen3_mlx.checkpoint.stored import formats_stored
from qwen3_mlx.checkpoint.weights import INDEX, Weights
from qwen3_mlx.engine.memory import (
    RESERVE,
    Workload,
    activation_bytes,
    bytes_read_per_token,
    cache_bytes,
    count_weights,
    largest_context,
    make_plan,
    weight_bytes,
)
from qwen3_mlx.files import read_json
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.quantization import Format
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.model.sizes import SIZES, published_config, published_model_config, yarn_lengths
from tests.support import DEMO, MOE, TINY, make_model, prefill, write_tiny

LAYERS = TINY["num_hidden_layers"]

pytestmark = pytest.mark.usefixtures("whole_memory")

FORMATS = [
    None,
    *(Format(bits, 64) for bits in (2, 3, 4, 5, 6, 8)),
    Format(4, 32),
    Format(4, 32, "mxfp4"),
    Format(8, 32, "mxfp8"),
    Format(4, 16, "nvfp4"),
]
NETWORKS = {
    "tied": TINY,
    "untied": {**TINY, "tie_word_embeddings": False},
    "biases": {**TINY, "attention_bias": True},
    "experts": MOE,
    "some experts": {**MOE, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    "odd rows": {**TINY, "intermediate_size": 96},  # which groups of 64 do not divide
}


def plain(_: str) -> None:
    return None


def four_bits(_: str) -> Format:
    return Format(4, 64)


def held(model: Qwen3) -> int:
    return sum(array.nbytes for array in model.tensors().values())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("networks")
    return {name: write_tiny(root / name, config) for name, config in NETWORKS.items()}


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_planned_to_the_byte(
    name: str, form: Format | None, dtype: mx.Dtype, folders: dict[str, Path]
) -> None:
    folder = folders[name]
    config = read_json(folder / "config.json")
    options = LoadOptions(dtype, form, dequantize=False)
    model = load_model(config, Weights(folder), options, lambda *_: None)
    assert plan_load(ModelConfig.from_dict(config), None, options).weights == held(model)


@pytest.mark.parametrize("dequantize", [True, False])
def test_stored_formats_and_their_exceptions_are_planned(
    dequantize: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Some modules are kept, some have more bits: as the config and the index say."""
    config = read_json(folders["experts"] / "config.json")
    options = LoadOptions(mx.float32)
    model = load_model(config, Weights(folders["experts"]), options, lambda *_: None)
    network = ModelConfig.from_dict(config)
    plainly = Qwen3(network)
    plainly.update(model.parameters())
    more = {"bits": 8, "group_size": 32}

    def form(path: str, module: nn.Module) -> Any:
        if not hasattr(module, "to_quantized") or path.endswith(("v_proj", "lm_head")):
            return False
        return more if path.endswith("mlp.gate") else {"bits": 4, "group_size": 64}

    nn.quantize(plainly, class_predicate=form)
    exceptions: dict[str, Any] = {f"model.layers.{n}.mlp.gate": more for n in range(LAYERS)}
    section = {"bits": 4, "group_size": 64, **exceptions, "lm_head": False}
    config["quantization"] = section
    tensors = plainly.tensors()
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (tmp_path / INDEX).write_text(json.dumps(index))
    options = LoadOptions(mx.bfloat16, dequantize=dequantize)
    loaded = load_model(config, Weights(tmp_path), options, lambda *_: None)
    stored = formats_stored(config, tmp_path)
    assert plan_load(network, stored, options).weights == held(loaded)
    # Without the index, config.json is believed, where the values of all layers are 4-bit.
    believed = plan_load(network, formats_stored(config), options).weights
    saved = LAYERS * 128 * 64 * (2 - 0.5 - 4 / 64)  # bytes
    assert believed == held(loaded) - (0 if dequantize else saved)


def test_the_published_sizes_are_those_of_the_published_files() -> None:
    """Parameters, and bytes of tensors, as the hub's files and indexes have them."""
    parameters = {
        "0.6B": 596_049_920,
        "1.7B": 1_720_574_976,
        "4B": 4_022_468_096,
        "8B": 8_190_735_360,
        "14B": 14_768_307_200,
        "32B": 32_762_123_264,
        "30B-A3B": 30_532_122_624,
        "235B-A22B": 235_093_634_560,
    }
    assert {size: count_weights(published_model_config(size)) for size in SIZES} == parameters
    for size, count in parameters.items():
        assert weight_bytes(published_model_config(size), plain) == 2 * count
    assert weight_bytes(published_model_config("4B"), four_bits) == 2_262_920_192
    assert weight_bytes(published_model_config("30B-A3B"), plain) == 61_064_245_248
    # Qwen/Qwen3-0.6B's file also holds a copy of the tied embedding, and a header.
    copied = 2 * 151936 * 1024
    assert weight_bytes(published_model_config("0.6B"), plain) + copied + 35_560 == 1_503_300_328


@pytest.mark.parametrize("size", ["0.6B", "8B", "30B-A3B"])
def test_the_plan_counts_the_tensors_of_the_network(size: str) -> None:
    """Held against the network itself, which is built but never computed."""
    narrow = {"num_hidden_layers": 2}  # each layer is like the others
    config = ModelConfig.from_dict({**published_config(size), **narrow})
    network = Qwen3(config)
    assert count_weights(config) == sum(array.size for array in network.tensors().values())


@pytest.mark.parametrize("form", CACHE_FORMATS.values(), ids=CACHE_FORMATS)
def test_the_cache_is_planned_to_the_byte(form: CacheFormat) -> None:
    model = make_model()
    model.cache_format = form
    work = Workload(300, itemsize=4, cache=form)
    cache = model.make_cache(work.context)
    prefill(model, cache, range(100), 64)
    assert cache_bytes(model.config, work) == sum(layer.nbytes for layer in cache)


def test_a_growing_cache_never_passes_its_plan() -> None:
    config = ModelConfig.from_dict(TINY)
    cache, keys = KVCache(), mx.zeros((1, 2, 50, 64))
    used = []
    for _ in range(40):
        cache.store(keys, keys, rope=lambda x, _: x)
        work = Workload(cache.offset, itemsize=4, bounded=False)
        used.append(config.num_hidden_layers * cache.nbytes / cache_bytes(config, work))
    assert 0.8 < max(used) < 1


@pytest.mark.parametrize(
    ("size", "kib"), [("0.6B", 112), ("8B", 144), ("14B", 160), ("32B", 256), ("235B-A22B", 188)]
)
def test_a_token_of_cache_takes_what_the_formula_says(size: str, kib: int) -> None:
    config, work = published_model_config(size), Workload(1024)
    sizes = {
        name: cache_bytes(config, replace(work, cache=form)) / 1024 / 1024
        for name, form in CACHE_FORMATS.items()
    }
    assert sizes["bf16"] == kib
    assert sizes["8"] == kib * 1.0625 / 2
    assert sizes["4"] == kib * (0.5625 + 0.625) / 4
    assert sizes["k8v4"] == kib * (1.0625 + 0.5625) / 4


def test_more_of_anything_takes_more() -> None:
    config, work = published_model_config("8B"), Workload(8192)
    sizes = [weight_bytes(config, lambda _, b=bits: Format(b, 64)) for bits in (2, 3, 4, 5, 6, 8)]  # type: ignore[misc]
    assert sizes == sorted(set(sizes))
    for fused in (True, False):
        here = replace(work, fused=fused)
        for changed in (
            replace(here, context=8193),
            replace(here, itemsize=4),
            replace(here, bounded=False),
            replace(here, chunk=2049),
        ):
            assert make_plan(config, 0, changed).total > make_plan(config, 0, here).total
    # A short prompt is no whole chunk; without a fused kernel the scores grow with the context.
    assert activation_bytes(config, Workload(512)) < activation_bytes(config, work)
    long = replace(work, context=32768)
    assert activation_bytes(config, long) == activation_bytes(config, work)
    unfused = [activation_bytes(config, replace(w, fused=False)) for w in (work, long)]
    assert unfused[1] - unfused[0] > 32 * 2048 * (32768 - 8192) * 4


@pytest.mark.heavy
def test_activations_are_about_what_prefill_holds() -> None:
    """An estimate: between half and twice the measured peak of a chunk, on a CPU."""
    if backend.on_gpu():
        pytest.skip("the CPU's formula")
    wide = {**TINY, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4}
    model = make_model(wide)
    for context in (256, 1024):
        cache = model.make_cache(context + 1)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        prefill(model, cache, range(context), 256)
        peak = mx.get_peak_memory() - before - sum(layer.nbytes for layer in cache)
        work = Workload(context, itemsize=4, chunk=256, fused=False)
        assert 0.5 < activation_bytes(model.config, work) / peak < 2


def test_the_largest_context_is_the_last_that_fits() -> None:
    config, weights = (
        published_model_config("8B"),
        weight_bytes(published_model_config("8B"), four_bits),
    )
    work = Workload(0)
    most = largest_context(config, weights, work, 10**10, 131072)
    totals = [make_plan(config, weights, replace(work, context=most + n)).total for n in (0, 1)]
    assert totals[0] <= 10**10 < totals[1]
    assert largest_context(config, weights, work, weights, 131072) == 0
    assert largest_context(config, weights, work, 10**12, 131072) == 131072


def test_a_token_moves_what_it_goes_through() -> None:
    nothing = Workload(0)
    # Dense and tied: all weights, the embedding as the head.
    assert bytes_read_per_token(published_model_config("4B"), plain, nothing) == 2 * count_weights(
        published_model_config("4B")
    )
    dense = published_model_config("8B")
    embedding = 2 * 151936 * 4096
    row = embedding // 151936
    expected = 2 * count_weights(dense) - embedding + row
    assert bytes_read_per_token(dense, plain, nothing) == expected
    full = bytes_read_per_token(dense, plain, Workload(1000))
    assert full - expected == cache_bytes(dense, Workload(1000))
    # 3.35 billion weights of Qwen3-30B-A3B are active, embedding included.
    active = (
        bytes_read_per_token(published_model_config("30B-A3B"), plain, nothing) / 2 + 151936 * 2048
    )
    assert active == pytest.approx(3.35e9, rel=0.003)


def test_yarn_is_for_the_sizes_and_the_window_it_is_published_for() -> None:
    assert [size for size in SIZES if not yarn_lengths(published_model_config(size))] == [
        "0.6B",
        "1.7B",
    ]
    assert yarn_lengths(published_model_config("8B")) == (65536, 131072)
    longer = {**published_config("4B"), "max_position_embeddings": 262144}
    assert yarn_lengths(ModelConfig.from_dict(longer)) == ()
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    with_yarn = {**published_config("4B"), "rope_scaling": yarn}
    assert yarn_lengths(ModelConfig.from_dict(with_yarn)) == ()


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "available_memory", lambda: 4_000_000_000)
    monkeypatch.setattr(backend, "memory_limit", lambda: 5_300_000_000)


def eight_billion(folder: Path, **more: Any) -> Path:
    """Write a checkpoint of 8B whose weights are no weights: opening them would be an error."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(DEMO / name)
    (folder / "config.json").write_text(json.dumps({**published_config("8B"), **more}))
    (folder / "model.safetensors").write_bytes(b"no weights")
    return folder


@pytest.mark.as_cpu
def test_what_cannot_fit_is_refused_before_a_weight_is_read(
    tmp_path: Path, small_machine: None
) -> None:
    folder = eight_billion(tmp_path / "8B")
    with pytest.raises(Qwen3Error) as error:
        load(folder, dtype="bfloat16")
    message = str(error.value)
    plan = plan_load(published_model_config("8B"), None, LoadOptions(mx.bfloat16))
    assert message.startswith(f"{folder} does not fit: weights 16.4 GB + cache 0.3 GB + act")
    assert f"reserve 0.5 GB = {plan.total / 1e9:.1f} GB with 2,048 tokens; " in message
    assert "this machine can give 4.0 GB" in message
    assert "--model 4B fits (Qwen/Qwen3-4B-MLX-4bit" in message
    assert "bits=" not in message  # not even 3 bits would do
    assert "other programs" not in message


@pytest.mark.as_cpu
def test_a_refusal_names_what_would_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = eight_billion(tmp_path / "8B")
    quantized = {"quantization": {"bits": 4, "group_size": 64}}
    stored = eight_billion(tmp_path / "8B-4bit", **quantized)

    def refusal(available: int, **options: Any) -> str:
        monkeypatch.setattr(backend, "available_memory", lambda: available)
        monkeypatch.setattr(backend, "memory_limit", lambda: 6 * 10**9)
        monkeypatch.setattr(backend, "total_memory", lambda: 6 * 10**9)
        with pytest.raises(Qwen3Error) as error:
            load(options.pop("source", folder), **options)
        return str(error.value)

    assert "bits=8 would fit (" in refusal(11 * 10**9, dtype="bfloat16")
    assert 'dtype="bfloat16" would fit (' in refusal(20 * 10**9, dtype="float32")
    narrower = refusal(8 * 10**9, bits=8, dtype="bfloat16")
    assert "bits=6 would fit (" in narrower and "weights 8.7 GB" in narrower
    wide = refusal(8 * 10**9, source=stored, dequantize=True, dtype="bfloat16")
    assert "dequantize=False would fit (" in wide and "bits=" not in wide
    busy = refusal(5 * 10**9, source=stored, dtype="bfloat16")
    assert "closing other programs would make room" in busy
    assert "none of the ready 4-bit models fits either" in refusal(10**9, source=stored)
    both = refusal(8 * 10**9, source=stored, draft=stored, dtype="bfloat16")
    assert "beside the draft model" in both and "without a draft model it would fit" in both


def test_of_a_hubs_model_no_weight_is_fetched(
    tmp_path: Path, small_machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = eight_billion(tmp_path / "8B"), list[str]()

    def fetch(_: Source, files: Any) -> Path:
        asked.extend(files)
        return folder

    monkeypatch.setattr(Source, "fetch", fetch)
    with pytest.raises(Qwen3Error, match="^Qwen/Qwen3-8B does not fit: weights"):
        load("Qwen/Qwen3-8B")
    assert "config.json" in asked
    assert "model.safetensors" not in asked


def test_dequantizing_by_itself_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    network, options = published_model_config("0.6B"), LoadOptions(mx.float32)
    kept = plan_load(network, four_bits, replace(options, dequantize=False))
    monkeypatch.setattr(backend, "worth_dequantizing", lambda size: size <= 4 * 596_049_920)
    assert plan_load(network, four_bits, options).weights == 4 * 596_049_920
    monkeypatch.setattr(backend, "worth_dequantizing", lambda size: size < 4 * 596_049_920)
    assert plan_load(network, four_bits, options) == kept


def test_a_plan_adds_up() -> None:
    plan = make_plan(published_model_config("8B"), 4_607_731_712, Workload(4096))
    assert plan.total == plan.weights + plan.cache + plan.activations + RESERVE
    assert str(plan) == (
        "weights 4.6 GB + cache 0.6 GB + activations 0.9 GB + reserve 0.5 GB = 6.6 GB"
    )


_VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                     1000.
Pages active:                                 400000.
Pages inactive:                               300000.
Pages wired down:                             100000.
Pages purgeable:                                 300.
File-backed pages:                              2000.
"""


@pytest.mark.as_cpu
def test_free_memory_is_read_from_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend._free_on_mac(_VM_STAT) == 16384 * 3300
    with pytest.raises(ValueError):
        backend._free_on_mac("something else")
    assert 0 < backend.available_memory() <= backend.memory_limit() <= backend.total_memory()
    ballast = mx.zeros(25_000_000)
    mx.eval(ballast)
    monkeypatch.setattr(backend, "_free_memory", lambda: 10**15)
    limit = backend.memory_limit()
    assert backend.available_memory() == limit - mx.get_active_memory() <= limit - ballast.nbytes
    monkeypatch.setattr(backend, "_free_memory", lambda: 1234)
    assert backend.available_memory() == 1234 + mx.get_cache_memory()


def test_a_container_has_its_own_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "total_memory", lambda: 1000)
    assert backend._free_in_container(tmp_path) == 1000  # there is none
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\nactive_file 50\n")
    assert backend._free_in_container(tmp_path) == 450


def _on_a_mac(monkeypatch: pytest.MonkeyPatch, working_set: int, free: int) -> None:
    info: Callable[[], dict[str, int]] = lambda: {"max_recommended_working_set_size": working_set}  # noqa: E731
    monkeypatch.setattr(mx, "device_info", info)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(backend, "on_gpu", lambda: True)
    monkeypatch.setattr(backend, "_free_memory", lambda: free)


def test_a_mac_warns_where_other_programs_hold_the_memory(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _on_a_mac(monkeypatch, 10**10, free=1_000_000)
    with load(tiny_folder) as llm:
        assert llm.chat("Hello", max_tokens=2).usage.completion_tokens
        assert llm.context == llm.config.context_window  # nor is the cache planned by what is free
    (message,) = caplog.messages
    assert re.fullmatch(
        rf"{tiny_folder} takes 0\.\d GB, and 0\.\d GB of memory are free: macOS will compress or "
        "swap out what other programs hold; closing some makes it faster",
        message,
    )
    caplog.clear()
    monkeypatch.setattr(backend, "_free_memory", lambda: 10**10)
    load(tiny_folder).close()
    monkeypatch.setattr(backend, "_free_memory", lambda: 1_000_000)
    monkeypatch.setenv("QWEN3_MEMORY", "4")
    load(tiny_folder).close()
    assert not caplog.messages


@pytest.mark.compute_dtype
def test_a_mac_refuses_beyond_its_working_set(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = eight_billion(tmp_path / "8B")
    _on_a_mac(monkeypatch, 11_453_246_122, free=10**12)  # of a Mac with 16 GB
    monkeypatch.setattr(mx, "get_active_memory", lambda: 0)
    with pytest.raises(
        Qwen3Error, match=r"this machine can give 11\.5 GB; bits=8 would fit"
    ) as error:
        load(folder)
    assert str(error.value).endswith("; QWEN3_MEMORY, in GB, sets another limit")
    assert "closing" not in str(error.value)
    stored = eight_billion(tmp_path / "4bit", quantization={"bits": 4, "group_size": 64})
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):  # so it is to be loaded
        load(stored)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 6 * 10**9)  # of another model
    with pytest.raises(Qwen3Error, match="closing the other models of this process would make"):
        load(stored)


@pytest.mark.as_cpu
def test_what_a_process_may_plan_with_can_be_set(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = eight_billion(tmp_path / "8B", quantization={"bits": 4, "group_size": 64})
    monkeypatch.setattr(backend, "_free_memory", lambda: 1_000_000)
    monkeypatch.setattr(backend, "total_memory", lambda: 2 * 10**9)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 0)
    with pytest.raises(
        Qwen3Error, match=r"this machine can give 0\.0 GB; .*; QWEN3_MEMORY, in GB, s"
    ):
        load(folder)
    monkeypatch.setenv("QWEN3_MEMORY", "8.5")
    assert backend.memory_limit() == 8_500_000_000
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(folder, dtype="bfloat16")
    monkeypatch.setenv("QWEN3_MEMORY", "3")
    with pytest.raises(Qwen3Error, match=r"; QWEN3_MEMORY allows 3\.0 GB; ") as error:
        load(folder, dtype="bfloat16")
    assert "sets another limit" not in str(error.value)
    with load(tiny_folder) as llm:
        assert llm.chat("Hello", max_tokens=2).usage.completion_tokens


@pytest.mark.parametrize("stated", ["0", "-4", "nan", "inf", "8GB", " "])
def test_a_wrong_limit_is_refused(
    stated: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN3_MEMORY", stated)
    with pytest.raises(ValueError, match=f"QWEN3_MEMORY must be GB, more than 0, not '{stated}'"):
        load(tiny_folder)


def _on_cuda(monkeypatch: pytest.MonkeyPatch, free: int = 10**10) -> None:
    """Have an NVIDIA GPU of 80 GB, whose keys of `device_info` are others than Metal's."""
    info = {"device_name": "H", "architecture": "sm_90", "total_memory": 80 * 10**9}
    monkeypatch.setattr(mx, "device_info", lambda: info | {"free_memory": free})
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(backend, "on_gpu", lambda: True)


def test_another_gpu_has_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    _on_cuda(monkeypatch, free=10**12)
    assert backend.memory_limit() == 80 * 10**9
    assert backend.available_memory() == 80 * 10**9 - mx.get_active_memory()
    _on_cuda(monkeypatch, free=70 * 10**9)  # other programs hold the rest, and nothing moves it
    assert backend.available_memory() == 70 * 10**9 + mx.get_cache_memory()
    facts = backend.describe()
    assert facts["blas"] == "CUDA" and facts["GPU memory"] == "80.0 GB, 70.0 GB free"
    assert "working set" not in facts


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
def test_another_gpu_loads_and_answers(
    kv_bits: int | None, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []
    with load(tiny_folder, kv_bits=kv_bits, dtype="float32") as llm:
        expected = llm.complete("Hello", max_tokens=8, temperature=0.0).text
    _on_cuda(monkeypatch)
    monkeypatch.setattr(mx, "set_wired_limit", limits.append)
    monkeypatch.setattr(mx, "set_cache_limit", limits.append)
    # Its quantized products take no views of longer buffers.
    monkeypatch.delattr(mx, "quantized_matmul")
    with load(tiny_folder, kv_bits=kv_bits, dtype="float32") as llm:
        assert llm.complete("Hello", max_tokens=8, temperature=0.0).text == expected
    assert limits == [2 << 30]  # of the buffer cache: nothing is wired


def test_another_gpu_refuses_what_others_leave_no_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = eight_billion(tmp_path / "8B")
    _on_cuda(monkeypatch, free=10**9)
    with pytest.raises(Qwen3Error, match="closing other programs would make room"):
        load(folder)


def test_another_gpu_fuses_attention_in_half_precision_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _on_cuda(monkeypatch)
    assert backend.has_fused_attention(2) and not backend.has_fused_attention(4)
    config = published_model_config("8B")
    half, whole = (
        capacity.plan_load(config, None, LoadOptions(dtype)).activations
        for dtype in (mx.bfloat16, mx.float32)
    )
    assert half == activation_bytes(config, Workload(2048))
    assert whole == activation_bytes(config, Workload(2048, itemsize=4, fused=False))
    _on_a_mac(monkeypatch, 10**15, free=10**12)
    assert backend.has_fused_attention(4)


def test_on_metal_the_working_set_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    _on_a_mac(monkeypatch, 10**15, free=10**12)
    assert backend.memory_limit() == 10**15
    assert backend.available_memory() == 10**15 - mx.get_active_memory()
    assert capacity.plan_load(
        published_model_config("8B"), None, LoadOptions(mx.bfloat16)
    ).activations == (activation_bytes(published_model_config("8B"), Workload(2048)))


def test_threads_suit_the_size_of_the_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        threads: list[int] = []
        openblas_set_num_threads = threads.append

    monkeypatch.setattr(backend, "BLAS", "libopenblas.so.0")
    monkeypatch.setattr("ctypes.CDLL", lambda name: Library)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    backend.tune_blas_threads(192)
    backend.tune_blas_threads(1024)
    backend.tune_blas_threads(1024, processes=2)
    backend.tune_blas_threads(1024, processes=4)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    backend.tune_blas_threads(192)
    monkeypatch.setattr(backend, "BLAS", "MLX's own")
    backend.tune_blas_threads(192)
    assert Library.threads == [1, 3, 1, 1]
