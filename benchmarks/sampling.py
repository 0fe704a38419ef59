"""Time of one sampling step with Qwen's parameters over Qwen3's vocabulary."""

import time
from collections.abc import Callable
from statistics import median

from qwen3_mlx import backend as backend  # first: the BLAS

# isort: split

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

from qwen3_mlx.engine.sampling import Sampler, choose
from qwen3_mlx.engine.sampling_params import NEUTRAL, THINKING

_VOCABULARY, _ROWS = 151_669, 151_936


def sampling_times(repeats: int = 30) -> dict[str, float]:
    """Return the seconds of a step at temperature 0.6, top_p 0.95, top_k 20: ours, mlx-lm's."""
    mx.random.seed(0)
    logits = 3 * mx.random.normal((_ROWS,))
    mx.eval(logits)
    ours = Sampler(THINKING.over(NEUTRAL), seed=0, vocabulary=_VOCABULARY, prompt=[0])
    peer = make_sampler(temp=0.6, top_p=0.95, top_k=20)

    def peer_step() -> mx.array:
        row = logits[None]
        token: mx.array = peer(row - mx.logsumexp(row, keepdims=True))
        return token

    steps: dict[str, Callable[[], mx.array]] = {
        "ours": lambda: choose(logits[None], [ours]),
        "peer": peer_step,
    }
    times: dict[str, list[float]] = {side: [] for side in steps}
    for _ in range(repeats):
        for side, step in steps.items():
            started = time.perf_counter()
            mx.eval(step())
            times[side].append(time.perf_counter() - started)
    return {side: median(values) for side, values in times.items()}
