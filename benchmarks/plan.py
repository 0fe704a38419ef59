"""Memory plan against measured memory: python -m benchmarks.plan [SIZE[:BITS] ...]

Random checkpoints of real size, by default 0.6B and 4B, at 4 and 8 bits. Each is created, then
loaded with dequantize=False in its own process. Three numbers are compared with the plan: active
bytes after loading, active bytes after the prefill of a few tokens with a cache for CONTEXT tokens,
and peak bytes while the engine decodes. Fails if active bytes are off by more than 2 %, or the peak
by more than 5 %.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from qwen3_mlx import backend  # first: the BLAS

# isort: split

import mlx.core as mx

from benchmarks.checkpoint import random_checkpoint
from benchmarks.processes import json_of
from qwen3_mlx.checkpoint.load import LoadOptions, load_model
from qwen3_mlx.checkpoint.stored import formats_stored
from qwen3_mlx.checkpoint.weights import Weights
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.memory import Workload, make_plan, weight_bytes
from qwen3_mlx.engine.sampling_params import SamplingParams
from qwen3_mlx.engine.sequence import FIRST_ROOM
from qwen3_mlx.files import read_json
from qwen3_mlx.model.config import ModelConfig

CONTEXT = 4096
_PROMPT = 4  # tokens: enough to allocate the cache, fast on a CPU
_ALLOWED = {"load": 0.02, "prefill": 0.02, "decode": 0.05}


def main() -> None:
    """Create, measure and compare the sizes that the arguments name."""
    sizes = sys.argv[1:] or ["0.6B", "4B"]
    facts = backend.describe()
    print(f"{facts['device']}, {facts['dtype']}, {CONTEXT:,} tokens, {time.strftime('%Y-%m-%d')}")
    print(f"{'bytes':16}{'planned':>16}{'held':>16}{'off by':>9}")
    wrong = []
    for word in sizes:
        size, _, only = word.partition(":")
        for bits in [int(only)] if only else (4, 8):
            with tempfile.TemporaryDirectory() as scratch:
                json_of("benchmarks.plan", "make", scratch, size, bits)
                figures = json_of("benchmarks.plan", "measure", scratch)
            wrong += [f"{size} {bits} {name}" for name in _show(f"{size} {bits}", figures)]
    sys.exit(f"too far off: {', '.join(wrong)}" if wrong else 0)


def _show(label: str, figures: dict[str, tuple[int, int]]) -> Iterator[str]:
    """Print planned and measured bytes by phase; yield the phases that are too far off."""
    for name, (planned, held) in figures.items():
        off = held / planned - 1
        print(f"{f'{label} {name}':16}{planned:>16,}{held:>16,}{off:>+9.3%}", flush=True)
        if abs(off) > _ALLOWED[name]:
            yield name


def measure(folder: Path) -> dict[str, tuple[int, int]]:
    """Load the checkpoint and run a few tokens; return planned and measured bytes by phase."""
    config = read_json(folder / "config.json")
    network, stored = ModelConfig.from_dict(config), formats_stored(config, folder)
    assert stored is not None
    dtype = backend.compute_dtype()
    plan = make_plan(
        network, weight_bytes(network, stored, dtype.size), Workload(CONTEXT, itemsize=dtype.size)
    )
    options = LoadOptions(dtype, dequantize=False)
    model = load_model(config, Weights(folder), options, lambda *_: None)
    mx.clear_cache()
    loaded = mx.get_active_memory()
    cache = model.make_cache(CONTEXT)
    logits = model(mx.arange(_PROMPT)[None], cache, wanted=[_PROMPT - 1])
    mx.eval(logits)
    figures = {
        "load": (plan.weights, loaded),
        "prefill": (plan.weights + plan.cache, mx.get_active_memory()),
    }
    del cache, logits
    mx.clear_cache()
    work = Workload(_PROMPT + FIRST_ROOM, itemsize=dtype.size, chunk=_PROMPT, fused=False)
    plan = make_plan(network, plan.weights, work)
    engine = Engine(model, vocabulary=network.vocab_size)
    greedy = SamplingParams(temperature=0)
    mx.reset_peak_memory()
    for _ in engine.stream(list(range(_PROMPT)), max_tokens=4, sampling=greedy):
        pass
    return figures | {"decode": (plan.total - plan.reserve, mx.get_peak_memory())}


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", folder, size, bits]:
            print(json.dumps(str(random_checkpoint(Path(folder), size, int(bits)))))
        case ["measure", folder]:
            print(json.dumps(measure(Path(folder))))
        case _:
            main()
