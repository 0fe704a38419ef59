"""What each stored format stands for, against a plain reading of the format's definition."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen3_mlx import CheckpointError
from qwen3_mlx.checkpoint.formats.matrix import Matrix
from qwen3_mlx.checkpoint.stored_formats import read_matrices
from tests.checkpoint.harness import Array, as_stored, make_gptq, scales_of
from tests.support import Stored, float_of, write_safetensors

UP = "model.layers.0.mlp.up_proj"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}


def whole(matrix: Matrix, most: int = 1 << 23) -> Array:
    """Join a matrix's blocks, as float32."""
    blocks = [np.array(block.astype(mx.float32)) for block in matrix.blocks(most)]
    return np.concatenate(blocks).reshape(matrix.shape)


def read(folder: Path, tensors: Mapping[str, Stored], section: dict[str, Any] | None) -> Any:
    """Write a file of these tensors and find what they stand for."""
    write_safetensors(folder / "model.safetensors", tensors)
    return read_matrices(folder, {"quantization_config": section} if section else {})


# --- FP8 ----------------------------------------------------------------------------------------


def e4m3(code: int) -> float:
    """Give the number of one code: 1 bit of sign, 4 of exponent (bias 7), 3 of mantissa."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if sign else size


E4M3 = np.array([e4m3(code) for code in range(256)], np.float32)


def make_fp8(
    shape: tuple[int, int], dtype: str = "BF16", block: tuple[int, int] = (128, 128), seed: int = 0
) -> tuple[dict[str, Stored], Array]:
    """Make a module's stored tensors, and the weight that they stand for."""
    random = np.random.RandomState(seed)
    codes = random.randint(0, 256, shape).astype(np.uint8)
    codes[codes & 127 == 127] = 0
    blocks = tuple(-(-size // side) for size, side in zip(shape, block, strict=True))
    scales = scales_of(random, blocks, dtype)
    expected = np.zeros(shape, np.float32)
    for i in range(blocks[0]):
        for j in range(blocks[1]):
            place = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            numbers = E4M3[codes[place]]
            expected[place] = numbers * float_of(scales)[i, j]
    return {"weight": ("F8_E4M3", codes), "weight_scale_inv": scales}, expected


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("shape", [(256, 128), (300, 200), (129, 128), (1, 1), (127, 385)])
def test_fp8(shape: tuple[int, int], dtype: str, tmp_path: Path) -> None:
    tensors, expected = make_fp8(shape, dtype)
    found = read(tmp_path, named(UP, tensors), FP8)
    assert set(found) == {f"{UP}.weight"}
    assert_same(whole(found[f"{UP}.weight"]), expected)


def test_fp8_blocks_of_other_sizes(tmp_path: Path) -> None:
    tensors, expected = make_fp8((200, 100), "F32", (48, 32))
    found = read(tmp_path, named(UP, tensors), {**FP8, "weight_block_size": [48, 32]})
    assert_same(whole(found[f"{UP}.weight"], most=1), expected)


def test_every_code_of_fp8(tmp_path: Path) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    tensors = {"weight": ("F8_E4M3", codes), "weight_scale_inv": ("F32", np.ones((1, 1), "f4"))}
    found = whole(read(tmp_path, named(UP, tensors), FP8)[f"{UP}.weight"])
    assert_same(found, E4M3[codes])
    assert np.isnan(found[[0, 1], [127, 127]]).all()
    assert np.nanmax(found) == 448


# --- AWQ ----------------------------------------------------------------------------------------


def packed_awq(values: Array) -> Array:
    """Pack [rows, outputs] as the GEMM layout does: from the low bits on, outputs 0 2 4 6 1 ..."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
    for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= values[:, output::8].astype(np.uint32) << np.uint32(4 * place)
    return words.view(np.int32)


def make_awq(
    inputs: int, outputs: int, group: int = 128, seed: int = 0
) -> tuple[dict[str, Stored], Array]:
    random = np.random.RandomState(seed)
    groups = inputs // group
    q = random.randint(0, 16, (inputs, outputs))
    zeros = random.randint(0, 16, (groups, outputs))
    scales = scales_of(random, (groups, outputs), "F16")
    expected = np.zeros((outputs, inputs), np.float32)
    for i in range(inputs):
        number = (q[i] - zeros[i // group]).astype(np.float32)
        expected[:, i] = number * float_of(scales)[i // group]
    tensors = {
        "qweight": ("I32", packed_awq(q)),
        "qzeros": ("I32", packed_awq(zeros)),
        "scales": scales,
    }
    return tensors, expected


@pytest.mark.parametrize(("inputs", "outputs", "group"), [(256, 136, 128), (64, 264, 32)])
def test_awq(inputs: int, outputs: int, group: int, tmp_path: Path) -> None:
    tensors, expected = make_awq(inputs, outputs, group)
    found = read(tmp_path, named(UP, tensors), {**AWQ, "group_size": group})
    assert set(found) == {f"{UP}.weight"}
    assert_same(whole(found[f"{UP}.weight"]), expected)


# --- GPTQ ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", ["sorted", "permuted", "missing"])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq(bits: int, order: str, version: int, tmp_path: Path) -> None:
    tensors, expected = make_gptq(256, 136, bits, order, version=version)
    section = {**GPTQ, "bits": bits, "desc_act": order == "permuted"}
    if version == 2:
        section["checkpoint_format"] = "gptq_v2"
    found = read(tmp_path, named(UP, tensors), section)
    assert set(found) == {f"{UP}.weight"}
    assert_same(whole(found[f"{UP}.weight"]), expected)


# --- MLX ----------------------------------------------------------------------------------------

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def unpacked_stream(words: Array, bits: int) -> Array:
    """Read numbers of so many bits from rows of words: the first are the lowest bits."""
    raw = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    places = raw.reshape(*words.shape[:-1], -1, bits)
    numbers: Array = (places.astype(np.int64) << np.arange(bits)).sum(-1)
    return numbers


def make_mlx(
    shape: tuple[int, ...], bits: int, group: int, mode: str = "affine", seed: int = 0
) -> tuple[dict[str, Stored], Array]:
    random = np.random.RandomState(seed)
    *outer, inputs = shape
    words = random.randint(0, 1 << 32, (*outer, inputs * bits // 32)).astype(np.uint32)
    if mode == "mxfp8":  # of codes for numbers
        codes = words.view(np.uint8)
        codes[codes & 127 == 127] = 0
    q, groups = unpacked_stream(words, bits), (*outer, inputs // group)
    if mode == "affine":
        scales, biases = scales_of(random, groups, "BF16"), scales_of(random, groups, "BF16")
        scale, bias = (float_of(part).repeat(group, -1) for part in (scales, biases))
        return (
            {"weight": ("U32", words), "scales": scales, "biases": biases},
            q.astype(np.float32) * scale + bias,
        )
    stored = random.randint(0x10, 0x60, groups).astype(np.uint8)
    if mode == "nvfp4":
        scale = E4M3[stored]
    else:
        stored += 60
        scale = np.float32(2) ** (stored.astype(np.float32) - 127)
    numbers = E2M1[q] if bits == 4 else E4M3[q]
    expected = (numbers * scale.repeat(group, -1)).astype(np.float32)
    return {"weight": ("U32", words), "scales": ("U8", stored)}, expected


MLX_FORMATS = [
    *((bits, group, "affine") for bits in (2, 3, 4, 5, 6, 8) for group in (32, 128)),
    *((4, 32, "mxfp4"), (8, 32, "mxfp8"), (4, 16, "nvfp4")),
]


@pytest.mark.parametrize(("bits", "group", "mode"), MLX_FORMATS)
def test_mlx(bits: int, group: int, mode: str, tmp_path: Path) -> None:
    section = {"bits": bits, "group_size": group, "mode": mode}
    for shape in ((136, 256), (3, 5, 128)):
        tensors, expected = make_mlx(shape, bits, group, mode)
        write_safetensors(tmp_path / "model.safetensors", named(UP, tensors))
        found = read_matrices(tmp_path, {"quantization": section})
        assert set(found) == {f"{UP}.weight"}
        assert_same(whole(found[f"{UP}.weight"]), expected)


def test_mlx_overrides_reach_experts_and_modules(tmp_path: Path) -> None:
    experts = "model.layers.0.mlp.experts"
    up, down = "model.layers.0.mlp.switch_mlp.up_proj", "model.layers.0.mlp.down_proj"
    section = {"bits": 4, "group_size": 64, up: {"bits": 8, "group_size": 32}, down: False}
    first, second = (make_mlx((8, 64), 8, 32, seed=seed) for seed in (1, 2))
    plain = as_stored(np.random.RandomState(0).randn(8, 64), "F16")
    tensors = {
        **named(f"{experts}.0.up_proj", first[0]),
        **named(f"{experts}.1.up_proj", second[0]),
        f"{down}.weight": plain,
    }
    found = read(tmp_path, tensors, section)
    assert_same(whole(found[f"{up}.weight"]), np.stack([first[1], second[1]]))
    assert_same(whole(found[f"{down}.weight"]), float_of(plain))


# --- plain, experts, and what all formats share --------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_plain(dtype: str, tmp_path: Path) -> None:
    values = np.random.RandomState(0).randn(3, 130, 24).astype(np.float32)
    tensors = {
        "a.weight": as_stored(values[0], dtype),
        "b.weight": as_stored(values, dtype),
        "c.norm.weight": as_stored(values[0, 0], dtype),
    }
    found = read(tmp_path, tensors, None)
    for name, stored in tensors.items():
        assert_same(whole(found[name], most=100), float_of(stored))


MAKERS: dict[str, tuple[dict[str, Any] | None, Callable[[int], tuple[dict[str, Stored], Array]]]]
MAKERS = {
    "fp8": (FP8, lambda seed: make_fp8((136, 128), seed=seed)),
    "awq": (AWQ, lambda seed: make_awq(128, 136, seed=seed)),
    "gptq": (GPTQ, lambda seed: make_gptq(128, 136, 4, "permuted", seed=seed)),
    "mlx": ({"bits": 3, "group_size": 32}, lambda seed: make_mlx((136, 128), 3, 32, seed=seed)),
    "plain": (None, lambda seed: make_plain((136, 128), seed)),
}


def make_plain(shape: tuple[int, ...], seed: int) -> tuple[dict[str, Stored], Array]:
    stored = as_stored(np.random.RandomState(seed).randn(*shape), "BF16")
    return {"weight": stored}, float_of(stored)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("kind", MAKERS)
def test_experts_one_by_one(kind: str, shards: int, tmp_path: Path) -> None:
    section, make = MAKERS[kind]
    tensors: dict[str, Stored] = {}
    expected = []
    for expert in (10, 3, 0, 1, 2, 4, 5, 6, 7, 8, 9):  # in no order, and past nine
        parts, value = make(expert)
        tensors |= named(f"model.layers.0.mlp.experts.{expert}.up_proj", parts)
        expected.append((expert, value))
    names = list(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        write_safetensors(tmp_path / file, {name: tensors[name] for name in names[shard::shards]})
    found = read_matrices(tmp_path, {"quantization_config": section} if section else {})
    assert set(found) == {"model.layers.0.mlp.switch_mlp.up_proj.weight"}
    matrix = found["model.layers.0.mlp.switch_mlp.up_proj.weight"]
    assert_same(whole(matrix), np.stack([value for _, value in sorted(expected)]))


@pytest.mark.parametrize("kind", MAKERS)
def test_one_expert_is_a_stack_of_one(kind: str, tmp_path: Path) -> None:
    section, make = MAKERS[kind]
    parts, expected = make(0)
    found = read(tmp_path, named("model.layers.0.mlp.experts.0.up_proj", parts), section)
    matrix = found["model.layers.0.mlp.switch_mlp.up_proj.weight"]
    assert matrix.shape == (1, 136, 128)
    assert_same(whole(matrix), expected[None])


@pytest.mark.parametrize("kind", MAKERS)
def test_modules_left_as_they_are_beside_quantized_ones(kind: str, tmp_path: Path) -> None:
    section, make = MAKERS[kind]
    parts, expected = make(0)
    values = np.random.RandomState(1).randn(2, 136, 128)
    head, norm = as_stored(values[0], "BF16"), as_stored(values[1, 0], "F32")
    tensors = {
        **named(UP, parts),
        f"{UP}.bias": norm,
        "lm_head.weight": head,
        "model.norm.weight": norm,
    }
    found = read(tmp_path, tensors, section)
    assert set(found) == {f"{UP}.weight", f"{UP}.bias", "lm_head.weight", "model.norm.weight"}
    assert_same(whole(found[f"{UP}.weight"]), expected)
    assert_same(whole(found["lm_head.weight"]), float_of(head))
    assert_same(whole(found["model.norm.weight"]), float_of(norm))


@pytest.mark.parametrize("kind", MAKERS)
def test_any_size_of_blocks_gives_the_whole(kind: str, tmp_path: Path) -> None:
    section, make = MAKERS[kind]
    parts = {"fp8": make_fp8((700, 130)), "awq": make_awq(128, 520), "mlx": None}.get(kind)
    parts = parts or {"gptq": make_gptq(128, 520, 8), "plain": make_plain((700, 130), 0)}.get(kind)
    tensors, expected = parts or make_mlx((700, 96), 3, 32)
    section = {**section, "bits": 8} if section and kind == "gptq" else section
    matrix = read(tmp_path, named(UP, tensors), section)[f"{UP}.weight"]
    for most in (1, 17_000, 40_000, 1 << 30):
        assert_same(whole(matrix, most), expected)
    assert len(list(matrix.blocks(1))) == -(-expected.shape[0] // 128)
    assert len(list(matrix.blocks(1 << 30))) == 1


# --- what is refused ----------------------------------------------------------------------------

REFUSED = {
    "awq gemv": ({**AWQ, "version": "gemv"}, "AWQ with version 'gemv', and only 'gemm'"),
    "awq 8 bits": ({**AWQ, "bits": 8}, "AWQ with bits 8, and only 4 can be read; take the orig"),
    "awq symmetric": ({**AWQ, "zero_point": False}, "AWQ with zero_point False, and only True"),
    "awq silent": ({"quant_method": "awq"}, "AWQ with bits None, and only 4"),
    "gptq 3 bits": ({**GPTQ, "bits": 3}, "GPTQ with bits 3, and only 4 and 8"),
    "gptq v3": ({**GPTQ, "checkpoint_format": "gptq_v3"}, "GPTQ with checkpoint_format 'gptq_v3'"),
    "gptq marlin": ({**GPTQ, "is_marlin_format": True}, "is_marlin_format True, and only False"),
    "gptq packed": ({**GPTQ, "pack_dtype": "int16"}, "pack_dtype 'int16', and only 'int32'"),
    "gptq dynamic": ({**GPTQ, "dynamic": {"+:.*down.*": {"bits": 8}}}, "GPTQ with `dynamic`"),
    "gptq without order": (
        {**GPTQ, "desc_act": True},
        f"{UP}.g_idx is missing, and desc_act is true",
    ),
    "fp8 without blocks": ({"quant_method": "fp8"}, "FP8 with weight_block_size None"),
    "fp8 blocks of nothing": ({**FP8, "weight_block_size": [0, 128]}, r"_block_size \[0, 128\]"),
    "fp8 blocks no pair": ({**FP8, "weight_block_size": 128}, "FP8 with weight_block_size 128"),
    "bitsandbytes of 8 bits": (
        {"load_in_8bit": True},
        "bitsandbytes with load_in_8bit, and only 4",
    ),
    "autoround of another kind": (
        {"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor"},
        "AutoRound with packing_format 'auto_round:llm_compressor', and only auto_round:auto_gptq",
    ),
    "autoround of floats": (
        {"quant_method": "auto-round", "data_type": "mx_fp"},
        "AutoRound with data_type 'mx_fp', and only 'int'",
    ),
    "compressed-tensors rotated": (
        {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {}}}},
        "compressed-tensors with a transform_config, which is not read",
    ),
    **{
        method: (
            {"quant_method": method, "bits": 4},
            rf"quantized as '{method}', which is not read \(.*compressed-tensors and MLX's own "
            r"formats are\); take the original weights, or a build for MLX",
        )
        for method in ("mxfp4", "hqq", "exl2", "torchao")
    },
    "a number": (5, "quantization is 5, not an object"),
    "seven bits": ({"bits": 7, "group_size": 64}, "bits must be one of"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_formats_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    section, complaint = REFUSED[kind]
    tensors, _ = make_mlx((8, 64), 4, 64)
    if kind == "gptq without order":
        tensors = make_gptq(256, 64, 4, "missing")[0]
    with pytest.raises(CheckpointError, match=complaint) as raised:
        read(tmp_path, named(UP, tensors), section)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def without(tensors: dict[str, Stored], kind: str) -> dict[str, Stored]:
    return {name: stored for name, stored in tensors.items() if name != kind}


def cut(tensors: dict[str, Stored], kind: str, *, columns: bool = False) -> dict[str, Stored]:
    """Leave a tensor's last row away, or its last column."""
    dtype, values = tensors[kind]
    values = values[:, :-1] if columns else values[:-1]
    return {**tensors, kind: (dtype, np.ascontiguousarray(values))}


def stray_index(tensors: dict[str, Stored]) -> dict[str, Stored]:
    dtype, values = tensors["g_idx"]
    values = values.copy()
    values[5] = 99
    return {**tensors, "g_idx": (dtype, values)}


MISFITS = {
    "fp8 scales": (FP8, cut(make_fp8((256, 130))[0], "weight_scale_inv"), "weight_scale_inv is"),
    "fp8 columns": (
        FP8,
        cut(make_fp8((256, 130))[0], "weight_scale_inv", columns=True),
        r"weight_scale_inv is BF16 \[2, 1\] where .* \[2, 2\] is needed",
    ),
    "fp8 one axis": (
        FP8,
        {
            "weight": ("F8_E4M3", np.zeros(128, "u1")),
            "weight_scale_inv": ("F32", np.ones(1, "f4")),
        },
        r"up_proj.weight is F8_E4M3 \[128\]",
    ),
    "e5m2": (
        FP8,
        {**make_fp8((8, 8))[0], "weight": ("F8_E5M2", np.zeros((8, 8), "u1"))},
        "up_proj.weight is F8_E5M2",
    ),
    "fp8 without scales": (FP8, without(make_fp8((8, 8))[0], "weight_scale_inv"), "is F8_E4M3"),
    "fp8 in silence": (None, without(make_fp8((8, 8))[0], "weight_scale_inv"), "is F8_E4M3"),
    "integers": (None, {"weight": ("U8", np.zeros((8, 8), "u1"))}, "up_proj.weight is U8"),
    "awq zeros": (AWQ, cut(make_awq(256, 64)[0], "qzeros"), "scales is F16"),
    "awq scales": (AWQ, cut(make_awq(256, 64)[0], "scales", columns=True), "scales is F16"),
    "awq inputs": (AWQ, cut(make_awq(256, 64)[0], "qweight"), "255 .* 2 groups"),
    "gptq zeros": (GPTQ, cut(make_gptq(256, 64, 4)[0], "qzeros", columns=True), "qzeros is I32"),
    "gptq scales": (GPTQ, cut(make_gptq(256, 64, 4)[0], "scales"), "scales is F16"),
    "gptq index": (GPTQ, cut(make_gptq(256, 64, 4)[0], "g_idx"), "g_idx is I32"),
    "gptq bits": (GPTQ, make_gptq(256, 64, 8)[0], "up_proj.qzeros is I32"),
    "gptq stray index": (GPTQ, stray_index(make_gptq(256, 64, 4)[0]), "g_idx names group 99"),
    "mlx scales": (
        {"bits": 4, "group_size": 64},
        cut(make_mlx((8, 128), 4, 64)[0], "scales"),
        r"scales is BF16 \[7, 2\] where .* \[8, 2\] is needed",
    ),
    "mlx biases": (
        {"bits": 4, "group_size": 64},
        without(make_mlx((8, 128), 4, 64)[0], "biases"),
        "up_proj.biases is missing",
    ),
    "mlx codes": (
        {"bits": 4, "group_size": 32, "mode": "mxfp4"},
        make_mlx((8, 128), 4, 32)[0],
        "scales is BF16",
    ),
    "mlx bits": ({"bits": 8, "group_size": 64}, make_mlx((8, 128), 4, 64)[0], "scales is BF16"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_tensors_that_do_not_fit_together_are_named(kind: str, tmp_path: Path) -> None:
    section, tensors, complaint = MISFITS[kind]
    with pytest.raises(CheckpointError, match=complaint) as raised:
        for matrix in read(tmp_path, named(UP, tensors), section).values():
            whole(matrix)
    assert "\n" not in str(raised.value)


def test_a_section_that_is_none_is_named(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", named(UP, make_plain((8, 8), 0)[0]))
    for odd in (5, "fp8", [1], True):
        with pytest.raises(CheckpointError, match="quantization is .*, not an object"):
            read_matrices(tmp_path, {"quantization": odd, "quantization_config": FP8})


def named(module: str, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    return {f"{module}.{kind}": stored for kind, stored in tensors.items()}


def assert_same(found: Array, expected: Array) -> None:
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
