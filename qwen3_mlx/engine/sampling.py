"""From logits to the next token: a chain of small pure functions, in float32.

V vocabulary, k candidates, N sequences: logits are [N, V].
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import mlx.core as mx

from qwen3_mlx.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from qwen3_mlx.engine.hooks import Mask

_STRETCH = 128
_COLDEST = 1e-5  # below, dividing by the temperature would leave the range of float32


class Sampler:
    """What one sequence brings to the choice of its tokens: parameters, seed, and tokens seen.

    All tokens of the reply count for the penalties, forced ones too, as in vLLM.

    The same seed, prompt and parameters choose the same tokens, alone or among others: the
    randomness of a token depends on the seed and its place in the reply alone.
    """

    def __init__(
        self, params: SamplingParams, *, seed: int, vocabulary: int, prompt: Sequence[int]
    ) -> None:
        """Prepare for a reply to `prompt`.

        `vocabulary` is the number of ids in use; the rows of the logits beyond are padding, which
        is never chosen. `params` has no None left.

        Raises:
            ValueError: `logit_bias` names an id that is not in the vocabulary.
        """
        self.vocabulary = vocabulary
        self.chain = Chain.of(params)
        self._params = params
        self._seed = seed
        self._place = 0  # in the reply, of the next token; where nothing is drawn it is not counted
        self._bias = _bias_vector(params.logit_bias or {}, vocabulary)
        self._counts: mx.array | None = None  # of each token in the reply, [V]
        self._in_prompt: mx.array | None = None
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1:
            self._counts = mx.zeros(vocabulary)
            self._in_prompt = mx.zeros(vocabulary, dtype=mx.bool_)
            self._in_prompt[mx.array(list(prompt))] = True

    @property
    def adjusts(self) -> bool:
        """Whether this sequence changes its logits before any token is ruled out."""
        return self._bias is not None or self._counts is not None

    def adjust(self, logits: mx.array) -> mx.array:
        """Apply bias and penalties to logits [V]."""
        if self._bias is not None:
            logits = logits + mx.pad(self._bias, (0, logits.size - self.vocabulary))
        if self._counts is not None and self._in_prompt is not None:
            known = logits[: self.vocabulary]
            known = penalise(known, self._counts, self._in_prompt, self._params)
            logits = mx.concatenate([known, logits[self.vocabulary :]])
        return logits

    def next_key(self) -> tuple[int, int]:
        """Give the key of the next token's randomness."""
        digest = blake2b(f"{self._seed}/{self._place}".encode(), digest_size=8).digest()
        self._place += 1
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")

    def count(self, tokens: mx.array, by: int = 1) -> None:
        """Take note of tokens [n] of the reply, each so many times."""
        if self._counts is not None:
            self._counts = self._counts.at[tokens].add(by)

    def force(self, tokens: mx.array) -> None:
        """Take note of tokens [n] that come next without being chosen."""
        self._place += tokens.size
        self.count(tokens)

    def rewind(self, tokens: mx.array) -> None:
        """Forget the last tokens [n], chosen or forced."""
        self._place -= tokens.size
        self.count(tokens, -1)


@dataclass(frozen=True, slots=True)
class Chain:
    """The steps from adjusted logits to a token; sequences that agree take them at once."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float

    @classmethod
    def of(cls, params: SamplingParams) -> "Chain":
        """Take what belongs here from parameters that have no None left."""
        assert params.temperature is not None and params.top_k is not None
        assert params.top_p is not None and params.min_p is not None
        if params.temperature < _COLDEST or params.top_k == 1:
            return GREEDY
        return cls(params.temperature, params.top_k, params.top_p, params.min_p)

    def __call__(self, logits: mx.array, vocabulary: int, samplers: Sequence[Sampler]) -> mx.array:
        """Choose tokens, int32 [N], by logits [N, V], one row for each of the samplers."""
        if self == GREEDY:
            return mx.argmax(logits[:, :vocabulary], axis=-1).astype(mx.int32)
        ids = None
        if self.top_k and self.top_k < vocabulary:
            logits, ids = likeliest(logits, self.top_k, vocabulary)
        elif self.top_p < 1:
            ids = mx.argsort(-logits[:, :vocabulary], axis=-1)
            logits = mx.take_along_axis(logits, ids, axis=-1)
        else:
            logits = logits[:, :vocabulary]
        # Neither dtype nor temperature changes the order, so they can wait until few are left.
        scaled = logits.astype(mx.float32) * (1 / self.temperature)
        if self.top_p < 1:
            scaled = within_top_p(scaled, self.top_p)
        if self.min_p:
            scaled = within_min_p(scaled, self.min_p)
        # The greatest of the logits with Gumbel noise is a draw from their softmax.
        width = scaled.shape[-1]
        noise = mx.vmap(lambda key: mx.random.gumbel((width,), key=key))
        keys = mx.array([sampler.next_key() for sampler in samplers], dtype=mx.uint32)
        place = mx.argmax(scaled + noise(keys), axis=-1, keepdims=True)
        if ids is not None:
            place = mx.take_along_axis(ids, place, axis=-1)
        return place[:, 0].astype(mx.int32)


GREEDY = Chain(0.0, 0, 1.0, 0.0)


def choose(
    logits: mx.array,
    samplers: Sequence[Sampler],
    masks: "Mapping[int, Mask] | None" = None,
    proposed: Mapping[int, int] | None = None,
) -> mx.array:
    """Choose the next token of each row, unevaluated int32 [N], by logits [N, V].

    A row is a sequence's, or the next of several of the same: then `proposed` has, by row, the
    token that is supposed to have come before it. `masks` tells, by row, the ids that are allowed:
    bit i of the packed 32-bit words is id i's.
    """
    masks, proposed = masks or {}, proposed or {}
    if masks or any(sampler.adjusts for sampler in samplers):
        rows, logits = [], logits.astype(mx.float32)
        for row, sampler in enumerate(samplers):
            if row in proposed:
                sampler.count(mx.array([proposed[row]]))
            rows.append(_masked(sampler.adjust(logits[row]), masks.get(row)))
        for row, token in proposed.items():
            samplers[row].count(mx.array([token]), -1)
        logits = mx.stack(rows)
    groups: dict[Chain, list[int]] = {}
    for row, sampler in enumerate(samplers):
        groups.setdefault(sampler.chain, []).append(row)
    vocabulary = samplers[0].vocabulary
    if len(groups) == 1:
        tokens = samplers[0].chain(logits, vocabulary, samplers)
    else:
        chosen = [
            chain(logits[mx.array(rows)], vocabulary, [samplers[row] for row in rows])
            for chain, rows in groups.items()
        ]
        order = [row for rows in groups.values() for row in rows]
        back = sorted(range(len(order)), key=order.__getitem__)
        tokens = mx.concatenate(chosen)[mx.array(back)]
    for row, sampler in enumerate(samplers):
        sampler.count(tokens[row : row + 1]) if sampler.adjusts else None
    return tokens


def _masked(logits: mx.array, mask: "Mask | None") -> mx.array:
    if mask is None:
        return logits
    words = mx.array(mask)
    allowed = ((words[:, None] >> mx.arange(32, dtype=mx.uint32)) & 1).flatten()[: logits.size]
    if allowed.size < logits.size:
        allowed = mx.pad(allowed, (0, logits.size - allowed.size))
    return mx.where(allowed, logits, -mx.inf)


def likeliest(logits: mx.array, k: int, vocabulary: int) -> tuple[mx.array, mx.array]:
    """Give the k greatest of the first `vocabulary` logits, greatest first, and their ids.

    Logits are [N, V], both results [N, k]. Sorting a whole vocabulary is slow on every device. Cut
    into stretches, its k greatest values lie in the k stretches with the greatest maxima, so only
    those are sorted. Stretches with padding in them may push others out, so as many more are taken.
    """
    count, width = logits.shape
    if width % _STRETCH:
        logits = mx.pad(logits, [(0, 0), (0, -width % _STRETCH)])
    table = logits.reshape(count, -1, _STRETCH)
    most = k + table.shape[1] - vocabulary // _STRETCH
    if most >= table.shape[1]:
        ids = mx.argsort(-logits[:, :vocabulary], axis=-1)[:, :k]
        return mx.take_along_axis(logits, ids, axis=-1), ids
    found = mx.argpartition(-table.max(axis=-1), kth=most - 1, axis=-1)[:, :most]
    ids = (found[:, :, None] * _STRETCH + mx.arange(_STRETCH, dtype=mx.uint32)).flatten(1)
    candidates = mx.take_along_axis(logits, ids, axis=-1)
    candidates = mx.where(ids < vocabulary, candidates, -mx.inf)
    best = mx.argpartition(-candidates, kth=k - 1, axis=-1)[:, :k]
    values = mx.take_along_axis(candidates, best, axis=-1)
    order = mx.argsort(-values, axis=-1)
    best = mx.take_along_axis(best, order, axis=-1)
    return mx.take_along_axis(values, order, axis=-1), mx.take_along_axis(ids, best, axis=-1)


def within_top_p(logits: mx.array, p: float) -> mx.array:
    """Rule out all but the fewest whose probabilities reach p; each row is greatest first."""
    probabilities = mx.softmax(logits, axis=-1)
    before = mx.cumsum(probabilities, axis=-1) - probabilities
    return mx.where(before < p, logits, -mx.inf)


def within_min_p(logits: mx.array, p: float) -> mx.array:
    """Rule out those less than p times as likely as their row's likeliest."""
    return mx.where(logits >= logits.max(axis=-1, keepdims=True) + math.log(p), logits, -mx.inf)


def penalise(
    logits: mx.array, counts: mx.array, in_prompt: mx.array, params: SamplingParams
) -> mx.array:
    """Apply the penalties for tokens seen; see `SamplingParams` for their meaning."""
    in_reply = counts > 0
    if (penalty := params.repetition_penalty or 1) != 1:
        pushed = mx.where(logits > 0, logits / penalty, logits * penalty)
        logits = mx.where(in_reply | in_prompt, pushed, logits)
    logits = logits - (params.frequency_penalty or 0) * counts
    return logits - (params.presence_penalty or 0) * in_reply


def _bias_vector(bias: Mapping[int, float], vocabulary: int) -> mx.array | None:
    if not bias:
        return None
    if outside := [token for token in bias if not 0 <= token < vocabulary]:
        raise ValueError(f"logit_bias names {outside[0]}; token ids are 0 to {vocabulary - 1}")
    vector = mx.zeros(vocabulary)
    vector[mx.array(list(bias))] = mx.array(list(bias.values()), dtype=mx.float32)
    return vector
