"""One side of a comparison, measured in a process of its own; prints a line of JSON.

python -m benchmarks.sides ours|peer out-of-the-box|equal-terms FOLDER PROMPT DECODE

Out of the box, each side does what its user gets: we preload a BLAS where there is one and hold the
weights as float32, mlx-lm computes in bfloat16 on quantized weights with MLX's own BLAS. On equal
terms mlx-lm's own model is dequantized to float32 and given the same BLAS.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DESCRIPTION = "seconds for the prompt, and for each token decoded after it"


def ours(folder: Path, terms: str, prompt: int, decoded: int) -> dict[str, float]:
    """Measure qwen3_mlx."""
    from qwen3_mlx import backend  # first: the BLAS

    # isort: split

    import mlx.core as mx

    from qwen3_mlx.checkpoint.files import read_json
    from qwen3_mlx.checkpoint.load import LoadOptions, load_model
    from qwen3_mlx.checkpoint.weights import Weights
    from qwen3_mlx.engine.engine import Engine
    from qwen3_mlx.engine.params import SamplingParams

    options = LoadOptions(backend.compute_dtype())
    model = load_model(read_json(folder / "config.json"), Weights(folder), options, lambda *_: None)
    engine = Engine(model, vocabulary=model.config.vocab_size)
    greedy = SamplingParams(temperature=0)

    def run(ids: list[int], count: int) -> list[float]:
        engine.forget()
        times = [time.perf_counter()]
        tokens = engine.stream(ids, max_tokens=count, sampling=greedy)
        return times + [time.perf_counter() for _ in tokens]

    return _summary(run, mx, prompt, decoded, model.config.vocab_size)


def peer(folder: Path, terms: str, prompt: int, decoded: int) -> dict[str, float]:
    """Measure mlx-lm."""
    if terms == "equal-terms":
        import qwen3_mlx.backend  # noqa: F401 - loads the BLAS

    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import dequantize_model, load_model

    model, _ = load_model(folder)
    if terms == "equal-terms":
        model = dequantize_model(model)
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())

    def run(ids: list[int], count: int) -> list[float]:
        times = [time.perf_counter()]
        for _ in generate_step(mx.array(ids), model, max_tokens=count):
            times.append(time.perf_counter())
        return times

    return _summary(run, mx, prompt, decoded, model.args.vocab_size)


def _summary(
    run: Callable[[list[int], int], list[float]], mx: Any, prompt: int, decoded: int, rows: int
) -> dict[str, float]:
    ids = [(7919 * n + 11) % (rows - 300) for n in range(prompt)]
    run(ids[:2], 2)  # sets up threads and buffers
    times = run(ids, decoded + 1)
    steps = sorted(b - a for a, b in zip(times[1:], times[2:], strict=False))
    return {
        "prefill": (times[1] - times[0]) / prompt,
        "decode": steps[len(steps) // 2],
        "peak_memory": mx.get_peak_memory(),
    }


def main() -> None:
    """Run the side that the arguments name."""
    side, terms, folder, prompt, decoded = sys.argv[1:]
    measure = {"ours": ours, "peer": peer}[side]
    print(json.dumps(measure(Path(folder), terms, int(prompt), int(decoded))))


if __name__ == "__main__":
    main()
