"""The public function `convert`: composes hub, text and checkpoint; no algorithm of its own."""

import logging
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from qwen3_mlx import backend
from qwen3_mlx.api.calibration import calibration_ids, distillation
from qwen3_mlx.arguments import Progress, plain
from qwen3_mlx.checkpoint.adapters import Adapter
from qwen3_mlx.checkpoint.auto_recipe import choose_measured_formats
from qwen3_mlx.checkpoint.convert import COPIED_FILES, Job, Written, check_output, run
from qwen3_mlx.checkpoint.description import fetch_weights, read_config
from qwen3_mlx.checkpoint.distill import Distillation, Distilled, needed_bytes
from qwen3_mlx.checkpoint.hub import Source
from qwen3_mlx.checkpoint.load import quantizable_shapes
from qwen3_mlx.checkpoint.model_card import model_card, usage
from qwen3_mlx.checkpoint.recipes import RECIPES, Formats, choose_formats
from qwen3_mlx.checkpoint.stored import quantization_of
from qwen3_mlx.checkpoint.stored_formats import kept_formats
from qwen3_mlx.checkpoint.weights import INDEX, with_stored_head
from qwen3_mlx.engine.memory import RESERVE, in_gb
from qwen3_mlx.errors import CheckpointError, Qwen3Error
from qwen3_mlx.files import as_memoryview
from qwen3_mlx.model.config import LOGITS, ModelConfig
from qwen3_mlx.model.quantization import AFFINE, Format
from qwen3_mlx.model.sizes import folder_name, hub_name, mlx_4bit_name, size_named
from qwen3_mlx.text.kind import CHAT, Kind
from qwen3_mlx.text.template import ChatTemplate
from qwen3_mlx.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
PhaseProgress = Callable[[str, int, int], None]
_DESCRIPTION = (*COPIED_FILES, "config.json", INDEX)
_MIN_TARGET_BPW, _MAX_TARGET_BPW = 2.5, 9.0
_MIN_KEPT = 0.9  # of an adapter, without a warning
_MAX_STEPS = 1_000_000  # of a distillation


@dataclass(frozen=True, slots=True)
class Conversion:
    """The result of `convert`.

    Attributes:
        output: the folder that was written.
        tensors: the number of tensors in it.
        weights: the number of weights.
        bytes: the bytes of all tensors.
        bits_per_weight: the average bits of a weight, scales and biases included.
        peak_memory: the most bytes that this process has held resident so far.
        seconds: the time that the conversion took.
        formats: the format of each quantized module, by its path.
        kind: what it is for: "chat", "embedding" or "reranker".
        dtype: that of scales, biases and tensors that are not quantized.
        adapter_kept: how much of an adapter's changes d of weights W is left after quantization Q:
            (Q(W + d) - Q(W))·d / d·d, 1 if all is; None if nothing was merged and quantized.
        distilled: the outcome of `distill`: steps, kl_before and kl_after, the mean divergence from
            the original on held-out text in nats a token, and kept, whether the tuned numbers were
            written; None without `distill`.
    """

    output: Path
    tensors: int
    weights: int
    bytes: int
    bits_per_weight: float
    peak_memory: int
    seconds: float
    formats: Mapping[str, Format]
    kind: str = CHAT
    dtype: str = "bfloat16"
    adapter_kept: float | None = None
    distilled: Distilled | None = None

    @property
    def usage(self) -> str:
        """A command that uses the result."""
        return usage(self.kind, folder_name(self.output))


def convert(  # noqa: PLR0913 - one keyword an option
    source: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    adapter: str | Path | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str = AFFINE,
    recipe: str = "uniform",
    target_bpw: float | None = None,
    calibration: str | None = None,
    distill: int | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
    force: bool = False,
    allow_nonfinite: bool = False,
    progress: PhaseProgress | None = None,
) -> Conversion:
    """Convert a checkpoint to a quantized MLX checkpoint; the model is never held in memory.

    The tensors are streamed from disk to disk. An interrupted conversion resumes after its
    finished shards when it is started again. `bits`, `group_size` and `mode` cannot be combined
    with the recipe "auto" or with `dequantize`.

    Args:
        source: a folder, a hub name such as "Qwen/Qwen3-8B", or "demo". Its weights are floats, or
            quantized: in MLX's format, FP8, AWQ, GPTQ, AutoRound, bitsandbytes or
            compressed-tensors, or as a GGUF file.
        output: the folder to write. It appears only when it is complete.
        revision: branch, tag or commit on the hub; default None, the main branch.
        adapter: an adapter (see `load`) to merge, in float32 and before anything is quantized;
            default None.
        bits: bits per weight: 2, 3, 4, 5, 6 or 8; default None, which is the mode's own, in the
            affine mode 4. Without `bits`, `group_size`, `mode` and `recipe` weights that are
            quantized in another format than MLX's keep their codes, but those of FP8.
        group_size: number of weights that share a scale: 32, 64 or 128; default None, which is the
            mode's own, in the affine mode 64.
        mode: quantization mode: "affine" (default), "mxfp4", "mxfp8" or "nvfp4".
        recipe: how formats are assigned to modules. "uniform" (default): all alike. "mixed": more
            bits for the embedding, the head and the first and last layer. "mixed-rich": also for
            attention and down_proj. "auto": chosen per module by measuring the divergence on text.
        target_bpw: for "auto", which requires it: average bits per weight of the result, scales
            included, 2.5 to 9.
        calibration: for "auto" and `distill`: the text to measure on and to learn from; default
            None, which is Python's own documentation.
        distill: steps of tuning after rounding, in the affine mode; default None, without. Scales
            and biases of the layers are tuned so that the result predicts what the original does,
            and kept only if the divergence falls on a part of the text that was not learned from.
        dtype: "bfloat16", "float16" or "float32", for tensors that are not quantized; default None,
            which is the source's.
        dequantize: True quantizes nothing and writes quantized weights as `dtype`; default False.
        force: True replaces an existing checkpoint in `output`; default False.
        allow_nonfinite: True keeps NaN and infinities in the weights and logs a warning; default
            False, which refuses them.
        progress: callable (phase, done, total); default None. The phases are "downloading" (bytes,
            called from other threads), "measuring" (layers), "writing" (bytes) and "distilling"
            (layers of the original, then steps).

    Returns:
        A `Conversion`: what was written, and the time and memory that it took.

    Raises:
        ValueError: an argument is out of its range, or two exclude each other.
        TypeError: `calibration` is no text.
        CheckpointError: the source cannot be found or read, or has a feature that is not supported.
        Qwen3Error: the output exists already, lies in the source, or cannot be written.
    """
    started = time.perf_counter()
    bits, group_size, target_bpw, distill, dequantize = map(
        plain, (bits, group_size, target_bpw, distill, dequantize)
    )
    _check_arguments(recipe, target_bpw, calibration, distill, mode=mode, quantizing=not dequantize)
    if not isinstance(calibration, str | None):
        raise TypeError(f"calibration must be text, not {calibration!r:.50}; read a file first")
    if dequantize and bits is not None:
        raise ValueError(f"bits={bits} and dequantize=True exclude each other")
    if (recipe == "auto" or dequantize) and (bits, group_size, mode) != (None, None, AFFINE):
        raise ValueError("bits, group_size and mode go with neither recipe 'auto' nor dequantize")
    fmt = Format.of(mode, bits, group_size)
    _refuse_size_name(source)
    place = Source(hub_name(source), revision, _progress_for(progress, "downloading"))
    output = Path(output).expanduser()
    # The folder of a GGUF file may be that of the result, too.
    check_output(None if place.names_file else place.folder, output, force=force)
    folder, stated = read_config(place, _DESCRIPTION)
    folder = fetch_weights(place, folder, also=_DESCRIPTION)
    config: Mapping[str, Any] = with_stored_head(stated, folder)
    merged = None
    if adapter is not None:
        merged = Adapter.at(adapter, ModelConfig.from_dict(config), place.name)
        config = merged.config(config)
    backend.refuse_fork()
    base, kind = None if place.folder else str(source), _kind_of(folder, config)
    job = Job(
        source=folder,
        output=output,
        config=config,
        formats={},
        dtype=backend.compute_dtype(dtype or _stated_dtype(config)),
        card=partial(model_card, base, kind, recipe),
        force=force,
        allow_nonfinite=allow_nonfinite,
        adapter=merged,
        distillation=_settings(folder, config, calibration, distill),
    )
    if recipe == "auto":
        target = target_bpw or 0.0
        near = Format(next(n for n in (8, 6, 5, 4, 3, 2) if n + 0.5 <= target), 64)
        _check_memory(job, choose_formats(quantizable_shapes(config), "uniform", near))
        job = _measured(job, calibration, target, progress)
    elif not dequantize:
        asked = (recipe, bits, group_size, mode) != ("uniform", None, None, AFFINE)
        kept = None if asked else kept_formats(config, folder)
        stored = quantization_of(config)
        stored_bits = stored.section.get("bits") if stored else None
        if not kept and isinstance(stored_bits, int) and stored_bits < fmt.bits:
            _log.warning("%d bits from %d bits: larger, not better", fmt.bits, stored_bits)
        job = replace(job, formats=kept or choose_formats(quantizable_shapes(config), recipe, fmt))
    _check_distillation(job)
    written = run(job, _progress_for(progress, "writing"), _progress_for(progress, "distilling"))
    _warn_of(written)
    return Conversion(
        output=output,
        **{part.name: getattr(written, part.name) for part in fields(written)},
        bits_per_weight=written.bits_per_weight,
        peak_memory=_peak_resident(),
        seconds=time.perf_counter() - started,
        formats={path: fmt for path, fmt in job.formats.items() if fmt},
        kind=kind,
        dtype=backend.dtype_name(job.dtype),
    )


def _kind_of(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the kind of the checkpoint for its card; a broken template or tokenizer is no matter.

    Weights alone can be converted, too.
    """
    try:
        tokenizer = Tokenizer(folder / "tokenizer.json")
        template = ChatTemplate.from_folder(folder)
        return Kind.of(folder, tokenizer, template, ModelConfig.from_dict(config).output).name
    except CheckpointError:
        return CHAT


def _refuse_size_name(source: str | Path) -> None:
    """Refuse "8B" and the like: `load` takes them for checkpoints that are quantized already."""
    if isinstance(source, str) and (size := size_named(source)):
        raise ValueError(
            f"{source} is the size that is ready in 4 bits, {mlx_4bit_name(size)}; to convert, "
            f"name the original, Qwen/Qwen3-{size}, or a folder, ./{source}"
        )


def _check_arguments(
    recipe: str,
    target_bpw: float | None,
    calibration: str | None,
    distill: int | None,
    *,
    mode: str,
    quantizing: bool,
) -> None:
    if recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, not {recipe!r}")
    if not quantizing and recipe != "uniform":
        raise ValueError(f"dequantize quantizes nothing, so recipe {recipe!r} has no place")
    if distill is not None:
        if type(distill) is not int or not 1 <= distill <= _MAX_STEPS:
            raise ValueError(f"distill is a number of steps, 1 to {_MAX_STEPS:,}, not {distill!r}")
        if not quantizing:
            raise ValueError("dequantize quantizes nothing, so there is nothing to distill")
        if mode != AFFINE:
            raise ValueError(
                f"distill tunes scales and biases, which are floats in mode affine only, not {mode}"
            )
    if recipe == "auto":
        if target_bpw is None or not _MIN_TARGET_BPW <= target_bpw <= _MAX_TARGET_BPW:
            raise ValueError(
                f"recipe 'auto' needs a target_bpw from {_MIN_TARGET_BPW} to {_MAX_TARGET_BPW} "
                f"bits, not {target_bpw}"
            )
    elif target_bpw is not None or (calibration is not None and distill is None):
        raise ValueError(
            f"target_bpw and calibration go with recipe 'auto', not {recipe!r} (calibration with "
            "distill, too)"
        )


def _warn_of(written: Written) -> None:
    left = written.adapter_kept
    if left is not None and left < _MIN_KEPT:
        _log.warning(
            "%.0f %% of the adapter is left after quantization; merge it into the original "
            "weights, with more bits, or keep it beside the quantized ones: --adapter "
            "(load(adapter=))",
            100 * left,
        )
    if (distilled := written.distilled) and not distilled.kept:
        _log.warning(
            "distill did not lower the divergence on held-out text (%.5f nats a token; without it "
            "%.5f), so its result was dropped",
            distilled.kl_after,
            distilled.kl_before,
        )


def _stated_dtype(config: Mapping[str, Any]) -> str:
    stated = str(config.get("torch_dtype") or config.get("dtype")).removeprefix("torch.")
    return stated if stated in ("bfloat16", "float16", "float32") else "bfloat16"


def _progress_for(progress: PhaseProgress | None, phase: str) -> Progress:
    return (lambda done, total: progress(phase, done, total)) if progress else (lambda *_: None)


def _peak_resident() -> int:
    """Return the most bytes this process has held; getrusage counts kilobytes, on macOS bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


# --- what learns from text ----------------------------------------------------------------------


def _measured(job: Job, text: str | None, target_bpw: float, progress: PhaseProgress | None) -> Job:
    """Return the job with formats chosen, and inputs measured, on a calibration text."""
    network = _predicting_network(job.config, "recipe 'auto'")
    ids = calibration_ids(job.source, network, text)
    formats, moments = choose_measured_formats(
        job.matrices(),
        job.config,
        ids,
        target_bpw=target_bpw,
        dtype=job.dtype,
        progress=_progress_for(progress, "measuring"),
    )
    digest = blake2b(bytes(as_memoryview(ids)), digest_size=16).hexdigest()
    return replace(job, formats=formats, moments=moments, calibration=digest)


def _settings(
    folder: Path, config: Mapping[str, Any], text: str | None, steps: int | None
) -> Distillation | None:
    """Return the settings of a distillation of so many steps; None without steps."""
    if steps is None:
        return None
    return distillation(folder, _predicting_network(config, "distill"), text, steps)


def _check_distillation(job: Job) -> None:
    """Refuse a distillation that has nothing to gain, or does not fit the memory."""
    if job.distillation is None:
        return
    matrices = job.matrices()
    if all(matrices[f"{path}.weight"].fmt == fmt for path, fmt in job.formats.items() if fmt):
        raise Qwen3Error(
            "distill makes up for rounding, and nothing is rounded here: the source's codes are "
            "kept as they are; leave distill out, or state other bits"
        )
    _check_memory(job, job.formats)


def _check_memory(job: Job, formats: Formats) -> None:
    """Refuse a distillation of weights in these formats that does not fit the memory."""
    if job.distillation is None:
        return
    network = ModelConfig.from_dict(job.config)
    needed = RESERVE + needed_bytes(network, formats, job.distillation)
    if needed > (available := backend.available_memory()):
        raise Qwen3Error(
            f"distill takes {in_gb(needed)} of memory, the quantized model included, and "
            f"{in_gb(available)} are free; leave it out, take fewer bits, or close other programs"
        )


def _predicting_network(config: Mapping[str, Any], what: str) -> ModelConfig:
    network = ModelConfig.from_dict(config)
    if network.output != LOGITS:
        raise Qwen3Error(
            f"{what} needs the predictions of a head, and this network has none for logits; take "
            "the recipe mixed or uniform, without distill"
        )
    return network
