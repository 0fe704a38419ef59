"""`qwen3 doctor --verify`: a machine that computes right passes, a wrong operation is named."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from qwen3_mlx import Qwen3Error, backend
from qwen3_mlx.cache import batched
from qwen3_mlx.cache.kv import KVCache
from qwen3_mlx.cache.quantized import QuantizedKVCache
from qwen3_mlx.engine.sampling import Sampler
from qwen3_mlx.verify import networks, paths, reference, run
from qwen3_mlx.verify.__main__ import main
from qwen3_mlx.verify.check import Check, Outcome, PathCheck, Row
from qwen3_mlx.verify.run import Report, line_of, verify
from qwen3_mlx.verify.speed import speed_of
from tests.cli.harness import call
from tests.embedding_twins import write_twin
from tests.support import moe_folder, read_weights

Captured = pytest.CaptureFixture[str]
pytestmark = pytest.mark.as_cpu  # kernels of a GPU cannot be simulated
FEW = ("rope", "cache, 8", "indexing and writing", "sampling", "the demo: a kept prefix")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave few of the checks, and none of speed."""
    monkeypatch.setattr(run, "CHECKS", [one for one in reference.CHECKS if one.name in FEW])
    monkeypatch.setattr(paths, "CHECKS", [one for one in paths.CHECKS if one.name in FEW])
    monkeypatch.setattr(run, "cut_network", lambda size, *, layers: size)
    monkeypatch.setattr(run, "speed_of", lambda network: f"as fast as {network}")
    monkeypatch.setattr(backend, "compute_dtype", lambda name=None: mx.float32)


@pytest.mark.heavy
@pytest.mark.usefixtures("few")
def test_a_sound_machine_passes(capsys: Captured) -> None:
    code, out, err = call(["doctor", "--verify"], capsys)
    assert (code, err) == (0, "")
    rows, _, report = out.partition("\nFor a report:\n\n")
    for line, name in zip(rows.splitlines(), FEW, strict=True):
        assert re.fullmatch(rf"{re.escape(name)} +float32 \de[+-]\d\d ok", line)
    first, *facts = report.splitlines()
    assert re.fullmatch(r"qwen3-mlx \S+ verify: 5 checks, 0 FAIL, \d+ s", first)
    assert [fact.partition(":")[0] for fact in facts][:2] == ["system", "device"]
    assert "mlx 0.32" in report and "as fast as" in report


@pytest.mark.heavy
@pytest.mark.usefixtures("few")
def test_a_wrong_operation_fails_by_name(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    rope = mx.fast.rope

    def late(x: mx.array, *rest: Any, offset: mx.array, **options: Any) -> mx.array:
        return rope(x, *rest, offset=offset + 1, **options)

    monkeypatch.setattr(mx.fast, "rope", late)
    code, out, _ = call(["doctor", "--verify"], capsys)
    assert code == 1
    assert re.search(r"^rope +float32 \S+, more than 2e-03 FAIL$", out, re.MULTILINE)
    report = out.partition("For a report:")[2]
    assert "5 checks, 1 FAIL" in report and "\nrope " in report


@pytest.mark.heavy
@pytest.mark.usefixtures("few")
def test_an_operation_that_raises_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> mx.array:
        raise ValueError("no kernel for this shape\nin /Users/jo/lib.metal: 3/4")

    monkeypatch.setattr(mx, "quantized_matmul", missing)
    (failed,) = verify(only=["rope", "cache, 8"]).failed
    assert line_of(failed).endswith(
        "float32 ValueError: no kernel for this shape in (a path): 3/4 FAIL"
    )


WRONG: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {}


def breaks(name: str) -> Callable[[Callable[[pytest.MonkeyPatch], None]], Any]:
    def note(patch: Callable[[pytest.MonkeyPatch], None]) -> Any:
        WRONG[patch.__name__] = name, patch
        return patch

    return note


def keep_views(monkeypatch: pytest.MonkeyPatch, owner: type, method: str) -> None:
    """Keep views of a layer's buffers over its next write, so that MLX must copy them."""
    write, kept = getattr(owner, method), list[mx.array]()

    def keep(self: Any, *arguments: Any, **options: Any) -> Any:
        kept[:] = [buffer[:, :, :1] for buffer in self._buffers]
        return write(self, *arguments, **options)

    monkeypatch.setattr(owner, method, keep)


@breaks("no copy of a cache, bf16")
def a_view_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_views(monkeypatch, KVCache, "append")


@breaks("no copy of a cache, 4")
def a_view_of_packed_numbers_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_views(monkeypatch, KVCache, "_write")


@breaks("no copy of a cache, in joint buffers")
def a_view_of_joint_buffers_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_views(monkeypatch, batched.JointCache, "attend")


@breaks("a layer of 0.6B")
def a_norm_without_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = mx.fast.rms_norm
    monkeypatch.setattr(mx.fast, "rms_norm", lambda x, _, eps: norm(x, None, eps))


@breaks("norm of heads and states")
def a_norm_without_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = mx.fast.rms_norm
    monkeypatch.setattr(mx.fast, "rms_norm", lambda x, weight, _: norm(x, weight, 0.0))


@breaks("attention, 4 heads a key head, 4,200 keys")
def a_kernel_for_medium_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = mx.fast.scaled_dot_product_attention

    def wrong(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        return attend(q, k, v, **options) * (1.1 if 4096 < k.shape[2] < 8192 else 1)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", wrong)


@breaks("product")
def a_sum_that_is_not_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "addmm", lambda _, a, b: a @ b)


@breaks("sorting")
def a_choice_of_wrong_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = mx.argpartition

    def wrong(x: mx.array, kth: int, axis: int) -> mx.array:
        return choose(-x if kth < 0 else x, kth=kth, axis=axis)

    monkeypatch.setattr(mx, "argpartition", wrong)


@breaks("product of experts, affine 6 bits")
def a_kernel_for_experts_of_six_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    product = mx.gather_qmm

    def wrong(*arrays: Any, **options: Any) -> mx.array:
        return product(*arrays, **options) * (1.1 if options["bits"] == 6 else 1)

    monkeypatch.setattr(mx, "gather_qmm", wrong)


@breaks("the demo: a batch that changes")
def rows_that_read_the_first_ones_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """What mlx 0.32.2 did for 30B-A3B, see `cache/batched.py`."""
    attend = mx.fast.scaled_dot_product_attention

    def first(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        k, v = (mx.broadcast_to(x[:1], x.shape) for x in (k, v))
        return attend(q, k, v, **options)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", first)


@breaks("the demo: cache of 4 bits")
def a_packed_token_that_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    attend: Callable[..., Any] = QuantizedKVCache.attend

    def older(self: QuantizedKVCache, q: mx.array, *rest: Any, rope: Any, **options: Any) -> Any:
        def late(x: mx.array, offset: int) -> Any:
            return rope(x, offset + (q.shape[2] == 1 and x.shape[1] == q.shape[1]))

        return attend(self, q, *rest, rope=late, **options)

    monkeypatch.setattr(QuantizedKVCache, "attend", older)


@breaks("the demo: a kept prefix")
def prefixes_that_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen3_mlx.cache.prefix.PrefixStore.acquire", lambda *_, **__: None)


@breaks("the demo: a kept prefix")
def a_copy_of_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    copy: Callable[..., Any] = KVCache.copy
    monkeypatch.setattr(KVCache, "copy", lambda self, tokens: copy(self, tokens - 1))


@breaks("sampling")
def sampling_of_the_next_position(monkeypatch: pytest.MonkeyPatch) -> None:
    key = Sampler.next_key
    monkeypatch.setattr(Sampler, "next_key", lambda self: (key(self), key(self))[1])


@pytest.mark.heavy
@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_path_fails(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "compute_dtype", lambda name=None: mx.float32)
    monkeypatch.setattr(paths, "_CACHED", 512)  # for speed
    name, patch = WRONG[fault]
    assert not verify(only=[name]).failed
    patch(monkeypatch)
    assert [row.name for row in verify(only=[name]).failed] == [name]


@pytest.mark.heavy
@pytest.mark.usefixtures("few")
def test_a_checkpoint_is_checked_as_well(
    tiny_folder: Any, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = call(["doctor", "--verify", str(tiny_folder)], capsys)
    assert code == 0
    assert len(re.findall(r"^the model: .+ float32 \S+ ok$", out, re.MULTILINE)) == 8
    report = out.partition("For a report:")[2]
    assert re.search(r"^model: \d\.\d million weights, 2 layers, float32$", report, re.MULTILINE)
    assert str(tiny_folder) not in report and "speed of the model" in report
    code, out, err = call(["doctor", str(tiny_folder)], capsys)
    assert (code, out) == (2, "") and "go with MODEL: qwen3 doctor --verify" in err
    code, out, err = call(["doctor", "--verify", "--hosts", "local:2"], capsys)
    assert (code, out) == (2, "") and "run one at a time" in err


@pytest.mark.heavy
@pytest.mark.usefixtures("few")
def test_experts_that_a_quantized_cache_chooses_are_no_failure(tmp_path: Path) -> None:
    assert not verify(str(moe_folder(tmp_path)), only=[]).failed


def test_the_report_of_a_chip_names_the_choice_of_dtype(
    demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run._described(demo, "float32") == "1.9 million weights, 4 layers, float32"
    monkeypatch.setattr(backend, "emulates_bfloat16", lambda: True)
    assert "float16 (its layers stay within the range" in run._described(demo, "float16")
    assert "bfloat16 (its layers come near the end" in run._described(demo, "bfloat16")


def test_a_failed_reference_fails_its_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report comes all the same."""
    monkeypatch.setattr(run, "CHECKS", [Check("unknown", lambda numbers: [mx.zeros(1)])])
    (row,) = verify(only=["unknown"]).failed
    reason = row.outcomes["float32"].reason
    assert reason.startswith("Qwen3Error: the reference of 'unknown' failed: KeyError")


def test_arguments(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["a", "b"]) == 2 and capsys.readouterr().err.startswith("usage: ")
    assert main(["--help"]) == 0 and capsys.readouterr().out.startswith("usage: ")
    monkeypatch.setenv("QWEN3_MEMORY", "much")
    assert main([]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and "QWEN3_MEMORY must be GB" in shown.err


def test_outcomes() -> None:
    sound, wrong = Outcome(0.1, 0.2), Outcome(float("nan"), 0.2)
    assert sound.ok and not wrong.ok
    report = Report([Row("a", {"float32": sound}), Row("b", {"float32": sound, "bfloat16": wrong})])
    assert [row.name for row in report.failed] == ["b"]
    check = Check("x", lambda numbers: [])
    one, two = mx.array([1.0, 2.0]), mx.array([1.0, 2.1])
    assert check.compare([one], [two], mx.float32).error == pytest.approx(0.1 / 2.1, rel=1e-4)
    assert (
        check.compare([one], [two], mx.bfloat16).limit
        > check.compare([one], [one], mx.float32).limit
    )
    for found, expected in (
        (mx.array([mx.nan, 1]), one),
        (mx.array([1, 2]), mx.array([1, 3])),
        (mx.array([1.0]), one),
    ):
        assert check.compare([found], [expected], mx.float32).error == float("inf")
    assert PathCheck("y", lambda dtype: 0.4, 0.5).outcome(mx.float32).ok
    names = [*(one.name for one in reference.CHECKS), *(one.name for one in paths.CHECKS)]
    assert len(set(names)) == len(names)


HEAVY = (
    "8,200 keys",
    "long rows",
    "layer of 1.7B",
    "layer of 4B",
    "layer of 8B",
    "B-A",
    "14B",
    "32B",
)
LIGHT = [one for one in reference.CHECKS if not any(word in one.name for word in HEAVY)]


@pytest.mark.heavy
@pytest.mark.parametrize("check", LIGHT, ids=lambda check: check.name)
def test_a_check_computes_the_same_twice(check: Check) -> None:
    """Its numbers depend on its name alone, and no result is empty."""
    found, expected = check.on_device(mx.float32), check.reference(mx.float32)
    assert found and all(array.size for array in found)
    assert check.compare(found, expected, mx.float32).error < 1e-5


def test_the_speed_stands_beside_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "memory_bandwidth", lambda: 10e9)
    model = networks.cut_network("0.6B", layers=1, vocabulary=512)
    speed = speed_of(model)
    itemsize = model.model.norm.weight.dtype.size
    read = model.nbytes + 256 * 2 * 8 * 128 * itemsize  # with the cache of a layer
    assert speed.bound == pytest.approx(10e9 / read, rel=1e-6)
    assert re.fullmatch(r"prefill \S+ tokens/s; decode \S+ tokens/s, \d+% of the .*", str(speed))


@pytest.mark.slow
def test_all_of_it_as_a_program() -> None:
    command = [sys.executable, "-m", "qwen3_mlx.verify"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout
    assert "0 FAIL" in done.stdout and "speed of" in done.stdout


def test_a_checkpoint_that_cannot_be_loaded_is_refused_before_anything_is_computed(
    tmp_path: Path, capsys: Captured
) -> None:
    for place, message in (
        (Path("nowhere"), "'nowhere' is no folder here"),
        (write_twin("reranker-seq-cls", tmp_path / "scores"), "has no head that computes logits"),
        (write_twin("embedding-untied", tmp_path / "vectors"), "has no head that computes logits"),
    ):
        code, out, err = call(["doctor", "--verify", str(place)], capsys)
        assert (code, out) == (1, "") and message in err


@pytest.mark.heavy
def test_a_checkpoint_that_fails_is_reported_without_its_name(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "secret"
    shutil.copytree(tiny_folder, folder)
    weights = read_weights(folder)
    weights["model.norm.weight"] *= mx.nan
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    monkeypatch.chdir(tmp_path)
    report = verify("./secret", only=[])
    assert "the model: finite logits" in str(report)
    assert "CheckpointError: the logits of the model have NaN" in str(report)
    assert report.facts["speed of the model"].startswith("not measured, CheckpointError: ")
    assert "secret" not in str(report)

    def full(source: str, **_: Any) -> None:
        raise Qwen3Error(f"{source} does not fit")

    monkeypatch.setattr(run, "load", full)
    (failed,) = verify("secret", only=[]).failed
    assert "Qwen3Error: (the model) does not fit FAIL" in line_of(failed)


@pytest.mark.usefixtures("few")
def test_a_machine_whose_speed_cannot_be_measured_gets_a_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(network: object) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(run, "CHECKS", [])
    monkeypatch.setattr(paths, "CHECKS", [])
    monkeypatch.setattr(run, "speed_of", missing)
    assert "not measured, RuntimeError: no kernel" in str(verify())


def test_the_report_has_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/Users/Jo Doe")
    for blas, told in (
        ("/Users/Jo Doe/env/lib/libopenblas.so.0", "libopenblas.so.0"),
        ("MLX's own (QWEN3_BLAS=/Users/Jo Doe/x.so cannot be loaded)", "(a path) cannot be"),
    ):
        monkeypatch.setattr(backend, "BLAS", blas)
        found = run._facts()["blas"]
        assert told in found and "Jo" not in found and "Doe" not in found


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "qwen3_mlx.verify"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline().startswith(b"norm of heads")
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (1, b"")
