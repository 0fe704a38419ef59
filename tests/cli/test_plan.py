"""`qwen3 plan`: the table, the JSON, the picture, and one sentence for everything wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from qwen3_mlx import backend
from qwen3_mlx.cache.quantized import CACHE_FORMATS
from qwen3_mlx.cli import chips
from qwen3_mlx.model.sizes import published_config
from tests.cli.harness import call

Captured = pytest.CaptureFixture[str]


def everything(capsys: Captured, *arguments: str) -> dict[str, Any]:
    code, out, err = call(["plan", *arguments, "--json"], capsys)
    assert code == 0, err
    content: dict[str, Any] = json.loads(out)
    return content


def row_of(out: str, name: str) -> str:
    return next(line for line in out.splitlines() if line.startswith(name))


def write_config(folder: Path, **more: Any) -> str:
    (folder / "config.json").write_text(json.dumps({**published_config("8B"), **more}))
    return str(folder)


def test_the_table_tells_what_fits(capsys: Captured) -> None:
    code, out, err = call(["plan", "8B", "--memory", "16"], capsys)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    assert out.startswith(
        "Qwen3-8B: 8.19 billion weights, 36 layers, context window 40,960 tokens\n"
    )
    assert "about two thirds by default, 11.5 GB" in out
    header = row_of(out, "memory in GB").split()
    assert header[-11:] == "2k 4k 8k 16k 32k 40k 64k* 128k* fits up to".split()
    assert row_of(out, "cache, bf16").split()[2:4] == ["0.30", "0.60"]
    assert row_of(out, "reserve").split()[1:] == ["0.50"] * 8
    assert row_of(out, "bf16").split()[1:3] == ["16.38", "(18.0)"]
    assert row_of(out, "bf16").split()[-1] == "-"
    four = row_of(out, "4 bits").split()
    assert four[2:4] == ["4.61", "6.3"]
    assert four[-2] == "(25.3)"
    assert four[-5:-3] == ["10.8", "(12.0)"] and re.fullmatch(r"3\d,\d{3}", four[-1])
    assert row_of(out, "3 bits").split()[-1].endswith("*")  # beyond the window, so with YaRN
    for word in ("YaRN", "--bandwidth", "bfloat16"):
        assert word in out


@pytest.mark.as_cpu
def test_this_machine_is_what_load_would_ask(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "available_memory", lambda: 6_500_000_000)
    monkeypatch.setattr(backend, "memory_limit", lambda: 9_000_000_000)
    _, out, _ = call(["plan", "8b"], capsys)
    assert "This machine can give 6.5 GB now, and 9.0 GB with nothing else running." in out
    assert "512 tokens at once" in out and "--dtype float32" in out
    _, out, _ = call(["plan", "8b", "--dtype", "float32"], capsys)
    assert row_of(out, "fp32").split()[1] == "32.76"
    assert row_of(out, "cache, fp32").split()[2] == "0.60"


@pytest.mark.parametrize(
    ("memory", "gives"),
    [("8", "5.7"), ("16", "11.5"), ("24", "17.2"), ("32", "22.9"), ("36", "25.8")]
    + [("48", "38.7"), ("64", "51.5"), ("96", "77.3"), ("128", "103.1"), ("512", "412.3")],
)
def test_what_a_mac_gives_its_gpu(memory: str, gives: str, capsys: Captured) -> None:
    """In GB of 10^9 bytes: as Metal's recommendedMaxWorkingSetSize, or a little less."""
    share = "two thirds" if float(memory) <= 36 else "three quarters"
    _, out, _ = call(["plan", "4B", "--memory", memory], capsys)
    said = (
        f"A Mac with {memory} GB: macOS lets the GPU have about {share} by default, {gives} GB of"
    )
    assert said in out


def test_the_machine_itself_is_asked(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "on_metal", lambda: True)
    monkeypatch.setattr(backend, "total_memory", lambda: 16 * 2**30)
    monkeypatch.setattr(backend, "memory_limit", lambda: 12_713_000_000)
    monkeypatch.setattr(backend, "available_memory", lambda: 12_713_000_000)
    monkeypatch.setattr(backend, "free_memory", lambda: 3_100_000_000)
    monkeypatch.setattr(backend, "working_set", lambda: 12_713_000_000)
    _, out, _ = call(["plan", "8B", "--memory", "16"], capsys)
    assert "This Mac, with 16 GB: its GPU can have 12.7 GB of 10^9 bytes." in out
    _, out, _ = call(["plan", "8B", "--memory", "24"], capsys)
    assert "A Mac with 24 GB: macOS lets the GPU have about two thirds" in out
    _, out, _ = call(["plan", "8B"], capsys)
    assert (
        "This Mac can give 12.7 GB, the working set that Metal recommends; 3.1 GB of memory" in out
    )
    monkeypatch.setenv("QWEN3_MEMORY", "12.7")
    _, out, _ = call(["plan", "8B"], capsys)
    assert "This process can have 12.7 GB, as QWEN3_MEMORY says." in out


def test_json_has_every_format(capsys: Captured) -> None:
    plan = everything(capsys, "4B", "--memory", "16", "--chip", "m4 max")
    assert plan["weights"]["4"] == 2_262_920_192
    assert list(plan["weights"]) == ["bf16", "8", "6", "5", "4", "mxfp4", "3"]
    assert plan["available"] == 16 * 2**30 * 2 // 3
    rows = plan["rows"]
    assert len(rows) == 7 * 4 * 8
    assert {row["cache_format"] for row in rows} == set(CACHE_FORMATS)
    for row in rows:
        terms = [row[term] for term in ("weights", "cache", "activations", "reserve")]
        assert row["total"] == sum(terms)
        assert row["fits"] == (row["total"] <= plan["available"])
        assert row["yarn"] == (row["context"] > 40960)
        most = plan["largest_context"][row["weight_format"]][row["cache_format"]]
        assert row["fits"] == (row["context"] <= most)
    first = rows[0]
    assert first["tokens_per_second_at_most"] == pytest.approx(
        546e9 / (plan["weights"]["bf16"] + first["cache"])
    )
    assert everything(capsys, "4B")["rows"][0]["tokens_per_second_at_most"] is None


def test_speed_is_bounded_by_active_experts(capsys: Captured) -> None:
    dense, sparse = (
        row_of(out.split("tokens/s, at most, at 400 GB/s")[1], "4 bits").split()
        for _, out, _ in (
            call(["plan", size, "--memory", "64", "--bandwidth", "400"], capsys)
            for size in ("32B", "30B-A3B")
        )
    )
    assert int(dense[2]) == 22
    assert int(sparse[2]) > 9 * int(dense[2])


def test_speeds_are_bounded_for_every_chip(capsys: Captured) -> None:
    _, out, _ = call(["plan", "4B", "--memory", "36"], capsys)
    assert max(map(len, out.splitlines())) <= 100
    formats = "GB/s bf16 8 bits 6 bits 5 bits 4 bits mxfp4 3 bits"
    heads, *rows = out.split("by the bandwidth of a chip's memory\n")[1].splitlines()
    assert " ".join(heads.split()) == formats
    assert [row.split()[0] for row in rows[:4]] == ["M1", "M2,", "M4", "M3"]
    bounds = everything(capsys, "4B")["tokens_per_second_at_most"]
    assert list(bounds) == ["bf16", "8", "6", "5", "4", "mxfp4", "3"]
    bounds = bounds["4"]
    assert set(bounds) == set(chips.BANDWIDTHS) and len(bounds) == 21
    for generation in range(1, 6):
        for kind in ("", " Pro", " Max", " Ultra"):
            known = f"M{generation}{kind}" in bounds
            assert known or (generation, kind) in ((4, " Ultra"), (5, " Ultra"))
    assert row_of(out, "M5 Pro").split()[-3] == f"{bounds['M5 Pro']:,.0f}"
    by_context = everything(capsys, "4B", "--chip", "M5 Pro")["rows"]
    first = next(row for row in by_context if row["weight_format"] == "4")
    assert first["tokens_per_second_at_most"] == bounds["M5 Pro"]
    less = everything(capsys, "4B", "--cache", "4")["tokens_per_second_at_most"]["4"]
    first = next(
        row for row in by_context if (row["weight_format"], row["cache_format"]) == ("4", "4")
    )
    assert first["tokens_per_second_at_most"] == less["M5 Pro"] > bounds["M5 Pro"]


def test_what_was_measured_is_said_beside_the_bound(capsys: Captured) -> None:
    shares = chips.published_shares()
    assert {bits: round(share, 2) for bits, share in shares.items()} == {
        4: 0.63,  # 134.52 tokens/s of 2.27 GB of weights and 0.31 GB of cache, at 546 GB/s
        6: 0.69,
        8: 0.73,
        16: 0.8,
    }
    for arguments in (["8B"], ["8B", "--chip", "M4 Max"], ["--chip", "M4 Max"]):
        _, out, _ = call(["plan", *arguments], capsys)
        assert "63% of it for 4B in 4 bits on an M4 Max" in out
    _, out, _ = call(["plan", "--memory", "36", "--chip", "M4 Max"], capsys)
    speeds = out.split("tokens/s at most, 546 GB/s")[1]
    assert row_of(speeds, "Qwen3-4B").split()[1:] == ["213", "153", "119", "65"]
    assert row_of(speeds, "Qwen3-235B").split()[1:] == ["-"] * 4


def test_a_known_chip_needs_no_option(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "on_metal", lambda: True)
    monkeypatch.setattr(backend, "device_name", lambda: "Apple M4 Pro")
    monkeypatch.setattr(backend, "working_set", lambda: 12_713_000_000)
    _, out, _ = call(["plan", "8B"], capsys)
    assert "tokens/s, at most, at 273 GB/s" in out
    _, out, _ = call(["plan", "8B", "--memory", "64"], capsys)  # another Mac
    assert "by the bandwidth of a chip's memory" in out
    monkeypatch.setattr(backend, "device_name", lambda: "Apple M9")
    assert chips.this_chip() is None


def test_the_cache_shown_can_be_chosen(capsys: Captured) -> None:
    _, out, _ = call(["plan", "8B", "--memory", "16", "--cache", "k8v4"], capsys)
    assert row_of(out, "cache, k8v4").split()[2:6] == ["0.12", "0.25", "0.49", "0.98"]


def test_a_folder_is_planned_as_it_is_too(tmp_path: Path, capsys: Captured) -> None:
    folder = write_config(tmp_path, quantization={"bits": 4, "group_size": 32})
    plan = everything(capsys, folder)
    assert plan["model"] == folder
    # 0.5 bits a weight more than with groups of 64
    assert plan["weights"]["as it is"] - plan["weights"]["4"] == pytest.approx(
        8.19e9 / 16, rel=0.01
    )
    write_config(
        tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}
    )
    code, out, err = call(["plan", folder, "--json"], capsys)
    assert code == 0
    assert not err
    found = json.loads(out)["weights"]
    assert found["4"] < found["as it is"]  # 8 bits, but for the embedding and the head


def test_a_stretched_window_is_marked(tmp_path: Path, capsys: Captured) -> None:
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32768}
    folder = write_config(tmp_path, rope_scaling=yarn, max_position_embeddings=65536)
    _, out, _ = call(["plan", folder], capsys)
    assert row_of(out, "memory in GB").split()[-5:] == ["32k", "64k*", "fits", "up", "to"]
    folder = write_config(tmp_path, max_position_embeddings=1000)
    assert [row["context"] for row in everything(capsys, folder)["rows"][:2]] == [1000, 1000]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["9B"], "'9B' is no folder here, nor a hub name such as Qwen/Qwen3-8B, nor one of the"),
        (["nowhere"], "'nowhere' is no folder here, nor a hub name"),
        (["8B", "--revision", "main"], "--revision belongs to hub names"),
        (["8B", "--memory", "0"], "--memory must be GB, from 1 to 100,000, not 0"),
        (["8B", "--memory", "nan"], "--memory must be GB"),
        (["8B", "--memory", "-16"], "--memory must be GB"),
        (["8B", "--memory", "much"], "--memory must be GB, from 1 to 100,000, not much"),
        (["8B", "--cache", "2"], "--cache must be one of bf16, 8, k8v4, 4, not '2'"),
        (["8B", "--dtype", "int8"], "dtype must be one of"),
        (["8B", "--bandwidth", "inf"], "--bandwidth must be GB/s, more than 0, not inf"),
        (["8B", "--bandwidth", "-1"], "--bandwidth must be GB/s"),
        (["8B", "--chip", ""], "--chip '' is not among M1, M1 Pro"),
        (["8B", "--chip", "M9"], "--chip 'M9' is not among M1, M1 Pro"),
        (["8B", "--chip", "M1", "--bandwidth", "1"], "give one of them"),
        (["8B", "--plot", "plan.jpeg"], "must end in .png or .svg, and plan.jpeg does not"),
        (["--revision", "main"], "need a model: qwen3 plan 8B"),
        (["--file", "x.gguf"], "need a model: qwen3 plan 8B"),
        (["8B", "--layers", "18,18"], "--layers and --context go with --hosts"),
        (["8B", "--context", "8192"], "--layers and --context go with --hosts"),
        (["8B", "--hosts", "24,36", "--plot", "plan.svg"], "--hosts go without --memory, --chip"),
        (["8B", "--hosts", "24,36", "--memory", "16"], "--hosts go without --memory, --chip"),
        (["8B", "--hosts", "24,36", "--chip", "M4"], "--hosts go without --memory, --chip"),
    ],
)
def test_wrong_arguments(arguments: list[str], complaint: str, capsys: Captured) -> None:
    code, out, err = call(["plan", *arguments], capsys)
    assert code != 0
    assert complaint in err
    assert len(err.splitlines()) == 1
    assert not out


def test_what_is_no_qwen3_is_refused(tmp_path: Path, capsys: Captured) -> None:
    code, _, err = call(["plan", str(tmp_path)], capsys)
    assert code == 1 and "has no config.json" in err
    code, _, err = call(["plan", write_config(tmp_path, model_type="llama")], capsys)
    assert code == 1 and "model_type is 'llama'" in err


@pytest.mark.heavy
def test_the_picture_is_drawn_the_same_every_time(tmp_path: Path, capsys: Captured) -> None:
    pytest.importorskip("matplotlib")
    files = tmp_path / "first.svg", tmp_path / "second.svg"
    for file in files:
        code, out, err = call(["plan", "8B", "--memory", "16", "--plot", str(file)], capsys)
        assert code == 0 and "4 bits" in out
        assert err == f"drawn: {file}\n"
    first, second = (file.read_text("utf-8") for file in files)
    assert first == second
    for word in ("tokens/s, at most", "M3 Ultra"):
        assert word in first
    assert ElementTree.fromstring(first).tag.endswith("svg")
    picture = tmp_path / "plan.png"  # of a machine that everything fits
    assert call(["plan", "0.6B", "--memory", "64", "--plot", str(picture)], capsys)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_one_sentence_tells_how_to_get_it(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    code, out, err = call(["plan", "8B", "--plot", str(tmp_path / "plan.svg")], capsys)
    assert (code, out) == (1, "")
    assert "pip install" in err and "'matplotlib>=" in err
    assert len(err.splitlines()) == 1


def test_no_slow_package_is_imported_for_the_table() -> None:
    assert "qwen3_mlx.cli.plan" in sys.modules
    program = "import sys, qwen3_mlx.cli.main; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    slow = {"matplotlib", "numpy", "mlx.nn", "tokenizers", "jinja2", "huggingface_hub"}
    slow |= {"importlib.metadata", "rich.markdown", "qwen3_mlx.cluster.launch"}
    assert not loaded & slow


# --- without a model ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "size", "bits"),
    [
        ("8", "4B", 4),
        ("16", "8B", 4),
        ("24", "14B", 4),
        ("32", "30B-A3B", 4),
        ("64", "30B-A3B", 8),
        ("192", "235B-A22B", 4),
    ],
)
def test_a_size_is_recommended(memory: str, size: str, bits: int, capsys: Captured) -> None:
    content = everything(capsys, "--memory", memory)
    best = content["recommended"]
    assert (best["size"], best["bits"]) == (size, bits)
    assert best["model"] == f"Qwen/Qwen3-{size}-MLX-{bits}bit"
    assert best["context"] >= 8192
    assert content["sizes"][size]["4"]["tokens_per_second_at_most"] is None
    own = everything(capsys, size, "--memory", memory)  # the same sums
    assert content["sizes"][size]["4"]["weights"] == own["weights"]["4"]
    assert content["sizes"][size]["4"]["largest_context"] == own["largest_context"]["4"]["bf16"]


def test_the_sizes_have_the_speeds_of_a_chip(capsys: Captured) -> None:
    content = everything(capsys, "--memory", "24", "--chip", "M4 Pro")["sizes"]["8B"]
    own = everything(capsys, "8B", "--memory", "24")["tokens_per_second_at_most"]
    assert {fmt: size["tokens_per_second_at_most"] for fmt, size in content.items()} == {
        fmt: bounds["M4 Pro"] for fmt, bounds in own.items()
    }


def test_a_slow_machine_is_recommended_a_smaller_size(capsys: Captured) -> None:
    assert everything(capsys, "--memory", "24", "--chip", "M1")["recommended"]["size"] == "8B"
    slow = everything(capsys, "--memory", "24", "--bandwidth", "1")
    assert slow["recommended"] is None
    _, out, _ = call(["plan", "--memory", "24", "--bandwidth", "1"], capsys)
    assert "at a readable speed" in out


def test_the_table_of_sizes(capsys: Captured) -> None:
    code, out, err = call(["plan", "--memory", "16"], capsys)
    assert (code, err) == (0, "")
    assert row_of(out, "Qwen3-8B").endswith("<--") and out.count("<--") == 1
    assert row_of(out, "Qwen3-32B").split()[1:] == ["-"] * 4
    assert "qwen3 pull 8B" in out
    _, out, _ = call(["plan", "--memory", "2"], capsys)
    assert "None of them fits" in out and "<--" not in out
    assert call(["plan"], capsys)[0] == 0


def test_memory_may_have_its_unit(capsys: Captured) -> None:
    plain = call(["plan", "8B", "--memory", "16"], capsys)
    for stated in ("16GB", "16 gb"):
        assert call(["plan", "8B", "--memory", stated], capsys) == plain
