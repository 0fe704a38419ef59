"""Adapters of mlx-lm and PEFT: what they compute, and what is refused."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_mlx import CheckpointError, convert, load
from qwen3_mlx.api.checkpoints import Checkpoints
from qwen3_mlx.checkpoint.adapters import Adapter
from qwen3_mlx.checkpoint.load import LoadOptions
from qwen3_mlx.files import read_json
from qwen3_mlx.model.adapted import Delta
from qwen3_mlx.model.config import ModelConfig
from tests.adapters import (
    HIDDEN,
    RANK,
    SCALE,
    WIDTH,
    all_linear,
    deltas_of,
    draw,
    merged,
    mlx_tensors,
    pair,
    peft_tensors,
    weights_of,
    write_merged,
    write_mlx,
    write_peft,
)
from tests.checkpoint.harness import hub_of, serving
from tests.cli.harness import piped
from tests.support import MOE, assert_close, random_ids, write_tiny

GOLDEN = Path(__file__).parent.parent / "golden" / "adapters"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
QUERY = "model.layers.1.self_attn.q_proj"
IDS = random_ids(12)
MOE_GOLDEN = ModelConfig.from_dict(read_json(GOLDEN / "peft_moe_experts" / "base" / "config.json"))


def logits(folder: Path, **options: Any) -> mx.array:
    with load(folder, **{"dtype": "float32", **options}) as llm:
        return llm.logits(IDS)


def steps(folder: Path, **options: Any) -> mx.array:
    """Compute the same logits one token at a time, as in decoding."""
    with load(folder, **{"dtype": "float32", **options}) as llm:

        def run(model: Any) -> mx.array:
            cache = model.make_cache()
            return mx.concatenate([model(mx.array([[token]]), cache)[0] for token in IDS])

        return llm.compute(run)


@pytest.fixture(scope="module")
def moe_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("moe"), MOE)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    return shutil.copytree(GOLDEN / "peft_moe_experts" / "adapter", folder / "adapter")


@pytest.mark.parametrize("case", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_an_adapter_computes_what_its_own_program_does(case: str) -> None:
    golden = np.load(GOLDEN / case / "golden.npz")
    with load(GOLDEN / case / "base", adapter=GOLDEN / case / "adapter", dtype="float32") as llm:
        found = llm.logits(golden["ids"].tolist())
    assert divergence(golden["logits"], found) < 1e-10
    assert divergence(golden["logits"], golden["logits_base"]) > 1e-3


def divergence(one: Any, other: Any) -> float:
    """Compute the mean KL divergence of two sets of logits [N, V]."""
    both = (np.asarray(x, np.float64) for x in (one, other))
    first, second = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in both)
    return float((np.exp(first) * (first - second)).sum(-1).mean())


# --- features, against weights merged by hand ---------------------------------------------------


@dataclass
class Made:
    """An adapter, and the tensors that it stands for."""

    adapter: Path
    changed: dict[str, Any]
    tie: bool | None = None


def all_layers_mlx(base: Path, folder: Path) -> Made:
    pairs = all_linear()
    return Made(write_mlx(folder, mlx_tensors(pairs)), merged(base, deltas_of(pairs)))


def rank_stabilised_with_patterns(base: Path, folder: Path) -> Made:
    narrow, wide = pair(256, HIDDEN, rank=2), pair(HIDDEN, WIDTH, seed=5)
    pairs = {QUERY: narrow, "model.layers.0.mlp.down_proj": wide}
    written = write_peft(
        folder,
        peft_tensors(pairs),
        use_rslora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.0.mlp.down_proj": 1},
    )
    deltas = deltas_of({QUERY: narrow}, RANK * SCALE / 2**0.5)
    deltas |= deltas_of({"model.layers.0.mlp.down_proj": wide}, 1 / RANK**0.5)
    return Made(written, merged(base, deltas))


def magnitudes(base: Path, folder: Path) -> Made:
    pairs = all_linear(seed=20)
    changed = merged(base, deltas_of(pairs))
    tensors = mlx_tensors(pairs)
    for name, weight in changed.items():
        m = 1 + draw(weight.shape[0])
        tensors[name.replace(".weight", ".m")] = m
        changed[name] = weight * (m / np.linalg.norm(weight, axis=1))[:, None]
    return Made(write_mlx(folder, tensors, fine_tune_type="dora"), changed)


def whole_layer(base: Path, folder: Path) -> Made:
    weights = weights_of(base)
    names = [name for name in weights if ".layers.1." in name]
    changed = {name: weights[name] + draw(*weights[name].shape) for name in names}
    return Made(write_mlx(folder, changed, fine_tune_type="full"), changed)


def tied_embedding_of_mlx(base: Path, folder: Path) -> Made:
    a, b = pair(rows_of(base), HIDDEN)
    tensors = {f"{EMBEDDING}.lora_a": b, f"{EMBEDDING}.lora_b": a}
    return Made(write_mlx(folder, tensors), merged(base, deltas_of({EMBEDDING: (a, b)})))


def embedding_apart_from_its_head(base: Path, folder: Path) -> Made:
    a, b = pair(rows_of(base), HIDDEN)
    new = draw(rows_of(base), HIDDEN, seed=9)
    tensors = {
        f"{EMBEDDING}.lora_embedding_A": b.T,
        f"{EMBEDDING}.lora_embedding_B": a.T,
        f"{EMBEDDING}.base_layer.weight": new,
    }
    head = weights_of(base)[f"{EMBEDDING}.weight"]
    changed = {f"{EMBEDDING}.weight": new + SCALE * (b @ a), f"{HEAD}.weight": head}
    return Made(write_peft(folder, tensors), changed, tie=False)


def saved_head(base: Path, folder: Path) -> Made:
    new = draw(rows_of(base), HIDDEN, seed=9)
    written = write_peft(folder, {f"{HEAD}.modules_to_save.weight": new})
    return Made(written, {f"{HEAD}.weight": new}, tie=False)


def adapted_head(base: Path, folder: Path) -> Made:
    pairs = {HEAD: pair(rows_of(base), HIDDEN)}
    head = weights_of(base)[f"{EMBEDDING}.weight"] + deltas_of(pairs)[f"{HEAD}.weight"]
    return Made(write_peft(folder, peft_tensors(pairs)), {f"{HEAD}.weight": head}, tie=False)


def rows_of(base: Path) -> int:
    return len(weights_of(base)[f"{EMBEDDING}.weight"])


DENSE = [
    all_layers_mlx,
    rank_stabilised_with_patterns,
    magnitudes,
    whole_layer,
    tied_embedding_of_mlx,
    embedding_apart_from_its_head,
    saved_head,
    adapted_head,
]


def experts_of_mlx(base: Path, folder: Path) -> Made:
    block, a, b = "model.layers.0.mlp", draw(8, RANK, HIDDEN), draw(8, HIDDEN, RANK, seed=1)
    up, gate = f"{block}.switch_mlp.up_proj", pair(8, HIDDEN)
    older = a.reshape(8 * RANK, HIDDEN)
    tensors = {f"{up}.lora_a": older, f"{up}.lora_b": b} | mlx_tensors({f"{block}.gate": gate})
    deltas = {f"{up}.weight": SCALE * b @ a} | deltas_of({f"{block}.gate": gate})
    return Made(write_mlx(folder, tensors), merged(base, deltas))


def a_pair_for_each_expert(base: Path, folder: Path) -> Made:
    block = "model.layers.1.mlp"
    pairs = {f"{block}.experts.{n}.down_proj": pair(HIDDEN, 64, seed=n) for n in range(8)}
    magnitudes = {f"{path}.lora_magnitude_vector": 1 + draw(HIDDEN, seed=50) for path in pairs}
    written = write_peft(folder, peft_tensors(pairs) | magnitudes, use_dora=True)
    name = f"{block}.switch_mlp.down_proj.weight"
    weight = weights_of(base)[name] + np.stack([SCALE * (b @ a) for a, b in pairs.values()])
    scale = (1 + draw(HIDDEN, seed=50)) / np.linalg.norm(weight, axis=-1)
    return Made(written, {name: weight * scale[..., None]})


def one_parameter_of_all_experts(base: Path, folder: Path) -> Made:
    block, a, b = "model.layers.1.mlp", draw(8 * RANK, HIDDEN), draw(128, RANK * 8, seed=1)
    tensors = {f"{block}.experts.lora_A.weight": a, f"{block}.experts.lora_B.weight": b}
    stated = ["mlp.experts.gate_up_proj"]
    delta = SCALE * np.einsum("ore,eri->eoi", b.reshape(128, RANK, 8), a.reshape(8, RANK, HIDDEN))
    names = [f"{block}.switch_mlp.{name}_proj.weight" for name in ("gate", "up")]
    deltas = dict(zip(names, (delta[:, :64], delta[:, 64:]), strict=True))
    return Made(write_peft(folder, tensors, target_parameters=stated), merged(base, deltas))


EXPERTS = [experts_of_mlx, a_pair_for_each_expert, one_parameter_of_all_experts]


@pytest.mark.parametrize("make", [*DENSE, *EXPERTS], ids=lambda make: make.__name__)
def test_a_feature_computes_what_merged_weights_do(
    make: Callable[[Path, Path], Made], tiny_folder: Path, moe_base: Path, tmp_path: Path
) -> None:
    base = moe_base if make in EXPERTS else tiny_folder
    made = make(base, tmp_path / "adapter")
    expected = logits(write_merged(base, tmp_path / "merged", made.changed, tie=made.tie))
    assert_close(logits(base, adapter=made.adapter), expected, 1e-5)
    assert float(mx.abs(expected - logits(base)).max()) > 1e-2


@pytest.mark.parametrize(
    "make",
    [magnitudes, embedding_apart_from_its_head, adapted_head, a_pair_for_each_expert],
    ids=lambda make: make.__name__,
)
def test_beside_quantized_weights_nothing_is_lost(
    make: Callable[[Path, Path], Made], tiny_folder: Path, moe_base: Path, tmp_path: Path
) -> None:
    base = moe_base if make in EXPERTS else tiny_folder
    adapter = make(base, tmp_path / "adapter").adapter
    expected = logits(base, adapter=adapter, bits=4, dequantize=True)
    beside = {"adapter": adapter, "bits": 4, "dequantize": False}
    assert_close(logits(base, **beside), expected, 2e-5)
    assert_close(steps(base, **beside), expected, 2e-5)


def test_it_takes_its_own_bytes_and_the_fast_path_stays(tiny_folder: Path, tmp_path: Path) -> None:
    pairs = all_linear()
    adapter = write_peft(tmp_path / "adapter", peft_tensors(pairs))
    nbytes = 4 * sum(a.size + b.size for a, b in pairs.values())
    options: dict[str, Any] = {"bits": 4, "dequantize": False, "dtype": "float32"}
    before = mx.get_active_memory()
    with load(tiny_folder, **options) as plain:
        held = mx.get_active_memory() - before
        with load(tiny_folder, adapter=adapter, **options) as llm:
            assert llm.model.nbytes - plain.model.nbytes == nbytes
            assert mx.get_active_memory() - before - 2 * held < 1.05 * nbytes
            attention = llm.model.layers[0].self_attn
            assert attention.fused and attention.fused.holds(attention)


def test_the_memory_plan_counts_it(tiny_folder: Path, tmp_path: Path) -> None:
    pairs = all_linear()
    adapter = write_peft(tmp_path / "adapter", peft_tensors(pairs))
    options = LoadOptions.of(None, "float32", None)

    def planned(adapter: Path | None) -> int:
        return Checkpoints.resolve(
            tiny_folder, None, None, options, None, None, adapter, None
        ).plan()

    numbers = sum(a.size + b.size for a, b in pairs.values())
    assert planned(adapter) - planned(None) == 4 * numbers


def test_prompts_on_disk_belong_to_one_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    adapters = [
        write_peft(tmp_path / str(seed), peft_tensors(all_linear(seed=seed))) for seed in (0, 1)
    ]
    prompt = random_ids(300)
    cached = []
    for adapter in [None, adapters[0], adapters[1], adapters[0]]:
        with load(tiny_folder, prompt_cache=tmp_path / "kept", adapter=adapter) as llm:
            scores = llm.score(prompt, start=299)
            cached.append(scores.cached_tokens)
            prepared = llm.prepare_text(prompt, prefill_only=True)
            llm._stream(prepared).close()
    assert cached[:3] == [0, 0, 0] and cached[3] > 0


def test_logits_of_some_tokens_are_those_of_the_adapted_head(
    tiny_folder: Path, tmp_path: Path
) -> None:
    adapter = adapted_head(tiny_folder, tmp_path / "adapter").adapter
    x = mx.array(draw(3, HIDDEN))
    with load(tiny_folder, adapter=adapter, bits=8, dequantize=False, dtype="float32") as llm:
        some, whole = llm.compute(lambda model: (model.logits_of([5, 7], x), model.head(x)))
    assert_close(some, whole[:, mx.array([5, 7])], 1e-4)


# --- what is refused ----------------------------------------------------------------------------


def of_peft(tensors: dict[str, Any] | None = None, **config: Any) -> Callable[[Path], Path]:
    made = peft_tensors({QUERY: pair(256, HIDDEN)}) | (tensors or {})
    return lambda folder: write_peft(folder, made, **config)


def of_mlx(tensors: dict[str, Any] | None = None, **config: Any) -> Callable[[Path], Path]:
    made = mlx_tensors({QUERY: pair(256, HIDDEN)}) | (tensors or {})
    return lambda folder: write_mlx(folder, made, **config)


def truncated(folder: Path) -> Path:
    file = of_peft()(folder) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    return folder


def as_bin(folder: Path) -> Path:
    (of_peft()(folder) / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    return folder


def without_config(folder: Path) -> Path:
    (of_peft()(folder) / "adapter_config.json").unlink()
    return folder


WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "another kind of PEFT": (of_peft(peft_type="IA3"), "peft_type is 'IA3'; LORA is read"),
    "biases": (of_peft(bias="all"), "bias is 'all'; none is read"),
    "biases of LoRA": (of_peft(lora_bias=True), "lora_bias is 'True'; that is not supported"),
    "single tokens": (of_peft(trainable_token_indices=[1]), "trainable_token_indices is"),
    "a changed base": (of_peft(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "no number": (of_peft(lora_alpha="16"), "lora_alpha is 16, not a number"),
    "not finite": (of_peft(lora_alpha=float("inf")), "lora_alpha is inf, not a number"),
    "enormous": (of_peft(lora_alpha=10**400), "lora_alpha is 1000.*, not a number within"),
    "another rank": (of_peft(r=8), r"q_proj.lora_A.weight has rank 4, .* states 8"),
    "no expression": (of_peft(alpha_pattern={"(": 1}), r"alpha_pattern: '\(' is no regular"),
    "no pattern": (of_peft(rank_pattern=[1]), "rank_pattern is not an object"),
    "a layer that is not there": (
        of_peft(peft_tensors({"model.layers.2.mlp.up_proj": pair(WIDTH, HIDDEN)})),
        r"model.layers.2.mlp.up_proj.lora_A.weight belongs to no matrix of this model",
    ),
    "a norm": (
        of_peft(peft_tensors({"model.norm": pair(HIDDEN, HIDDEN)})),
        "model.norm.lora_A.weight belongs to no matrix",
    ),
    "a tensor that is left over": (
        of_peft({"model.layers.0.mlp.up_proj.bias": draw(WIDTH)}),
        "mlp.up_proj.bias belongs to no tensor of this model",
    ),
    "another shape": (
        of_peft(peft_tensors({"model.layers.0.mlp.up_proj": pair(WIDTH + 1, HIDDEN)})),
        r"up_proj.lora_B.weight is \[129, 4\], .* stands where \[128, 4\] is needed",
    ),
    "half a pair": (
        of_peft({"model.layers.0.mlp.up_proj.lora_A.weight": draw(RANK, HIDDEN)}),
        "model.layers.0.mlp.up_proj.lora_B is missing",
    ),
    "a magnitude without DoRA": (
        of_peft({f"{QUERY}.lora_magnitude_vector": draw(256)}),
        "lora_magnitude_vector has no place",
    ),
    "DoRA without magnitudes": (of_peft(use_dora=True), "lora_magnitude_vector is missing"),
    "experts of a dense model": (
        of_peft(peft_tensors({"model.layers.0.mlp.experts": pair(WIDTH, HIDDEN)})),
        "mlp.experts.lora_B.weight is .* which does not fit this model",
    ),
    "another vocabulary": (
        of_peft({"lm_head.weight": draw(7, HIDDEN)}),
        r"lm_head.weight is \[7, 64\], which does not fit",
    ),
    "another kind of mlx-lm": (of_mlx(fine_tune_type="ia3"), "fine_tune_type is 'ia3'; lora, dora"),
    "no scale": (of_mlx(lora_parameters={"rank": 4}), "lora_parameters.scale is None, not a num"),
    "experts of a dense model, mlx-lm": (
        of_mlx({f"{QUERY}.switch_mlp.up_proj.{kind}": draw(4, 4) for kind in ("lora_a", "lora_b")}),
        "q_proj.switch_mlp.up_proj.lora_a belongs to no matrix of this model",
    ),
    "made for another": (of_mlx(num_layers=1, model="x/Y", fine_tune_type=1), r"made for x/Y\)"),
    "truncated": (truncated, "bytes where its header promises"),
    "of PyTorch": (as_bin, "has adapter_model.bin, but only safetensors are read"),
    "without a config": (without_config, "is no adapter: it has no adapter_config.json"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_cannot_be_honoured_is_refused_by_name(
    fault: str, tiny_folder: Path, tmp_path: Path
) -> None:
    make, message = WRONG[fault]
    with pytest.raises(CheckpointError, match=message) as raised:
        load(tiny_folder, adapter=make(tmp_path / "adapter"))
    assert "\n" not in str(raised.value)


@settings(max_examples=40)
@given(
    noise=st.binary(min_size=1, max_size=12), place=st.integers(0, 2000), in_config=st.booleans()
)
def test_a_damaged_adapter_is_refused_or_read(
    noise: bytes, place: int, in_config: bool, damaged: Path
) -> None:
    name = "adapter_config.json" if in_config else "adapter_model.safetensors"
    whole = (GOLDEN / "peft_moe_experts" / "adapter" / name).read_bytes()
    place = place % (len(whole) - len(noise))
    (damaged / name).write_bytes(whole[:place] + noise + whole[place + len(noise) :])
    try:
        Adapter("damaged", damaged, MOE_GOLDEN).delta("model.layers.0.mlp.switch_mlp.up_proj")
    except CheckpointError as error:
        assert "\n" not in str(error)
    finally:
        (damaged / name).write_bytes(whole)


def test_an_adapter_given_as_the_model_names_the_way_out(tmp_path: Path) -> None:
    adapter = of_peft(base_model_name_or_path="Qwen/Qwen3-8B")(tmp_path / "adapter")
    done = piped(["Hi", "--model", str(adapter)])
    assert done.returncode == 1
    assert "is an adapter for Qwen/Qwen3-8B, not a whole model; load that and" in done.stderr
    assert "--adapter" in done.stderr


def test_an_adapter_of_the_hub_is_fetched(tiny_folder: Path, tmp_path: Path) -> None:
    adapter = of_peft()(tmp_path / "served")
    expected = logits(tiny_folder, adapter=adapter)
    with serving(adapter) as (address, asked), hub_of(tmp_path / "home", address):
        assert_close(logits(tiny_folder, adapter="someone/tiny"), expected, 0)
    assert not [name for name in asked if name.endswith((".bin", ".md"))]


def test_the_command_takes_an_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "adapter", peft_tensors(all_linear()))
    given = ["Hi", "-m", str(tiny_folder), "-t", "0", "-n", "8", "-q"]
    plain, adapted = piped(given), piped([*given, "--adapter", str(adapter)])
    assert (plain.returncode, adapted.returncode) == (0, 0), adapted.stderr
    assert plain.stdout != adapted.stdout
    done = piped([*given, "--adapter", str(tmp_path)])
    assert (done.returncode, done.stdout) == (1, "")
    assert "is no adapter: it has no adapter_config.json" in done.stderr


# --- merged -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [magnitudes, whole_layer, embedding_apart_from_its_head, *EXPERTS],
    ids=lambda make: make.__name__,
)
def test_merging_computes_what_loading_does(
    make: Callable[[Path, Path], Made], tiny_folder: Path, moe_base: Path, tmp_path: Path
) -> None:
    base = moe_base if make in EXPERTS else tiny_folder
    adapter = make(base, tmp_path / "adapter").adapter
    made = convert(base, tmp_path / "out", adapter=adapter, dequantize=True, dtype="float32")
    assert made.adapter_kept is None
    assert_close(logits(tmp_path / "out"), logits(base, adapter=adapter), 1e-5)


def test_mlx_lm_loads_what_is_merged(tiny_folder: Path, tmp_path: Path) -> None:
    lm = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is the reference here")
    adapter = adapted_head(tiny_folder, tmp_path / "adapter").adapter
    convert(tiny_folder, tmp_path / "out", adapter=adapter, dequantize=True, dtype="float32")
    model, _ = lm.load_model(tmp_path / "out")
    assert_close(model(mx.array([IDS]))[0], logits(tiny_folder, adapter=adapter), 1e-4)


def test_experts_are_merged_however_their_rows_are_cut(tmp_path: Path) -> None:
    a, b, weight = draw(3, RANK, 8), draw(3, 10, RANK, seed=1), draw(30, 8, seed=2)
    delta = Delta(mx.array(a), mx.array(b), mx.array(1 + draw(3, 10)))
    whole = delta.merged(mx.array(weight).reshape(3, 10, 8)).reshape(30, 8)
    for start, stop in [(0, 30), (3, 7), (7, 23), (10, 20), (19, 30)]:
        rows = delta.merged_rows(mx.array(weight[start:stop]), start)
        assert_close(rows, whole[start:stop], 1e-6)


@pytest.mark.parametrize(
    ("made_for", "folder", "is_warned"),
    [
        ("Qwen/Qwen3-8B-Base", "Qwen3-8B", True),
        ("unsloth/qwen3-4b-thinking-2507-bnb-4bit", "Qwen3-4B-Instruct-2507-MLX-4bit", True),
        ("8B", "Qwen3-8B-Base-mine", True),
        ("unsloth/Qwen3-8B-unsloth-bnb-4bit", "Qwen3-8B-4bit", False),
        ("8B", "qwen3-8b", False),
        ("/home/me/model", "Qwen3-8B", False),
    ],
)
def test_an_adapter_of_another_release_gets_a_warning(
    made_for: str,
    folder: str,
    is_warned: bool,
    tiny_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.copytree(tiny_folder, tmp_path / folder)
    tensors = peft_tensors(all_linear())
    adapter = write_peft(tmp_path / "adapter", tensors, base_model_name_or_path=made_for)
    with load(tmp_path / folder, adapter=adapter):
        pass
    assert ("was made for" in caplog.text) == is_warned


def test_how_much_is_left_after_quantization_is_said(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = {path: (0.1 * a, 0.1 * b) for path, (a, b) in all_linear().items()}
    adapter = write_peft(tmp_path / "adapter", peft_tensors(small))
    made = convert(tiny_folder, tmp_path / "whole", adapter=adapter, bits=8)
    assert made.adapter_kept and made.adapter_kept > 0.95
    assert not caplog.records
    convert(tiny_folder, tmp_path / "quantized", bits=4)
    done = piped(
        ["convert", str(tmp_path / "quantized"), str(tmp_path / "again"), "--adapter", str(adapter)]
    )
    assert done.returncode == 0
    assert "% after quantization" in done.stdout
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "of the adapter is left after quantization; merge it into the original" in warning
