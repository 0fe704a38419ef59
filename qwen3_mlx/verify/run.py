"""The run: all checks, one after another, and the report."""

import os
import platform
import re
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.api.checkpoints import Checkpoints
from qwen3_mlx.api.llm import LLM
from qwen3_mlx.api.load import load
from qwen3_mlx.checkpoint.load import LoadOptions
from qwen3_mlx.engine.memory import count_weights
from qwen3_mlx.errors import CheckpointError
from qwen3_mlx.extras import installed_version
from qwen3_mlx.model.config import LOGITS
from qwen3_mlx.verify import attention, paths
from qwen3_mlx.verify.check import Check, Outcome, PathCheck, Row
from qwen3_mlx.verify.networks import TEXT, cut_network
from qwen3_mlx.verify.reference import CHECKS, Reference
from qwen3_mlx.verify.speed import Speed, speed_of
from qwen3_mlx.version import __version__

_PACKAGES = ("mlx", "mlx-metal", "mlx-cuda-12", "mlx-cuda-13", "mlx-cpu", "mlx-lm", "numpy")
_PATH = re.compile(r"(?<!\w)[~.]?(/[^\s/:'\"]+)+")
_LAYERS = 4  # of the network whose speed is measured
_MESSAGE = 200  # characters of an error


@dataclass(slots=True)
class Report:
    """The outcomes of all checks, and the facts about the machine."""

    rows: list[Row] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def failed(self) -> list[Row]:
        """The checks that failed."""
        return [row for row in self.rows if not row.ok]

    def __str__(self) -> str:
        """Return the block for a report: the machine, the versions, what failed; nothing else."""
        found = f"{len(self.rows)} checks, {len(self.failed)} FAIL, {self.seconds:.0f} s"
        lines = [f"qwen3-mlx {__version__} verify: {found}"]
        lines += [f"{name}: {fact}" for name, fact in self.facts.items()]
        lines += [line_of(row) for row in self.failed]
        return "\n".join(lines)


def line_of(row: Row) -> str:
    """Return a check and its outcomes as a line."""
    cells = []
    for dtype, outcome in row.outcomes.items():
        error = outcome.reason or f"{outcome.error:.0e}"
        failure = "" if outcome.reason else f", more than {outcome.limit:.0e}"
        cells.append(f"{dtype} {error} ok" if outcome.ok else f"{dtype} {error}{failure} FAIL")
    return f"{row.name:52}{'   '.join(cells)}"


def verify(
    model: str | None = None,
    *,
    only: Collection[str] | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Report:
    """Check this machine, and the checkpoint `model` if one is given; return the report.

    Each check is made in float32 and in the compute dtype. `only` names the checks to make, by
    default all; `on_row` is called with each check when it is done. Nothing of the result tells
    about the user: no path, no host, no name of a checkpoint.

    Raises:
        CheckpointError: there is no such checkpoint, or it computes no logits.
        Qwen3Error: the checkpoint does not fit the memory.
    """
    started = time.monotonic()
    backend.memory_limit()  # a QWEN3_MEMORY that is none is refused
    if model is not None:  # before anything is computed
        _refuse(model)
    report = Report()
    auto = [mx.float16] if backend.emulates_bfloat16() else []  # what `dtype="auto"` may choose
    dtypes = list(dict.fromkeys([mx.float32, backend.compute_dtype(), *auto]))
    steps = [_against_reference(dtypes, only), _of_paths(dtypes, only)]
    if model is not None:
        steps.append(_of_checkpoint(model, report.facts))
    report.facts |= _facts()
    for rows in steps:
        for row in rows:
            report.rows.append(row)
            on_row(row)
    if model is None and only is None:
        size = "8B" if backend.on_gpu() else "0.6B"
        measured = _speed(lambda: speed_of(cut_network(size, layers=_LAYERS)))
        report.facts[f"speed of {_LAYERS} layers of {size}"] = measured
    report.seconds = time.monotonic() - started
    return report


def _against_reference(dtypes: list[mx.Dtype], only: Collection[str] | None) -> Iterator[Row]:
    """Yield the checks against the reference, which is computed meanwhile."""
    checks = [check for check in CHECKS if only is None or check.name in only]
    names = [backend.dtype_name(dtype) for dtype in dtypes]
    with (
        tempfile.TemporaryDirectory() as folder,
        Reference(Path(folder), [check.name for check in checks], names) as reference,
    ):
        for check in checks:
            outcomes = {}
            for dtype, name in zip(dtypes, names, strict=True):
                outcomes[name] = _guarded(partial(_compare, check, dtype, reference))
            yield Row(check.name, outcomes)
            mx.clear_cache()


def _compare(check: Check, dtype: mx.Dtype, reference: Reference) -> Outcome:
    expected = reference.arrays(check.name, backend.dtype_name(dtype))
    return check.compare(check.on_device(dtype), expected, dtype)


def _of_paths(dtypes: list[mx.Dtype], only: Collection[str] | None) -> Iterator[Row]:
    checks = list(paths.CHECKS)
    if backend.on_metal():
        checks.append(PathCheck("attention is fused", attention.fused))
    for check in checks:
        if only is None or check.name in only:
            outcomes = {
                backend.dtype_name(dtype): _guarded(partial(check.outcome, dtype))
                for dtype in dtypes
            }
            yield Row(check.name, outcomes)
            mx.clear_cache()


def _guarded(measure: Callable[[], Outcome]) -> Outcome:
    """Return the outcome; that of a check that raises is a failure."""
    try:
        return measure()
    except Exception as error:  # noqa: BLE001 - whatever it is, this machine fails the check
        return Outcome(float("inf"), 0.0, _reason(error))


def _speed(measure: Callable[[], Speed]) -> str:
    """Return a speed as text; a machine that cannot even be measured gets its report as well."""
    try:
        return str(measure())
    except Exception as error:  # noqa: BLE001 - the report is what matters
        return f"not measured, {_reason(error)}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {_impersonal(str(error))[:_MESSAGE]}"


def _impersonal(text: str) -> str:
    """Return a text as one line without paths, which may have the user's name."""
    home = re.escape(os.path.expanduser("~"))
    return _PATH.sub("(a path)", re.sub(rf"{home}(?=/)", "~", " ".join(text.split())))


def _refuse(source: str) -> None:
    """Refuse a checkpoint that cannot be loaded, as far as is known without its weights."""
    options = LoadOptions.of(None, "auto", None, 64)
    checkpoints = Checkpoints.resolve(source, None, None, options, None, None, None, None)
    if checkpoints.target.network.output != LOGITS:
        raise CheckpointError(
            f"{source} has no head that computes logits, which verify compares; name a model that "
            "generates"
        )
    checkpoints.check_memory()


def _of_checkpoint(source: str, facts: dict[str, str]) -> Iterator[Row]:
    """Yield the checks of a checkpoint, in the dtype that is best for it."""
    try:
        llm = load(source, dtype="auto")
    except Exception as error:  # noqa: BLE001 - as in `_guarded`
        reason = _reason(error).replace(source, "(the model)")  # perhaps a hub name
        yield Row("the model: loading", {"auto": Outcome(float("inf"), 0.0, reason)})
        return
    with llm:
        llm.compute(lambda model: setattr(model, "source", "the model"))  # in messages
        dtype = llm.compute(lambda model: model.model.norm.weight).dtype
        name = backend.dtype_name(dtype)
        facts["model"] = _described(llm, name)
        yield Row("the model: finite logits", {name: _guarded(partial(_finite, llm))})
        prompts = [llm.tokenizer.encode(TEXT[start:]) for start in (0, 9, 19, 40)]
        for path_name, (path, limit) in paths.PATHS.items():
            check = PathCheck(path_name, partial(_along, path, llm, prompts), limit)
            outcome = _guarded(partial(check.outcome, dtype))
            yield Row(f"the model: {path_name}", {name: outcome})
        speeds: list[str] = []
        llm.compute(lambda model: speeds.append(_speed(lambda: speed_of(model))))
        facts["speed of the model"] = speeds[0]


def _along(path: paths.Path, llm: LLM, prompts: Sequence[list[int]], _: mx.Dtype) -> float:
    return paths.along(path, llm, prompts)


def _finite(llm: LLM) -> Outcome:
    logits = llm.logits(llm.tokenizer.encode(TEXT))
    return Outcome(0.0 if mx.isfinite(logits).all().item() else float("inf"), 0.0)


def _described(llm: LLM, dtype: str) -> str:
    """Return the shape of a model, and why it is computed in this dtype."""
    config = llm.config
    reason = ""
    if backend.emulates_bfloat16():
        within = "stay within" if dtype == "float16" else "come near the end of"
        reason = f" (its layers {within} the range of float16, which this chip computes faster)"
    return (
        f"{count_weights(config) / 1e6:,.1f} million weights, {config.num_hidden_layers} layers, "
        f"{dtype}{reason}"
    )


def _facts() -> dict[str, str]:
    """Describe the machine and the versions, without anything personal."""
    machine = backend.describe()
    system = f"macOS {platform.mac_ver()[0]}" if platform.mac_ver()[0] else machine["system"]
    packages = [f"python {machine['python']}"]
    for name in _PACKAGES:
        if version := installed_version(name):
            packages.append(f"{name} {version}")
    if backend.BLAS.startswith("/"):
        machine["blas"] = machine["blas"].rpartition("/")[2]
    keys = ("device", "architecture", "blas", "memory", "working set", "GPU memory", "dtype")
    return {
        "system": system,
        **{key: _impersonal(machine[key]) for key in keys if key in machine},
        "versions": ", ".join(packages),
    }
