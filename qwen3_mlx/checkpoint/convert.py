"""From any checkpoint to an MLX folder, some rows at a time: no model is ever held.

All output tensors are known before the first is computed, so each shard's header is written first
and its rows follow as they come. Shards that are finished stay finished: whoever starts the same
conversion again goes on behind them.
"""

import json
import logging
import math
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwen3_mlx import backend
from qwen3_mlx.checkpoint import gptq
from qwen3_mlx.checkpoint.load import quantizable
from qwen3_mlx.checkpoint.recipes import Formats
from qwen3_mlx.checkpoint.stored_formats import Matrix, read_matrices
from qwen3_mlx.checkpoint.weights import INDEX, mismatches, refuse_missing_layers, weight_names
from qwen3_mlx.errors import CheckpointError, Qwen3Error
from qwen3_mlx.files import ShardWriter, TensorSpec, atomic_write
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.quantization import Format
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.version import __version__

_log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
_SHARD_BYTES = 1_000_000_000  # at most, but for a single larger tensor
_BLOCK = 1 << 23  # numbers of a tensor in work at once
_IN_WORK = 3  # blocks
CARRIED = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "LICENSE"),
)
_STATE = "conversion.json"
_DTYPE_NAMES = {mx.bfloat16: "bfloat16", mx.float16: "float16", mx.float32: "float32"}
# The bits of the exponent; where all are set stands an infinity, or no number at all.
_EXPONENT = {mx.bfloat16: 0x7F80, mx.float16: 0x7C00, mx.float32: 0x7F800000}
_INTEGERS = {2: (mx.uint16, mx.int16), 4: (mx.uint32, mx.int32)}


@dataclass(frozen=True, slots=True)
class Job:
    """What to write, and how.

    `formats` has a format for each module whose weights are to be quantized; other numbers become
    `dtype`. Modules with `moments` of their inputs are rounded with care for those; `calibration`
    names the text they were measured on. `card` writes the README.md that goes with it.
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


@dataclass(frozen=True, slots=True)
class Written:
    """What a conversion wrote: tensors, weights (numbers of the network), bytes of the tensors."""

    tensors: int
    weights: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """The bits that a weight takes on average, scales and biases included."""
        return 8 * self.bytes / self.weights


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the source, and those that it becomes."""

    name: str
    matrix: Matrix
    fmt: Format | None
    planned: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        return sum(planned.nbytes for planned in self.planned)


def run(job: Job, progress: Progress) -> Written:
    """Convert; `progress(done, total)` is told the bytes written.

    Raises:
        Qwen3Error: the output is there already, would lie in the source, or does not fit the disk.
        CheckpointError: the source is broken, or has numbers that are none.
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
    _go_on_or_begin(job, partial, [tensor.name for tensor in tensors])
    try:
        with _streams() as streams:
            _write_shards(job, partial, shards, streams, progress)
        _write_rest(job, partial, shards, written)
        _take_name(partial, job.output.resolve())
    except OSError as error:
        raise Qwen3Error(f"writing {partial} failed: {error.strerror or error}") from error
    except CheckpointError:  # of a broken source nothing is worth keeping
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if not any(partial.glob("*.safetensors")):  # nothing that would be worth going on from
            shutil.rmtree(partial, ignore_errors=True)
    return written


def partial_folder(output: Path) -> Path:
    """Give the folder that a conversion works in until it is finished."""
    output = output.resolve()
    return output.with_name(output.name + ".partial")


def _replaced_folder(output: Path) -> Path:
    return output.with_name(output.name + ".replaced")


def check_output(source: Path | None, output: Path, *, force: bool) -> None:
    """Refuse a place that a conversion must not write to.

    Raises:
        Qwen3Error: it is the source or lies in it, or what is there is not to be replaced.
    """
    source, output = source and source.resolve(), output.resolve()
    if source and (output == source or source in output.parents):
        raise Qwen3Error(f"{output} lies in the source; give another folder for the result")
    if output == output.parent:
        raise Qwen3Error(f"{output} is no place for a result; give another folder")
    for needed in (partial_folder(output), _replaced_folder(output)):
        if source and (needed == source or needed in source.parents):
            raise Qwen3Error(f"{needed} is needed for the work, and the source; rename one of them")
    if not output.exists() or (output.is_dir() and _is_empty(output)):
        return
    if not force:
        raise Qwen3Error(f"{output} exists; --force (force=True) replaces it")
    whole = (output / "config.json").is_file() and any(output.glob("*.safetensors"))
    if not whole or (source and output in source.parents):
        raise Qwen3Error(f"{output} is no checkpoint's folder, so it is not replaced")


def _is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


# --- the plan -----------------------------------------------------------------------------------


def _plan(job: Job) -> list[_Tensor]:
    """List the tensors to write, in the order of the network."""
    geometry = ModelConfig.from_dict(job.config)
    matrices = read_matrices(job.source, job.config)
    refuse_missing_layers(geometry, matrices)
    model = Qwen3(geometry)
    needed = {name: tuple(array.shape) for name, array in model.tensors().items()}
    there = {name: matrix.shape for name, matrix in matrices.items()}
    if complaints := mismatches(needed, there, tied=model.config.tie_word_embeddings):
        raise CheckpointError(f"weights and config.json do not match; {'; '.join(complaints)}")
    tensors = []
    for name, shape in needed.items():
        module, _, kind = name.rpartition(".")
        fmt = job.formats.get(module) if kind == "weight" else None
        parts = fmt.tensors(shape, job.dtype) if fmt else {kind: (shape, job.dtype)}
        planned = tuple(
            TensorSpec(f"{module}.{key}", dtype, size) for key, (size, dtype) in parts.items()
        )
        tensors.append(_Tensor(name, matrices[name], fmt, planned))
    return tensors


def _shards(tensors: Sequence[_Tensor]) -> dict[str, list[_Tensor]]:
    """Share the tensors out among files."""
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


def _go_on_or_begin(job: Job, partial: Path, names: Sequence[str]) -> None:
    """Keep the finished shards of an interrupted run of the same job, and drop any other's."""
    files = [job.source / name for name in weight_names(job.source)]
    identity = {
        "version": __version__,
        "files": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "config": dict(job.config),
        "tensors": list(names),
        "formats": {path: fmt.as_config() for path, fmt in job.formats.items() if fmt},
        "dtype": _DTYPE_NAMES[job.dtype],
        "calibration": job.calibration,
    }
    text = json.dumps(identity, sort_keys=True)
    state = partial / _STATE
    if not state.is_file() and partial.exists() and not (partial.is_dir() and _is_empty(partial)):
        raise Qwen3Error(f"{partial} is needed for the work and is no conversion's; move it away")
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
) -> None:
    sizes = {file: sum(tensor.nbytes for tensor in tensors) for file, tensors in shards.items()}
    missing = [file for file in shards if not (partial / file).is_file()]
    total, done = sum(sizes.values()), sum(sizes.values()) - sum(sizes[file] for file in missing)
    needed, free = sum(sizes[file] for file in missing), shutil.disk_usage(partial).free
    if needed > free:
        raise Qwen3Error(
            f"the result takes {needed / 1e9:.2f} GB more and the disk of {partial.parent} has "
            f"{free / 1e9:.2f} GB free"
        )
    progress(done, total)
    for file in missing:
        with atomic_write(partial / file) as stream:
            tensors = shards[file]
            writer = ShardWriter(stream, [plan for tensor in tensors for plan in tensor.planned])
            nonfinite: Counter[str] = Counter()
            for tensor, block in _computed(tensors, job, streams):
                if nonfinite and tensor.name not in nonfinite and not job.allow_nonfinite:
                    break  # the tensor that has some is counted to its end
                nonfinite += Counter({tensor.name: block.count_nonfinite()})
                for planned, rows in zip(tensor.planned, block.arrays, strict=True):
                    writer.append(planned.name, rows)
                    done += rows.nbytes
                progress(done, total)
            _refuse_nonfinite(nonfinite, job.dtype, allowed=job.allow_nonfinite)
    mx.clear_cache()


def _refuse_nonfinite(counts: Mapping[str, int], dtype: mx.Dtype, *, allowed: bool) -> None:
    if counts:
        told = ", ".join(
            f"{name} has NaN or infinity in {n:,} places as {_DTYPE_NAMES[dtype]}"
            for name, n in counts.items()
        )
        if not allowed:
            raise CheckpointError(
                f"{told}; look for a sound copy, or take them as they are with --allow-nonfinite "
                "(allow_nonfinite=True)"
            )
        _log.warning("%s", told)


class _Block:
    """Some rows of a tensor on their way to the file; all is in work once it is made.

    `arrays` are the bytes of what the rows become.
    """

    def __init__(self, rows: mx.array, tensor: _Tensor, job: Job) -> None:
        dtype, fmt = job.dtype, tensor.fmt
        self._rows = rows.astype(dtype)
        self._exponent = _EXPONENT[dtype]
        self.arrays: Sequence[mx.array] = [self._rows]
        inputs = job.moments.get(tensor.name.removesuffix(".weight"))
        if fmt and inputs is not None and gptq.fits(fmt, rows.shape[-1]):
            self.arrays = gptq.quantize(self._rows, fmt, inputs, dtype)
        elif fmt:
            self.arrays = mx.quantize(
                self._rows, group_size=fmt.group_size, bits=fmt.bits, mode=fmt.mode
            )
        self.arrays = [array.view(mx.uint8) for array in self.arrays]  # as they are written
        # Of the bits as integers, with a sign and without, those of infinities and of what is no
        # number are the greatest: two maxima are ten times as fast as looking at each number.
        unsigned, signed = _INTEGERS[dtype.size]
        self._greatest = self._rows.view(unsigned).max(), self._rows.view(signed).max()
        mx.async_eval(self.arrays, self._greatest)

    def count_nonfinite(self) -> int:
        """Count the infinities and what is no number, once the block is computed."""
        unsigned, signed = (int(array.item()) for array in self._greatest)  # type: ignore[arg-type]
        sign = 1 << 8 * self._rows.dtype.size - 1
        if unsigned < sign | self._exponent and signed < self._exponent:
            return 0
        bits = self._rows.view(_INTEGERS[self._rows.dtype.size][0])
        return int(((bits & self._exponent) == self._exponent).sum().item())  # type: ignore[arg-type]


@contextmanager
def _streams() -> Iterator[Sequence[mx.Stream]]:
    """Lend the streams that share the work: two on a CPU, because a stream there is one thread."""
    default = mx.default_stream(mx.default_device())
    if backend.on_gpu():
        yield [default]
        return
    second = backend.acquire_stream()
    try:
        yield [default, second]
    finally:  # an error or Ctrl-C leaves blocks in work
        backend.wait_for_work(default)
        backend.release_stream(second)


def _computed(
    tensors: Sequence[_Tensor], job: Job, streams: Sequence[mx.Stream]
) -> Iterator[tuple[_Tensor, _Block]]:
    """Give all tensors' blocks in order, while some ahead are in work."""
    in_work: deque[tuple[_Tensor, _Block]] = deque()
    blocks = ((tensor, rows) for tensor in tensors for rows in tensor.matrix.blocks(_BLOCK))
    for stream in cycle(streams):
        # All that becomes of a block runs on its own stream, its reading included: what ran on
        # another would wait for the block in work there.
        with mx.stream(stream):
            following = next(blocks, None)
            if following is None:
                break
            tensor, rows = following
            in_work.append((tensor, _Block(rows, tensor, job)))
        if len(in_work) == _IN_WORK:
            yield in_work.popleft()
    yield from in_work


# --- what goes with the weights -----------------------------------------------------------------


def _write_rest(
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
    for name in CARRIED:
        if (job.source / name).is_file():
            shutil.copyfile(job.source / name, partial / name)
    if job.card:
        (partial / "README.md").write_text(job.card(job, written), "utf-8")
    config = output_config(job)
    (partial / "config.json").write_text(json.dumps(config, indent=4) + "\n", "utf-8")


def output_config(job: Job) -> dict[str, Any]:
    """Give the result's config.json: the source's, with the quantization as MLX programs read it.

    Keys that only newer versions of other libraries write are stated in the older spelling as
    well, for programs that know no other, and defaults that were left out are stated for those that
    have none or others.
    """
    network = ModelConfig.from_dict(job.config)
    config = {
        key: value
        for key, value in job.config.items()
        if key not in ("quantization", "quantization_config", "dtype")
    }
    known = {**asdict(network), **(asdict(network.experts) if network.experts else {})}
    for key in known.keys() - {"yarn", "experts"}:
        if config.get(key) is None:
            config[key] = known[key]
    config["rope_theta"] = network.rope_theta
    config["rope_scaling"] = _rope_scaling(config, network)
    config["torch_dtype"] = _DTYPE_NAMES[job.dtype]
    if section := _quantization(job.formats):
        config["quantization"] = config["quantization_config"] = section
    return config


def _rope_scaling(config: Mapping[str, Any], network: ModelConfig) -> dict[str, Any] | None:
    """State the scaling that is in force, whichever section and spelling it comes from."""
    if network.yarn is None:
        return None
    stated = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    window = network.yarn.original_max_position_embeddings
    return {
        **{key: value for key, value in stated.items() if value is not None and key != "type"},
        "rope_type": "yarn",
        "original_max_position_embeddings": window,
    }


def _quantization(formats: Formats) -> dict[str, Any]:
    """State the commonest format once, and the others by module."""
    used = [fmt for fmt in formats.values() if fmt]
    if not used:
        return {}
    usual = max(dict.fromkeys(used), key=used.count)
    others = {path: fmt.as_config() for path, fmt in formats.items() if fmt and fmt != usual}
    return {**usual.as_config(), **others}


def _take_name(partial: Path, output: Path) -> None:
    """Put the finished folder where the result is to be; what it replaces goes last."""
    replaced = _replaced_folder(output)
    if output.exists():
        shutil.rmtree(replaced, ignore_errors=True)  # of an earlier run that was cut short here
        output.rename(replaced)
    try:
        partial.rename(output)
    except BaseException:
        if replaced.exists() and not output.exists():
            replaced.rename(output)
        raise
    (output / _STATE).unlink()
    shutil.rmtree(replaced, ignore_errors=True)


def modules_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Give the weights' shapes of the modules that can be quantized, by their paths."""
    model = Qwen3(ModelConfig.from_dict(config))
    return {path: tuple(module["weight"].shape) for path, module in quantizable(model)}
