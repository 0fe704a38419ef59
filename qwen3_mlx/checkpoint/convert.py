"""Converts any supported checkpoint to an MLX folder, some rows at a time.

The model is never in memory as a whole. All output tensors are known before the first is computed,
so each shard's header is written first, and its rows follow as they are computed. Finished shards
are kept: the same conversion, started again, continues after them.
"""

import json
import logging
import math
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle, repeat
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.arguments import Progress
from qwen3_mlx.checkpoint import gptq
from qwen3_mlx.checkpoint.adapters import Adapter
from qwen3_mlx.checkpoint.distill import TUNED, Distillation, Distilled, distill
from qwen3_mlx.checkpoint.formats.matrix import Matrix, as_floats
from qwen3_mlx.checkpoint.hub import KIND_FILES
from qwen3_mlx.checkpoint.output_config import output_config
from qwen3_mlx.checkpoint.recipes import Formats
from qwen3_mlx.checkpoint.stored_formats import read_matrices
from qwen3_mlx.checkpoint.weights import INDEX, mismatches, refuse_missing_layers, weight_names
from qwen3_mlx.errors import CheckpointError, Qwen3Error
from qwen3_mlx.files import ShardWriter, TensorSpec, atomic_write
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.quantization import Format
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.version import __version__

_log = logging.getLogger(__name__)
_SHARD_BYTES = 1_000_000_000  # maximum, except for a single larger tensor
_BLOCK = 1 << 23  # numbers of a tensor that are computed at once
_BLOCKS_IN_FLIGHT = 3
COPIED_FILES = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "LICENSE"),
    *KIND_FILES,
)
_STATE = "conversion.json"
# The bits of the exponent. A number in which all are set is an infinity or NaN.
_EXPONENT = {mx.bfloat16: 0x7F80, mx.float16: 0x7C00, mx.float32: 0x7F800000}
_Content = mx.array | tuple[mx.array, ...]  # rows as floats, or as codes
_INTEGERS = {2: (mx.uint16, mx.int16), 4: (mx.uint32, mx.int32)}


@dataclass(frozen=True, slots=True)
class Job:
    """The source, the output and the settings of a conversion.

    `formats` has a format for each module whose weights are to be quantized; other numbers become
    `dtype`. Modules that have `moments` of their inputs are rounded by GPTQ; `calibration` names
    the text on which the moments were measured. `card` returns the text of the README.md. An
    `adapter` is merged in float32 before anything is rounded; `config` is that of the result.
    After rounding, scales and biases are tuned as `distillation` states.
    """

    source: Path
    output: Path
    config: Mapping[str, Any]
    formats: Formats
    dtype: mx.Dtype
    moments: Mapping[str, mx.array] = field(default_factory=dict)
    calibration: str = ""
    card: "Callable[[Job, Written], str] | None" = None
    force: bool = False
    allow_nonfinite: bool = False
    adapter: Adapter | None = None
    distillation: Distillation | None = None

    def matrices(self) -> dict[str, Matrix]:
        """Return the tensors of the source, with the adapter, by their names in the network."""
        matrices = read_matrices(self.source, self.config)
        return self.adapter.merged(matrices) if self.adapter else matrices


@dataclass(frozen=True, slots=True)
class Written:
    """The result of a conversion: tensors, weights (numbers of the network), tensor bytes.

    `adapter_kept` is how much of an adapter's changes d of weights W is left after rounding Q:
    (Q(W + d) - Q(W))·d / d·d. Shards of an interrupted run do not count. None if nothing was
    merged and rounded. `distilled` is the outcome of `Job.distillation`.
    """

    tensors: int
    weights: int
    bytes: int
    adapter_kept: float | None = None
    distilled: Distilled | None = None

    @property
    def bits_per_weight(self) -> float:
        """Average bits of a weight, scales and biases included."""
        return 8 * self.bytes / self.weights


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the source, and the output tensors that it is converted to.

    `before` is the tensor without the adapter, if one is merged into it.
    """

    name: str
    matrix: Matrix
    fmt: Format | None
    planned: tuple[TensorSpec, ...]
    before: Matrix | None = None

    @property
    def nbytes(self) -> int:
        return sum(planned.nbytes for planned in self.planned)


def run(job: Job, progress: Progress, distilling: Progress = lambda *_: None) -> Written:
    """Run a conversion; `progress(done, total)` is called with the bytes written.

    `distilling(done, total)` is called with the layers of the original, and then the steps.

    Raises:
        Qwen3Error: the output exists, would lie in the source, or does not fit the disk.
        CheckpointError: the source is broken, or contains NaN or infinity.
    """
    check_output(job.source, job.output, force=job.force)
    tensors = _plan(job)
    written = Written(
        tensors=sum(len(tensor.planned) for tensor in tensors),
        weights=sum(math.prod(tensor.matrix.shape) for tensor in tensors),
        bytes=sum(tensor.nbytes for tensor in tensors),
    )
    shards = _shards(tensors)
    partial = partial_folder(job.output)
    _prepare_partial(job, partial, [tensor.name for tensor in tensors])
    try:
        with _streams() as streams:
            kept = _write_shards(job, partial, shards, streams, progress)
        distilled = None
        if job.distillation:
            config = output_config(job.config, job.formats, job.dtype)
            distilled = distill(
                partial, config, job.matrices(), job.distillation, job.dtype, distilling
            )
        written = replace(written, adapter_kept=kept, distilled=distilled)
        _write_other_files(job, partial, shards, written)
        _publish(partial, job.output.resolve())
    except OSError as error:
        raise Qwen3Error(f"writing {partial} failed: {error.strerror or error}") from error
    except CheckpointError:  # shards of a broken source are not worth keeping
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if not any(partial.glob("*.safetensors")):  # there is nothing to continue from
            shutil.rmtree(partial, ignore_errors=True)
    return written


def partial_folder(output: Path) -> Path:
    """Return the folder in which a conversion works until it is finished."""
    output = output.resolve()
    return output.with_name(output.name + ".partial")


def _replaced_folder(output: Path) -> Path:
    return output.with_name(output.name + ".replaced")


def check_output(source: Path | None, output: Path, *, force: bool) -> None:
    """Refuse an output folder that a conversion must not write to.

    Raises:
        Qwen3Error: the output is the source or lies in it, or exists and must not be replaced.
    """
    source, output = source and source.resolve(), output.resolve()
    if source and (output == source or source in output.parents):
        raise Qwen3Error(f"{output} lies in the source; give another folder for the result")
    if output == output.parent:
        raise Qwen3Error(f"{output} cannot be the output folder; give another folder")
    for needed in (partial_folder(output), _replaced_folder(output)):
        if source and (needed == source or needed in source.parents):
            raise Qwen3Error(
                f"the conversion needs {needed} as a working folder, and it is the source or "
                "contains it; rename one of them"
            )
    if not output.exists() or (output.is_dir() and _is_empty(output)):
        return
    whole = (output / "config.json").is_file() and any(output.glob("*.safetensors"))
    if not whole or (source and output in source.parents):
        raise Qwen3Error(f"{output} is not a checkpoint folder, so it is not replaced")
    if not force:
        raise Qwen3Error(f"{output} exists; --force (force=True) replaces it")


def _is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


# --- the plan -----------------------------------------------------------------------------------


def _plan(job: Job) -> list[_Tensor]:
    """Return the tensors to write, in the order of the network."""
    geometry = ModelConfig.from_dict(job.config)
    matrices = job.matrices()
    refuse_missing_layers(geometry, matrices)
    before = read_matrices(job.source, job.config) if job.adapter else {}
    model = Qwen3(geometry)
    needed = {name: tuple(array.shape) for name, array in model.tensors().items()}
    present = {name: matrix.shape for name, matrix in matrices.items()}
    if problems := mismatches(needed, present, tied=model.config.tie_word_embeddings):
        raise CheckpointError(f"weights and config.json do not match; {'; '.join(problems)}")
    tensors = []
    for name, shape in needed.items():
        module, _, kind = name.rpartition(".")
        fmt = job.formats.get(module) if kind == "weight" else None
        parts = fmt.tensors(shape, job.dtype) if fmt else {kind: (shape, job.dtype)}
        planned = tuple(
            TensorSpec(f"{module}.{key}", dtype, size) for key, (size, dtype) in parts.items()
        )
        is_changed = fmt and job.adapter and job.adapter.changes(name)
        tensor = _Tensor(name, matrices[name], fmt, planned)
        tensors.append(replace(tensor, before=before.get(name)) if is_changed else tensor)
    return tensors


def _shards(tensors: Sequence[_Tensor]) -> dict[str, list[_Tensor]]:
    """Return the tensors of each output file, by its name."""
    groups: list[list[_Tensor]] = [[]]
    room = _SHARD_BYTES
    for tensor in tensors:
        if groups[-1] and tensor.nbytes > room:
            groups.append([])
            room = _SHARD_BYTES
        groups[-1].append(tensor)
        room -= tensor.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{number:05}-of-{len(groups):05}.safetensors": group
        for number, group in enumerate(groups, 1)
    }


def _prepare_partial(job: Job, partial: Path, names: Sequence[str]) -> None:
    """Create the working folder; keep the finished shards of an interrupted run of the same job.

    Shards of any other job are removed.
    """
    files = [job.source / name for name in weight_names(job.source)]
    files += job.adapter.files if job.adapter else []
    identity = {
        "version": __version__,
        "files": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "config": dict(job.config),
        "tensors": list(names),
        "formats": {path: fmt.as_config() for path, fmt in job.formats.items() if fmt},
        "dtype": backend.dtype_name(job.dtype),
        "calibration": job.calibration,
        "distillation": job.distillation and job.distillation.identity,
    }
    text = json.dumps(identity, sort_keys=True)
    state = partial / _STATE
    if not state.is_file() and partial.exists() and not (partial.is_dir() and _is_empty(partial)):
        raise Qwen3Error(
            f"the conversion needs {partial} as its working folder, and something else is there; "
            "move it away"
        )
    if not state.is_file() or state.read_text("utf-8", "replace") != text:
        if partial.exists():
            shutil.rmtree(partial)
        try:
            partial.mkdir(parents=True)
            state.write_text(text, "utf-8")
        except OSError as error:
            raise Qwen3Error(f"{partial} cannot be written: {error.strerror}") from error


# --- the work -----------------------------------------------------------------------------------


def _write_shards(
    job: Job,
    partial: Path,
    shards: Mapping[str, list[_Tensor]],
    streams: Sequence[mx.Stream],
    progress: Progress,
) -> float | None:
    """Write the shards that are missing; return `Written.adapter_kept` of them."""
    kept = _Kept()
    sizes = {file: sum(tensor.nbytes for tensor in tensors) for file, tensors in shards.items()}
    missing = [file for file in shards if not (partial / file).is_file()]
    total, done = sum(sizes.values()), sum(sizes.values()) - sum(sizes[file] for file in missing)
    needed, free = sum(sizes[file] for file in missing), shutil.disk_usage(partial).free
    if job.distillation and not (partial / TUNED).is_file():  # which has their scales and biases
        rounded = [tensor for tensors in shards.values() for tensor in tensors if tensor.fmt]
        needed += sum(spec.nbytes for tensor in rounded for spec in tensor.planned[1:])
    if needed > free:
        raise Qwen3Error(
            f"the result takes {needed / 1e9:.2f} GB more and the disk of {partial.parent} has "
            f"{free / 1e9:.2f} GB free"
        )
    progress(done, total)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    for file in missing:
        _write_shard(job, partial / file, shards[file], streams, kept, advance)
    mx.clear_cache()
    return kept.share


def _write_shard(
    job: Job,
    path: Path,
    tensors: Sequence[_Tensor],
    streams: Sequence[mx.Stream],
    kept: "_Kept",
    advance: Callable[[int], None],
) -> None:
    """Compute and write one shard; `advance` is called with the bytes of each block."""
    nonfinite: Counter[str] = Counter()
    with atomic_write(path) as stream:
        writer = ShardWriter(stream, [spec for tensor in tensors for spec in tensor.planned])
        for tensor, block in _compute_blocks(tensors, job, streams):
            if nonfinite and tensor.name not in nonfinite and not job.allow_nonfinite:
                break  # the first tensor with NaN or infinity is counted to its end
            nonfinite += Counter({tensor.name: block.count_nonfinite()})
            kept.add(block.kept)
            for spec, rows in zip(tensor.planned, block.arrays, strict=True):
                writer.append(spec.name, rows)
            advance(sum(rows.nbytes for rows in block.arrays))
        _refuse_nonfinite(nonfinite, job.dtype, allowed=job.allow_nonfinite)


def _refuse_nonfinite(counts: Mapping[str, int], dtype: mx.Dtype, *, allowed: bool) -> None:
    if not counts:
        return
    found = ", ".join(
        f"{name} has NaN or infinity in {n:,} places as {backend.dtype_name(dtype)}"
        for name, n in counts.items()
    )
    if not allowed:
        raise CheckpointError(
            f"{found}; look for a sound copy, or take them as they are with --allow-nonfinite "
            "(allow_nonfinite=True)"
        )
    _log.warning("%s", found)


class _Kept:
    """How much of an adapter is left after rounding; see `Written.adapter_kept`."""

    def __init__(self) -> None:
        self._left = self._whole = 0.0

    def add(self, products: Sequence[mx.array]) -> None:
        """Add the products of a block, (Q(W + d) - Q(W))·d and d·d, if it has any."""
        if products:
            left, whole = (float(product) for product in products)
            self._left, self._whole = self._left + left, self._whole + whole

    @property
    def share(self) -> float | None:
        """The share that is left; None if there is no change."""
        return self._left / self._whole if self._whole else None


class _Block:
    """Some rows of a tensor being converted; the computation starts when the block is created.

    `arrays` are the bytes of the output tensors' rows, and `kept` the products for `_Kept`, if
    `before` has the same rows without the adapter.
    """

    def __init__(
        self, content: _Content, tensor: _Tensor, job: Job, before: mx.array | None = None
    ) -> None:
        dtype, fmt = job.dtype, tensor.fmt
        self._exponent = _EXPONENT[dtype]
        inputs = job.moments.get(tensor.name.removesuffix(".weight"))
        arrays: Sequence[mx.array]
        self.kept: list[mx.array] = []
        if isinstance(content, tuple):
            packed, *groups = content
            arrays = [packed, *(as_floats(part, dtype) for part in groups)]
            self._rows = mx.stack(arrays[1:]) if fmt and fmt.has_biases else mx.zeros(1, dtype)
        else:
            self._rows = content.astype(dtype)
            if fmt and inputs is not None and gptq.fits(fmt, content.shape[-1]):
                arrays = gptq.quantize(self._rows, fmt, inputs, dtype)
            elif fmt:
                arrays = mx.quantize(self._rows, **fmt.as_config())
            else:
                arrays = [self._rows]
            if fmt and before is not None:
                change = content.astype(mx.float32) - before.astype(mx.float32)
                old = mx.quantize(before.astype(dtype), **fmt.as_config())
                left = fmt.dequantize_float32(*arrays) - fmt.dequantize_float32(*old)
                self.kept = [(left * change).sum(), change.square().sum()]
        self.arrays = [array.view(mx.uint8) for array in arrays]  # as they are written
        # Read as integers, unsigned and signed, the bits of infinities and NaN are the greatest.
        # Two maxima find them ten times as fast as a check of each number.
        unsigned, signed = _INTEGERS[dtype.size]
        self._greatest = self._rows.view(unsigned).max(), self._rows.view(signed).max()
        mx.async_eval(self.arrays, self._greatest, self.kept)

    def count_nonfinite(self) -> int:
        """Count the infinities and NaN; waits until the block is computed."""
        unsigned, signed = (int(array.item()) for array in self._greatest)  # type: ignore[arg-type]
        sign = 1 << 8 * self._rows.dtype.size - 1
        if unsigned < sign | self._exponent and signed < self._exponent:
            return 0
        bits = self._rows.view(_INTEGERS[self._rows.dtype.size][0])
        return int(((bits & self._exponent) == self._exponent).sum().item())  # type: ignore[arg-type]


@contextmanager
def _streams() -> Iterator[Sequence[mx.Stream]]:
    """Yield the streams that share the work: two on a CPU, because a stream there is one thread."""
    default = mx.default_stream(mx.default_device())
    if backend.on_gpu():
        yield [default]
        return
    second = backend.acquire_stream()
    try:
        yield [default, second]
    finally:  # an error or Ctrl-C leaves blocks in flight
        backend.wait_for_work(default)
        backend.release_stream(second)


def _compute_blocks(
    tensors: Sequence[_Tensor], job: Job, streams: Sequence[mx.Stream]
) -> Iterator[tuple[_Tensor, _Block]]:
    """Yield the blocks of all tensors in order, while the next blocks are computed."""
    in_flight: deque[tuple[_Tensor, _Block]] = deque()
    blocks = ((tensor, content) for tensor in tensors for content in _contents(tensor, job))
    for stream in cycle(streams):
        # All work on a block runs on its own stream, its reading included: work on the other
        # stream would wait for the block that is computed there.
        with mx.stream(stream):
            upcoming = next(blocks, None)
            if upcoming is None:
                break
            tensor, (content, before) = upcoming
            in_flight.append((tensor, _Block(content, tensor, job, before)))
        if len(in_flight) == _BLOCKS_IN_FLIGHT:
            yield in_flight.popleft()
    yield from in_flight


def _contents(tensor: _Tensor, job: Job) -> Iterator[tuple[_Content, mx.array | None]]:
    """Yield a tensor some rows at a time: its codes, if it has those of the format, or floats.

    With the rows come the same rows without the adapter, if one is merged into them.
    """
    contents: Iterator[_Content] = tensor.matrix.blocks(_BLOCK)
    if tensor.fmt and tensor.fmt == tensor.matrix.fmt and not job.moments:
        contents = tensor.matrix.code_blocks(_BLOCK)
    before = tensor.before.blocks(_BLOCK) if tensor.before else repeat(None)
    return zip(contents, before, strict=False)


# --- what goes with the weights -----------------------------------------------------------------


def _write_other_files(
    job: Job, partial: Path, shards: Mapping[str, list[_Tensor]], written: Written
) -> None:
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": written.bytes, "total_parameters": written.weights},
            "weight_map": {
                planned.name: file
                for file, tensors in shards.items()
                for tensor in tensors
                for planned in tensor.planned
            },
        }
        (partial / INDEX).write_text(json.dumps(index, indent=2), "utf-8")
    for name in COPIED_FILES:
        if (job.source / name).is_file():
            (partial / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(job.source / name, partial / name)
    if job.card:
        (partial / "README.md").write_text(job.card(job, written), "utf-8")
    config = output_config(job.config, job.formats, job.dtype)
    (partial / "config.json").write_text(json.dumps(config, indent=4) + "\n", "utf-8")


def _publish(partial: Path, output: Path) -> None:
    """Rename the finished folder to the output; a folder that it replaces is removed last."""
    replaced = _replaced_folder(output)
    if output.exists():
        shutil.rmtree(replaced, ignore_errors=True)  # left by a run that was interrupted here
        output.rename(replaced)
    try:
        partial.rename(output)
    except BaseException:
        if replaced.exists() and not output.exists():
            replaced.rename(output)
        raise
    for name in (_STATE, TUNED):
        (output / name).unlink(missing_ok=True)
    shutil.rmtree(replaced, ignore_errors=True)
