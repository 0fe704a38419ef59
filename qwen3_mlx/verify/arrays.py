"""Checks of operations on arrays: sorting, indexing, bits, sums, random numbers, and sampling."""

import mlx.core as mx
import numpy as np

from qwen3_mlx.engine.sampling import Sampler, choose
from qwen3_mlx.engine.sampling_params import NEUTRAL, THINKING, SamplingParams
from qwen3_mlx.verify.check import Check, Numbers

_WIDTH, _VOCABULARY = 151_936, 151_669  # of the logits of Qwen3, and those that are tokens


def _logits(numbers: Numbers) -> mx.array:
    """Return logits [2, V] whose greatest differ even in bfloat16, so that no order is open."""
    values = np.clip(numbers.draw.standard_normal((2, _WIDTH)), -4, 4)
    for row in values:
        row[numbers.draw.choice(_VOCABULARY, 64, replace=False)] = 6 + np.arange(64) / 16
    return numbers.hold(values)


def _sorting(numbers: Numbers) -> list[mx.array]:
    logits = _logits(numbers)
    best = mx.argpartition(-logits, kth=19, axis=-1)[:, :20]
    routed = numbers.hold(np.stack([numbers.draw.permutation(128) for _ in range(3)]))
    return [
        mx.sort(mx.argpartition(routed, kth=-8, axis=-1)[:, -8:], axis=-1),
        mx.argmax(logits, axis=-1),
        mx.sort(mx.take_along_axis(logits, best, axis=-1), axis=-1),
        mx.argsort(-logits, axis=-1)[:, :20],
        mx.argsort(numbers.integers(128, 500)),
        logits.max(axis=-1),
    ]


def _indexing(numbers: Numbers) -> list[mx.array]:
    x = numbers.normal(40, 6)
    rows = numbers.integers(40, 9)
    changed, flags = mx.array(x), mx.zeros(40, dtype=mx.bool_)
    changed[rows] = mx.ones((9, 6), dtype=x.dtype)
    flags[rows] = True
    changed[3:7, 1:4] = x[:4, :3]
    return [
        *(mx.take(x, rows.astype(dtype), axis=0) for dtype in (mx.uint8, mx.uint32, mx.int32)),
        mx.concatenate([*reversed(mx.split(x, 3, axis=1))], axis=1),
        mx.stack([x, x + 1], axis=1),
        mx.pad(x, [(1, 2), (0, 3)]),
        mx.where(x > 0, mx.round(4 * x), mx.clip(x, -1, 1)),
        mx.diagonal(x.reshape(4, 10, 6), axis1=1, axis2=2),
        changed,
        flags,
        mx.zeros(40).at[mx.array([1, 1, 39])].add(2),
    ]


def _bits(numbers: Numbers) -> list[mx.array]:
    words = numbers.integers(2**32 - 1, 64)
    places = mx.arange(32, dtype=mx.uint32)
    unpacked = (words[:, None] >> places) & 1
    return [
        unpacked,
        (unpacked << places).sum(axis=-1).astype(mx.uint32),
        words.view(mx.uint16).max(),
        words.view(mx.uint8),
        words | 5,
    ]


def _sums(numbers: Numbers) -> list[mx.array]:
    x = numbers.normal(3, 2000)
    return [
        mx.softmax(x, axis=-1, precise=True),
        mx.logsumexp(x, axis=-1),
        mx.cumsum(mx.softmax(x[:, :64].astype(mx.float32), axis=-1), axis=-1),
        mx.logaddexp(x[0], x[1]),
        x.astype(mx.float32).mean(axis=-1),
        mx.isfinite(x).all(axis=-1),
    ]


def _random(numbers: Numbers) -> list[mx.array]:
    keys = numbers.integers(2**32 - 1, 5, 2)
    gumbel = mx.vmap(lambda key: mx.random.gumbel((200,), key=key))
    whole = mx.random.randint(0, 1 << 20, (4, 9), key=keys[0])
    return [whole, gumbel(keys)]


def _sampling(numbers: Numbers) -> list[mx.array]:
    """Choose tokens greedily, as Qwen advises, with penalties, and with a mask."""
    logits = _logits(numbers)
    mask = np.zeros(_WIDTH // 32, dtype=np.uint32)
    mask[1000:1100] = 0xF0F0F0F0
    chosen = []
    for params in (
        SamplingParams(temperature=0.0),
        THINKING,
        SamplingParams(temperature=1.0, top_k=0, top_p=0.9),
        SamplingParams(temperature=0.0, presence_penalty=1.5, logit_bias={7: 30.0}),
    ):
        samplers = [
            Sampler(params.over(NEUTRAL), seed=seed, vocabulary=_VOCABULARY, prompt=[5, 6])
            for seed in range(2)
        ]
        chosen += [choose(logits, samplers), choose(logits, samplers, masks={0: mask})]
    return chosen


CHECKS = [
    Check("sorting", _sorting),
    Check("indexing and writing", _indexing),
    Check("bits of words", _bits),
    Check("softmax and sums", _sums),
    Check("random numbers by key", _random),
    Check("sampling", _sampling),
]
