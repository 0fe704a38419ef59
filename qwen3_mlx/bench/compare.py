"""Measures sides in turn, each in a process of its own: MLX binds its BLAS once a process."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from threading import Timer

from qwen3_mlx.bench.measure import OURS, PEER, Case, Measurement, NumericSettings, Setup
from qwen3_mlx.errors import Qwen3Error

AS_IT_COMES, EQUAL = "out of the box", "equal terms"


@dataclass(slots=True)
class TargetResult:
    """What a side came to: its figures by case, as far as it got in its time."""

    is_default: bool  # whether nobody chose the terms for it
    terms: NumericSettings | None = None  # and weights: once it has loaded
    weights: int = 0  # bytes held then
    figures: dict[Case, Measurement] = field(default_factory=dict)
    bandwidth: float = 0.0  # of the memory, bytes a second


def compare(
    folder: str,
    cases: Sequence[Case],
    count: int,
    *,
    against: Sequence[str] = (),
    repeats: int = 1,
    seconds: float,
    told: Callable[[int], None] = lambda done: None,
) -> dict[str, TargetResult]:
    """Measure this package, and mlx-lm on the terms in `against`, in turn, `repeats` times.

    Each run may take so many `seconds`; `told` hears of each figure that is there. Figures are the
    medians of the repeats, of memory the most. Where mlx-lm computes on our terms as it comes, it
    runs once.

    Raises:
        Qwen3Error: a side failed, or ours had not one figure in its time.
    """
    rounds: list[dict[str, TargetResult]] = []
    done = 0

    def tell() -> None:
        nonlocal done
        done += 1
        told(done)

    for _ in range(repeats):
        results = {OURS: _run(Setup(OURS, folder, cases, count), seconds, tell)}
        terms = results[OURS].terms
        if not results[OURS].figures:
            raise Qwen3Error(f"not one figure was there after {seconds:g} s; give it more time")
        for way in (AS_IT_COMES, EQUAL):
            if way not in against:
                continue
            setup = Setup(PEER, folder, cases, count, terms if way == EQUAL else None)
            results[f"{PEER}, {way}"] = peer = _run(setup, seconds, tell)
            if way == AS_IT_COMES and peer.terms == terms:
                results[f"{PEER}, {EQUAL}"] = results.pop(f"{PEER}, {way}")
                break
        rounds.append(results)
    return {name: _median([results[name] for results in rounds]) for name in rounds[0]}


def _run(setup: Setup, seconds: float, tell: Callable[[], None]) -> TargetResult:
    """Run a side in a process of its own, until it is done or its time is over."""
    as_it_comes = setup.terms is None
    off = {"QWEN3_BLAS": "off"} if setup.name == PEER and as_it_comes else {}
    command = [sys.executable, "-m", "qwen3_mlx.bench.targets", json.dumps(asdict(setup))]
    result = TargetResult(as_it_comes)
    with (
        tempfile.TemporaryFile("w+") as complaints,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # nothing is sent: the side ends when it is closed
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            env=os.environ | off,
        ) as process,
    ):
        timer = Timer(seconds, process.kill)
        timer.daemon = True  # or a Ctrl-C that comes between these lines would wait for it
        try:
            timer.start()
            assert process.stdout
            for line in process.stdout:
                content = json.loads(line)
                if "error" in content:
                    raise Qwen3Error(content["error"])
                if "terms" in content:
                    result.terms, result.weights = (
                        NumericSettings(**content["terms"]),
                        content["weights"],
                    )
                    result.bandwidth = content["bandwidth"]
                else:
                    figures = content["figures"]
                    case = Case(**figures["case"])
                    result.figures[case] = Measurement(**figures | {"case": case})
                    tell()
            code, late = process.wait(), not timer.is_alive()
        finally:
            timer.cancel()
            process.kill()
        complaints.seek(0)
        said = complaints.read().strip().splitlines()
    if code and not late:
        raise Qwen3Error(f"{setup.name} failed: {said[-1] if said else f'it ended with {code}'}")
    return result


def _median(results: Sequence[TargetResult]) -> TargetResult:
    """Give the medians of the figures that all repeats have."""
    first = results[0]
    common = [case for case in first.figures if all(case in other.figures for other in results)]
    return replace(
        first,
        figures={
            case: Measurement(
                case,
                first_token=median(one.figures[case].first_token for one in results),
                decode=median(one.figures[case].decode for one in results),
                peak=max(one.figures[case].peak for one in results),
                a_pass=median(one.figures[case].a_pass for one in results),
            )
            for case in common
        },
    )
