"""Division of a network among machines: numbers only, no arrays and no connections.

A pipeline gives each rank whole layers: rank 0 the last ones, the final norm and the head, because
it samples the tokens; the last rank the first ones and the embedding. Tensor parallelism gives each
rank some key/value heads, with their query heads, and columns of the feed-forward blocks in whole
quantization groups; norms, router, embedding and head are on every rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from qwen3_mlx.checkpoint.shard import Share, Span
from qwen3_mlx.cluster.hosts import PIPELINE, TENSOR, check_split
from qwen3_mlx.engine.memory import (
    RESERVE,
    Module,
    Plan,
    Workload,
    activation_bytes,
    cache_bytes,
    in_gb,
    modules,
)
from qwen3_mlx.errors import CapacityError, Qwen3Error
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.quantization import FormatOf

_CUT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Host:
    """A machine of a cluster, and the bytes that the model may take there."""

    name: str
    available: int


@dataclass(frozen=True, slots=True)
class Model:
    """The network to divide, the formats of its weights in memory, and the work to plan for.

    `itemsize` is the bytes of the compute dtype.
    """

    name: str
    network: ModelConfig
    format_of: FormatOf
    work: Workload

    def plan(self, share: Share) -> Plan:
        """Return the memory that a share takes on its machine."""
        own, has = share.network(self.network), share.has_tensor(self.network)
        weights = sum(
            self._share_bytes(module, share)
            for module in modules(self.network)
            if has(f"{module.path}.weight")
        )
        cache, activations = cache_bytes(own, self.work), activation_bytes(own, self.work)
        return Plan(weights, cache, activations, RESERVE)

    def _share_bytes(self, module: Module, share: Share) -> int:
        size = module.nbytes(self.format_of(module.path), self.work.itemsize)
        name = module.path.rpartition(".")[2]
        if share.is_stage or name not in _CUT:
            return size
        if name in ("gate_proj", "up_proj", "down_proj"):
            experts = self.network.experts if ".switch_mlp." in module.path else None
            span = share.expert_columns if experts else share.columns
            whole = experts.moe_intermediate_size if experts else self.network.intermediate_size
        else:
            span, whole = share.heads, self.network.num_key_value_heads
        return size * (span[1] - span[0]) // whole


def divide(
    model: Model, hosts: Sequence[Host], split: str = PIPELINE, layers: Sequence[int] | None = None
) -> list[Share]:
    """Return the share of each host, of which the first is rank 0.

    A pipeline is divided by memory, or as `layers` states: a number of layers for each host. Parts
    of layers are even, since the ranks wait for the largest, or by memory where that does not fit.

    Raises:
        ValueError: `split` is unknown, or `layers` do not add up, or go with a tensor split.
        Qwen3Error: the network cannot be divided among so many.
        CapacityError: a share does not fit its host; the message shows the sums of all.
    """
    check_split(split, layers)
    if split == TENSOR:
        network, unit = model.network, _unit(model)
        shares = tensor(network, [1] * len(hosts), unit)
        if not _fit(hosts, [model.plan(share) for share in shares]):
            shares = tensor(network, [max(1, host.available) for host in hosts], unit)
    else:
        counts = _stated(model, hosts, layers) if layers else _by_memory(model, hosts)
        shares = pipeline(model.network, counts)
    _check_fits(model, hosts, shares)
    return shares


def pipeline(network: ModelConfig, counts: Sequence[int]) -> list[Share]:
    """Return the stages with so many layers: rank 0 has the last ones."""
    experts, total = network.experts, network.num_hidden_layers
    width = experts.moe_intermediate_size if experts else 0
    heads, columns = (0, network.num_key_value_heads), (0, network.intermediate_size)
    shares, stop = list[Share](), total
    for rank, count in enumerate(counts):
        layers = (stop - count, stop)
        shares.append(Share(rank, len(counts), layers, total, heads, columns, (0, width)))
        stop -= count
    return shares


def tensor(network: ModelConfig, weights: Sequence[int], unit: int = 1) -> list[Share]:
    """Return a part of every layer for each rank, by its weight as heads and whole groups allow.

    Columns are cut at multiples of `unit`.

    Raises:
        Qwen3Error: there are fewer heads or groups than ranks, or a cut would split a group.
    """
    ranks = len(weights)
    heads = _parts(network.num_key_value_heads, weights, 1, "key/value heads")
    queries = network.num_attention_heads // network.num_key_value_heads
    if any(end * queries * network.head_dim % unit for _, end in heads):
        raise Qwen3Error(
            f"the heads of {queries * network.head_dim} columns are no whole quantization groups "
            f"of {unit}; divide it as a pipeline, or take a checkpoint with smaller groups"
        )
    experts, count = network.experts, network.num_hidden_layers
    is_dense = not experts or not all(map(experts.in_layer, range(count)))
    what = f"groups of {unit} feed-forward columns"
    columns: list[Span] = [(0, network.intermediate_size)] * ranks
    of_experts: list[Span] = [(0, 0)] * ranks
    if is_dense:
        columns = _parts(network.intermediate_size, weights, unit, what)
    if experts:
        of_experts = _parts(experts.moe_intermediate_size, weights, unit, what)
    return [
        Share(rank, ranks, (0, count), count, heads[rank], columns[rank], of_experts[rank])
        for rank in range(ranks)
    ]


def _parts(total: int, weights: Sequence[int], unit: int, what: str) -> list[Span]:
    """Return spans of `total` for each rank, cut at multiples of `unit`; none is empty."""
    ranks, blocks = len(weights), total // unit
    if total % unit or blocks < ranks:
        raise Qwen3Error(
            f"{total / unit:g} {what} cannot be divided among {ranks} ranks; divide it as a "
            "pipeline, or among fewer"
        )
    ends, whole = [0], sum(weights)
    for rank, weight in enumerate(accumulate(weights), start=1):
        wished = round(blocks * weight / whole)
        ends.append(min(max(wished, ends[-1] + 1), blocks - ranks + rank))
    return [(start * unit, stop * unit) for start, stop in pairwise(ends)]


def _unit(model: Model) -> int:
    """Return the multiple at which columns may be cut so that no quantization group is split."""
    formats = [
        model.format_of(module.path)
        for module in modules(model.network)
        if module.path.endswith(("o_proj", "down_proj"))
    ]
    return math.lcm(*(fmt.group_size for fmt in formats if fmt))


def _stated(model: Model, hosts: Sequence[Host], layers: Sequence[int]) -> Sequence[int]:
    count = model.network.num_hidden_layers
    if len(layers) != len(hosts) or any(number < 1 for number in layers) or sum(layers) != count:
        stated = ",".join(map(str, layers))
        raise ValueError(
            f"layers must be a number for each of the {len(hosts)} hosts, at least 1, and {count} "
            f"in all, not {stated}"
        )
    return layers


def _by_memory(model: Model, hosts: Sequence[Host]) -> list[int]:
    """Return the layers of each host, so that all use about the same fraction of their memory."""
    network, count = model.network, model.network.num_hidden_layers
    if len(hosts) > count:
        raise Qwen3Error(
            f"{model.name} has {count} layers, too few for {len(hosts)} hosts; name fewer"
        )
    even = [count * (rank + 1) // len(hosts) - count * rank // len(hosts) for rank in _ranks(hosts)]
    plans = [model.plan(share) for share in pipeline(network, even)]
    layer = sum(
        module.nbytes(model.format_of(module.path), model.work.itemsize)
        for module in modules(network)
        if ".layers." in module.path
    )
    layer = (layer + cache_bytes(network, model.work)) // count
    beside = [plan.total - number * layer for plan, number in zip(plans, even, strict=True)]
    counts = [1] * len(hosts)
    for _ in range(count - len(hosts)):
        used = [beside[rank] + (counts[rank] + 1) * layer for rank in _ranks(hosts)]
        counts[min(_ranks(hosts), key=lambda rank: used[rank] / max(1, hosts[rank].available))] += 1
    return counts


def _ranks(hosts: Sequence[Host]) -> range:
    return range(len(hosts))


def _fit(hosts: Sequence[Host], plans: Sequence[Plan]) -> bool:
    return all(plan.total <= host.available for host, plan in zip(hosts, plans, strict=True))


def _check_fits(model: Model, hosts: Sequence[Host], shares: Sequence[Share]) -> None:
    plans = [model.plan(share) for share in shares]
    if _fit(hosts, plans):
        return
    sums = "; ".join(
        f"{host.name}: {plan} of {in_gb(host.available)}"
        for host, plan in zip(hosts, plans, strict=True)
    )
    total = sum(plan.total for plan in plans)
    room = sum(host.available for host in hosts)
    way = (
        "another division may fit: layers=, or less context"
        if total <= room
        else "fewer bits, less context or another host may make it fit"
    )
    raise CapacityError(
        f"{model.name} does not fit with {model.work.context:,} tokens. {sums}; {way}",
        fits_alone=False,
    )


def describe(share: Share) -> str:
    """Return what a share has, in words."""
    if share.is_stage or share.ranks == 1:
        first, stop = share.layers
        ends = ["embedding"] * share.is_first + ["head"] * share.is_last
        return " + ".join([f"layers {first}-{stop - 1}", *ends])
    start, stop = share.expert_columns if share.expert_columns[1] else share.columns
    of = " of experts" if share.expert_columns[1] else ""
    return f"key/value heads {share.heads[0]}-{share.heads[1] - 1}, {stop - start} columns{of}"


def longest_context(
    model: Model, hosts: Sequence[Host], shares: Sequence[Share], limit: int
) -> int:
    """Return the longest context, up to `limit` tokens, for which every share fits; 0 if none.

    That of the tightest host counts: all hold the same tokens.
    """

    def fits(context: int) -> bool:
        longer = replace(model, work=replace(model.work, context=context))
        return _fit(hosts, [longer.plan(share) for share in shares])

    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def traffic(network: ModelConfig, split: str, ranks: int, itemsize: int) -> tuple[int, int]:
    """Return the messages between ranks, and their bytes, for one token of one sequence.

    In a pipeline the id and each boundary's hidden state are sent. Tensor parallelism sums the id,
    and twice in each layer a hidden state.
    """
    row = network.hidden_size * itemsize
    if split == PIPELINE:
        return ranks, 4 + (ranks - 1) * row
    sums = 2 * network.num_hidden_layers
    return sums + 1, 4 + sums * row
