"""Checks of whole paths: every way to generate must agree with one pass over all tokens.

Replies are greedy. Equal tokens cannot be asked for: where two logits are almost equal, kernels for
other numbers of rows may round to another choice. So each token of a reply must have, in one
pass over prompt and reply, almost the greatest logit.
"""

import gc
import math
from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import numpy as np

from qwen3_mlx import backend
from qwen3_mlx.api.llm import LLM
from qwen3_mlx.api.load import load
from qwen3_mlx.cache.quantized import CACHE_FORMATS, PLAIN, CacheFormat
from qwen3_mlx.engine.engine import Engine
from qwen3_mlx.engine.hooks import TokenCollector
from qwen3_mlx.engine.memory import kv_token_bytes
from qwen3_mlx.engine.request import Request, RequestResult
from qwen3_mlx.engine.sampling_params import NEUTRAL, SamplingParams
from qwen3_mlx.engine.sequence import FIRST_ROOM
from qwen3_mlx.engine.speculation.speculator import Speculator
from qwen3_mlx.model.config import ModelConfig
from qwen3_mlx.model.qwen3 import Qwen3
from qwen3_mlx.model.sizes import DEMO, published_config
from qwen3_mlx.verify.check import PathCheck

_GREEDY = SamplingParams(temperature=0.0).over(NEUTRAL)
_QUESTIONS = (
    *("What is 12 + 34?", "What is 5 + 678?", "Repeat: apple pear plum", "Count from 3 to 9."),
    *("Reverse: one two three", "Who are you?", "What is 9 + 9?", "Repeat: a b c d e f g h i j k"),
)
_TOKENS = 24  # of a reply
_CACHED = 2048  # tokens in a cache whose copies are looked for: more than a step has in flight
_STEPS = 16  # until all sequences decode together, and as many to look for copies in
_JOINT = 2  # sequences, from which on they have joint buffers unless those are quantized
_MOST_OF_A_COPY = 0.5
# A path: it generates with a network after prompts, and returns the worst disagreement.
Path = Callable[[Qwen3, Sequence[list[int]]], float]
_SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


class Decoding:
    """Greedy replies of so many tokens to some prompts, by an engine."""

    def __init__(self, prompts: Sequence[list[int]], tokens: int) -> None:
        self.prompts = prompts
        self.results: list[RequestResult | BaseException] = []
        self._tokens = tokens
        self._sinks = [TokenCollector() for _ in prompts]
        self._replies: list[list[int]] = [[] for _ in prompts]

    def submit(self, engine: Engine) -> None:
        """Submit the requests; the caller runs the engine's steps."""
        for ids, sink in zip(self.prompts, self._sinks, strict=True):
            engine.submit(
                Request(
                    ids=ids,
                    sampling=_GREEDY,
                    max_tokens=self._tokens,
                    seed=0,
                    end_ids=frozenset(),
                    sink=sink,
                    on_finish=self.results.append,
                )
            )

    def check(self) -> None:
        """Raise the error of a request that has failed."""
        for result in self.results:
            if isinstance(result, BaseException):
                raise result

    @property
    def replies(self) -> list[list[int]]:
        """The tokens so far; raises the error of a request that has failed."""
        self.check()
        for reply, sink in zip(self._replies, self._sinks, strict=True):
            reply += sink.take()
        return self._replies

    @property
    def ended(self) -> bool:
        """True if all requests have ended."""
        return len(self.results) == len(self.prompts)


def _run(engine: Engine, done: Callable[[], bool] = lambda: False) -> None:
    """Run steps until all work is, or until `done`."""
    while not done() and engine.step():
        pass


def _decode(engine: Engine, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Return the replies to some prompts, decoded together."""
    decoding = Decoding(prompts, _TOKENS)
    decoding.submit(engine)
    _run(engine)
    return decoding.replies


def _disagreement(
    model: Qwen3, prompt: Sequence[int], reply: Sequence[int], fmt: CacheFormat
) -> float:
    """Return how far a reply's tokens are below the greatest logits of one pass, relatively.

    Of a quantized cache it is a pass with such a cache: a plain one may choose other experts.
    """
    caches = None if fmt == PLAIN else model.make_cache(cache_format=fmt)
    ids = mx.array([[*prompt, *reply]])
    logits = model(ids, caches)[0, len(prompt) - 1 : -1].astype(mx.float32)
    chosen = mx.take_along_axis(logits, mx.array(list(reply))[:, None], axis=-1)
    below = float(np.array((logits.max(axis=-1) - chosen[:, 0]).max() / mx.abs(logits).max()))
    return below if math.isfinite(below) else math.inf


def _worst(
    model: Qwen3,
    prompts: Sequence[list[int]],
    replies: Sequence[list[int]],
    fmt: CacheFormat = PLAIN,
) -> float:
    return max(_disagreement(model, *one, fmt) for one in zip(prompts, replies, strict=True))


def _engine(model: Qwen3, fmt: CacheFormat = PLAIN, speculator: Speculator | None = None) -> Engine:
    return Engine(
        model,
        vocabulary=model.config.vocab_size,
        cache_format=fmt,
        available=backend.available_memory(),  # its requests are few and short
        speculator=speculator,
    )


# --- ways to generate -----------------------------------------------------------------------------


def _alone(model: Qwen3, prompts: Sequence[list[int]]) -> float:
    """Decode one prompt after another."""
    engine = _engine(model)
    return _worst(model, prompts[:3], [_decode(engine, [one])[0] for one in prompts[:3]])


def _together(model: Qwen3, prompts: Sequence[list[int]]) -> float:
    """Decode a batch in which half of the sequences end early, and are replaced by others."""
    engine, half = _engine(model), len(prompts) // 2
    short, long = Decoding(prompts[:half], _TOKENS // 2), Decoding(prompts[half:], 2 * _TOKENS)
    later = Decoding(prompts[:half], _TOKENS)
    for decoding in (short, long):
        decoding.submit(engine)
    _run(engine, lambda: short.ended)
    later.submit(engine)
    _run(engine)
    return max(_worst(model, one.prompts, one.replies) for one in (short, long, later))


def _cached(model: Qwen3, prompts: Sequence[list[int]], fmt: CacheFormat) -> float:
    """Decode alone and together with caches of a format."""
    engine = _engine(model, fmt)
    replies = [*_decode(engine, prompts[:2]), *_decode(engine, prompts[2:3])]
    return _worst(model, prompts[:3], replies, fmt)


def _speculated(model: Qwen3, prompts: Sequence[list[int]]) -> float:
    """Decode with draft tokens by lookup, after text that repeats itself."""
    repeated = [prompt * 4 for prompt in prompts[:3]]
    engine = _engine(model, speculator=Speculator(model.config))
    return _worst(model, repeated, [_decode(engine, [one])[0] for one in repeated])


def _continued(model: Qwen3, prompts: Sequence[list[int]]) -> float:
    """Decode after a kept prefix, which must be used: after a copy of part of it, then after it."""
    engine, worst = _engine(model), 0.0
    ids = list(prompts[1])
    _decode(engine, [[*ids, *prompts[0] * 2]])
    for _ in range(2):
        decoding = Decoding([ids], _TOKENS)
        decoding.submit(engine)
        _run(engine)
        ((reply,), (result,)) = decoding.replies, decoding.results
        if not isinstance(result, RequestResult) or result.cached_tokens < len(ids) - 1:
            return math.inf
        worst = max(worst, _disagreement(model, ids, reply, PLAIN))
        ids = [*ids, *reply[: _TOKENS // 2]]
    return worst


# With a limit of its own where rounding may do more: of quantized caches it may choose other codes.
PATHS: dict[str, tuple[Path, float | None]] = {
    "one after another": (_alone, None),
    "a batch that changes": (_together, None),
    "speculation": (_speculated, None),
    "a kept prefix": (_continued, None),
    "cache of 8 bits": (partial(_cached, fmt=CACHE_FORMATS["8"]), 0.05),
    "cache k8v4": (partial(_cached, fmt=CACHE_FORMATS["k8v4"]), 0.05),
    "cache of 4 bits": (partial(_cached, fmt=CACHE_FORMATS["4"]), 0.05),
}


def along(path: Path, llm: LLM, prompts: Sequence[list[int]]) -> float:
    """Return the disagreement of a path, measured on the thread that owns the network."""
    return float(np.array(llm.compute(lambda model: mx.array(path(model, prompts)))))


def _on_demo(dtype: mx.Dtype, path: Path) -> float:
    with load(DEMO, dtype=backend.dtype_name(dtype), dequantize=False) as llm:
        prompts = [llm.tokenizer.encode(llm.render(question)) for question in _QUESTIONS]
        return along(path, llm, prompts)


# --- small random networks ------------------------------------------------------------------------


def _small(dtype: mx.Dtype, *, experts: bool) -> Qwen3:
    """Create a random network of two narrow layers."""
    content = published_config("30B-A3B") | _EXPERTS if experts else published_config("0.6B")
    mx.random.seed(0)
    model = Qwen3(ModelConfig.from_dict(content | _SMALL))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def _ids(count: int, seed: int) -> list[int]:
    return [(7 * place * place + 3 * seed) % 509 for place in range(count)]


def _experts(dtype: mx.Dtype) -> float:
    """Decode with a mixture of experts, alone and together."""
    model, prompts = _small(dtype, experts=True), [_ids(9 + seed, seed) for seed in range(6)]
    return max(_alone(model, prompts), _together(model, prompts))


def _copied(
    dtype: mx.Dtype, *, fmt: CacheFormat = PLAIN, sequences: int = 1, experts: bool = False
) -> float:
    """Return the most memory beyond weights and caches, in buffers of a sequence's layer.

    A copy of one would be one or more, and nothing else that a step computes is as large.
    """
    gc.collect()  # of former checks, or it would be freed meanwhile
    model = _small(dtype, experts=experts)
    weights = mx.get_active_memory()
    engine = _engine(model, fmt)
    # What the engine allocates for a sequence, alone or in joint buffers.
    capacity = _CACHED + FIRST_ROOM
    prompts = [_ids(_CACHED, seed) for seed in range(sequences)]
    decoding = Decoding(prompts, FIRST_ROOM)
    decoding.submit(engine)
    _run(engine, lambda: all(len(reply) >= _STEPS for reply in decoding.replies))
    mx.reset_peak_memory()
    for _ in range(_STEPS):
        engine.step()
    taken = mx.get_peak_memory() - weights
    decoding.check()
    config, buffers = model.config, 2 * len(model.layers)
    buffer = capacity * kv_token_bytes(config, fmt, dtype.size) / buffers
    # A quantized cache is read by products, of which MLX's CPU build makes its matrices dense, or
    # is unpacked, both for a layer at a time.
    allowed = 0.0 if fmt == PLAIN else 3.0
    if fmt != PLAIN and backend.on_cuda():
        plain = kv_token_bytes(config, PLAIN, dtype.size) / len(model.layers)
        allowed = 1 + capacity * plain / buffer
    return max(0.0, taken / buffer - buffers * sequences - allowed)


_NO_COPIES = {
    **{name: partial(_copied, fmt=fmt) for name, fmt in CACHE_FORMATS.items()},
    "experts": partial(_copied, experts=True),
    "in joint buffers": partial(_copied, sequences=_JOINT),
}
CHECKS = [
    *(
        PathCheck(f"the demo: {name}", partial(_on_demo, path=path), limit)
        for name, (path, limit) in PATHS.items()
    ),
    PathCheck("experts: alone and in a batch", _experts),
    *(
        PathCheck(f"no copy of a cache, {name}", measure, _MOST_OF_A_COPY)
        for name, measure in _NO_COPIES.items()
    ),
]
