"""Memory check: refuses a checkpoint that does not fit this machine, before weights are fetched."""

import logging
from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.cache.quantized import CACHE_FORMATS, PLAIN, CacheFormat
from qwen3_mlx.checkpoint.load import LoadOptions
from qwen3_mlx.engine.memory import (
    Plan,
    Workload,
    count_weights,
    in_gb,
    make_plan,
    weight_bytes,
)
from qwen3_mlx.engine.memory_ledger import unallocated_guarantees
from qwen3_mlx.errors import CapacityError
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.quantization import Format, FormatOf
from qwen3_mlx.model.sizes import SIZES, mlx_4bit_name, published_model_config

_log = logging.getLogger(__name__)
MIN_CONTEXT = 2048  # tokens; with fewer a model is of no use
_READY_FORMAT = Format(4, 64)  # of the 4-bit checkpoints on the hub


def plan_load(
    network: ModelConfig,
    stored: FormatOf | None,
    options: LoadOptions,
    context: int | None = None,
    cache: CacheFormat = PLAIN,
) -> Plan:
    """Return the memory plan of a checkpoint loaded with `options`, for `context` tokens."""
    context = context or MIN_CONTEXT
    quantize, dequantize = options.quantize, options.dequantize
    if dequantize is None:
        dequantize = backend.worth_dequantizing(4 * count_weights(network))

    def format_of(path: str) -> Format | None:
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
        fused=backend.has_fused_attention(options.dtype.size),
    )
    weights = weight_bytes(network, format_of, work.itemsize) + options.adapter_bytes
    return make_plan(network, weights, work)


def check_fits(
    name: str,
    network: ModelConfig,
    stored: FormatOf | None,
    options: LoadOptions,
    context: int | None = None,
    cache: CacheFormat = PLAIN,
    beside: int = 0,
) -> None:
    """Check that a checkpoint fits the memory that is available.

    `beside` bytes are reserved for a draft model. On a Mac the limit is Metal's working set, which
    may be more than is free at the moment: then a warning is logged.

    Raises:
        CapacityError: it does not fit; the message shows the sum, and what would fit.
    """
    tokens = context or MIN_CONTEXT
    available = backend.available_memory() - unallocated_guarantees() - beside
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
        ways.append("without a draft model it would fit")
    if unallocated_guarantees() and plan.total <= available + unallocated_guarantees():
        ways.append(
            "closing another LLM of this process, or loading it with less context, would make room"
        )
    stated = backend.memory_from_environment() is not None
    if plan.total <= backend.memory_limit() - beside:
        # Under a stated limit or on a Mac's GPU, memory of other programs is not counted: only
        # models of this process can be in the way.
        own = stated or backend.on_metal()
        others = "the other models of this process" if own else "other programs"
        ways.append(f"closing {others} would make room")
    raise CapacityError(
        f"{name} does not fit: {plan} with {tokens:,} tokens; "
        f"{'QWEN3_MEMORY allows' if stated else 'this machine can give'} {in_gb(available)}"
        f"{' beside the draft model' if beside else ''}; {'; '.join(ways)}"
        f"{'' if stated else '; QWEN3_MEMORY, in GB, sets another limit'}",
        fits_alone=plan.total + beside <= backend.available_memory() + mx.get_active_memory(),
    )


def _warn_of_other_programs(name: str, total: int) -> None:
    if not backend.on_metal() or backend.memory_from_environment():
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
    """Yield the first load option with which the same checkpoint fits, if there is one."""
    others = {}
    if stored or options.quantize:
        others["dequantize=False"] = replace(options, dequantize=False)
    if options.dtype.size > 2:
        others['dtype="bfloat16"'] = replace(options, dtype=mx.bfloat16)
    if not stored:
        for bits in (8, 6, 5, 4, 3):
            others[f"bits={bits}"] = replace(options, quantize=Format(bits, 64))
    for option, changed in others.items():
        if (total := plan_load(network, stored, changed).total) <= available:
            yield f"{option} would fit ({in_gb(total)})"
            return


def _other_cache(
    network: ModelConfig,
    stored: FormatOf | None,
    options: LoadOptions,
    tokens: int,
    available: int,
) -> Iterator[str]:
    """Yield the most bits of a quantized KV cache with which the whole context fits, if any."""
    for bits in (8, 4):
        cache = CACHE_FORMATS[str(bits)]
        if (total := plan_load(network, stored, options, tokens, cache).total) <= available:
            yield f"kv_bits={bits} would fit ({in_gb(total)})"
            return


def _suggest_model(available: int) -> str:
    """Return advice that names the largest published size that fits, quantized to 4 bits."""
    options = LoadOptions(backend.compute_dtype())
    plans = {
        size: plan_load(published_model_config(size), lambda _: _READY_FORMAT, options)
        for size in SIZES
    }
    fitting = {size: plan.total for size, plan in plans.items() if plan.total <= available}
    if not fitting:
        return "none of the ready 4-bit models fits either"
    best = max(fitting, key=lambda size: fitting[size])
    return f"--model {best} fits ({mlx_4bit_name(best)}, 4-bit, {in_gb(fitting[best])})"
