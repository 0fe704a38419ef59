"""One step of the conversion benchmark, run in its own process; prints a line of JSON.

python -m benchmarks.converting make SIZE FOLDER       a random bfloat16 checkpoint
python -m benchmarks.converting ours|peer SOURCE OUTPUT
                                                       4 bits, groups of 64: seconds, peak memory
python -m benchmarks.converting interrupted SOURCE OUTPUT BYTES SIGNAL
                                                       in small shards, and die after BYTES
python -m benchmarks.converting compare FOLDER FOLDER  tensors that differ
"""

import json
import os
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from qwen3_mlx import backend as backend  # first: the BLAS

# isort: split

import mlx.core as mx

from benchmarks.checkpoint import random_checkpoint
from benchmarks.processes import peak_resident
from qwen3_mlx import convert
from qwen3_mlx.checkpoint import convert as streaming

_SMALL_SHARD = 8_000_000  # bytes; many shards, so that there is much to resume from


def make(size: str, folder: str) -> dict[str, str]:
    """Write a random checkpoint, in this process to keep the driver's memory low."""
    return {"folder": str(random_checkpoint(Path(folder), size, bits=None))}


def ours(source: str, output: str) -> dict[str, float]:
    """Convert with this package."""
    _forget(Path(source))
    started = time.perf_counter()
    convert(source, output, bits=4, group_size=64)
    return {"seconds": time.perf_counter() - started, "peak": peak_resident()}


def peer(source: str, output: str) -> dict[str, float]:
    """Convert with mlx-lm: the steps of its `convert`, without the tokenizer."""
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    _forget(Path(source))
    started = time.perf_counter()
    with redirect_stdout(sys.stderr):
        model, config = load_model(Path(source), lazy=True)
        model, config = quantize_model(model, config, 64, 4)
        save_model(output, model, donate_model=True)
        save_config(config, config_path=Path(output) / "config.json")
    return {"seconds": time.perf_counter() - started, "peak": peak_resident()}


def interrupted(source: str, output: str, after: str, signal: str) -> dict[str, int]:
    """Convert in small shards until `after` bytes are written, then send itself the signal."""
    streaming._SHARD_BYTES = _SMALL_SHARD
    begun: list[int] = []

    def progress(_: str, done: int, total: int) -> None:
        begun.append(done)
        if done - begun[0] > int(after):
            print(json.dumps({"found": begun[0], "done": done}), flush=True)
            os.kill(os.getpid(), int(signal))

    made = convert(source, output, bits=4, group_size=64, progress=progress)
    return {"found": begun[0], "done": made.bytes}


def compare(first: str, second: str) -> dict[str, Any]:
    """Return the names of tensors that are not bit-identical, or that only one folder has."""
    ours, theirs = _tensors(Path(first)), _tensors(Path(second))
    differing = sorted(ours.keys() ^ theirs.keys())
    common = sorted(ours.keys() & theirs.keys())
    for name in common:
        one, other = ours.pop(name), theirs.pop(name)  # freed after the comparison
        alike = one.dtype == other.dtype and one.shape == other.shape
        if not (alike and mx.array_equal(one.view(mx.uint8), other.view(mx.uint8)).item()):
            differing.append(name)
        mx.clear_cache()
    return {"tensors": len(common), "differing": differing}


def _tensors(folder: Path) -> dict[str, mx.array]:
    tensors: dict[str, mx.array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        tensors |= loaded
    return tensors


def _forget(folder: Path) -> None:
    """Drop the files from the file cache (Linux only), so that the conversion starts cold."""
    os.sync()
    if hasattr(os, "posix_fadvise"):
        for file in folder.glob("*.safetensors"):
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    steps = {step.__name__: step for step in (make, ours, peer, interrupted, compare)}
    print(json.dumps(steps[sys.argv[1]](*sys.argv[2:])))
