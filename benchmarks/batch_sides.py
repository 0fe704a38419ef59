"""One side of `benchmarks.batches`, in a process of its own; prints tokens a second as JSON.

python -m benchmarks.batch_sides ours|peer equal-terms|out-of-the-box FOLDER SIZE STEPS

MLX binds its BLAS when it is first imported, so each side imports it after its own choice.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

_PROMPT = 32  # tokens


def our_speed(folder: Path, terms: str, size: int, steps: int) -> float:
    """Give our tokens a second."""
    from qwen3_mlx import backend  # first: the BLAS

    # isort: split

    from qwen3_mlx.checkpoint.files import read_json
    from qwen3_mlx.checkpoint.load import LoadOptions, load_model
    from qwen3_mlx.checkpoint.weights import Weights
    from qwen3_mlx.engine.engine import Engine
    from qwen3_mlx.engine.params import NEUTRAL, Request, SamplingParams

    options = LoadOptions(backend.compute_dtype())
    model = load_model(read_json(folder / "config.json"), Weights(folder), options, lambda *_: None)
    engine = Engine(model, vocabulary=model.config.vocab_size)
    greedy = SamplingParams(temperature=0).over(NEUTRAL)
    counts = [_Count() for _ in range(size)]
    for seed, count in enumerate(counts):
        engine.submit(
            Request(
                ids=_prompt(seed),
                sampling=greedy,
                max_tokens=steps + size + 8,
                seed=0,
                end_ids=frozenset(),
                watcher=count,
                done=lambda outcome: None,
            )
        )
    while min(count.tokens for count in counts) < 2:
        engine.step()
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - started)
    return size / median(times)


def peer_speed(folder: Path, terms: str, size: int, steps: int) -> float:
    """Give mlx-lm's."""
    if terms == "equal-terms":
        import qwen3_mlx.backend  # noqa: F401 - loads the BLAS

    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.utils import dequantize_model, load_model

    model, _ = load_model(folder)
    if terms == "equal-terms":
        model = dequantize_model(model)
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    generator = BatchGenerator(model, stop_tokens=[])
    generator.insert([_prompt(seed) for seed in range(size)], [steps + 8] * size)
    for _ in range(2):
        generator.next_generated()
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        told = generator.next_generated()
        times.append(time.perf_counter() - started)
        assert len(told) == size
    return size / median(times)


class _Count:
    """Counts the tokens of a sequence."""

    finished = False
    tokens = 0

    def advance(self, ids: Sequence[int]) -> None:
        """Take the next tokens."""
        self.tokens += len(ids)


def _prompt(seed: int) -> list[int]:
    return [(7919 * place + 11 + seed) % 150_000 for place in range(_PROMPT)]


def main() -> None:
    """Run the side that the arguments name."""
    side, terms, folder, size, steps = sys.argv[1:]
    measure = {"ours": our_speed, "peer": peer_speed}[side]
    print(json.dumps(measure(Path(folder), terms, int(size), int(steps))))


if __name__ == "__main__":
    main()
