"""`qwen3 plan --hosts`: the share of each machine, by weight format, and what fits all of them."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from qwen3_mlx.cli.plan_estimate import Machine, MemoryEstimate
from qwen3_mlx.cluster.hosts import SPLITS, TENSOR
from qwen3_mlx.cluster.shares import (
    Host,
    Model,
    describe,
    divide,
    longest_context,
    traffic,
)
from qwen3_mlx.errors import Qwen3Error

_LABEL = 50  # characters


@dataclass(frozen=True, slots=True)
class Division:
    """A model divided among machines in one way; or why it cannot be.

    Attributes:
        fmt: the weight format.
        split: pipeline or tensor.
        hosts: a row for each machine: its name, its share, the terms of its memory.
        longest: the longest context that fits all, in tokens.
        messages, nbytes: what goes between the machines for a token.
        reason: why there is none.
    """

    fmt: str
    split: str
    hosts: Sequence[dict[str, Any]] = ()
    longest: int = 0
    messages: int = 0
    nbytes: int = 0
    reason: str = ""


def divisions(
    estimate: MemoryEstimate,
    memories: Sequence[float],
    layers: Sequence[int] | None,
    context: int,
    cache: str,
) -> Iterator[Division]:
    """Yield the divisions of a model among Macs with so many GB, by weight format and split."""
    machines = [Machine.mac(memory) for memory in memories]
    hosts = [
        Host(f"{rank}: {memory:g} GB", machine.available)
        for rank, (memory, machine) in enumerate(zip(memories, machines, strict=True))
    ]
    estimate = replace(estimate, machine=machines[0])
    work = estimate.work(context, cache)
    for fmt, format_of in estimate.formats.items():
        model = Model(estimate.name, estimate.config, format_of, work)
        for split in SPLITS:
            try:
                shares = divide(model, hosts, split, None if split == TENSOR else layers)
            except Qwen3Error as error:
                yield Division(estimate.label(fmt), split, reason=str(error))
                continue
            rows = []
            for host, share in zip(hosts, shares, strict=True):
                plan = model.plan(share)
                terms = asdict(plan) | {"total": plan.total, "available": host.available}
                rows.append({"host": host.name, "share": describe(share), **terms})
            limit = estimate.contexts[-1]
            moved = traffic(estimate.config, split, len(hosts), estimate.itemsize)
            longest = longest_context(model, hosts, shares, limit)
            yield Division(estimate.label(fmt), split, rows, longest, *moved)


def table_of_hosts(name: str, found: Sequence[Division], context: int) -> str:
    """Return the divisions as a table, with their sums."""
    lines = [f"{name}, with a context of {context:,} tokens; the first host leads.", ""]
    lines.append(
        f"{'memory in GB':{_LABEL}}{'weights':>9}{'cache':>8}{'prefill':>9}{'reserve':>9}{'sum':>8}"
        f"{'of':>8}"
    )
    for one in found:
        if one.reason:
            lines += ["", f"{one.fmt}, {one.split}: {one.reason}"]
            continue
        lines += ["", f"{one.fmt}, {one.split}: fits up to {one.longest:,} tokens; {_moved(one)}"]
        for row in one.hosts:
            label = f"  {row['host']}, {row['share']}"
            names = ("weights", "cache", "activations", "reserve", "total", "available")
            widths = (9, 8, 9, 9, 8, 8)
            cells = (f"{row[key] / 1e9:.2f}" for key in names)
            numbers = "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
            lines.append(f"{label:{_LABEL}}{numbers}")
    lines += [
        "",
        "pipeline: any cable will do. tensor: each layer waits for the other machines twice, which",
        "pays over Thunderbolt with RDMA alone. See docs/cluster.md.",
    ]
    return "\n".join(lines)


def _moved(one: Division) -> str:
    kib = f"{one.nbytes / 1024:,.1f} KiB"
    return f"{one.messages:,} messages and {kib} between the hosts a token"
