"""`qwen3 bench`: measures speed and memory of a model, and compares with mlx-lm."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from qwen3_mlx import backend
from qwen3_mlx.bench.compare import DEFAULTS, EQUAL, TargetResult, compare
from qwen3_mlx.bench.measure import NEW, OURS, PEER, Case, Measurement, cases_of
from qwen3_mlx.cache.quantized import cache_format
from qwen3_mlx.checkpoint.description import checkpoint_folder
from qwen3_mlx.checkpoint.hub import Source
from qwen3_mlx.checkpoint.stored_formats import formats_held
from qwen3_mlx.checkpoint.weights import with_stored_head
from qwen3_mlx.cli.chips import BANDWIDTHS, this_chip
from qwen3_mlx.cli.console import Bar
from qwen3_mlx.cli.model_facts import refuse_other_kinds
from qwen3_mlx.cli.option_groups import option
from qwen3_mlx.cli.options import Adapter, Json, ModelArgument, Plot
from qwen3_mlx.cluster.hosts import PIPELINE, ClusterOptions, read_hosts
from qwen3_mlx.engine.memory import Workload, bytes_read_per_token
from qwen3_mlx.engine.scheduler import MAX_RUNNING
from qwen3_mlx.evaluate.plots import Panel, check_picture, draw_speeds
from qwen3_mlx.files import read_json
from qwen3_mlx.interrupt import interruptible
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.quantization import FormatOf
from qwen3_mlx.model.sizes import DEMO, hub_name

_PROMPTS, _TOGETHER, _COUNT, _MINUTES = "128,1024,4096", "2,4,8", 32, 10.0
_MAX_MINUTES = 10_000.0  # a week
_TERMS = {"both": (DEFAULTS, EQUAL), "box": (DEFAULTS,), "equal": (EQUAL,)}
_NAME, _CELL, _RATIO = 38, 14, 8  # widths of the table's columns, in characters
_WIDE = _CELL + _RATIO
_OPEN = "~"  # before a ratio whose repeats are on both sides of 1

_Number = Callable[[Measurement], float]


def bench(  # noqa: PLR0913 - one parameter an option
    model: ModelArgument = None,
    adapter: Adapter = None,
    against: Annotated[
        str | None, option("--against", text=f"Also measure this engine: {PEER}.")
    ] = None,
    terms: Annotated[
        str | None,
        option(
            text="Its settings: box (its defaults), equal (our dtype and BLAS), or both (default).",
        ),
    ] = None,
    hosts: Annotated[
        str | None,
        option(text="Measure on several machines: names for ssh, this one first, or local:2."),
    ] = None,
    split: Annotated[
        str, option(text="Divide the model among --hosts: pipeline or tensor.", show_default=True)
    ] = PIPELINE,
    layers: Annotated[
        str | None, option(text="Layers of each of --hosts, such as 18,18 (default: by memory).")
    ] = None,
    prompts: Annotated[
        str, option(text="Prompt lengths in tokens, comma-separated.", show_default=True)
    ] = _PROMPTS,
    together: Annotated[
        str, option(text="Batch sizes, comma-separated.", show_default=True)
    ] = _TOGETHER,
    count: Annotated[
        int,
        option("--decode", min=2, text="Decode steps to take the median of.", show_default=True),
    ] = _COUNT,
    repeats: Annotated[
        int,
        option(
            min=1,
            text="Runs per engine, in turn; medians and spreads are shown.",
            show_default=True,
        ),
    ] = 1,
    minutes: Annotated[
        float, option(text="Time limit of one run of an engine.", show_default=True)
    ] = _MINUTES,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Measure prefill and decode speed and memory of MODEL on this machine.

    Each engine runs in its own process, the cheapest cases first; cases beyond
    its time limit are left open. The prompts are random tokens. MODEL must be
    one that writes text: no embedding model, and no reranker.

    [bold]qwen3 bench 8B --against mlx-lm[/bold]   compare with mlx-lm.
    """
    peer_terms = _peer_terms(against, terms)
    if not 0 < minutes <= _MAX_MINUTES:
        raise ValueError(f"--minutes must be more than 0, at most {_MAX_MINUTES:,.0f}")
    if ClusterOptions(hosts, split, layers) and (adapter or (against and _has_names(hosts))):
        raise ValueError(
            "--hosts go without --adapter, and --against mlx-lm with --hosts local:N only; on "
            "several machines run its own benchmark under mlx.launch"
        )
    if plot:
        check_picture(plot)
    folder = _folder(model or DEMO)
    content = with_stored_head(read_json(folder / "config.json"), folder)
    config, stored = ModelConfig.from_dict(content), formats_held(content, folder)
    detect = import_module("qwen3_mlx.text.abilities")  # Jinja, which --help does not need
    refuse_other_kinds(detect.Abilities.of(folder, config.output).kind, "a benchmark measures")
    if (longest := config.context_window - 2 * count - NEW) < 1:
        raise ValueError(f"--decode {count} is too long for a context of {config.context_window}")
    lengths = _lengths(prompts, longest)
    cases = cases_of(lengths, _batches(together))
    shared = [case for case in cases if not case.special]
    with interruptible(), Bar("measuring") as bar:  # so that the engines' processes end, too
        results = compare(
            str(folder),
            cases,
            count,
            adapter=adapter,
            hosts={"hosts": hosts, "split": split, "layers": layers},
            against=peer_terms,
            repeats=repeats,
            seconds=60 * minutes,
            on_measurement=lambda done: bar(
                done, repeats * (len(cases) + len(peer_terms) * len(shared))
            ),
        )
    facts = {
        "model": f"{model or DEMO} with {adapter}" if adapter else model or DEMO,
        "machine": backend.describe(),
        "decoded": count,
        "repeats": repeats,
        "date": time.strftime("%Y-%m-%d"),
    }
    bounds = _bounds(config, stored, results[OURS])
    if plot:
        draw_speeds(plot, _title(facts), list(_panels(cases, results)))
    if as_json:
        sides = {"sides": _as_json(results, bounds), "cluster": results[OURS].cluster}
        print(json.dumps(facts | sides, indent=1))
    else:
        print(_title(facts), "", *_table(cases, results, bounds), "", sep="\n")
        print(*_notes(cases, results, bounds, minutes), sep="\n")


def _peer_terms(against: str | None, terms: str | None) -> Sequence[str]:
    """Return the settings with which the other engine is measured; none without it."""
    if against not in (None, PEER):
        raise ValueError(f"--against must be {PEER}, not {against!r}")
    if terms and not against:
        raise ValueError(f"--terms are those of another engine: --against {PEER}")
    if terms not in (None, *_TERMS):
        raise ValueError(f"--terms must be one of {', '.join(_TERMS)}, not {terms!r}")
    return _TERMS[terms or "both"] if against else ()


def _has_names(hosts: str | None) -> bool:
    return any(not host.is_local for host in read_hosts(hosts, None))


def _folder(model: str) -> Path:
    """Return the folder of a checkpoint, downloading it if it is not on disk."""
    with Bar("downloading", in_bytes=True) as bar:
        return checkpoint_folder(Source(hub_name(model), progress=bar))


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = sorted({int(word) for word in text.split(",")})
    except ValueError:
        numbers = [0]
    if numbers[0] < 1:
        raise ValueError(f"{option} must be comma-separated numbers of at least 1, not {text!r}")
    return numbers


def _batches(text: str) -> list[int]:
    sizes = _numbers("--together", text) if text else []
    if sizes and sizes[-1] > MAX_RUNNING:
        raise ValueError(f"--together: no more than {MAX_RUNNING} sequences decode at once")
    return sizes


def _lengths(text: str, longest: int) -> list[int]:
    """Parse the prompt lengths; of the defaults, keep those that the context has room for."""
    lengths = _numbers("--prompts", text)
    if text == _PROMPTS:
        lengths = [length for length in lengths if length <= longest] or [longest]
    if lengths[-1] > longest:
        raise ValueError(f"--prompts {lengths[-1]} is too long: the context has room for {longest}")
    return lengths


def _rows(cases: Sequence[Case]) -> Iterator[tuple[str, str, Case, _Number, bool]]:
    """Yield the table's rows: group, label, case, number, and whether higher is better."""
    alone = [case for case in cases if case.sequences == 1 and not case.kept]
    plain = [case for case in alone if not case.special]
    several = [case for case in cases if case.sequences > 1]
    for case in cases:
        if case in plain or case.kept:
            label = (
                f"{case.prompt:,} kept and {NEW} new" if case.kept else f"{case.prompt:,} tokens"
            )
            yield "first token, s, after a prompt of", label, case, lambda f: f.first_token, False
    for case in plain:
        yield "prefill, tokens/s", f"{case.prompt:,} tokens", case, lambda f: f.prefill, True
    for case in alone:
        yield (
            "decode, tokens/s",
            f"after {case.prompt:,}{_how(case)}",
            case,
            lambda f: f.decode,
            True,
        )
    for case in several:
        label = f"{case.sequences} together, after {case.prompt:,}"
        yield "decode, tokens/s", label, case, lambda f: f.decode, True
    for case in (*alone, *several):
        several_at_once = f"{case.sequences} x " if case.sequences > 1 else ""
        label = f"most, {several_at_once}{case.prompt:,} tokens{_how(case)}"
        yield "memory, GB", label, case, lambda f: f.peak / 1e9, False


def _how(case: Case) -> str:
    """Return a label of the special settings of a case."""
    bits = f", {case.kv_bits}-bit cache" if case.kv_bits else ""
    return bits + (", copying" if case.copying else "")


def _bounds(
    config: ModelConfig, stored: FormatOf | None, result: TargetResult
) -> dict[Case, float]:
    """Compute the decode speed, in tokens/s, at which reading weights and cache takes all the time.

    The bandwidth is the measured one. With speculation a forward pass yields several tokens.
    """
    if not result.terms:
        return {}
    bounds = {}
    for case, figures in result.figures.items():
        if case.sequences == 1 and not case.kept:
            work = Workload(
                context=case.prompt,
                itemsize=backend.compute_dtype(result.terms.dtype).size,
                cache=cache_format(case.kv_bits, config.head_dim),
            )
            formats = stored if stored and result.terms.quantized else lambda _: None
            moved = bytes_read_per_token(config, formats, work)
            bounds[case] = result.bandwidth / moved * figures.a_pass
    return bounds


def _table(
    cases: Sequence[Case], results: Mapping[str, TargetResult], bounds: Mapping[Case, float]
) -> Iterator[str]:
    ours, *peers = (name.partition(", ") for name in results)
    yield f"{'':{_NAME}}{ours[0]:>{_CELL}}" + "".join(f"{name:>{_WIDE}}" for name, _, _ in peers)
    if peers:
        yield " " * (_NAME + _CELL) + "".join(f"{way:>{_WIDE}}" for _, _, way in peers)
    group = ""
    for heading, label, case, number, higher_is_better in _rows(cases):
        if heading != group:
            yield heading
            group = heading
        numbers = [
            [
                number(figures[case])
                for figures in result.repeats or [result.figures]
                if case in result.figures
            ]
            for result in results.values()
        ]
        yield _line(label, numbers, higher_is_better=higher_is_better)
    held = [[result.weights / 1e9] if result.weights else [] for result in results.values()]
    yield _line("weights", held, higher_is_better=False)
    yield "decode, tokens/s, of those that the memory's bandwidth allows"
    for case in (case for case in cases if case in bounds):
        label, speed = f"after {case.prompt:,}{_how(case)}", results[OURS].figures[case].decode
        beside = f"{_shown(speed)} of {_shown(bounds[case])}"
        yield f"  {label:{_NAME - 2}}{beside:>{_CELL}}{speed / bounds[case]:>{_RATIO}.0%}"


def _line(label: str, numbers: Sequence[Sequence[float]], *, higher_is_better: bool) -> str:
    """Return a line of the numbers of all repeats, by side: medians, spreads and ratios."""
    own, *others = numbers
    line = f"  {label:{_NAME - 2}}{_with_spread(own):>{_CELL}}"
    for other in others:
        ratios = [
            mine / theirs if higher_is_better else theirs / mine
            for mine, theirs in zip(own, other, strict=False)
        ]
        ratio = f"{median(ratios):.2f}x" if ratios else ""
        if len(ratios) > 1 and min(ratios) <= 1 <= max(ratios):
            ratio = _OPEN + ratio
        line += f"{_with_spread(other):>{_CELL}}{ratio:>{_RATIO}}"
    return line.rstrip()


def _with_spread(repeats: Sequence[float]) -> str:
    """Return the median of the repeats, with half the distance between the extremes."""
    if not repeats:
        return "-"
    middle = median(repeats)
    half = (max(repeats) - min(repeats)) / 2
    return _shown(middle) + (f" ±{half / middle:.0%}" if len(repeats) > 1 else "")


def _shown(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _notes(
    cases: Sequence[Case],
    results: Mapping[str, TargetResult],
    bounds: Mapping[Case, float],
    minutes: float,
) -> Iterator[str]:
    for name, result in results.items():
        if terms := result.terms:
            held = "quantized weights" if terms.quantized else "weights in the same"
            blas = "" if backend.on_gpu() else f", BLAS {terms.blas}"
            as_it_comes = " (as it comes)" if name.endswith(EQUAL) and result.is_default else ""
            yield f"{name}: {terms.dtype}, {held}{blas}{as_it_comes}."
        if len(result.figures) < sum(name == OURS or not case.special for case in cases):
            reason = (
                f"not measured within {minutes:g} minutes (see --minutes)"
                if result.is_late
                else "not measured: the memory was too small for so many together"
            )
            yield f"{name}: - was {reason}."
    own = results[OURS]
    for case in (case for case in own.figures if case.copying):
        yield f"Copying: {own.figures[case].a_pass:.1f} tokens a forward pass, by lookup."
    if moved := own.cluster:
        yield f"Hosts: {'; '.join(moved['shares'])}."
        yield (
            f"Between the hosts: {moved['messages']:,} messages and {moved['nbytes'] / 1024:,.1f} "
            f"KiB a token, {moved['control']:.0f} bytes of plans a pass; {moved['waiting']:.0%} of "
            "the time was spent waiting for them."
        )
    if any(own.figures[case].decode > bound for case, bound in bounds.items()):
        yield (
            "More than 100%: the model fits the processor's cache, or the machine was busy while "
            "its bandwidth was measured."
        )
    chip = this_chip()
    stated = f"; Apple states {BANDWIDTHS[chip]:g} for the {chip}" if chip else ""
    yield f"Memory: {own.bandwidth / 1e9:,.1f} GB/s were read by a matrix times a vector{stated}."
    if len(results) > 1:
        yield f"Ratios: how many times better {OURS} does."
        if len(own.repeats) > 1:
            yield (
                f"±: half the distance between the extremes. {_OPEN}: in some repeats {OURS} was "
                "better, in others not."
            )


def _title(facts: Mapping[str, Any]) -> str:
    name, machine = Path(facts["model"]).resolve().name, facts["machine"]
    return f"{name} on {machine['device']}, {machine['system']}, {facts['date']}"


def _panels(cases: Sequence[Case], results: Mapping[str, TargetResult]) -> Iterator[Panel]:
    def lines(
        number: _Number, included: Callable[[Case], bool], key: str
    ) -> dict[str, dict[int, float]]:
        return {
            name: {
                getattr(case, key): number(result.figures[case])
                for case in cases
                if included(case) and case in result.figures
            }
            for name, result in results.items()
        }

    def alone(case: Case) -> bool:
        return case == Case(1, case.prompt)

    shortest = min(case.prompt for case in cases)
    tokens = "tokens of prompt"
    yield Panel("prefill, tokens/s", tokens, lines(lambda f: f.prefill, alone, "prompt"))
    yield Panel("decode, tokens/s", tokens, lines(lambda f: f.decode, alone, "prompt"))
    together = lines(
        lambda f: f.decode, lambda case: case == Case(case.sequences, shortest), "sequences"
    )
    yield Panel(f"decode after {shortest:,}, tokens/s", "sequences together", together)


def _as_json(results: Mapping[str, TargetResult], bounds: Mapping[Case, float]) -> dict[str, Any]:
    def beside_bound(name: str, figures: Measurement) -> dict[str, float | None]:
        bound = bounds.get(figures.case) if name == OURS else None
        share = figures.decode / bound if bound else None
        return {"decode_at_most": bound, "share_of_bandwidth": share}

    return {
        name: {
            "terms": asdict(result.terms) if result.terms else None,
            "weights": result.weights,
            "bandwidth": result.bandwidth,
            "figures": [
                asdict(figures)
                | {"prefill": figures.prefill, **beside_bound(name, figures)}
                | {"repeats": [asdict(one[figures.case]) for one in result.repeats]}
                for figures in result.figures.values()
            ],
        }
        for name, result in results.items()
    }
