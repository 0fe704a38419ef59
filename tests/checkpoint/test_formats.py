"""Checkpoints in other programs' formats, against what those and transformers make of them."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from qwen3_mlx import CheckpointError, Qwen3Error, convert, load
from qwen3_mlx.checkpoint import gguf_file
from qwen3_mlx.checkpoint.formats.gguf import schemes
from qwen3_mlx.checkpoint.formats.matrix import StoredRows
from qwen3_mlx.checkpoint.gguf_file import read_gguf
from qwen3_mlx.files import PACKED, Entry, read_rows
from tests.cli.harness import call
from tests.support import read_weights

GOLDEN = Path(__file__).parents[1] / "golden/formats"
CASES = sorted(folder.name for folder in GOLDEN.iterdir() if folder.is_dir())
GGUFS = [case for case in CASES if case.startswith("gguf")]
# Cases with matrices that MLX has no format for: they are held in 8 bits, or in floats.
REQUANTIZED = ("bnb", "ct_fp8", "ct_nvfp4", "gguf_iq4", "gguf_moe_q4_k_m", "gguf_q5_k_m")
EXACT, CLOSE = 1e-10, 3e-4  # nats
FLOAT32: Any = {"dtype": "float32"}
# The bytes where a block has float16 numbers, if not the first two.
_SCALES = {
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
}


def source_of(case: str) -> Path:
    """Return what a user would name: the file of a GGUF, or its first part, or the folder."""
    return next(iter(sorted((GOLDEN / case).glob("*.gguf"))), GOLDEN / case)


def divergence(case: str, source: Path, **options: Any) -> float:
    """Load a checkpoint, and compare its logits with the golden ones: the mean KL divergence."""
    golden = np.load(GOLDEN / case / "golden.npz")
    with load(source, **FLOAT32, **options) as llm:
        logits = np.array(llm.logits(golden["ids"].flatten().tolist()), np.float64)
    expected, found = (
        each - np.log(np.exp(each).sum(-1, keepdims=True))
        for each in (golden["logits"].astype(np.float64), logits)
    )
    return float((np.exp(expected) * (expected - found)).sum(-1).mean())


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_computes_what_its_own_program_does(case: str) -> None:
    assert divergence(case, source_of(case), dequantize=True) < EXACT
    held = divergence(case, source_of(case), dequantize=False)
    assert held < (CLOSE if case.startswith(REQUANTIZED) else EXACT)


@pytest.mark.parametrize(
    "case", ["autoround_mixed_bits", "bnb_moe_nf4", "ct_w4a16_asym", "gguf_narrow_q4_k_m"]
)
def test_a_conversion_keeps_the_codes(case: str, tmp_path: Path) -> None:
    made = convert(source_of(case), tmp_path / "kept", **FLOAT32)
    kept = divergence(case, tmp_path / "kept", dequantize=False)
    assert kept < (CLOSE if case.startswith(REQUANTIZED) else EXACT)
    if case == "gguf_narrow_q4_k_m":
        assert {fmt.bits for fmt in made.formats.values()} == {5, 8}  # it falls back to Q5_0, Q8_0
    convert(source_of(case), tmp_path / "floats", dequantize=True, **FLOAT32)
    assert divergence(case, tmp_path / "floats") < EXACT
    asked = convert(source_of(case), tmp_path / "asked", bits=3, group_size=32)
    assert 3 in {fmt.bits for fmt in asked.formats.values()}


def test_bits_may_be_asked_for_while_loading() -> None:
    case = "ct_w4a16_asym"
    assert EXACT < divergence(case, source_of(case), bits=4, dequantize=False) < 1
    assert divergence(case, source_of(case), bits=8, dequantize=False) < CLOSE


@pytest.mark.heavy
@pytest.mark.parametrize("case", GGUFS)
def test_the_tokenizer_of_a_gguf_is_the_original(case: str) -> None:
    with load(source_of(case)) as llm:
        for known in json.loads((GOLDEN / case / "tokens.json").read_text()):
            assert llm.tokenizer.encode(known["text"]) == known["ids"]
        text = "<|im_start|>a<|fim_prefix|>b"
        assert llm.tokenizer.decode(llm.tokenizer.encode(text)) == text
        assert llm.thinking.can_think and llm.kind == "chat"
        assert llm.chat("Hi", max_tokens=2).usage.prompt_tokens > 5


@pytest.mark.parametrize("kind", PACKED)
def test_every_type_of_gguf_is_decoded_to_the_bit(kind: str, tmp_path: Path) -> None:
    quants = pytest.importorskip("gguf.quants")
    numbers, size = PACKED[kind]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (256, 512 // numbers * size), dtype=np.uint8)
    blocks = raw.reshape(-1, size)
    for place in _SCALES.get(kind, (0,)):
        scales = rng.normal(0, 0.01, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    (tmp_path / "raw").write_bytes(raw.tobytes())
    rows = stored_rows(Entry(tmp_path / "raw", kind, (256, 512), 0))
    expected = quants.dequantize(raw, quants.GGMLQuantizationType[kind])[128:200]
    assert np.array_equal(np.array(rows.read(128, 200)), expected)
    if rows.codes:
        held = rows.codes.fmt.dequantize_float32(*rows.codes.read(128, 200))
        assert np.array_equal(np.array(held), expected)


def stored_rows(entry: Entry) -> StoredRows:
    """Return a tensor of a file as it is read."""

    class Stored:
        stored = {"a.weight": entry}

        def rows(self, name: str, start: int, stop: int) -> mx.array:
            return read_rows(self.stored[name], start, stop)

    (scheme,) = (each for each in schemes({}) if each.dtypes == (entry.dtype,))
    return scheme.decoder(Stored(), "a")  # type: ignore[arg-type]


# --- a GGUF file among others, and broken ones --------------------------------------------------


def test_a_gguf_is_found_by_its_folder_and_by_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(source_of("gguf_yarn_q8_0"), tmp_path / "tiny-Q8_0.gguf")
    with load(tmp_path) as llm:
        assert llm.config.yarn
    shutil.copy(source_of("gguf_narrow_q4_k_m"), tmp_path / "tiny-Q4_K_M.gguf")
    (tmp_path / "mmproj-F16.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"has tiny-Q4_K_M.gguf, tiny-Q8_0.gguf; name one"):
        load(tmp_path)
    for name in ("Q8_0", "q8_0", "tiny-Q8_0.gguf"):
        with load(f"{tmp_path}:{name}") as llm:
            assert llm.config.yarn
    code, out, err = call(["show", f"{tmp_path}:Q4_K_M", "--json"], capsys)
    assert code == 0, err
    assert json.loads(out)["quantization"] == "GGUF"
    code, out, _ = call(["plan", str(tmp_path / "tiny-Q4_K_M.gguf"), "--json"], capsys)
    assert code == 0 and "as it is" in json.loads(out)["weights"]


def test_parts_of_a_split_file_belong_together(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "gguf_split_bf16", tmp_path / "split")
    third = sorted(folder.glob("*.gguf"))[2]
    assert divergence("gguf_split_bf16", third) < EXACT
    third.unlink()
    with pytest.raises(CheckpointError, match="lacks .*-00003-of-00003.gguf: all parts are needed"):
        load(folder)


def test_a_broken_gguf_is_one_sentence(tmp_path: Path) -> None:
    whole = source_of("gguf_narrow_q4_k_m").read_bytes()
    rng = np.random.default_rng(1)
    file = tmp_path / "broken.gguf"
    for place in (0, 3, 4, 8, 30, 1_000, 30_000, len(whole) - 1):
        file.write_bytes(whole[:place])
        with pytest.raises(CheckpointError):
            read_gguf(file)
    for _ in range(100):
        broken = bytearray(whole)
        for place in rng.integers(0, 40_000, 3):
            broken[place] = rng.integers(0, 256)
        file.write_bytes(broken)
        try:
            read_gguf(file)
        except CheckpointError as error:
            assert "\n" not in str(error)


def test_a_key_that_is_stated_twice_is_refused(tmp_path: Path) -> None:
    whole, key = source_of("gguf_narrow_q4_k_m").read_bytes(), b"general.architecture"
    entry = whole[24 : whole.index(key) + len(key) + 4 + 8 + len(b"qwen3")]
    assert entry[8:].startswith(key)
    keys = int.from_bytes(whole[16:24], "little") + 1
    file = tmp_path / "twice.gguf"
    file.write_bytes(whole[:16] + keys.to_bytes(8, "little") + entry + whole[24:])
    with pytest.raises(CheckpointError, match=r"states general\.architecture twice"):
        read_gguf(file)


def test_a_part_of_another_network_is_refused(tmp_path: Path) -> None:
    whole, key = source_of("gguf_narrow_q4_k_m").read_bytes(), b"general.architecture"
    file = tmp_path / "part.gguf"
    file.write_bytes(whole)
    first = {key.decode(): "qwen3moe"}
    with pytest.raises(CheckpointError, match="is of a qwen3, .* all parts of one kind"):
        read_gguf(file, first)
    place = whole.index(key) + len(key) + 12
    file.write_bytes(whole[:place] + b"llama" + whole[place + 5 :])
    with pytest.raises(CheckpointError, match="is of a llama"):
        read_gguf(file, {key.decode(): "qwen3"})


def test_another_network_is_refused_by_its_name(tmp_path: Path) -> None:
    whole = source_of("gguf_narrow_q4_k_m").read_bytes()
    place = whole.index(b"general.architecture") + len(b"general.architecture") + 4
    assert whole[place + 8 : place + 13] == b"qwen3"
    file = tmp_path / "llama.gguf"
    file.write_bytes(whole[: place + 8] + b"llama" + whole[place + 13 :])
    with pytest.raises(
        CheckpointError, match="is of a llama, and only qwen3 and qwen3moe are read"
    ):
        load(file)


def test_a_description_that_was_damaged_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN3_HOME", str(tmp_path))
    source = source_of("gguf_narrow_q4_k_m")
    with load(source):
        pass
    (folder,) = (tmp_path / "gguf").iterdir()
    for name, text in (("tokenizer.json", "{"), ("gguf.json", "{}"), ("config.json", None)):
        if text is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(text)
        with load(source) as llm:
            assert llm.kind == "chat"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("eos_token_id", (4, struct.pack("<I", 9999)), "eos_token_id is 9999, which is no token"),
        ("eos_token_id", (8, b"\x01" + bytes(7) + b"x"), "eos_token_id is 'x', which is no token"),
        ("tokens", (4, struct.pack("<I", 3)), "tokens is no list of str"),
    ],
)
def test_metadata_of_another_kind_is_named(
    key: str, value: tuple[int, bytes], words: str, tmp_path: Path
) -> None:
    file = tmp_path / "odd.gguf"
    file.write_bytes(with_value(source_of("gguf_narrow_q4_k_m"), f"tokenizer.ggml.{key}", *value))
    with pytest.raises(CheckpointError, match=f"has metadata that is wrong: .*{words}"):
        load(file)


def with_value(source: Path, key: str, kind: int, raw: bytes) -> bytes:
    """Return a GGUF file with another value of a key; its numbers are no longer at their place."""
    whole = source.read_bytes()
    reader = gguf_file._Reader(source, whole, len(whole), {})
    reader._place = whole.index(key.encode()) + len(key)
    start = reader._place
    reader._value(reader._one("I"))
    changed = whole[:start] + struct.pack("<I", kind) + raw + whole[reader._place :]
    return changed + bytes(64)  # the numbers begin at another multiple of 32, perhaps a later one


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    for case, name, rows, words in (
        ("bnb_moe_nf4", "nested_quant_map", 1, "nested_quant_map is F32"),
        ("ct_mixed", "q_proj.weight_scale", 8, "weight_scale is BF16"),
        ("ct_w4a16_asym", "weight_zero_point", None, "stated as not symmetric"),
    ):
        folder = shutil.copytree(GOLDEN / case, tmp_path / case)
        tensors = read_weights(folder)
        found = next(each for each in sorted(tensors) if each.endswith(name))
        array = tensors.pop(found)
        mx.eval(array, tensors)
        if rows is not None:
            tensors[found] = array[:rows]
        mx.save_safetensors(str(folder / "model.safetensors"), tensors)
        with pytest.raises(CheckpointError, match=words):
            load(folder)


def test_the_result_may_lie_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(source_of("gguf_narrow_q4_k_m"), tmp_path / "tiny.gguf")
    monkeypatch.chdir(tmp_path)
    convert("tiny.gguf", "tiny")
    with load("./tiny") as llm:
        assert llm.kind == "chat"


@pytest.mark.as_cpu
def test_experts_are_multiplied_in_float32_on_a_cpu() -> None:
    with load(source_of("bnb_moe_nf4"), dtype="bfloat16") as llm:
        assert llm.chat("Hi", max_tokens=2).usage.prompt_tokens
    with pytest.raises(Qwen3Error, match="experts in float32 only on a CPU"):
        load(source_of("bnb_moe_nf4"), dtype="bfloat16", dequantize=True)
