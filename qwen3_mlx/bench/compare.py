"""Speed comparison: runs the benchmark targets in turn, each in its own process.

A process per target is needed because MLX binds its BLAS library once per process.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from threading import Timer
from typing import Any

from qwen3_mlx.bench.measure import OURS, PEER, Case, Measurement, NumericSettings, Setup
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.processes import module_command

DEFAULTS, EQUAL = "out of the box", "equal terms"
_ONE: Mapping[str, Any] = {}


@dataclass(slots=True)
class TargetResult:
    """The measurements of one target, as far as its time allowed.

    Attributes:
        is_default: True if the target ran with its own default dtype and BLAS.
        terms: the numeric settings that it ran with; None until it has loaded.
        weights: bytes of MLX memory held after loading.
        figures: the measurements by case; of several repeats their medians.
        bandwidth: memory bandwidth in bytes per second; 0 for mlx-lm.
        repeats: the measurements of each repeat, if there are several.
        is_late: True if its time was over before it had measured all.
        cluster: what went between several machines: see `targets`.
    """

    is_default: bool
    terms: NumericSettings | None = None
    weights: int = 0
    figures: dict[Case, Measurement] = field(default_factory=dict)
    bandwidth: float = 0.0
    repeats: Sequence[Mapping[Case, Measurement]] = ()
    is_late: bool = False
    cluster: Mapping[str, Any] | None = None

    def read(self, line: Mapping[str, Any]) -> bool:
        """Add a line that the target's process wrote; return True if it is a measurement.

        The process writes {"terms", "weights", "bandwidth"} once it has loaded, {"figures"} for
        each measurement, or {"error"}; see `targets.py`.

        Raises:
            Qwen3Error: it is an error.
        """
        if "error" in line:
            raise Qwen3Error(line["error"])
        if "cluster" in line:
            self.cluster = line["cluster"]
            return False
        if "terms" in line:
            self.terms = NumericSettings(**line["terms"])
            self.weights, self.bandwidth = line["weights"], line["bandwidth"]
            return False
        case = Case(**line["figures"]["case"])
        self.figures[case] = Measurement(**line["figures"] | {"case": case})
        return True


def compare(  # noqa: PLR0913 - one keyword an option
    folder: str,
    cases: Sequence[Case],
    count: int,
    *,
    adapter: str | None = None,
    hosts: Mapping[str, Any] = _ONE,
    against: Sequence[str] = (),
    repeats: int = 1,
    seconds: float,
    on_measurement: Callable[[int], None] = lambda done: None,
) -> dict[str, TargetResult]:
    """Measure this package and mlx-lm in turn, `repeats` times; every other time mlx-lm begins.

    Args:
        folder: the checkpoint.
        cases: the cases to measure.
        count: decode steps per case.
        adapter: an adapter of the checkpoint, for all engines.
        hosts: the keywords hosts, split and layers of `load`, if there are several machines.
        against: terms for mlx-lm: `DEFAULTS`, its defaults, and `EQUAL`, this package's numeric
            settings. If both are the same, it runs once, as `EQUAL`.
        repeats: number of rounds. The result is the median of each figure.
        seconds: time limit of one run.
        on_measurement: called with the number of measurements done so far.

    Raises:
        Qwen3Error: a target failed, or this package had no measurement within its time.
    """
    rounds: list[dict[str, TargetResult]] = []
    done = 0

    def measured() -> None:
        nonlocal done
        done += 1
        on_measurement(done)

    terms: NumericSettings | None = None  # of this package
    ways = {OURS: ""} | {f"{PEER}, {way}": way for way in (DEFAULTS, EQUAL) if way in against}
    for number in range(repeats):
        results: dict[str, TargetResult] = {}
        for side, way in [*ways.items()][:: -1 if number % 2 else 1]:
            name, own = (PEER if way else OURS), (terms if way == EQUAL else None)
            setup = Setup(name, folder, cases, count, own, adapter, **hosts)
            results[side] = result = _run(setup, seconds, measured)
            if not way and not result.figures:
                raise Qwen3Error(f"there is no measurement after {seconds:g} s; allow more time")
            terms = terms if way else result.terms
            if way == DEFAULTS and not number and result.terms == terms:
                results[f"{PEER}, {EQUAL}"] = results.pop(side)
                ways = {OURS: "", f"{PEER}, {EQUAL}": DEFAULTS}
                break
        rounds.append(results)
    return {side: _median([results[side] for results in rounds]) for side in ways}


def _run(setup: Setup, seconds: float, measured: Callable[[], None]) -> TargetResult:
    """Run a target in its own process until it ends or its time is over; return its results."""
    is_default = setup.terms is None
    blas = {"QWEN3_BLAS": "off"} if setup.name == PEER and is_default else {}
    command = module_command("qwen3_mlx.bench.targets", json.dumps(asdict(setup)))
    result = TargetResult(is_default)
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # unused; the target exits when this pipe closes
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | blas,
        ) as process,
    ):
        timer = Timer(seconds, process.kill)
        timer.daemon = True  # a Ctrl-C before `try` must not wait for it
        try:
            timer.start()
            assert process.stdout
            for _ in filter(result.read, map(json.loads, process.stdout)):
                measured()
            code, result.is_late = process.wait(), not timer.is_alive()
        finally:
            timer.cancel()
            process.kill()
        errors.seek(0)
        lines = errors.read().strip().splitlines()
    if code and not result.is_late:
        cause = lines[-1] if lines else f"it ended with {code}"
        raise Qwen3Error(f"{setup.name} failed: {cause}")
    return result


def _median(results: Sequence[TargetResult]) -> TargetResult:
    """Return the medians of the measurements that all repeats have."""
    first = results[0]
    common = [case for case in first.figures if all(case in other.figures for other in results)]
    return replace(
        first,
        bandwidth=median(one.bandwidth for one in results),
        is_late=any(one.is_late for one in results),
        repeats=[one.figures for one in results],
        figures={
            case: Measurement(
                case,
                first_token=median(one.figures[case].first_token for one in results),
                decode=median(one.figures[case].decode for one in results),
                peak=int(median(one.figures[case].peak for one in results)),
                a_pass=median(one.figures[case].a_pass for one in results),
            )
            for case in common
        },
    )
