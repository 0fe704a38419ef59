"""Whether a checkpoint fits this machine: told before a byte of its weights is read or fetched."""

import logging
from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.cache.quantized import CACHE_FORMATS, PLAIN, CacheFormat
from qwen3_mlx.checkpoint.load import LoadOptions
from qwen3_mlx.engine.memory import (
    FormatOf,
    Plan,
    Quantized,
    Workload,
    count_weights,
    in_gb,
    make_plan,
    weight_bytes,
)
from qwen3_mlx.engine.memory_ledger import owed
from qwen3_mlx.errors import Qwen3Error
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.quantization import Format
from qwen3_mlx.model.sizes import SIZES, mlx_4bit_name, published

_log = logging.getLogger(__name__)
_CONVERSATION = 2048  # tokens; what cannot hold so many is of no use
_READY = Format(4, 64)


def plan_load(
    network: ModelConfig,
    stored: FormatOf | None,
    options: LoadOptions,
    context: int | None = None,
    cache: CacheFormat = PLAIN,
) -> Plan:
    """Plan for a checkpoint as `options` load it, and a conversation of `context` tokens."""
    context = context or _CONVERSATION
    quantize, dequantize = options.quantize, options.dequantize
    if dequantize is None:
        dequantize = backend.worth_dequantizing(4 * count_weights(network))

    def format_of(path: str) -> Quantized | None:
        if dequantize:
            return None
        if stored:
            return stored(path)
        return quantize.for_module(path) if quantize else None

    work = Workload(
        context=min(context, network.context_window),
        itemsize=options.dtype.size,
        cache=cache,
        chunk=backend.prefill_chunk(),
        fused=backend.on_gpu(),
    )
    return make_plan(network, weight_bytes(network, format_of, work.itemsize), work)


def check_fits(
    name: str,
    network: ModelConfig,
    stored: FormatOf | None,
    options: LoadOptions,
    context: int | None = None,
    cache: CacheFormat = PLAIN,
    beside: int = 0,
) -> None:
    """Compare the plan with what the machine can give; `beside` bytes go to a draft model.

    A Mac gives up to Metal's working set; where less is free, the log warns.

    Raises:
        Qwen3Error: it is more; the message shows the sum, and what would fit.
    """
    tokens = context or _CONVERSATION
    available = backend.available_memory() - owed() - beside
    plan = plan_load(network, stored, options, tokens, cache)
    if plan.total <= available:
        _warn_of_other_programs(name, plan.total + beside)
        return
    ways = [
        *_other_cache(network, stored, options, tokens, available),
        *_other_options(network, stored, options, available),
        *([f"a shorter context than {context:,} may fit"] if context else []),
        _suggest_model(available),
    ]
    if plan.total <= available + beside:
        ways.append("so it would without a draft model")
    if owed() and plan.total <= available + owed():
        ways.append(
            "closing another LLM of this process, or loading it with less context, would do"
        )
    stated = backend.stated_memory() is not None
    if plan.total <= backend.memory_limit() - beside:
        alone = stated or backend.on_gpu()  # what other programs hold does not count
        others = "the other models of this process" if alone else "other programs"
        ways.append(f"closing {others} would make room")
    raise Qwen3Error(
        f"{name} does not fit: {plan} with {tokens:,} tokens; "
        f"{'QWEN3_MEMORY allows' if stated else 'this machine can give'} {in_gb(available)}"
        f"{' beside the draft model' if beside else ''}; {'; '.join(ways)}"
        f"{'' if stated else '; QWEN3_MEMORY, in GB, sets another limit'}"
    )


def _warn_of_other_programs(name: str, total: int) -> None:
    if not backend.on_metal() or backend.stated_memory():
        return
    if total > (free := backend.free_memory()):
        _log.warning(
            "%s takes %s, and %s of memory are free: macOS will compress or swap out what other "
            "programs hold; closing some makes it faster",
            name,
            in_gb(total),
            in_gb(free),
        )


def _other_options(
    network: ModelConfig, stored: FormatOf | None, options: LoadOptions, available: int
) -> Iterator[str]:
    """Name the first way to load the same checkpoint that fits."""
    others = {}
    if stored or options.quantize:
        others["dequantize=False"] = replace(options, dequantize=False)
    if options.dtype.size > 2:
        others['dtype="bfloat16"'] = replace(options, dtype=mx.bfloat16)
    if not stored:
        for bits in (8, 6, 5, 4, 3):
            others[f"bits={bits}"] = replace(options, quantize=Format(bits, 64))
    for words, changed in others.items():
        if (total := plan_load(network, stored, changed).total) <= available:
            yield f"{words} would fit ({in_gb(total)})"
            return


def _other_cache(
    network: ModelConfig,
    stored: FormatOf | None,
    options: LoadOptions,
    tokens: int,
    available: int,
) -> Iterator[str]:
    """Name the most bits of a quantized cache with which the whole context fits."""
    for bits in (8, 4):
        form = CACHE_FORMATS[str(bits)]
        if (total := plan_load(network, stored, options, tokens, form).total) <= available:
            yield f"kv_bits={bits} would fit ({in_gb(total)})"
            return


def _suggest_model(available: int) -> str:
    """Name the largest of the published sizes that fits as it can be had, quantized to 4 bits."""
    options = LoadOptions(backend.compute_dtype())
    plans = {size: plan_load(published(size), lambda _: _READY, options) for size in SIZES}
    fitting = {size: plan.total for size, plan in plans.items() if plan.total <= available}
    if not fitting:
        return "nor does any of the ready 4-bit models"
    best = max(fitting, key=lambda size: fitting[size])
    return f"--model {best} fits ({mlx_4bit_name(best)}, 4-bit, {in_gb(fitting[best])})"
